"""What every registered method keeps to, whatever it computes; a later one is covered on registration."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    FORMS,
    HELD,
    SIZES,
    Federation,
    bits,
    every_form,
    whole,
)
from model_families import batch, save_folder, tokenizer
from torch import Tensor, nn

from fedtune.config.computing import Computing
from fedtune.core import client
from fedtune.core.settings import Settings
from fedtune.core.state import to_payload
from fedtune.core.types import Order, Reply
from fedtune.core.wire import check, decode
from fedtune.errors import FederationError, InputError
from fedtune.federation import checkpoint
from fedtune.federation.process import torch_settings
from fedtune.measure.memory import MemoryMeter
from fedtune.methods import registry
from fedtune.models.load import Loaded, load_model
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import trainable
from fedtune.transport.in_process import Simulation


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_every_registered_method_is_tried_here() -> None:
    missing = [name for name in registry.METHODS if not FORMS.get(name)]
    assert not missing, f"no settings for {missing}: add an entry for each to FORMS in {Path(__file__).name}"
    unknown = [name for name in FORMS if name not in registry.METHODS]
    assert not unknown, f"FORMS names methods that are not registered: {unknown}"


@pytest.mark.parametrize("name", list(registry.METHODS))
def test_defaults_are_valid_and_the_registry_names_the_right_classes(name: str) -> None:
    config = registry.config_class(name)()
    assert isinstance(config, Settings) and config.name == name
    assert type(config).model_validate(config.model_dump()) == config  # the saved form reads back as itself
    method = registry.build(config, 0)
    assert method.arrival in ("plan-order", "any-order", "one-by-one", "in-turn")
    assert method.rounds >= 0
    assert {
        type(flag) for flag in (method.pools_data, method.uses_wire, method.saves_merged, method.sends_model)
    } == {bool}
    state = registry.state_class(name)
    assert dataclasses.is_dataclass(state) and state.__dataclass_params__.frozen
    summary = registry.METHODS.part(name).summary
    assert summary and "\n" not in summary


def test_a_name_can_be_registered_once_only() -> None:
    before = registry.METHODS.listing()
    with pytest.raises(InputError, match="the method name 'fedavg' is taken: fedtune has registered it"):
        registry.register("fedavg", registry.Entry("elsewhere", "A", "B", "another"))
    assert registry.METHODS.listing() == before


@every_form
def test_another_seed_gives_other_bits(name: str, label: str) -> None:
    first, other = whole(name, label), Federation(name, label, seed=1)
    assert isinstance(first.state, registry.state_class(name))
    if first.method.rounds:
        other.round(1)
        assert bits(first.saved[1].state) != bits(other.saved[1].state)
        assert bits(first.saved[1].state) != bits(first.saved[0].state)  # the round did something


@every_form
def test_one_seed_gives_the_same_bits_and_a_run_changes_nothing_but_what_it_trains(
    name: str, label: str
) -> None:
    """Nor does it read memory that it has not written: in one of the two runs that is full of NaN."""
    first, federation = whole(name, label), Federation(name, label)
    frozen, streams = federation.frozen(), random_streams()
    with torch_settings(Computing(deterministic="strict"), torch.device("cpu")):
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
        federation.exported()  # also before any round: the first evaluation may come then
        assert_same(frozen, federation.frozen())
        for round in range(1, federation.method.rounds + 1):
            federation.round(round)
            assert_same(frozen, federation.frozen())
            federation.exported()
            assert_same(frozen, federation.frozen())
        assert random_streams() == streams
        assert federation.state_bits() == first.state_bits()
        assert federation.exported() == first.exported()


def random_streams() -> tuple[object, ...]:
    """Where the process's own generators stand."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), *rest


