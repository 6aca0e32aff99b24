"""Training with little memory: the same loss and gradients as without it, bit for bit, and what it saves."""

from __future__ import annotations

import platform

import pytest
import torch
from model_families import ATTACH, DECODERS, FAMILIES, batch, build
from torch import Tensor
from torch.testing import assert_close

from fedtune.bench.process_memory import rss
from fedtune.errors import InputError
from fedtune.models.memory_efficient import memory_efficient, release_memory


def gradients(family: str, how: str, dtype: torch.dtype, is_lean: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = ATTACH[how](build(family, dtype), 0)
    model.train()
    torch.manual_seed(0)
    if is_lean:
        with memory_efficient(model, checkpointing=True):
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

    with pytest.raises(ZeroDivisionError), memory_efficient(model, checkpointing=True):
        assert computes_again()
        raise ZeroDivisionError
    assert not computes_again()
    assert torch.equal(model(**batch(family)).loss, before)


def test_checkpointing_of_the_models_owner_stays() -> None:
    model = build("llama")
    # the name that transformers has from 5.24 on, or the one before
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with memory_efficient(model, checkpointing=False):
        pass
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_model_that_cannot_compute_again_is_refused() -> None:
    model = build("llama")
    type(model).supports_gradient_checkpointing = False
    try:
        with (
            pytest.raises(InputError, match="gradient_checkpointing: LlamaForCausalLM has none"),
            memory_efficient(model, checkpointing=True),
        ):
            raise AssertionError("was entered")
    finally:
        del type(model).supports_gradient_checkpointing


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
