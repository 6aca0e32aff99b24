"""Training of one block at a time: precision, memory, low-rank gradients, BAdam."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from fedcybgd_bench import SETTINGS, Spy, bench, changed_parts, examples
from model_families import build
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from toy import Bench

from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.state import from_payload, to_payload
from fedtune.core.types import Payload
from fedtune.data.batches import collate, epoch_batches
from fedtune.data.encoded import Encoded
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedcybgd.badam import BAdam
from fedtune.methods.fedcybgd.order import turn
from fedtune.methods.fedcybgd.powersgd import GradientFilter
from fedtune.methods.fedcybgd.settings import BAdamConfig, PowerSGD
from fedtune.methods.fedcybgd.state import State
from fedtune.methods.fedcybgd.training import ActiveBlock
from fedtune.methods.settings import Training
from fedtune.models.parts import find_parts


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> int:
    """Entries that differ once both are rounded to bfloat16."""
    return sum(int((before[n].bfloat16() != after[n].bfloat16()).sum()) for n in before)


def small_rate(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, change: Callable[[Mapping[str, nn.Parameter]], None]
) -> tuple[dict[str, Tensor], State, State]:
    """Weights at first, and the state after one cycle and after two; `change` sees each step's gradients."""
    federation = bench(dtype=dtype, lr=1e-6, local_epochs=3)
    for name, p in federation.model.named_parameters():  # weights of the usual size, the same for all dtypes
        start = build("llama", torch.bfloat16, 3).get_parameter(name)
        p.data.copy_(start * 0.05 if p.ndim == 2 else start)
    federation.state = federation.method.init(federation.model)
    first = federation.state.weights

    def step(active: ActiveBlock) -> None:
        change(active.parameters)
        take_step(active)

    take_step = ActiveBlock.step
    with monkeypatch.context() as patch:
        patch.setattr(ActiveBlock, "step", step)
        federation.round(1)
        once = federation.state
        federation.round(2)
    return first, once, federation.state


