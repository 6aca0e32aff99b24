"""FedCyBGD and FedBAvg: the cycle bit for bit, what crosses the wire, and what happens when clients fail."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from fedcybgd_bench import SETTINGS, Spy, bench, changed_parts, part_of
from hypothesis import given
from hypothesis import strategies as st
from model_families import FAMILIES, build
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from fedtune.core.aggregate import WeightedSum
from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.types import Payload
from fedtune.data.batches import collate, epoch_batches
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods.fedcybgd.order import turn, turns
from fedtune.methods.fedcybgd.settings import Config, FedBAvgConfig
from fedtune.models.parts import find_parts


def descend(model: nn.Module, names: Sequence[str], items: Sequence[Encoded], seed: int) -> dict[str, Tensor]:
    """Plain AdamW on these parameters of the whole model; gives back their values at the end."""
    chosen = {n: p for n, p in model.named_parameters() if n in names}
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen.values(), lr=SETTINGS["lr"], weight_decay=0.0, fused=True)
    generator = torch_generator(seed, "batches")
    model.train()
    for _ in range(SETTINGS["local_epochs"]):
        for indices in epoch_batches(len(items), SETTINGS["batch_size"], generator):
            model(**collate([items[i] for i in indices], 0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in chosen.items()}


@pytest.mark.parametrize(("family", "clients"), [("llama", 3), ("llama", 6), ("roberta", 3)])
def test_a_cycle_without_compression_is_block_coordinate_descent_bit_for_bit(
    family: str, clients: int
) -> None:
    federation, model = bench(clients, family=family), build(family, blocks=3)
    path = find_parts(model).path
    outcome = federation.round(1)
    assert sorted(outcome.clients) == list(range(clients))
    for place, client in enumerate(outcome.clients):
        block = place % 3
        seed = derive_seed(derive_seed(0, "client", client, 1), "block", str(block))
        heads = ("classifier.",) if family == "roberta" else ()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        names = [n for n in start if n.startswith((f"{path}.{block}.", *heads))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(derive_seed(0, "client", client, 1), "dropout"))
            end = descend(model, names, federation.data[client], seed)
        with torch.no_grad():
            for name in names:  # Algorithm 1, lines 8 and 11: a change is sent and added
                model.get_parameter(name).copy_(start[name] + (end[name] - start[name]))
                assert_close(model.get_parameter(name), end[name], rtol=2**-22, atol=1e-8)
    ((_, result),) = federation.method.export(federation.state, federation.model)
    for name, parameter in result.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_after_a_client_only_its_block_has_changed_and_the_next_one_gets_it() -> None:
    federation = bench(6)
    start, spy = federation.state, Spy(federation)
    federation.round(1)
    states = [start, *federation.states_on_the_way]
    for place, (before, after) in enumerate(pairwise(states)):
        assert changed_parts(before.weights, after.weights) == {str(place % 3)}
        assert {part_of(name) for name in spy.replies[place].tensors} == {str(place % 3)}
        for name, tensor in spy.orders[place][1].tensors.items():
            assert (
                name == "architecture"
                or name not in before.weights
                or torch.equal(tensor, before.weights[name])
            )
    assert federation.state.turns == 6


@given(
    parts=st.integers(1, 9),
    order=st.sampled_from(["ascending", "descending", "random"]),
    per_turn=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_block_is_visited_once_a_pass(parts: int, order: Any, per_turn: int, seed: int) -> None:
    names = [str(i) for i in range(parts)]
    per_turn = min(per_turn, parts)
    stream = turns(names, order, per_turn, seed)
    passes = 4 * per_turn  # turns that are whole passes however the two divide
    groups = [next(stream) for _ in range(parts * 4)]
    assert all(len(set(group)) == per_turn for group in groups)
    assert Counter(part for group in groups for part in group) == dict.fromkeys(names, passes)
    for n, group in enumerate(groups):
        assert turn(names, order, per_turn, seed, n) == group
    first = [part for group in groups for part in group][:parts]
    if order != "random":
        assert first == (names if order == "ascending" else names[::-1])


def test_as_many_clients_as_blocks_visit_each_once_and_twice_as_many_twice() -> None:
    for clients, times in ((3, 1), (6, 2)):
        federation = bench(clients, block_order="random")
        spy = Spy(federation)
        federation.round(1)
        own = Counter(str(payload.scalars["own"]) for _, payload in spy.orders)
        assert own == {"0": times, "1": times, "2": times}


def test_fewer_clients_than_blocks_go_on_in_the_next_cycle_and_may_have_several() -> None:
    federation = bench(2, blocks=5, blocks_per_client=2, extra_blocks=["embeddings"])
    spy = Spy(federation)
    federation.round(1)
    federation.round(2)
    assert [p.scalars["own"] for _, p in spy.orders] == ["0,1", "2,3", "4,embeddings", "0,1"]
    assert [sorted({part_of(n) for n in r.tensors}) for r in spy.replies[:3:2]] == [
        ["0", "1"],
        ["4", "embeddings"],
    ]


def test_embeddings_norm_and_head_are_blocks_of_their_own_and_a_classifier_trains_with_every_one() -> None:
    federation = bench(5, blocks=2, extra_blocks=["embeddings", "norm", "head"])
    start = federation.state.weights
    federation.round(1)
    states = [start, *(s.weights for s in federation.states_on_the_way)]
    found = [changed_parts(a, b) for a, b in pairwise(states)]
    assert found == [{"0"}, {"1"}, {"embeddings"}, {"norm"}, {"head"}]
    federation = bench(2, blocks=2, family="roberta")
    start = federation.state.weights
    federation.round(1)
    states = [start, *(s.weights for s in federation.states_on_the_way)]
    found = [changed_parts(a, b) for a, b in pairwise(states)]
    assert found == [{"0", "classifier"}, {"1", "classifier"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_belongs_to_one_part(family: str) -> None:
    model = build(family)
    parts = find_parts(model)
    found = [t.data_ptr() for part in parts.parameters for t in parts.named([part]).values()]
    assert sorted(found) == sorted(p.data_ptr() for p in model.parameters())
    around = {part for part, named in parts.parameters.items() if named} - {"0", "1"}
    tied = family in ("gemma", "gemma3", "gpt2", "opt", "bloom")
    expected = {"embeddings", "classifier"} if family in ("roberta", "bert") else {"embeddings", "norm"}
    expected |= {"norm"} if family == "bert" else set()  # its pooler
    assert around == expected | (set() if tied or "classifier" in expected else {"head"})


def test_a_client_gets_only_what_changed_since_it_was_there() -> None:
    federation = bench(3)
    spy = Spy(federation)
    has: dict[int, dict[str, Tensor]] = {}
    for round in (1, 2, 3):
        federation.round(round)
    server = find_parts(federation.model)
    for client, payload in spy.orders:
        sent = {n: t for n, t in payload.tensors.items() if n != "architecture"}
        mine = has.setdefault(client, {})
        assert all(name not in mine or not torch.equal(mine[name], t) for name, t in sent.items())
        mine |= sent
        wanted = {f"{part}:{n}" for part in server.parameters for n in server.tensors(part)}
        assert mine.keys() == wanted  # with what it had, it has the whole model
    whole = sum(t.nbytes for t in has[0].values())
    down = [sum(t.nbytes for n, t in p.tensors.items() if n != "architecture") for _, p in spy.orders]
    assert down[:3] == [whole] * 3  # the first time everything
    block = sum(p.nbytes for p in server.parameters["0"].values())
    assert all(size <= 3 * block for size in down[3:])
    entries = [e["payload_bytes"] for e in federation.wire if e["direction"] == "down"]
    assert entries == [payload.nbytes for _, payload in spy.orders]
    assert {e["kind"] for e in federation.wire} == {"train"}


def test_a_client_that_disappears_leaves_its_block_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    federation = bench(3)
    spy = Spy(federation)
    federation.round(1)
    before = federation.state
    spy.fail = {1}
    with caplog.at_level(logging.WARNING, "fedtune"):
        outcome = federation.round(2, quorum=0.5)
    lost = next(str(p.scalars["own"]) for client, p in spy.orders[3:] if client == 1)
    assert set(outcome.left_out) == {1} and sorted(outcome.clients) == [0, 2]
    assert f"nobody answered; block {lost} keeps its value" in caplog.text
    assert "client 1 is left out" in caplog.text
    assert changed_parts(before.weights, federation.state.weights) == {"0", "1", "2"} - {lost}
    assert federation.state.versions[lost] == before.versions[lost]
    spy.fail = set()
    federation.round(3)
    parts = {client: {part_of(n) for n in p.tensors} for client, p in spy.orders[6:]}
    everything = {"architecture", "0", "1", "2", *(p for p in find_parts(federation.model).parameters)}
    assert parts[1] == everything  # it may have lost what it held
    assert all(parts[client] < everything for client in (0, 2))


def test_a_client_that_lost_what_it_held_says_so_and_gets_it_again() -> None:
    federation = bench(3)
    federation.round(1)
    federation.runner.states.pop(2)
    outcome = federation.round(2, quorum=0.5)
    assert "it does not have part" in outcome.left_out[2]
    assert sorted(federation.round(3).clients) == [0, 1, 2]


def test_a_first_client_that_fails_in_every_cycle_holds_nobody_up() -> None:
    federation = bench(2, blocks=2)
    spy = Spy(federation)
    spy.fail = {0}
    for round in (1, 2, 3):
        assert federation.round(round, quorum=0.5).clients == [1]
    assert federation.state.turns == 6


def test_a_reply_for_another_block_is_refused() -> None:
    federation = bench(3)
    spy = Spy(federation)

    def another(reply: Payload) -> Payload:
        own = part_of(next(iter(reply.tensors)))
        return Payload({n.replace(f"{own}:", f"{(int(own) + 1) % 3}:"): t for n, t in reply.tensors.items()})

    spy.change[1] = another
    before = federation.state.weights
    outcome = federation.round(1, quorum=0.5)
    assert "not asked for" in outcome.left_out[1]
    own = next(str(p.scalars["own"]) for client, p in spy.orders if client == 1)
    assert changed_parts(before, federation.state.weights) == {"0", "1", "2"} - {own}


def test_a_client_with_fewer_examples_than_a_batch_trains() -> None:
    federation = bench(3, batch_size=64, gradient_accumulation=8)
    before = federation.state.weights
    assert sorted(federation.round(1).clients) == [0, 1, 2]
    assert changed_parts(before, federation.state.weights) == {"0", "1", "2"}


ADDED: dict[str, dict[str, Any]] = {
    "lora": {"trainable": "lora", "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}},
    "adapter": {"trainable": "adapter", "adapter": {"size": 3}},
}
# LoRA on q (32 to 32) and down (48 to 32) of rank 2; an adapter of 32 · 3 + 3 and 3 · 32 + 32
ADDED_BYTES = {"lora": 4 * 2 * (32 + 32 + 48 + 32), "adapter": 4 * (32 * 3 + 3 + 3 * 32 + 32)}


@pytest.mark.parametrize("form", ADDED)
def test_lora_and_adapters_train_in_one_block_and_alone_cross_the_wire_again(form: str) -> None:
    """Table 6, rows ii and iii: the blocks' own weights go out once, what is added to them goes both ways."""
    federation = bench(3, **ADDED[form])
    plain = find_parts(build("llama", blocks=3))
    spy, start = Spy(federation), federation.state
    federation.round(1)
    states = [start, *federation.states_on_the_way]
    for place, (before, after) in enumerate(pairwise(states)):
        assert changed_parts(before.weights, after.weights) == {f"{place}.added"}
    up = [e["payload_bytes"] for e in federation.wire if e["direction"] == "up"]
    assert up == [ADDED_BYTES[form]] * 3
    names = {n for n in spy.orders[0][1].tensors if not part_of(n).endswith("added")} - {"architecture"}
    assert names == {f"{part}:{n}" for part in plain.parameters for n in plain.tensors(part)}
    federation.round(2)
    for _, payload in spy.orders[3:]:
        sent = {part_of(n) for n in payload.tensors} - {"architecture"}
        assert sent <= {"0.added", "1.added", "2.added"} and sent
    untouched = build("llama", blocks=3)
    found = find_parts(federation.model)
    for part in plain.parameters:
        for name, tensor in found.named([part]).items():
            assert torch.equal(tensor, find_parts(untouched).named([part])[name])


