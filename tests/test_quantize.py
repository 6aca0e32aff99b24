"""Quantised linear layers: the bits that bitsandbytes makes, read and computed with as worked out by hand."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from model_families import ATTACH, DECODERS, DTYPES, FAMILIES, batch, build, wake
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models import quantize as quantize_module
from fedtune.models.blocks import find_blocks, linear_layers
from fedtune.models.ia3 import attach_ia3, scaled_tensors
from fedtune.models.lora import LoraForm, attach_lora, joined_factors, lora_layers
from fedtune.models.memory_efficient import computed_again
from fedtune.models.offload import offloaded
from fedtune.models.quantize import (
    QuantizedLinear,
    plain_state,
    quantization_of,
    quantize,
    quantized_layers,
    quantized_sha256,
)
from fedtune.models.tuning import count_parameters, train_all, trainable

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs fedtune[quant]")

# QLoRA, appendix E
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)
ADDED = [name for name in ATTACH if name != "full"]


def model_of(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """One block with one linear layer."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    if bias is not None:
        linear.bias.data = bias.clone()
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"linear": linear})])})


def quantised(weight: Tensor, kind: str, bias: Tensor | None = None) -> QuantizedLinear:
    model = model_of(weight, bias)
    quantize(model, kind, "tiny")
    return quantized_layers(model)["blocks.0.linear"]


def test_four_bits_are_the_nearest_levels_of_each_64_weights() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    layer = quantised(weight, "nf4")
    packed = layer.get_parameter("packed").numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(6, 64)  # the high half first
    largest = weight.abs().amax(dim=1, keepdim=True).numpy()
    distance = np.abs(weight.numpy()[..., None] / largest[..., None] - LEVELS)
    assert (codes == distance.argmin(-1)).all()
    bits = {name: p.dtype for name, p in layer.named_parameters()}
    assert bits == {
        "packed": torch.uint8,
        "absmax": torch.uint8,
        "absmax_scale": torch.float32,
        "absmax_offset": torch.float32,
    }
    # the scales are quantised too: less their mean, in 8 bits of the largest among them
    scales = layer.weight.numpy() / np.where(LEVELS[codes] == 0, 1, LEVELS[codes])
    kept = np.array([row[codes[i] != 7].mean() for i, row in enumerate(scales)])
    assert kept == pytest.approx(largest[:, 0], abs=float(np.abs(largest - largest.mean()).max()) / 50)
    assert np.allclose(layer.weight.numpy(), LEVELS[codes] * kept[:, None], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_shares_of_each_rows_largest(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 8.0, -4.0, 2.0]], dtype=dtype)
    layer = quantised(weight, "int8")
    assert layer.get_parameter("packed").tolist() == [[127, -64, 32, 0], [0, 127, -64, 32]]
    assert layer.get_parameter("absmax").tolist() == [1.0, 8.0]
    exact = torch.tensor([[127, -64, 32, 0], [0, 127 * 8, -64 * 8, 32 * 8]]) / 127
    assert torch.allclose(layer.weight.float(), exact.to(dtype).float(), rtol=1e-6)
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (130, 66)])
def test_forward_and_backward_are_those_of_the_widened_weight(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    layer = quantised(weight.to(dtype), kind, bias.to(dtype))
    plain = nn.Linear(shape[1], shape[0], dtype=dtype)
    plain.weight.data, plain.bias.data = layer.weight, bias.to(dtype)
    x = torch.randn(2, 3, shape[1], generator=generator).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(ours), plain(theirs)
    assert torch.equal(out, expected)
    weights = torch.randn(out.shape, generator=generator).to(dtype)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "bias")


