"""What a GPU's time goes to: noise against a copy of the weights, steps against loops as one writes them.

The shape is TinyLlama's, 1.1 billion weights, random. All seconds are those of the clock from an idle GPU to
an idle GPU, medians over several turns; of two that are compared each turn takes both.

* Noise: one pass that writes w0 + Σ a_j z_j for all weights into others, K = 4,096, against a copy of w0
  there. `seconds at 7B` is the pass scaled to 6.7 billion weights.
* A zeroth-order step of FedKSeed, and two forward passes of the same model, one sequence of 256 tokens.
* Steps of clients in bfloat16, from the first batch to the last, against the same by hand: LoRA and one block
  (FedCyBGD) in PyTorch's fused AdamW, without masters; FedKSeed against the four passes of the papers' code.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.bench.billion import TINY_LLAMA
from fedtune.bench.gpu_checks import the_gpu
from fedtune.bench.local_step import STEPS, by_fedtune, by_hand
from fedtune.bench.random_model import VOCABULARY, random_batch
from fedtune.bench.seconds import seconds
from fedtune.bench.zo_step import EPSILON, LR, SEEDS, reference_step, step_ratios, zeroth_steps
from fedtune.core.store import Store
from fedtune.core.types import ClientEnv, Payload
from fedtune.data.encoded import Encoded
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedcybgd.settings import Config as BlockConfig
from fedtune.methods.fedcybgd.training import train_blocks
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.load import quiet, seeded
from fedtune.models.parts import find_parts
from fedtune.models.tuning import train_all
from fedtune.zeroth import KINDS, SeedPool, rebuild_all_
from fedtune.zeroth.pool import Noise

TURNS = 5
SEVEN = 6_738_415_616  # weights of LLaMA-2-7B
EXAMPLES, TOKENS = 4, 128
TRAINED: dict[str, Any] = {"batch_size": EXAMPLES, "local_steps": STEPS, "lr": 1e-5}
Weights = dict[str, Tensor]


def measure(shape: dict[str, Any] = TINY_LLAMA) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of seconds, and the ratios that they are for.

    Raises:
        InputError: PyTorch sees no GPU.
    """
    device = the_gpu()
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with quiet():
        base = nn.Module.to(_model(shape), device)
        for dtype in (torch.bfloat16, torch.float32):
            model, plain = (nn.Module.to(deepcopy(base), dtype) for _ in range(2))
            _noise(model, ("hadamard4",), rows, ratios)
            if dtype == torch.bfloat16:
                _noise(
                    model, [cast(Noise, kind) for kind in KINDS if kind != "hadamard4"], rows, ratios, turns=1
                )
            batch = _there(random_batch(), device)
            found = zeroth_steps(train_all(model), plain, batch, ("hadamard4",))
            ratios |= step_ratios(found)
            rows += found
            del model, plain
        _clients(base, device, rows, ratios)
    return rows, ratios


