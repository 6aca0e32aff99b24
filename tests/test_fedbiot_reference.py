"""FedBiOT against Algorithm 2 written down once more in plain PyTorch: no model, merge or loss of fedtune's.

What the reference shares with the run are tiny models, examples, the random streams' seeds, and the numbers
that LoRA is drawn as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fedbiot_bench import SIZES, SMALL, Run, items
from model_families import build
from torch import Tensor, nn
from torch.testing import assert_close

from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.data.encoded import Encoded
from fedtune.methods.fedbiot.server import ADAPTER, factors
from fedtune.models.alignment import distillation_loss, representation_loss
from fedtune.models.blocks import find_blocks

SCALING = 2.0  # alpha 4 / rank 2
KEPT = (0, 2, 4)  # of the five blocks before the adapter: ⌊j · 4 / 2⌋, and 3 = ⌊0.6 · 5⌋
LAMBDA, RATE, BETAS = 3.0, 1e-2, (0.9, 0.95)
ALIGNMENT = {"steps_before": 3, "steps": 2, "batch_size": 3, "lr": RATE}
SEED = 4  # of `Run`
Factors = dict[str, Tensor]


def linears(model: nn.Module, block: int) -> Iterator[tuple[str, nn.Module]]:
    """What LoRA tunes of a block."""
    names = {"llama": ("self_attn.q_proj", "self_attn.v_proj"), "gpt2": ("attn.c_attn",)}
    for name in names[model.config.model_type]:
        yield name, find_blocks(model).modules[block].get_submodule(name)


def only(model: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """The model with some of its blocks."""
    path, blocks = find_blocks(model).path, find_blocks(model).modules
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList([blocks[k] for k in kept]))
    return model.requires_grad_(False)


@contextmanager
def tuned(model: nn.Module, lora: Factors, blocks: dict[str, int]) -> Iterator[None]:
    """Inside, blocks add s B A x to what their linears make of x.

    Args:
        model: The model.
        lora: Factors by prefix, place and path.
        blocks: The block of each prefix and place.
    """
    handles = []
    for prefix, block in blocks.items():
        for name, module in linears(model, block):
            a, b = (lora[f"{prefix}.{name}.lora_{which}.weight"] for which in "AB")

            def add(module: nn.Module, x: tuple[Tensor], y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return y + SCALING * x[0] @ a.T @ b.T

            handles.append(module.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Reference:
    """The server's and the clients' arithmetic."""

    def __init__(self, family: str, adapter: Factors, drawn: Factors) -> None:
        self.full = only(build(family, blocks=6), tuple(range(6)))
        self.small = only(build(family, blocks=6), (*KEPT, 5))
        self.adapter, self.drawn = adapter, drawn
        self.emulator, self.public = drawn, items(4, 9)

    def run(self, model: nn.Module, lora: Factors, batch: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the adapter, the logits, and the tokens that have a next one; all by token."""
        count = len(find_blocks(model).modules)
        places = {f"emulator.{k}": k for k in range(3)} if model is self.small else {}
        seen = []
        handle = (
            find_blocks(model)
            .modules[count - 1]
            .register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        width = max(len(item.input_ids) for item in batch)
        ids = torch.tensor([[*item.input_ids, *[0] * (width - len(item.input_ids))] for item in batch])
        real = torch.tensor([[k < len(item.input_ids) for k in range(width)] for item in batch])
        with tuned(model, lora, {**places, "adapter.0": count - 1}):
            logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        handle.remove()
        counted = real[:, 1:]
        targets = ids[:, 1:][counted]
        return seen[0][:, :-1][counted], logits[:, :-1][counted], targets

    def align(self, start: Factors, steps: int, when: str | int) -> Factors:
        """Eq. 7 with the features' mean."""
        lora = {name: tensor.clone().requires_grad_(True) for name, tensor in start.items()}
        optimizer = torch.optim.AdamW(lora.values(), lr=RATE, betas=BETAS, weight_decay=0.0)
        batches = endless(len(self.public), 3, torch_generator(SEED, "alignment", when))
        for _ in range(steps):
            batch = [self.public[i] for i in next(batches)]
            with torch.no_grad():
                t, teacher, _ = self.run(self.full, self.adapter, batch)
            s, student, _ = self.run(self.small, self.adapter | lora, batch)
            p = teacher.softmax(-1)
            divergence = (p * (p.log() - student.softmax(-1).log())).sum(-1).mean()
            ((t - s).pow(2).mean() + LAMBDA * divergence).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: tensor.detach() for name, tensor in lora.items()}

    def before(self) -> Factors:
        """Tunes the emulator and puts s B A into its weights."""
        merged = self.align(self.drawn, 3, "before")
        for k in range(3):
            for name, module in linears(self.small, k):
                a, b = (merged[f"emulator.{k}.{name}.lora_{which}.weight"] for which in "AB")
                module.weight.data += SCALING * (b @ a if isinstance(module, nn.Linear) else (b @ a).T)
        return merged

    def local(self, client: int, round: int) -> Factors:
        """Two steps on the adapter, the second at half of the rate."""
        own = items(SIZES[client], client)
        lora = {name: tensor.clone().requires_grad_(True) for name, tensor in self.adapter.items()}
        optimizer = torch.optim.AdamW(lora.values(), lr=RATE, betas=BETAS, weight_decay=0.0)
        batches = endless(len(own), 2, torch_generator(derive_seed(SEED, "client", client, round), "batches"))
        for rate in (RATE, RATE / 2):
            optimizer.param_groups[0]["lr"] = rate
            _, logits, targets = self.run(self.small, self.emulator | lora, [own[i] for i in next(batches)])
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: tensor.detach() for name, tensor in lora.items()}

    def round(self, number: int) -> None:
        """Both clients, their mean by examples, and the alignment after it."""
        one, two = self.local(0, number), self.local(1, number)
        self.adapter = {name: (2 * one[name] + 6 * two[name]) / 8 for name in one}
        self.emulator = self.align(self.emulator, 2, number)