@every_form
def test_a_restored_run_goes_on_with_the_same_bits(
    name: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the same peaks of clients' memory, though here every step is followed for itself."""
    original = whole(name, label)
    follow_every_step(monkeypatch)
    for saved in original.saved:
        checkpoint.save(tmp_path, saved, config_sha256="x", keep=None)
    assert checkpoint.rounds(tmp_path) == list(range(original.method.rounds + 1))
    middle = original.method.rounds // 2
    for done in {middle, original.method.rounds}:
        restored = Federation(name, label)
        restored.restore(checkpoint.load(tmp_path, done, config_sha256="x"))
        assert restored.state_bits() == bits(original.saved[done].state)
        restored.run(start=done + 1)
        later = [entry for entry in original.memory if entry["round"] > done]
        assert clients_of(restored.memory) == clients_of(later)
        assert restored.state_bits() == original.state_bits()
        assert restored.exported() == original.exported()


def clients_of(accounts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The accounts of clients; a server's may hold tensors apart after a restart that were one before."""
    return [entry for entry in accounts if entry["where"] == "client"]


def follow_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no client take a peak over from a step that was like its own."""
    monkeypatch.setattr(client, "MemoryMeter", lambda device, beside, **_: MemoryMeter(device, beside))


@every_form
def test_a_client_needs_its_order_and_its_environment_alone(name: str, label: str) -> None:
    original = whole(name, label).transport
    assert len(original.orders) == len(original.replies)
    # another process's model, method object and runner, whose replies lie where their tensors are
    elsewhere = Federation(name, label, laid_out=True).runner
    elsewhere.store = HELD
    for sent in reversed(original.orders):  # so that nothing is left behind by the order before
        elsewhere.states = {sent.client: sent.kept} if sent.kept else {}
        assert bytes(elsewhere.handle(sent.client, sent.frame)) == original.replies[sent.round, sent.client]


@every_form
def test_replies_hold_what_was_asked_for_and_the_ledger_what_was_sent(name: str, label: str) -> None:
    original, planner = whole(name, label), Federation(name, label)
    sent = {(order.round, order.client): order.frame for order in original.transport.orders}
    assert sent.keys() == original.transport.replies.keys()
    expected = {}
    for round in range(1, original.method.rounds + 1):
        planner.restore(original.saved[round - 1])
        planned = list(planned_orders(planner, round, original))
        assert sorted(order.client for order in planned) == sorted(planner.sizes)
        for order in planned:
            down, up = sent[round, order.client], original.transport.replies[round, order.client]
            assert bits(decode(down).payload) == bits(order.payload)  # planning again plans the same
            specs = planner.compression.expects(order.expects) if planner.compression else order.expects
            assert decode(up).payload.tensors.keys() == specs.keys()
            check(decode(up).payload, specs)
            for direction, frame in (("down", down), ("up", up)):
                payload_bytes = decode(frame).payload.nbytes
                assert payload_bytes < len(frame)
                expected[round, order.client, direction] = (payload_bytes, len(frame))
    entries: dict[tuple[int, int, str], tuple[int, int]] = {}
    for e in original.wire:  # a model that is sent along has an entry of its own
        key = (e["round"], e["client"], e["direction"])
        before = entries.get(key, (0, 0))
        entries[key] = (before[0] + e["payload_bytes"], before[1] + e["framed_bytes"])
    assert entries == (expected if original.method.uses_wire else {})


def planned_orders(planner: Federation, round: int, original: Federation) -> Iterator[Order]:
    """A round's orders; where clients come in turn, each after the reply of the one before."""
    cohort, state = planner.cohort(round), planner.state
    if planner.method.arrival != "in-turn":
        yield from planner.method.plan(state, round, cohort)
        return
    for _ in cohort.clients:
        (order,) = planner.method.plan(state, round, cohort)
        yield order
        up = decode(original.transport.replies[round, order.client]).payload
        state = planner.method.server_step(state, [Reply(order.client, up, {}, cohort)])


@every_form
def test_a_round_under_its_quorum_changes_nothing(name: str, label: str) -> None:
    federation = Federation(name, label)
    frozen = federation.frozen()
    for round in range(1, federation.method.rounds + 1):
        state, before, kept = federation.state, federation.state_bits(), dict(federation.runner.states)
        with pytest.raises(FederationError, match=f"round {round}: .* the quorum is 9"):
            federation.round(round, quorum=9)  # all replied and were folded in when it turns out too few
        assert federation.state is state and federation.state_bits() == before
        assert_same(frozen, federation.frozen())
        federation.runner.states = kept  # a resumed run has them from the checkpoint
        federation.round(round)
        assert bits(to_payload(state)) == before  # nor does a good round change the state it started from
    assert federation.state_bits() == whole(name, label).state_bits()


@every_form
def test_what_is_exported_is_what_is_saved(name: str, label: str, tmp_path: Path) -> None:
    form, federation, names = FORMS[name][label], whole(name, label), []
    base = save_folder(tmp_path / "base", form.family, getattr(torch, form.dtype), form.blocks)

    def loader(model: str) -> Loaded:
        return load_model(
            str(base) if model == "tiny" else model,
            dtype=form.dtype,
            initial="pretrained",
            task="classification" if form.family == "roberta" else "causal-lm",
            num_labels=3 if form.family == "roberta" else None,
            seed=0,
            base=Path("."),
        )

    for export, model in federation.models():
        names.append(export)
        model.eval()
        wanted = logits(model, form.family)
        beside = export == "adapemu"  # merged, which rounds once more
        save_result(model, tokenizer(), tmp_path / export, merge=federation.method.saves_merged or beside)
        read = load_result(tmp_path / export, loader)
        got = logits(read.model, form.family)
        if beside:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.2 if form.dtype == "bfloat16" else 1e-4)
        else:
            assert torch.equal(got, wanted)
    clients = [f"client-{client:04d}" for client in federation.sizes]
    assert names in (["global"], ["global", "adapemu"], clients, ["global", *clients])


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch(family)).logits
    return result