def _model(shape: dict[str, Any]) -> LlamaForCausalLM:
    """Random weights in bfloat16, drawn on the host and so the same everywhere."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with seeded(0):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(default)


def _there(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _noise(
    model: nn.Module,
    kinds: Iterable[Noise],
    rows: list[dict[str, Any]],
    ratios: dict[str, float],
    *,
    turns: int = TURNS,
) -> None:
    """A pass of each kind of noise over the weights, in turn with a copy of them."""
    w0: Weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    w = {name: torch.empty_like(weight) for name, weight in w0.items()}
    first = next(iter(w0.values()))
    count, dtype = sum(weight.numel() for weight in w0.values()), str(first.dtype).removeprefix("torch.")
    a = np.random.default_rng(0).normal(scale=1e-6, size=SEEDS)

    def copy() -> None:
        for name, weight in w.items():
            weight.copy_(w0[name])

    for kind in kinds:
        pool = SeedPool(0, SEEDS, kind)
        small = {"small": torch.zeros(4096, dtype=first.dtype, device=first.device)}
        rebuild_all_(small, small, pool, a)  # compiles

        def noise(pool: SeedPool = pool) -> None:
            rebuild_all_(w, w0, pool, a)

        pairs = _in_turn(noise, copy, first.device, turns)
        row = {"case": f"noise over the weights, {kind}", "parameters": count, "dtype": dtype}
        rows.append(row | pairs.row | {"seconds at 7B": pairs.row["seconds"] * SEVEN / count})
        ratios[f"seconds: a pass of {kind} / a copy of the weights, {dtype}"] = pairs.ratio


class _Pairs:
    """Seconds of something and of what it is compared with, taken in turn."""

    def __init__(self, pairs: list[tuple[float, float]]) -> None:
        self.ratio = statistics.median(one / two for one, two in pairs)
        one, two = (statistics.median(times) for times in zip(*pairs, strict=True))
        self.row = {"seconds": one, "by hand": two}


def _in_turn(
    what: Callable[[], object], plain: Callable[[], object], device: torch.device, turns: int = TURNS
) -> _Pairs:
    return _Pairs([(seconds(what, device)[0], seconds(plain, device)[0]) for _ in range(turns)])


def _clients(
    base: LlamaForCausalLM, device: torch.device, rows: list[dict[str, Any]], ratios: dict[str, float]
) -> None:
    """Steps of clients of three methods against the same steps by hand."""
    for case, of in (("LoRA", _lora), ("one block, FedCyBGD", _block), ("FedKSeed, hadamard4", _zeroth)):
        model = deepcopy(base)
        count = sum(parameter.numel() for parameter in model.parameters())
        what, plain = of(model, device)
        what()  # what is done once, and the account of memory, which slows the first steps down
        plain()
        pairs = _in_turn(what, plain, device)
        row = {"case": f"{STEPS} steps: {case}", "parameters": count, "dtype": "bfloat16"}
        rows.append(row | pairs.row)
        ratios[f"seconds: steps of {case} / by hand"] = pairs.ratio


Ways = tuple[Callable[[], object], Callable[[], object]]


def _lora(model: LlamaForCausalLM, device: torch.device) -> Ways:
    config = Config.model_validate(
        {**TRAINED, "trainable": "lora", "lora": {"rank": 16}, "gradient_checkpointing": "none"}
    )
    env = _env(config.attach(model, seed=0), device)
    return by_fedtune(env, config), by_hand(env, config)


def _block(model: LlamaForCausalLM, device: torch.device) -> Ways:
    config = BlockConfig.model_validate({**TRAINED, "gradient_checkpointing": "none"})
    parts = find_parts(model.requires_grad_(False))
    block = parts.named([str(parts.blocks // 2)])
    env = _env(model, device)
    same = Config.model_validate({**TRAINED, "trainable": "full"})

    def plain() -> None:
        for parameter in block.values():
            parameter.requires_grad_(True)
        by_hand(env, same)()
        for parameter in block.values():
            parameter.requires_grad_(False)

    return lambda: train_blocks(env, iter([block]), config, checkpointing="none"), plain


def _zeroth(model: LlamaForCausalLM, device: torch.device) -> Ways:
    train_all(model)
    batch = _there(random_batch(), device)
    plain = reference_step(model, batch)

    def steps() -> None:
        with step_weights(model, SeedPool(0, SEEDS, "hadamard4"), torch.zeros(SEEDS), LR) as weights:
            for j in range(STEPS):
                up, down = weights.loss(batch, j, EPSILON), weights.loss(batch, j, -EPSILON)
                weights.update([(j, (up - down) / (2 * EPSILON))])

    def by_the_papers() -> None:
        for _ in range(STEPS):
            plain()

    return steps, by_the_papers


def _env(model: nn.Module, device: torch.device) -> ClientEnv:
    drawn = torch.randint(VOCABULARY, (4 * EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return ClientEnv(
        client=0,
        round=1,
        seed=0,
        model=model,
        items=[Encoded(tuple(row), tuple(row)) for row in drawn.tolist()],
        pad_id=0,
        state=Payload(),
        memory=MemoryMeter(device),
        device=device,
        store=Store(),
    )
