"""Where a run's chance comes from: its seed, and a stream of its own for each purpose, round and client."""

from __future__ import annotations

import hashlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import LORA, SIZES, Federation
from fedcybgd_bench import Spy, bench, part_of
from model_families import build
from toy import Bench

from fedtune.core import seeds
from fedtune.core.cohort import sample_cohort
from fedtune.data.encoded import Encoded
from fedtune.methods.fedcybgd.badam import BAdam
from fedtune.methods.fedcybgd.order import turn
from fedtune.methods.fedcybgd.settings import BAdamConfig
from fedtune.models.lora import attach_lora

SEED = 5
AGAIN = {
    "drop",
    "blocks",
    "cohort",
    "client-order",
    "adapter",
    "alignment-rows",
}  # looked up again: the same each time, on purpose

Stream = tuple[str, ...]  # the seed that it is derived from, then its purpose


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> dict[Stream, list[int]]:
    """Every stream of the test, with the seeds that it was given, in the order of derivation."""
    found: dict[Stream, list[int]] = {}

    def noted(text: bytes, digest_size: int) -> Any:
        digest = hashlib.blake2b(text, digest_size=digest_size)
        name = tuple(part.partition(":")[2] for part in text.decode().split("\x1f"))
        found.setdefault(name, []).append(int.from_bytes(digest.digest(), "big") >> 1)
        return digest

    monkeypatch.setattr(seeds, "hashlib", SimpleNamespace(blake2b=noted))
    return found


def test_a_derived_seed_by_hand() -> None:
    """What is stored elsewhere (splits, cohorts, pools) was drawn with these."""
    text = b"int:0\x1fstr:cohort\x1fint:1"
    whole = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    assert seeds.derive_seed(0, "cohort", 1) == whole // 2 < 2**63
    assert (
        len({seeds.derive_seed(*key) for key in ((0, 1, 2), (0, 12), (0, "12"), (0, "1", 2), (1, 12))}) == 5
    )
    one, other = seeds.torch_generator(3, "x"), torch.Generator().manual_seed(seeds.derive_seed(3, "x"))
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))
    assert seeds.numpy_generator(3, "x").random() != seeds.numpy_generator(3, "y").random()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("fedavg", "lora-dropout"),
        ("fedavg", "stack-unlike-ranks"),
        ("fedkseed", "hadamard4"),
        ("fedkseed-pro", "hadamard4"),
        ("infinite-pool", "steps"),
        ("fedbiot", "last-block"),
        ("fedcybgd", "extra-random"),
        ("fedcybgd", "lora-gpt2-layer-drop"),
        ("fedcybgd", "hybrid"),
        ("fedcybgd", "powersgd-no-checkpointing"),
        ("fedbavg", "layer-drop"),
        ("badam", "random"),
        ("standalone", "lora"),
        ("centralized", "full"),
    ],
)
def test_every_stream_comes_from_the_runs_seed_and_is_drawn_from_once(
    name: str, label: str, derived: dict[Stream, list[int]]
) -> None:
    federation = Federation(name, label, seed=SEED)
    federation.run()
    sources = {str(SEED)} | {str(values[0]) for values in derived.values()}
    if name in ("fedcybgd", "fedbavg"):
        sources.add("0")  # what it draws for a client's model is overwritten
    assert {stream[0] for stream in derived} <= sources
    assert {
        stream: len(values)
        for stream, values in derived.items()
        if len(values) > 1 and stream[1] not in AGAIN
    } == {}
    purposes = {stream[1:] for stream in derived if stream[0] == str(SEED)}
    rounds = range(1, federation.method.rounds + 1)
    clients = [0] if federation.method.pools_data else list(SIZES)
    assert {p for p in purposes if p[0] == "client"} == {
        ("client", str(c), str(r)) for c in clients for r in rounds
    }
    if federation.method.arrival == "in-turn":
        assert {p for p in purposes if p[0] == "client-order"} == {("client-order", str(r)) for r in rounds}
    if "drop" in {p[0] for p in purposes}:
        at = [int(p[1]) for p in purposes if p[0] == "drop"]
        turns = federation.method.rounds * (len(clients) if federation.method.arrival == "in-turn" else 1)
        assert set(at) == set(range(turns))


