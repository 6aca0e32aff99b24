"""The round's small parts at their edges: who is enough, whose mean, which names, what a state may hold."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Toy

from fedtune.core import wire
from fedtune.core.aggregate import FRACTION_BITS, LIMIT, WeightedSum
from fedtune.core.cohort import (
    QuorumError,
    RoundOutcome,
    hold_quorum,
    round_half_up,
    sample_cohort,
    who_and_why,
)
from fedtune.core.faults import faults
from fedtune.core.ledger import Ledger
from fedtune.core.state import from_payload, to_payload
from fedtune.core.types import Payload, TensorSpec
from fedtune.core.wire import Content, FrameError, check, decode, encode
from fedtune.data.split import checked
from fedtune.data.task_folders import part_of_task
from fedtune.errors import InputError, ProgramError
from fedtune.methods.fedkseed import order
from fedtune.protection.share import flatten, unflatten


def outcome(came: int, gone: int) -> RoundOutcome:
    gaps = {client: f"reason {client}" for client in range(came + gone - 1, came - 1, -1)}
    return RoundOutcome(4, tuple(range(came + gone)), list(range(came)), gaps)


def test_a_quorum_that_is_just_met_is_met_and_of_the_missing_five_are_named() -> None:
    hold_quorum(outcome(3, 2), 3)
    with pytest.raises(QuorumError) as caught:
        hold_quorum(outcome(2, 5), 3)
    says = str(caught.value)
    assert says.startswith(
        "round 4: 2 of 7 clients gave a usable reply, the quorum is 3. Left out: client 2: reason 2; client 3"
    )
    assert "client 6: reason 6. See to that" in says
    with pytest.raises(QuorumError, match=r"client 6: reason 6; and 1 more\. See") as caught:
        hold_quorum(outcome(2, 6), 3)
    assert "client 7" not in str(caught.value)


def test_who_has_the_same_reason_is_named_together() -> None:
    assert who_and_why({}) == ""
    assert who_and_why({4: "late", 1: "nan", 2: "late"}) == "client 1: nan; clients 2, 4: late"
    many = {client: "nan" for client in range(7)} | {9: "late"}
    assert who_and_why(many) == "clients 0, 1, 2, 3, 4 and 2 more: nan; client 9: late"


def test_a_mean_is_over_those_that_have_it_by_their_examples() -> None:
    one = RoundOutcome(1, clients=[0, 1, 2], examples={0: 1, 1: 3, 2: 100})
    one.metrics |= {0: {"loss": 2.0}, 1: {"loss": 6.0}, 2: {}}
    assert one.mean("loss") == 5.0 and one.mean("other") is None
    one.totals["loss"] = 7.5
    assert one.mean("loss") == 7.5
    assert RoundOutcome(1).mean("loss") is None


def test_halves_go_up_and_a_cohort_is_never_larger_than_the_federation() -> None:
    assert [round_half_up(x) for x in (0.5, 1.4, 1.5, 2.5, 3.0)] == [1, 1, 2, 3, 3]
    sizes = {5: 1, 3: 2, 9: 4}
    assert sample_cohort(sizes, 7, seed=0, round=1).clients == (3, 5, 9)
    assert sample_cohort(sizes, None, seed=0, round=1).examples == {3: 2, 5: 1, 9: 4}
    assert len(sample_cohort(sizes, 0.5, seed=0, round=1).clients) == 2  # 1.5
    assert len(sample_cohort(sizes, 0.01, seed=0, round=1).clients) == 1


@dataclass(frozen=True)
class Held:
    count: int
    by_name: dict[str, Tensor] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    needed: dict[str, Tensor] = None  # type: ignore[assignment]
    label: str | None = None


@dataclass(frozen=True)
class Bare:
    by_name: dict[str, Tensor]


def test_a_state_comes_back_as_it_was_whatever_is_empty() -> None:
    full = Held(3, {"a/b": torch.ones(2)}, {"0": True}, {}, "x")
    payload = to_payload(full)
    assert payload.scalars == {"count": 3, "flags/0": True, "label": "x"} and set(payload.tensors) == {
        "by_name/a/b"
    }
    again = from_payload(Held, payload)
    assert (again.count, again.flags, again.label) == (3, {"0": True}, "x") and list(again.by_name) == ["a/b"]
    assert from_payload(Held, to_payload(Held(0))) == Held(0)
    assert from_payload(Bare, to_payload(Bare({}))).by_name == {}
    with pytest.raises(ValueError, match="Bare has no field count; it has by_name"):
        from_payload(Bare, to_payload(Held(0)))
    with pytest.raises(TypeError, match=r"Bare.by_name/x is list: a state holds scalars and tensors"):
        to_payload(Bare({"x": [1]}))  # type: ignore[dict-item]


def test_names_that_do_not_fit_are_shown_three_at_a_time() -> None:
    spec = TensorSpec(torch.float32, (1,))
    one = torch.zeros(1)
    with pytest.raises(FrameError, match=r"missing a, b, c;$"):
        check(Payload({}), dict.fromkeys("cab", spec))
    with pytest.raises(FrameError, match=r"missing a, b, c and 1 more; not asked for z;$"):
        check(Payload({"z": one}), dict.fromkeys("dcab", spec))
    check(Payload({"a": one}), {"a": spec})


def test_the_bounds_of_values_are_below_the_limit_and_not_below_the_least() -> None:
    spec = TensorSpec(torch.float32, (2,), limit=4.0, at_least=-1.0)
    check(Payload({"a": torch.tensor([-1.0, 3.9999])}), {"a": spec})
    for wrong in ([-1.0001, 0.0], [4.0, 0.0], [0.0, -4.0]):
        with pytest.raises(FrameError, match="holds values"):
            check(Payload({"a": torch.tensor(wrong)}), {"a": spec})
    with pytest.raises(FrameError, match="scalar x is inf"):
        check(Payload(scalars={"x": float("inf"), "y": "inf"}), {})
    check(Payload(scalars={"x": 1e300, "y": "nan"}), {})


def test_a_sum_holds_what_fits_and_nothing_beyond() -> None:
    just = torch.tensor([LIMIT - 1, -(LIMIT - 1)])
    whole = WeightedSum.empty(3).add({"a": just}, 3)
    assert torch.equal(whole.mean("a"), just) and whole.weight == 3
    assert torch.equal(WeightedSum.empty(3).add({"a": just}, 0).sums["a"], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight 1 does not fit: 3 of 3 are taken"):
        whole.add({"a": just}, 1)
    with pytest.raises(ValueError, match="weight -1 does not fit"):
        WeightedSum.empty(3).add({"a": just}, -1)
    for value in (LIMIT, -LIMIT, float("nan")):
        with pytest.raises(ValueError, match="262,144 or more"):
            WeightedSum.empty(3).add({"a": torch.tensor([value])}, 1)
    with pytest.raises(ValueError, match="a cohort without examples"):
        WeightedSum.empty(0)
    given = {"a": torch.tensor([0.5], dtype=torch.float64)}
    first = WeightedSum.empty(4).add(given, 2)
    assert given["a"].tolist() == [0.5] and first.add(given, 2).mean("a").tolist() == [
        0.5
    ]  # what is added stays
    half = WeightedSum.empty(4).add({"a": torch.tensor([2.0])}, 1)
    assert half.sums["a"].tolist() == [2**FRACTION_BITS // 2] and half.scaled("a", 3.0).tolist() == [1.5]


def test_a_ledgers_mean_is_over_clients_and_rounds_that_sent_something() -> None:
    wire: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    ledger = Ledger(wire.append, memory.append)
    assert ledger.payload_bytes_per_client_round() == 0.0
    assert dict(ledger.payload_bytes) == dict(ledger.framed_bytes) == {"down": 0, "up": 0}
    for round, client, direction, size in (
        (1, 0, "down", 10),
        (1, 0, "up", 4),
        (1, 1, "down", 10),
        (2, 0, "down", 6),
    ):
        ledger.message(
            round=round,
            client=client,
            direction=direction,
            kind="train",
            payload_bytes=size,
            framed_bytes=size + 1,
        )
    assert ledger.peak_memory_bytes == {"client": 0, "server": 0, "evaluation": 0}
    for where, peak in (("client", 5), ("client", 3), ("server", 9), ("evaluation", 4)):
        ledger.memory(round=1, where=where, client=0, peak_bytes=peak, how="counted")
    again = Ledger(wire.append, memory.append)
    again.restore(list(wire), list(memory))
    assert len(wire) == 4 and len(memory) == 4  # nothing is written twice
    for account in (ledger, again):
        assert dict(account.payload_bytes) == {"down": 26, "up": 4} and dict(account.framed_bytes) == {
            "down": 29,
            "up": 5,
        }
        assert account.peak_memory_bytes == {"client": 5, "server": 9, "evaluation": 4}
        assert account.payload_bytes_per_client_round() == 10.0


def test_vectors_come_back() -> None:
    shapes = {"b": (2, 2), "a": (3,), "c": ()}
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape) + at
        for at, (name, shape) in enumerate(shapes.items())
    }
    vector = flatten(tensors, shapes)
    assert vector.tolist() == [1, 2, 3, 0, 1, 2, 3, 2]  # a, b, c
    assert all(torch.equal(found, tensors[name]) for name, found in unflatten(vector, shapes).items())
    with pytest.raises(ValueError, match="was asked for, and there is"):
        flatten({"a": tensors["a"]}, shapes)


def test_a_models_fingerprint_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(
        order, "trainable", lambda model: looked.append(model) or dict(model.named_parameters())
    )
    fingerprint, one, other = order.Fingerprint(), Toy(), Toy(w=2.0)
    assert fingerprint.of(one) == fingerprint.of(one) != fingerprint.of(other) == fingerprint.of(other)
    assert looked == [one, other]


def test_a_long_frame_is_read_from_a_map_that_is_given_back_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = {name: torch.arange(3000.0) + at for at, name in enumerate("abc")} | {"n": torch.arange(5)}
    frame = encode(Content(Payload(tensors, {"x": 1.5}), {"round": 2}))
    assert isinstance(wire.empty_frame(len(frame)), bytearray)
    monkeypatch.setattr(wire, "LONG", 1000)
    assert isinstance(wire.empty_frame(1000), bytearray)
    given: list[tuple[int, int]] = []

    class Map(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            assert option == mmap.MADV_DONTNEED
            given.append((start, length))

    assert isinstance(wire.empty_frame(len(frame)), mmap.mmap)
    long = Map(-1, len(frame))
    long.write(frame)
    content = decode(long)
    assert content.payload.scalars == {"x": 1.5} and content.meta == {"round": 2}
    assert all(torch.equal(content.payload.tensors[name], tensor) for name, tensor in tensors.items())
    head = len(frame) - sum(tensor.nbytes for tensor in tensors.values())
    ends = [head + 40, head + 40 + 12000, head + 40 + 24000, head + 40 + 36000]  # int64 comes first
    whole = [end // mmap.PAGESIZE * mmap.PAGESIZE for end in ends]
    assert given == [(0, pages) for pages in whole if pages] and given[-1][1] > len(frame) - mmap.PAGESIZE


def test_a_part_of_a_task_and_the_examples_that_a_message_shows() -> None:
    taken = [part_of_task(*part) for part in (("task001", 12, 25.0), ("task002", 12, 25.0), ("a", 3, 1.0))]
    assert taken == [[2, 8, 10], [8, 9, 11], [1]]  # as in earlier versions
    with pytest.raises(InputError, match=r"5 examples are given more than once: 0, 1, 2, 3, 4$"):
        checked([range(5), range(5)], 5, 2, "a split")
    with pytest.raises(InputError, match=r"6 examples are given more than once: 0, 1, 2, 3, 4, \.\.\.$"):
        checked([range(6), range(6)], 6, 2, "a split")
    with pytest.raises(InputError, match=r"2 of 4 training examples belong to nobody: 1, 3\. Give"):
        checked([[0], [2]], 4, 2, "a split")
    assert [part.tolist() for part in checked({"b": [2, 0], "a": [1]}, 3, None, "a split").parts] == [
        [0, 2],
        [1],
    ]


def test_a_fault_in_fedtunes_own_code_is_shown_by_its_place_in_it() -> None:
    with pytest.raises(ProgramError) as found, faults("a part"):
        round_half_up("a")  # type: ignore[arg-type]
    assert re.search(r"It came out of fedtune/core/cohort\.py, line \d+\.$", str(found.value))