def test_a_bfloat16_model_moves_at_a_small_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same gradients exactly the entries move that move in a float32 run rounded at the end."""
    taken: list[dict[str, Tensor]] = []

    def note(parameters: Mapping[str, nn.Parameter]) -> None:
        taken.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    def give(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, gradient in taken[steps[0]].items():
            parameters[name].grad = gradient.float()
        steps[0] += 1

    steps = [0]
    narrow, narrow_once, narrow_twice = small_rate(monkeypatch, torch.bfloat16, note)
    wide, wide_once, wide_twice = small_rate(monkeypatch, torch.float32, give)
    assert steps[0] == len(taken) and all(torch.equal(narrow[n].float(), wide[n]) for n in wide)
    for state in (narrow_once, narrow_twice):
        assert state.weights.keys() == narrow.keys()
        assert all(weight.dtype == torch.float32 for weight in state.weights.values())
    assert all(torch.equal(weight, wide_once.weights[n]) for n, weight in narrow_once.weights.items())
    assert moved(narrow, narrow_once.weights) == moved(wide, wide_once.weights) > 0
    # a second visit takes up what the first had not moved far enough to show
    assert moved(narrow, narrow_twice.weights) > moved(narrow, narrow_once.weights)
    assert moved(narrow, narrow_twice.weights) >= moved(wide, wide_twice.weights)
    own, _, own_twice = small_rate(monkeypatch, torch.float32, lambda parameters: None)
    # gradients of the float32 model's own differ from those of the bfloat16 one: 2406 entries, not 2402
    assert moved(narrow, narrow_twice.weights) >= 0.98 * moved(own, own_twice.weights)


def test_only_the_block_has_gradients_and_what_is_before_it_is_not_kept() -> None:
    """A later block keeps less for the backward pass, and every block less than the whole model does."""
    seen: dict[str, int] = {}
    for own in ("0", "5"):
        federation = bench(1, blocks=6, batch_size=8, block_order="ascending" if own == "0" else "descending")
        federation.data[0][:] = [Encoded(tuple(range(3, 63)), tuple(range(3, 63)))] * 8  # type: ignore[index]
        Spy(federation)
        federation.round(1)
        seen[own] = max(e["peak_bytes"] for e in federation.memory if e["where"] == "client")
    model = build("llama", blocks=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    meter = MemoryMeter("cpu")
    for _ in range(2):
        with meter.step(8 * 60, [model, optimizer]):
            model(**collate([Encoded(tuple(range(3, 63)), tuple(range(3, 63)))] * 8, 0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert seen["5"] < seen["0"] < meter.peak_bytes


def test_gradient_checkpointing_gives_the_same_result() -> None:
    results = []
    for checkpointing in (False, True):
        federation = bench(gradient_checkpointing=checkpointing)
        federation.round(1)
        results.append(federation.state.weights)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_powersgd_gives_low_rank_and_loses_nothing() -> None:
    weight = nn.Parameter(torch.zeros(12, 9))
    filter = GradientFilter(PowerSGD(rank=2, iterations=4, start_step=1), torch_generator(0))
    generator, given_, taken = torch_generator(1), torch.zeros(12, 9), torch.zeros(12, 9)
    for step in range(20):
        weight.grad = torch.randn(12, 9, generator=generator)
        given_ += weight.grad
        filter.step({"w": weight})
        taken += weight.grad
        rank = int(torch.linalg.matrix_rank(weight.grad, tol=1e-4))
        assert rank == (9 if step == 0 else 2)
        error = filter.memory["error"].get("w", torch.zeros(12, 9))
        assert_close(taken + error, given_, rtol=1e-4, atol=1e-4)  # what is left out comes later
    low = torch.randn(12, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    fresh = GradientFilter(PowerSGD(rank=2, iterations=2), torch_generator(0))
    weight.grad = low.clone()
    fresh.step({"w": weight})
    assert_close(weight.grad, low)  # of rank 2 already: passes whole
    bias = nn.Parameter(torch.zeros(5))
    bias.grad = torch.ones(5)
    fresh.step({"b": bias})
    assert torch.equal(bias.grad, torch.ones(5))


@pytest.mark.parametrize(("rate", "filtered"), [(1.0, True), (1.9, True), (2.0, False), (2.1, False)])
def test_a_matrix_that_would_shrink_too_little_passes_whole(rate: float, filtered: bool) -> None:
    # 8 x 8 = 64 numbers; two factors of rank 2 have 2 (8 + 8) = 32, half of that
    parameter = nn.Parameter(torch.zeros(8, 8))
    whole = torch.randn(8, 8, generator=torch_generator(0, "g"))
    parameter.grad = whole.clone()
    settings = PowerSGD(rank=2, min_compression_rate=rate)
    GradientFilter(settings, torch_generator(0)).step({"w": parameter})
    assert torch.equal(parameter.grad, whole) is not filtered
    assert int(torch.linalg.matrix_rank(parameter.grad)) == (2 if filtered else 8)


def test_what_powersgd_remembers_counts_as_memory() -> None:
    """8 x 6 weights, rank 2: an error of 8 x 6 and Q of 6 x 2, in float32, beside the rest."""
    parameter = nn.Parameter(torch.ones(8, 6))
    sizes = []
    for powersgd in (None, PowerSGD(rank=2)):
        active = ActiveBlock.begin({"w": parameter}, Training(), powersgd, torch_generator(0))
        meter = MemoryMeter("cpu")
        parameter.grad = torch.arange(48.0).reshape(8, 6)
        active.step()
        with meter.whole(resident=[{"w": parameter}, *active.resident()]):
            pass
        sizes.append(meter.peak_bytes)
        active.end()
    assert sizes[1] - sizes[0] == 4 * (8 * 6 + 6 * 2)


def test_powersgd_and_accumulation_change_training() -> None:
    results = []
    for powersgd in (None, {"rank": 1}, {"rank": 1, "start_step": 99}):
        federation = bench(optimizer="sgd", powersgd=powersgd)
        federation.round(1)
        results.append(federation.state.weights["0:mlp.down_proj.weight"])
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_badam_switches_blocks_at_the_interval_and_begins_anew() -> None:
    """Five steps at an interval of two: blocks 0, 0, 1, 1, 2, each with AdamW's first steps again."""
    settings = {**SETTINGS, "local_epochs": None, "local_steps": 5, "switch_interval": 2, "weight_decay": 0.1}
    method = BAdam(BAdamConfig.model_validate({**settings, "block_order": "ascending"}), 0)
    data = {0: examples(4, 0)}
    central = Bench(method, build("llama", blocks=3), data)
    outcome = central.round(1)
    assert outcome.metrics[0]["steps"] == 5 and central.wire == []
    model = build("llama", blocks=3)
    generator = torch_generator(derive_seed(0, "client", 0, 1), "batches")
    order = [batch for _ in range(3) for batch in epoch_batches(4, 2, generator)]
    optimizer: torch.optim.Optimizer | None = None
    for step in range(5):
        block = list(find_parts(model).parameters[str(step // 2)].values())
        model.requires_grad_(False)
        for parameter in block:
            parameter.requires_grad_(True)
        if optimizer is None or step % 2 == 0:
            optimizer = torch.optim.AdamW(block, lr=1e-2, weight_decay=0.1, fused=True)
        model.train()(**collate([data[0][i] for i in order[step]], 0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ((_, result),) = central.method.export(central.state, central.model)
    for name, parameter in result.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert central.model.config.use_cache is True


def test_badam_refuses_an_interval_under_one_and_takes_every_order() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        BAdamConfig.model_validate({"switch_interval": -1})
    ends = {}
    for order in ("ascending", "descending", "random"):
        settings = {**SETTINGS, "switch_interval": 1, "block_order": order, "gradient_checkpointing": True}
        method = BAdam(BAdamConfig.model_validate({**settings, "local_epochs": 1}), 0)
        central = Bench(method, build("llama", blocks=3), {0: examples(2, 0)})
        start = central.state.start
        central.round(1)
        ends[order] = changed_parts(start, central.state.trained)
    assert ends == {"ascending": {"0"}, "descending": {"2"}, "random": {turn("012", "random", 1, 0, 0)[0]}}


def test_a_state_holds_each_weight_once_and_reads_one_that_held_some_twice() -> None:
    """As earlier checkpoints did: rounded to the model's dtype, and in float32 beside it."""
    exact = torch.tensor([1.001, -2.0])
    old = Payload(
        {
            "weights/0:w": exact.bfloat16(),
            "weights/1:w": torch.ones(3, dtype=torch.bfloat16),
            "masters/0:w": exact,
        },
        {"turns": 1, "missed": 0, "versions/0": 1},
    )
    state = from_payload(State, old)
    assert torch.equal(state.weights["0:w"], exact) and state.versions == {"0": 1}
    kept = to_payload(state)
    assert sorted(kept.tensors) == ["weights/0:w", "weights/1:w"]
    assert kept.nbytes - old.nbytes == -2 * 2  # two bfloat16 numbers less
