"""`federation.wire`: rounding without bias, the largest numbers, what is lost comes later, exact bytes."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Federation, whole
from reproduced import load
from torch import Tensor
from torch.testing import assert_close

from fedtune.config.file import parse_config
from fedtune.config.wire import Wire
from fedtune.core.compression import PLACES, SCALE, Compression
from fedtune.core.robust import Updates
from fedtune.core.rounding import GROUP, from_levels, to_levels
from fedtune.core.seeds import torch_generator
from fedtune.core.types import Payload, TensorSpec
from fedtune.core.wire import Content, FrameError, check, decode, encode
from fedtune.errors import InputError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.planning.plan import plan

plan_measured = load("plan_measured")
FORMS: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"dtype": "int8"},
    {"dtype": "int4"},
    {"top_k": 0.25},
    {"top_k": 0.01},
    {"dtype": "int4", "top_k": 0.3},
    {"dtype": "bfloat16", "top_k": 0.01},
]


class Updating:
    """A method all of whose floating-point tensors but one are updates."""

    uses_wire = True

    def updates(self) -> Updates:
        return Updates(lambda name: "" if name == "beside" else "update")


def compression(**settings: Any) -> Compression:
    found = Wire.model_validate(settings).compression(Updating())
    assert found is not None
    return found


def specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape), 2.0**18) for name, t in tensors.items()}


def chance(seed: int = 0) -> Any:
    return partial(torch_generator, seed)


def test_int8_by_hand() -> None:
    values = torch.cat([torch.tensor([127.0, -127.0, 0.0, 5.0]), torch.zeros(GROUP - 4), torch.tensor([0.5])])
    numbers, scales = to_levels(values, 127, torch_generator(0))
    assert scales.tolist() == pytest.approx([1.0, 0.5 / 127])  # the second group has one number
    assert numbers[:4].tolist() == [127, -127, 0, 5] and numbers[GROUP].item() == 127
    assert from_levels(numbers, scales).tolist() == pytest.approx(values.tolist())


def test_int4_packs_two_numbers_a_byte_and_places_are_bits() -> None:
    update = {"x": torch.tensor([7.0, 0.0, -7.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])}
    sent, kept = compression(dtype="int4", top_k=0.25).compress(update, {}, chance())
    assert kept == {}
    # 7 → 15, −7 → 1, 3 → 11 and 8 to fill up; scale 7/7; places 0, 2, 7 of the first byte
    assert sent["x"].tolist() == [15 + 16 * 1, 11 + 16 * 8] and sent[SCALE + "x"].tolist() == [1.0]
    assert sent[PLACES + "x"].tolist() == [1 + 4 + 128, 0]
    back = compression(dtype="int4", top_k=0.25).restore(sent, specs(update))
    assert torch.equal(back["x"], update["x"])


def test_few_of_many_places_are_numbers() -> None:
    update = {"x": torch.zeros(40, 5)}
    update["x"][3, 1], update["x"][39, 4] = -2.0, 1.0
    sent, _ = compression(top_k=0.01).compress(update, {}, chance())
    assert sent["x"].tolist() == [-2.0, 1.0]
    assert sent[PLACES + "x"].dtype == torch.int32 and sent[PLACES + "x"].tolist() == [16, 199]


def test_what_is_left_out_comes_later_by_hand() -> None:
    half = compression(top_k=0.5, error_feedback=True)
    padding = [0.0] * 6  # so that a bit a number is less than the numbers
    first = {"x": torch.tensor([3.0, -1.0, 2.0, 8.0, 9.0, -7.0, 6.0, 0.5, *padding])}
    sent, kept = half.compress(first, {}, chance())
    assert kept["x"].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, *padding]
    second = {"x": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.75, *padding])}
    sent, kept = half.compress(second, kept, chance())
    arrived = half.restore(sent, specs(first))["x"].tolist()
    assert arrived == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1.25, *padding]
    assert kept["x"].tolist() == [1.0, *[0.0] * 13]


@pytest.mark.parametrize("settings", FORMS)
def test_what_is_sent_and_what_is_kept_make_up_the_updates(settings: dict[str, Any]) -> None:
    both = compression(**settings, error_feedback=True)
    generator, kept, total, arrived = torch_generator(1), dict[str, Tensor](), 0.0, 0.0
    for step in range(5):
        update = {"x": torch.randn(33, 29, generator=generator), "beside": torch.ones(9)}
        sent, kept = both.compress(update, kept, chance(step))
        check(Payload(sent), both.expects(specs(update)))
        back = both.restore(sent, specs(update))
        check(Payload(back), both.restored(specs(update)))
        assert torch.equal(back["beside"], update["beside"]) and kept.keys() == {"x"}
        total, arrived = total + update["x"], arrived + back["x"]
    assert_close(arrived + kept["x"], total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_rounding_keeps_the_mean(dtype: str) -> None:
    rounded = compression(dtype=dtype)
    update = {"x": torch.randn(300, generator=torch_generator(2))}
    sent = [rounded.compress(update, {}, chance(draw))[0] for draw in range(2000)]
    draws = [rounded.restore(each, specs(update))["x"] for each in sent]
    mean, deviation = torch.stack(draws).double().mean(0), torch.stack(draws).double().std(0)
    off = (mean - update["x"]).abs() / (deviation / 2000**0.5).clamp_min(1e-9)
    assert off.max() < 5 and len({draw.sum().item() for draw in draws}) > 100
    again = rounded.compress(update, {}, chance(7))[0]
    assert all(torch.equal(again[n], t) for n, t in rounded.compress(update, {}, chance(7))[0].items())


@pytest.mark.parametrize("settings", FORMS)
def test_it_is_never_larger_and_its_size_is_known_from_the_shape(settings: dict[str, Any]) -> None:
    packed = compression(**settings)
    for shape in [(), (1,), (3,), (8, 16), (5, 129), (64, 300), (0, 4)]:
        for dtype in (torch.float32, torch.bfloat16):
            update = {"x": torch.ones(shape, dtype=dtype)}
            sent, _ = packed.compress(update, {}, chance())
            expected = packed.expects(specs(update))
            assert {n: (t.dtype, tuple(t.shape)) for n, t in sent.items()} == {
                n: (s.dtype, s.shape) for n, s in expected.items()
            }
            assert sum(t.nbytes for t in sent.values()) <= update["x"].nbytes
            assert packed.restore(sent, specs(update))["x"].shape == shape


def test_what_nan_and_infinity_become_is_refused() -> None:
    for bad in (float("nan"), float("inf")):
        for settings in FORMS:
            packed, update = compression(**settings), {"x": torch.full((64,), bad)}
            sent = decode(encode(Content(Payload(packed.compress(update, {}, chance())[0])))).payload
            with pytest.raises(FrameError, match="NaN or infinite"):
                check(sent, packed.expects(specs(update)))


@pytest.mark.parametrize(
    ("top_k", "places"),
    [
        (0.5, [255, 255]),  # all 16 of 16, and 8 were said
        (0.5, [1, 0]),
        (0.02, [5, 5, 6]),
        (0.02, [6, 5, 7]),
        (0.02, [-1, 5, 7]),
        (0.02, [0, 1, 150]),
    ],
)
def test_places_that_cannot_be_are_refused(top_k: float, places: list[int]) -> None:
    packed, update = compression(top_k=top_k), {"x": torch.arange(16.0 if top_k == 0.5 else 150.0)}
    sent, _ = packed.compress(update, {}, chance())
    sent[PLACES + "x"] = torch.tensor(places, dtype=sent[PLACES + "x"].dtype)
    with pytest.raises(FrameError, match="the places of x are not"):
        packed.restore(sent, specs(update))


def test_a_client_that_sends_too_large_a_scale_is_left_out() -> None:
    federation = Federation("fedavg", "full-bfloat16-int8-errors")
    handle = federation.runner.handle

    def larger(client: int, frame: Any) -> bytes:
        reply = decode(handle(client, frame))
        if client != 1:
            return encode(reply)
        tensors = {n: t * 0 + 2.0**17 if n.startswith(SCALE) else t for n, t in reply.payload.tensors.items()}
        return encode(dataclasses.replace(reply, payload=Payload(tensors)))

    federation.runner.handle = larger  # type: ignore[method-assign]
    outcome = federation.round(1, quorum=2)
    assert sorted(outcome.clients) == [0, 2] and "holds values of 262,144 or more" in outcome.left_out[1]


def test_each_client_keeps_what_its_own_update_lost() -> None:
    federation = whole("fedavg", "int4-top-k-errors")
    names = set(federation.state.weights)
    for state in federation.runner.states.values():
        assert {name.removeprefix("error:") for name in state.tensors} == names
        assert all(t.dtype == torch.float32 and t.any() for t in state.tensors.values())
    scaffold = whole("fedavg", "scaffold-bfloat16-errors").runner.states[0].tensors
    assert {name.split(":")[0] for name in scaffold if ":" in name} == {"error"}
    assert {name for name in scaffold if ":" not in name}  # its control variates


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"federation": {"wire": {"error_feedback": True}}}, "float32 without top_k loses nothing"),
        ({"federation": {"wire": {"top_k": 1.0}}}, "federation.wire.top_k"),
        (
            {"federation": {"wire": {"dtype": "int8"}, "secure_aggregation": {}}},
            "numbers of secure_aggregation.bits bits each",
        ),
        (
            {
                "federation": {
                    "wire": {"dtype": "int8", "error_feedback": True},
                    "privacy": {"clip": 1.0, "noise_multiplier": 1.0},
                }
            },
            "leave error_feedback out",
        ),
        ({"method": {"name": "fedkseed"}, "federation": {"wire": {"dtype": "int8"}}}, "send no updates"),
        ({"method": {"name": "standalone"}, "federation": {"wire": {"dtype": "int8"}}}, "send nothing"),
        (
            {
                "method": {"name": "fedavg", "aggregation": "stack"},
                "federation": {"wire": {"top_k": 0.5}},
            },
            "leave out top_k",
        ),
        (
            {
                "method": {"name": "fedavg", "rounds": 1},
                "federation": {"wire": {"dtype": "int4", "error_feedback": True}},
            },
            "there is one; leave it out",
        ),
        (
            {
                "method": {"name": "fedcybgd"},
                "federation": {"wire": {"dtype": "int4", "error_feedback": True}},
            },
            "another block in each turn",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_config({"method": {"name": "fedavg"}, **settings}, "c.yaml")


PLANNED = [
    ("fedavg, lora", {"dtype": "int8", "error_feedback": True}),
    ("fedavg, full", {"dtype": "int4", "top_k": 0.1, "error_feedback": True}),
    ("fedbiot", {"dtype": "bfloat16"}),
    ("fedcybgd, hybrid", {"dtype": "int8", "top_k": 0.2}),
]


@pytest.mark.parametrize(("method", "wire"), PLANNED)
def test_a_plan_is_what_a_run_measures(method: str, wire: dict[str, Any], tmp_path: Path) -> None:
    document = plan_measured.small_run("bundled", method).given()
    config = parse_config({**document, "federation": {**document["federation"], "wire": wire}}, "c.yaml")
    planned, summary = plan(config).document, run(config, tmp_path / "run", Silent())
    plain = plan(parse_config(document, "c.yaml")).document
    sent = {direction: planned["payload_bytes"][direction] for direction in ("down", "up")}
    assert sent == {direction: summary["payload_bytes"][direction] for direction in ("down", "up")}
    assert sent["down"] == plain["payload_bytes"]["down"] and sent["up"] < 0.6 * plain["payload_bytes"]["up"]
    for role in ("client", "server"):
        measured = summary["peak_memory_bytes"][role]
        assert planned[f"{role}_peak_memory_bytes"]["total"] == pytest.approx(measured, rel=0.02)