def in_blocks(seed: int, steps: int = 1) -> set[str]:
    """The blocks that BAdam moves in its first steps."""
    config = BAdamConfig(local_steps=steps, batch_size=1, lr=1e-2, switch_interval=1)
    b = Bench(BAdam(config, seed), build("llama", blocks=4), {0: [Encoded((3, 9, 4), (3, 9, 4))]})
    before = {name: tensor.clone() for name, tensor in b.state.start.items()}
    b.round(1)
    return {part_of(n) for n, t in b.state.trained.items() if not torch.equal(t, before[n])}


def test_the_seed_decides_on_the_blocks_of_badam_and_fedcybgd() -> None:
    parts = ["0", "1", "2", "3"]
    for seed in range(3):
        drawn = seeds.numpy_generator(seed, "blocks", 0).permutation(4)
        assert in_blocks(seed) == {str(drawn[0])}
        assert in_blocks(seed, 3) == {str(block) for block in drawn[:3]}
        second = seeds.numpy_generator(seed, "blocks", 1).permutation(4)
        order = [turn(parts, "random", 1, seed, index)[0] for index in range(8)]
        assert order == [str(block) for block in (*drawn, *second)]
    assert len({turn(parts, "random", 4, 0, index) for index in range(6)}) > 1  # passes are unlike


def test_each_cycle_has_an_order_of_its_own_and_every_client_once() -> None:
    b = bench(3, blocks=3, rounds=4)
    spy = Spy(b)
    for round in range(1, 5):
        b.round(round)
    asked = [client for client, _ in spy.orders]
    cycles = [tuple(asked[at : at + 3]) for at in range(0, 12, 3)]
    assert all(sorted(cycle) == [0, 1, 2] for cycle in cycles) and len(set(cycles)) > 2
    assert cycles == [tuple(seeds.numpy_generator(0, "client-order", r).permutation(3)) for r in range(1, 5)]


def test_cohorts_of_all_seeds_and_rounds_ask_everyone_alike() -> None:
    sizes = dict.fromkeys(range(6), 1)
    asked = Counter(
        client
        for seed in range(20)
        for r in range(1, 11)
        for client in sample_cohort(sizes, 2, seed=seed, round=r).clients
    )
    assert sum(asked.values()) == 400 and all(
        40 < count < 95 for count in asked.values()
    )  # 66.7, 3.6 deviations


def test_a_seed_gives_these_cohorts() -> None:
    """As in earlier versions: a run that goes on asks whom it would have asked."""
    drawn = [sample_cohort(dict.fromkeys(range(6), 1), 3, seed=1, round=r).clients for r in (1, 2, 3)]
    assert drawn == [(0, 2, 3), (0, 2, 5), (1, 3, 5)]
    known = seeds.derive_seed(0, "cohort", 1), seeds.derive_seed(7, "client", 2, 3), seeds.derive_seed(0)
    assert known == (5609851646329409881, 2080490863703637867, 6711488920161924273)


def test_what_is_attached_starts_alike_in_every_method_and_unlike_with_another_seed() -> None:
    """So that a comparison's rows begin at one point."""

    def start(name: str, label: str, seed: int) -> dict[str, torch.Tensor]:
        changes = {**LORA, "local_epochs": 1, "trainable": "lora"} if name == "centralized" else {}
        form = Federation(name, "full" if changes else label, seed=seed, **changes)
        return {n: p.detach().clone() for n, p in form.model.named_parameters() if "lora_A" in n}

    first = start("fedavg", "lora", SEED)
    assert first
    for name, label in (("standalone", "lora"), ("centralized", "lora"), ("fedavg", "freeze-a")):
        again = start(name, label, SEED)
        assert again.keys() == first.keys() and all(torch.equal(again[n], first[n]) for n in first), name
        other = start(name, label, SEED + 1)
        assert not any(torch.equal(other[n], first[n]) for n in first), name
    blocks = {n: p for n, p in start("fedcybgd", "lora", SEED).items() if n in first}
    drawn = derive_of_lora(SEED)
    assert blocks and all(torch.equal(blocks[n], drawn[n]) for n in blocks)


def derive_of_lora(seed: int) -> dict[str, torch.Tensor]:
    """LoRA's A on a model of three blocks, attached by hand with the seed of its purpose."""
    base = build("llama", blocks=3)
    model = attach_lora(
        base, rank=2, alpha=4.0, dropout=0.0, targets=None, seed=seeds.derive_seed(seed, "adapter")
    )
    return {n: p.detach() for n, p in model.named_parameters() if "lora_A" in n}