def endless(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        yield from (order[at : at + size] for at in range(0, n, size))


def both(family: str) -> tuple[Run, Reference]:
    settings: dict[str, Any] = {"alignment": ALIGNMENT, "distill_weight": LAMBDA, "family": family}
    run = Run(**settings)
    drawn = Run(**{**settings, "alignment": {**ALIGNMENT, "steps_before": 0}}).state.emulator
    assert not any(bool(tensor.any()) for name, tensor in drawn.items() if "lora_B" in name)
    return run, Reference(family, run.state.adapter, drawn)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_algorithm_2(family: str) -> None:
    run, wanted = both(family)
    assert_close(run.state.merged, wanted.before(), rtol=1e-3, atol=1e-4)
    if family == "gpt2":  # its dropout is drawn inside the model
        return
    for number in (1, 2):
        run.round(number)
        wanted.round(number)
        assert_close(run.state.adapter, wanted.adapter, rtol=1e-3, atol=1e-4)
        assert_close(run.state.emulator, wanted.emulator, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_emulator_computes_what_an_attached_one_does(family: str) -> None:
    """A client's model against the one whose LoRA was never merged, before and after a round."""
    run, wanted = both(family)
    merged, batch = run.state.merged, items(3, 5)
    assert max(float(t.abs().max()) for name, t in merged.items() if "lora_B" in name) > 0.01
    run.round(1)
    client = run.client_module(0).eval()
    for name, parameter in factors(client, (3,), ADAPTER).items():
        parameter.data.copy_(run.state.adapter[name])
    ids = torch.tensor([item.input_ids[:4] for item in batch])
    with torch.no_grad():  # the LoRA that travels still starts at zero here
        got = client(input_ids=ids).logits
        short = [Encoded(item.input_ids[:4], item.input_ids[:4]) for item in batch]
        _, attached, _ = wanted.run(wanted.small, run.state.adapter | merged, short)
        _, plain, _ = wanted.run(wanted.small, run.state.adapter | wanted.drawn, short)
    assert_close(got[:, :-1].reshape(-1, 64), attached, rtol=1e-4, atol=1e-4)
    assert float((attached - plain).abs().max()) > 0.01
    results = dict(run.method.export(run.state, run.model))  # AdapEmu has what travels on top of it
    wanted.before()
    with torch.no_grad():
        got = results["adapemu"].eval()(input_ids=ids).logits
        _, both_parts, _ = wanted.run(wanted.small, run.state.adapter | run.state.emulator, short)
    assert_close(got[:, :-1].reshape(-1, 64), both_parts, rtol=1e-3, atol=1e-3)


def test_every_alignment_draws_batches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Any, list[list[int]]] = {}
    run = Run(alignment={"steps_before": 6, "steps": 6, "batch_size": 2})
    tune = type(run.method).tune_emulator

    def noted(method: Any, state: Any, emulator: Any, steps: int, when: str | int) -> Any:
        teacher = method.at_server().teacher()
        ask: Callable[..., Any] = type(teacher).ask
        teacher.ask = lambda rows, batch: seen.setdefault(when, []).append(rows) or ask(teacher, rows, batch)  # type: ignore[func-returns-value]
        return tune(method, state, emulator, steps, when)

    monkeypatch.setattr(type(run.method), "tune_emulator", noted)
    again = Run(alignment={"steps_before": 6, "steps": 6, "batch_size": 2})
    for round in (1, 2, 3):
        again.round(round)
    assert list(seen) == ["before", 1, 2, 3]
    drawn = [tuple(map(tuple, rows)) for rows in seen.values()]
    assert len(set(drawn)) == 4 and all(len(rows) == 6 for rows in drawn)


def test_the_loss_of_bfloat16_states_is_computed_in_float32() -> None:
    ones, zeros = torch.ones(301, 1).bfloat16(), torch.zeros(301, 1).bfloat16()
    # Σ = 301, which bfloat16 has no number for
    assert representation_loss(ones.T, zeros.T, "paper").item() == 301.0
    t, s = torch.tensor([[1.0, 1.0078125]]).bfloat16(), torch.tensor([[1.0, 1.0]]).bfloat16()
    assert representation_loss(s, t, "mean").item() == 2.0**-14 / 2
    assert representation_loss(s, t, "rms-normalized").item() == pytest.approx(
        2.0**-14 / (1 + 1.0078125**2), rel=1e-6
    )
    teacher, student = torch.tensor([[4.0, 3.984375, 1.0]]), torch.tensor([[3.984375, 4.0, 1.0]])
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    wanted = float((p * (p / q).log()).sum())
    got = distillation_loss(student.bfloat16(), teacher.bfloat16())
    assert got.dtype == torch.float32 and got.item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("form", ["mean", "paper", "rms-normalized"])
def test_alignment_in_bfloat16_learns_what_it_learns_in_float32(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same weights, which bfloat16 has; LoRA stays float32, and is merged with one rounding."""
    settings: dict[str, Any] = {**SMALL, "alignment": {**ALIGNMENT, "steps_before": 12, "form": form}}
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(
            "fedbiot_bench.build",
            lambda family, blocks, dtype=dtype: build(family, blocks=blocks).bfloat16().to(dtype),
        )
        run = Run(**settings)
        assert all(tensor.dtype == torch.float32 for tensor in run.state.merged.values())
        found[dtype] = run.state.merged
        if dtype == torch.bfloat16:
            held = run.method.at_server().client_tensors(run.state.merged)
            weight = find_blocks(run.method.at_server().base).modules[2].self_attn.q_proj.weight
            path = "emulator.1.self_attn.q_proj.lora_{}.weight"  # the emulator's second block is the third
            a, b = (run.state.merged[path.format(which)].double() for which in "AB")
            exact = (weight.double() + SCALING * b @ a).bfloat16()
            same = held["model.layers.1.self_attn.q_proj.weight"] == exact
            assert float(same.float().mean()) > 0.99 and not bool((weight == exact).all())
    one, two = (torch.cat([t.flatten() for n, t in found[d].items() if "lora_B" in n]) for d in found)
    assert float(F.cosine_similarity(one, two, dim=0)) > 0.95
