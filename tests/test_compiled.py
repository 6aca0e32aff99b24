"""`method.compile`: the same numbers to 1e-5 from compiled blocks, or a refusal that says what is missing."""

from __future__ import annotations

import shutil
from typing import Any

import contract
import pytest
import torch
from contract import FORMS, LORA, Federation, Form
from model_families import build
from torch import nn
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.config.file import parse_config
from fedtune.core.state import to_payload
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.models.blocks import find_blocks
from fedtune.models.compiled import check_compiled, compiled
from fedtune.models.quantize import quantize


def test_training_with_compiled_blocks_ends_where_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, dropout's own random numbers included. Two of the five steps are measured, and so plain."""
    ids = [tuple(3 + (7 * place + at) % 60 for at in range(6)) for place in range(4)]
    monkeypatch.setattr(contract, "examples", lambda family: {0: [Encoded(each, each) for each in ids]})
    monkeypatch.setitem(FORMS["fedavg"], "one block", Form(LORA, blocks=1))
    monkeypatch.setattr(inductor, "compile_threads", 1)  # no processes beside this one
    compile, calls = nn.Module.compile, list[int]()

    def counted(self: nn.Module, **how: Any) -> None:
        compile(self, **how)
        fast: Any = self._compiled_call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return fast(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", counted)
    steps: dict[str, Any] = {"rounds": 1, "local_epochs": None, "local_steps": 5, "batch_size": 2, "lr": 1e-3}
    steps["lora"] = {"rank": 2, "alpha": 4.0, "dropout": 0.3}
    plain = Federation("fedavg", "one block", **steps).run()
    assert not calls
    fast = Federation("fedavg", "one block", **steps, compile=True).run()
    assert len(calls) == 3
    wanted, got = (to_payload(each.state).tensors for each in (plain, fast))
    moved = [float((wanted[n] - plain.saved[0].state.tensors[n]).abs().max()) for n in wanted]
    assert max(moved) > 1e-3
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)
    for block in find_blocks(fast.model).modules:
        assert block._compiled_call_impl is None  # what comes then, evaluation and generation, is as before


def test_blocks_are_plain_where_operations_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()

    def compile(self: nn.Module, **how: Any) -> None:
        assert how == {"dynamic": True, "options": {"fallback_random": True}}
        plain = self._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            said.append("compiled")
            return plain(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile)
    model, ids = build("llama", blocks=1), torch.tensor([[3, 4]])
    for _ in range(2):  # the second time it finds what the first one made
        said.clear()
        with pytest.raises(KeyError), compiled(model, True):
            model(ids)
            with Following():
                model(ids)
            raise KeyError
        assert said == ["compiled"]
        model(ids)
        assert said == ["compiled"]
    with compiled(model, False):
        model(ids)
    assert said == ["compiled"]


class Following(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


def test_without_a_compiler_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", blocks=1)
    check_compiled(model)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"there is no \S+ here\. Install one \(apt install g\+\+"):
        check_compiled(model)


def test_quantised_weights_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    model = build("llama", blocks=1)
    quantize(model, "nf4", "tiny")
    with pytest.raises(InputError, match=r"weights as they are, .* quantised; set it to false"):
        check_compiled(model)


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed-pro", "zero-shot"])
def test_methods_without_gradients_have_no_such_setting(method: str) -> None:
    with pytest.raises(InputError, match=r"method\.compile"):
        parse_config({"method": {"name": method, "compile": True}}, "c.yaml")


@pytest.mark.parametrize("method", ["fedavg", "fedbiot", "fedcybgd", "badam", "centralized"])
def test_methods_with_gradients_have_it_and_not_beside_offloading(method: str) -> None:
    given: dict[str, Any] = {"name": method, "compile": True}
    if method == "fedbiot":
        given["adapter_layers"] = 1
    assert parse_config({"method": given}, "c.yaml").method.compile  # type: ignore[attr-defined]
    given["offload_params"] = "disk"
    if "trainable" in registry.config_class(method).model_fields:
        given["trainable"] = "lora"
    with pytest.raises(InputError, match=r"compile is for weights that stay where they are, .* disk"):
        parse_config({"method": given}, "c.yaml")
