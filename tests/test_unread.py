"""What is mapped from files leaves a process's memory where it is not needed, and comes back as it was."""

from __future__ import annotations

import importlib
import mmap
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.core.store import Store
from fedtune.core.types import Payload
from fedtune.models.mapped import unread
from fedtune.models.quantize import quantize

on_linux = pytest.mark.skipif(
    not Path("/proc/self/smaps").is_file(), reason="asks Linux for a process's memory"
)


def resident(file: Path) -> int:
    """Bytes of a file's maps that are in this process's memory."""
    found, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_file = line.endswith(str(file))
        elif of_file and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@on_linux
def test_what_a_client_holds_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    """4 MB, all of them looked at; left is a page at each end of a tensor, which others may share."""
    came = {name: torch.randn(500, 1000) for name in ("v", "w")} | {"few": torch.ones(3)}
    store = Store(tmp_path)
    key = store.put(Payload({name: tensor.clone() for name, tensor in came.items()}))
    found = store.get(key)
    assert found is not None
    part, file = found.tensors["w"][3:100, 5:7], tmp_path / f"{key}.safetensors"  # as a model has it
    wanted = part.clone()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in came.items())
    assert resident(file) >= 4_000_000
    store.unread(key)
    assert resident(file) <= 8 * mmap.PAGESIZE
    assert torch.equal(part, wanted)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in came.items())


def test_what_is_in_memory_alone_stays_there() -> None:
    store, wanted = Store(), torch.arange(100_000.0)
    key = store.put(Payload({"w": wanted.clone()}))
    store.unread(key)
    store.unread("another")
    found = store.get(key)
    assert found is not None
    held = found.tensors["w"]
    unread([torch.empty(3, device="meta"), held[::2], held])
    assert torch.equal(held, wanted)


@on_linux
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs fedtune[quant]")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_that_are_quantised_take_their_pages_along(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map of a file is there until its last weight goes; what was read of it is not."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
    )
    made = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept, file = dict(made.named_parameters()), tmp_path / "model.safetensors"
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    assert resident(file) >= sum(parameter.nbytes for parameter in model.parameters())
    functional, seen, left = importlib.import_module("bitsandbytes").functional, list[int](), list[int]()
    name = "quantize_4bit" if kind == "nf4" else "int8_vectorwise_quant"
    quantized = getattr(functional, name)

    def looked(weight: Tensor, *given: Any, **more: Any) -> Any:
        seen.append(resident(file))
        left.append(weight.numel() * 2)
        return quantized(weight, *given, **more)

    monkeypatch.setattr(functional, name, looked)
    quantize(model, kind, "tiny")
    ends = 2 * mmap.PAGESIZE * len(kept)
    for number, there in enumerate(seen):  # those that are still to come
        assert there <= sum(left[number:]) + ends
    assert len(seen) == 21 and ends < sum(left) / 8
    for path, parameter in model.named_parameters():  # nothing that stays was on the pages that went
        assert ("layers" in path and "norm" not in path) or torch.equal(parameter, kept[path])
