"""Training with little memory: the same loss and gradients as without it, bit for bit, and what it saves."""

from __future__ import annotations

import platform
from functools import partial

import pytest
import torch
from model_families import ATTACH, DECODERS, FAMILIES, batch, build, wake
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from fedtune.bench.process_memory import rss
from fedtune.errors import InputError
from fedtune.methods.fedavg import settings as fedavg
from fedtune.methods.fedcybgd import settings as fedcybgd
from fedtune.models import memory_efficient as memory
from fedtune.models.blocks import find_blocks
from fedtune.models.lean_loss import batch_loss
from fedtune.models.lora import attach_lora
from fedtune.models.memory_efficient import computed_again, memory_efficient, release_memory, resolved


def gradients(family: str, how: str, dtype: torch.dtype, is_lean: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = ATTACH[how](build(family, dtype), 0)
    model.train()
    torch.manual_seed(0)
    if is_lean:
        with memory_efficient(model, checkpointing="full"):
            loss = model(**batch(family)).loss
            loss.backward()
    else:
        loss = model(**batch(family)).loss
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "how"), [*((f, "full") for f in FAMILIES), ("llama", "lora"), ("gpt2", "adapter")]
)
def test_loss_and_gradients_are_those_of_the_model_itself(family: str, how: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        loss, wanted = gradients(family, how, dtype, is_lean=False)
        lean_loss, got = gradients(family, how, dtype, is_lean=True)
    assert_close(lean_loss, loss.to(lean_loss.dtype), rtol=1e-6, atol=0)
    assert got.keys() == wanted.keys() and got
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.parametrize("family", DECODERS)
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = build(family)
    before = model(**batch(family)).loss

    def computes_again() -> bool:  # the model's own property has two names
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    with pytest.raises(ZeroDivisionError), memory_efficient(model, checkpointing="full"):
        assert computes_again()
        raise ZeroDivisionError
    assert not computes_again()
    assert torch.equal(model(**batch(family)).loss, before)


def test_checkpointing_of_the_models_owner_stays() -> None:
    model = build("llama")
    # the name that transformers has from 5.24 on, or the one before
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with memory_efficient(model, checkpointing="none"):
        pass
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_model_that_cannot_compute_again_is_refused() -> None:
    model = build("llama")
    type(model).supports_gradient_checkpointing = False
    try:
        with (
            pytest.raises(InputError, match="gradient_checkpointing: LlamaForCausalLM has none"),
            memory_efficient(model, checkpointing="full"),
        ):
            raise AssertionError("was entered")
    finally:
        del type(model).supports_gradient_checkpointing


@pytest.mark.parametrize(("wanted", "again"), [("none", []), ("full", [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 4]),
                                              (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_which_blocks_are_computed_again(family: str, wanted: int | str, again: list[int]) -> None:
    """With dropout, whose random numbers are drawn again: no bit changes."""
    model = attach_lora(build(family, blocks=5), rank=2, alpha=4, dropout=0.5, targets=None, seed=0).train()
    wake(model)
    found = []
    for how in ("none", wanted):
        calls = [0] * 5
        handles = [
            next(block.children()).register_forward_pre_hook(partial(_count, calls, place))
            for place, block in enumerate(find_blocks(model).modules)
        ]
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]), computed_again(model, how):
            torch.manual_seed(4)
            batch_loss(model, batch(family)).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        for handle in handles:
            handle.remove()
    assert [place for place, count in enumerate(calls) if count == 2] == again
    assert found[0].keys() == found[1].keys() and all(map(torch.equal, found[0].values(), found[1].values()))


def _count(calls: list[int], place: int, *_: object) -> None:
    calls[place] += 1


def test_auto_goes_by_the_models_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    size = sum(p.numel() for p in model.parameters())
    for large, wanted in ((size, True), (size + 1, False)):
        monkeypatch.setattr(memory, "LARGE", large)
        with computed_again(model, "auto"):
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == wanted
        assert resolved(model, "auto") == ("full" if wanted else "none") and resolved(model, 3) == 3
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert resolved(model, "auto") == "none"
    with computed_again(model, "auto"):  # of a family that cannot, nothing
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_the_words_of_older_configurations_and_what_is_no_setting() -> None:
    for given, meant in ((True, "full"), (False, "none"), ("auto", "auto"), (3, 3)):
        for kind in (fedavg.Config, fedcybgd.Config, fedcybgd.BAdamConfig):
            assert kind.model_validate({"gradient_checkpointing": given}).gradient_checkpointing == meant
    for wrong in (0, -1, "some", 1.5, None):
        with pytest.raises(ValidationError):
            fedavg.Config.model_validate({"gradient_checkpointing": wrong})


@pytest.mark.skipif(rss() is None or platform.libc_ver()[0] != "glibc", reason="glibc on Linux")
def test_what_large_tensors_free_goes_back_to_the_system() -> None:
    """Every other one of 60 tensors of 4 MB: 120 MB, of which a heap would give none back."""
    del [torch.ones(2**22)][0]  # 16 MB were freed: so far glibc would put 4 MB on its heap
    release_memory()
    tensors = [torch.ones(2**20) for _ in range(60)]
    before = rss()
    del tensors[::2]
    after = rss()
    assert before is not None and after is not None
    assert before - after > 100e6