@pytest.mark.parametrize(
    "label",
    [label for label in FORMS["fedavg"] if not label.startswith("asynchronous") and "tune" not in label],
)
def test_one_shot_is_the_first_round_of_many(label: str) -> None:
    one_shot, of_many = Federation("fedavg", label, rounds=1).run(), whole("fedavg", label)
    assert one_shot.method.rounds == 1 < of_many.method.rounds
    assert one_shot.state_bits() == bits(of_many.saved[1].state)
    assert bits(to_payload(one_shot.state)) != bits(of_many.saved[2].state)


@pytest.mark.parametrize(
    "label",  # what clients with parts of their own send: test_own_models.py
    [
        one
        for one, form in FORMS["fedavg"].items()
        if not form.wire and not one.startswith(("own", "fine", "prune"))
    ],
)
def test_fedavg_sends_what_its_page_says(label: str) -> None:
    """docs/fedavg.md, "What it costs"."""
    federation = whole("fedavg", label)
    parameters = trainable(federation.model)
    size = sum(parameter.nbytes for parameter in parameters.values())
    sent = {
        direction: [e["payload_bytes"] for e in federation.wire if e["direction"] == direction]
        for direction in ("down", "up")
    }
    client_rounds = federation.method.rounds * len(SIZES)
    if "unlike-ranks" in label:
        ranks = [(1, 3, 1)[client] for client in SIZES] * federation.method.rounds
        assert sent["up"] == [size // 3 * rank for rank in ranks]
    elif "scaffold" in label:
        control = sum(4 * parameter.numel() for parameter in parameters.values())
        assert sent["up"] == sent["down"] == [size + control] * client_rounds
    elif label == "alternate":
        halves = [sum(p.nbytes for n, p in parameters.items() if f".lora_{one}" in n) for one in "AB"]
        rounds = range(1, federation.method.rounds + 1)
        assert sent["up"] == [halves[round % 2] for round in rounds for _ in SIZES]
        assert sent["down"] == [size] * client_rounds and sum(halves) == size
        return
    else:
        assert sent["up"] == [size] * client_rounds
    if not label.startswith(("stack", "residual")):
        assert sent["down"] == sent["up"]
        return
    factors = {name: p for name, p in parameters.items() if ".lora_" in name}
    rest = size - sum(p.nbytes for p in factors.values())
    shapes = [  # (in, out) of each module
        (a.shape[1], factors[name.replace("lora_A", "lora_B")].shape[0])
        for name, a in factors.items()
        if ".lora_A" in name
    ]
    ranks = 1 + 3 + 1 if "unlike-ranks" in label else len(SIZES) * next(iter(factors.values())).shape[0]
    if label == "residual":  # the factors too, and of each round the means' product beside the clients'
        rest, ranks = size, ranks // len(SIZES) * (len(SIZES) + 1)
    for round in range(1, federation.method.rounds + 1):
        stacked = [4 * min(ranks * (round - 1) * (i + o), i * o) for i, o in shapes]
        assert sent["down"][(round - 1) * len(SIZES) : round * len(SIZES)] == [rest + sum(stacked)] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("label", ["full-bfloat16", "lora", "lora-classifier", "freeze-a", "unlike-ranks"])
def test_asynchronous_ends_with_the_synchronous_bits(label: str, dropout: float) -> None:
    seed, simulation = 4, Simulation(dropout=dropout, delay_s=10.0)  # client 1 drops out, 2 comes before 0
    late, together = (
        Federation("fedavg", label, seed=seed, simulation=simulation, rounds=1, arrival=arrival)
        for arrival in ("asynchronous", "synchronous")
    )
    arrived = late.round(1, quorum=1).clients
    assert together.round(1, quorum=1).clients == arrived != sorted(arrived)  # not in the order of the plan
    assert (len(arrived) < len(SIZES)) == (dropout > 0)
    assert late.exported() == together.exported()
    if not dropout:
        in_order = Federation("fedavg", label, seed=seed, rounds=1).run()
        assert late.exported() == in_order.exported()