@pytest.mark.parametrize("form", ADDED)
def test_a_cycle_of_lora_or_adapters_is_training_each_in_its_block_bit_for_bit(form: str) -> None:
    federation = bench(3, **ADDED[form])
    config = Config.model_validate({**SETTINGS, **ADDED[form]})
    model = config.attach(build("llama", blocks=3), derive_seed(0, "adapter"))
    parts = find_parts(model)
    outcome = federation.round(1)
    for block, client in enumerate(outcome.clients):
        seed = derive_seed(derive_seed(0, "client", client, 1), "block", f"{block}.added")
        chosen = parts.named([f"{block}.added"])
        names = [n for n, p in model.named_parameters() if any(p is q for q in chosen.values())]
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        end = descend(model, names, federation.data[client], seed)
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).copy_(start[name] + (end[name] - start[name]))
    for name, tensor in parts.named(["0.added", "1.added", "2.added"]).items():
        assert torch.equal(federation.state.weights[name], tensor), name


def test_what_is_added_to_a_dropped_block_stays_away_with_it() -> None:
    federation = bench(4, blocks=4, compression="layer-drop", **ADDED["lora"])
    spy = Spy(federation)
    federation.round(1)
    for _, payload in spy.orders:
        parts = {part_of(n) for n in payload.tensors}
        blocks = {p for p in parts if p.isdigit()}
        assert len(blocks) == 2 and {p for p in parts if p.endswith("added")} == {
            f"{b}.added" for b in blocks
        }


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="hybrid prunes blocks that were trained whole"):
        bench(compression="hybrid", trainable="lora")
    with pytest.raises(ValidationError, match="extra_blocks train whole"):
        bench(extra_blocks=["norm"], trainable="adapter")
    with pytest.raises(ValidationError, match="client_ranks"):
        bench(trainable="lora", lora={"rank": 2, "client_ranks": [1, 2]})
    with pytest.raises(ValidationError, match="`adapter` is set but trainable is full"):
        bench(adapter={"size": 2})
    with pytest.raises(InputError, match="blocks_per_client: 4, but there are 3 blocks"):
        bench(blocks_per_client=4)
    with pytest.raises(ValidationError, match="'embeddings', 'norm' or 'head'"):
        bench(extra_blocks=["layers.9"])
    with pytest.raises(ValidationError, match="each part once"):
        bench(extra_blocks=["norm", "norm"])
    with pytest.raises(InputError, match=r"no part 'head' of its own .it is tied.*it has embeddings, norm"):
        bench(family="gpt2", extra_blocks=["head"])
    with pytest.raises(
        InputError, match=r"drop_ratio: 0.9 of the 2 blocks .* leaves none of them; at most 0.5"
    ):
        bench(compression="layer-drop", drop_ratio=0.9)
    with pytest.raises(InputError, match=r"cannot take heads out of BloomBlock.*layer-drop or none"):
        bench(family="bloom", compression="hybrid")
    with pytest.raises(ValidationError, match="fedbavg has no cycle"):
        bench(config=FedBAvgConfig, compression="hybrid")


def test_fedbavg_averages_one_block_a_round() -> None:
    federation = bench(config=FedBAvgConfig, name="fedbavg")
    spy = Spy(federation)
    start = federation.state.weights
    for round in (1, 2):
        federation.round(round)
        replies = spy.replies[-3:]
        now = federation.state.weights
        assert changed_parts(start, now) == {str(round - 1)}
        total = WeightedSum.empty(2 + 3 + 4)
        for client, reply in zip((0, 1, 2), replies, strict=True):
            total = total.add(dict(reply.tensors), 2 + client)
        for name in replies[0].tensors:
            assert torch.equal(now[name], start[name] + total.mean(name))
        start = now
    sent = {part_of(n) for _, p in spy.orders[3:] for n in p.tensors}
    assert sent == {"architecture", "0"}  # all else is where it was


def test_the_state_knows_what_everyone_holds_as_plain_json() -> None:
    federation = bench(2, blocks=2)
    federation.round(1)
    held = {client: json.loads(text) for client, text in federation.state.held.items()}
    last = federation.round(2).clients
    assert sorted(held) == ["0", "1"] and sorted(last) == [0, 1]
    assert sorted(versions["0"] for versions in held.values()) == ["0", "1"]  # the second had the first's