def test_a_bias_can_train() -> None:
    layer = quantised(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), "nf4", torch.zeros(4))
    layer(torch.ones(3, 8)).sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [3.0] * 4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_is_the_plain_one_with_its_widened_weights(family: str, kind: str) -> None:
    plain, model = build(family), build(family)
    names = {
        f"{find_blocks(plain).path}.{index}.{path}"
        for index, block in enumerate(find_blocks(plain).modules)
        for path in linear_layers(block)
    }
    quantize(model, kind, family)
    assert quantized_layers(model).keys() == names and quantization_of(model) == kind
    assert count_parameters(model).total == count_parameters(plain).total
    before = plain(**batch(family)).logits
    plain.load_state_dict(plain_state(model))
    found, wanted = model(**batch(family)).logits, plain(**batch(family)).logits
    if any(layer.transposed for layer in quantized_layers(model).values()):
        torch.testing.assert_close(found, wanted)  # the plain one multiplies by the transpose
    else:
        assert torch.equal(found, wanted)
    assert not torch.equal(found, before)  # something was lost


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bloom"])
def test_what_is_added_trains_as_on_the_widened_weights(family: str, form: str) -> None:
    quantised_model = build(family)
    quantize(quantised_model, "nf4", family)
    plain = build(family)
    plain.load_state_dict(plain_state(quantised_model))
    gradients = []
    for base in (quantised_model, plain):
        model = ATTACH[form](base, 5)
        wake(model)
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(**batch(family)).loss.backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def both(family: str, kind: str) -> tuple[Any, Any]:
    """A quantised model, and the plain one with its widened weights."""
    quantised_model, plain = build(family), build(family)
    quantize(quantised_model, kind, family)
    plain.load_state_dict(plain_state(quantised_model))
    return quantised_model, plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_begins_at_parts_of_the_widened_weight(family: str, start: Any, kind: str) -> None:
    factors = []
    for base in both(family, kind):
        how: dict[str, Any] = {"rank": 2, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
        layers = lora_layers(attach_lora(base, **how, form=LoraForm(start=start)))
        factors.append([tensor for layer in layers.values() for tensor in joined_factors(layer) or ()])
    assert factors[0]
    for pair in zip(
        *factors, strict=True
    ):  # what lies in memory otherwise may round to the next of eight bits
        torch.testing.assert_close(*pair, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_go_into_the_widened_weights(family: str, kind: str) -> None:
    """As (IA)³'s are merged where a checkpoint came quantised."""
    found = []
    for base in both(family, kind):
        model = attach_ia3(base, targets=None, seed=5)
        wake(model)
        layers = [module for module in model.modules() if isinstance(module, IA3Layer)]
        found.append([tensor for layer in layers for tensor in scaled_tensors(layer).values()])
    assert found[0] and all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("again", ["none", "full"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bits_that_are_on_disk_between_the_passes_give_the_same_step(
    family: str, kind: str, again: str
) -> None:
    """The backward pass of a block comes when its module holds its bits no more."""
    found = []
    for where in ("none", "disk"):
        model: Any = ATTACH["lora"](both(family, kind)[0], 5)
        wake(model)
        model.train()
        with torch.random.fork_rng(), computed_again(model, again), offloaded(model, where):
            torch.manual_seed(0)
            model(**batch(family)).loss.backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("family", DECODERS)
def test_what_moves_in_forward_passes_is_what_is_not_quantised(family: str) -> None:
    model = build(family)
    quantize(model, "nf4", family)
    kept = {id(p) for layer in quantized_layers(model).values() for p in layer.parameters()}
    biases = {id(layer.bias) for layer in quantized_layers(model).values() if layer.bias is not None}
    moved = {id(p) for p in trainable(train_all(model)).values()}
    assert moved == {id(p) for p in model.parameters()} - (kept - biases)


def test_threads_change_no_bit() -> None:
    threads, digests = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for kind in ("nf4", "int8"):
                weight = torch.randn(300, 600, generator=torch.Generator().manual_seed(3)).bfloat16()
                model = model_of(weight)
                quantize(model, kind, "tiny")
                widened = quantized_layers(model)["blocks.0.linear"].widened(torch.bfloat16)
                digests.add((kind, quantized_sha256(model), float(widened.double().sum())))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 2


def test_a_digest_knows_bits_names_and_kinds() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    one, other, again = model_of(weight), model_of(weight), model_of(weight)
    quantize(one, "nf4", "tiny")
    quantize(other, "int8", "tiny")
    quantize(again, "nf4", "tiny")
    assert quantized_sha256(one) == quantized_sha256(again) != quantized_sha256(other)
    again.get_parameter("blocks.0.linear.packed").data[3] ^= 1
    assert quantized_sha256(one) != quantized_sha256(again)
    assert quantized_sha256(model_of(weight)) == ""


def test_a_layer_that_is_called_in_two_places_is_one() -> None:
    linear = nn.Linear(8, 8)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"a": linear, "b": linear})])})
    quantize(model, "nf4", "tiny")
    block: Any = model["blocks"][0]  # type: ignore[index]
    assert isinstance(block["a"], QuantizedLinear) and block["a"] is block["b"]
    assert copy.deepcopy(model)["blocks"][0]["a"].kind == "nf4"  # type: ignore[index]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_added_widens_few_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of a large model takes a tenth of a second to widen; PEFT asks 21 times where it may."""
    model = build("llama")
    quantize(model, kind, "tiny")
    asked, widened = list[QuantizedLinear](), QuantizedLinear.widened
    monkeypatch.setattr(
        QuantizedLinear, "widened", lambda self, dtype: asked.append(self) or widened(self, dtype)
    )
    ATTACH["lora"](model, 0)
    assert len(asked) == 3 * len(set(asked)) > 0


def test_nothing_to_quantise_is_said() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.LayerNorm(4)])})
    with pytest.raises(InputError, match=r"the blocks of model tiny \(ModuleDict\) have none"):
        quantize(model, "nf4", "tiny")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nf4 needs bitsandbytes; pip install 'fedtune\[quant\]'"):
        quantize(model_of(torch.zeros(2, 2)), "nf4", "tiny")


def test_bitsandbytes_compiles_and_fetches_nothing_as_it_is_imported() -> None:
    """What it would have wrapped by torch.compile is as it was written; PEFT has imported it by now."""
    import bitsandbytes.backends.default.ops as ops

    inside = [cell.cell_contents for cell in ops._dequantize_4bit_compute.__closure__]
    assert inside and all(part is ops._dequantize_4bit_compute.__wrapped__ for part in inside)
    assert torch.compile.__module__ == "torch" and "kernels" not in sys.modules
