"""Linear layers whose weights are kept in 8 or 4 bits and are whole only while they are used.

* nf4: 4-bit NormalFloat in blocks of 64 weights, whose largest magnitudes are themselves kept in 8 bits
  (Dettmers et al., "QLoRA", 2023, Sections 3.1 and 3.2: double quantisation): 4.13 bits a weight.
* int8: each row is scaled by its largest magnitude (Dettmers et al., "LLM.int8()", 2022, Eq. 4): 8 bits.

bitsandbytes makes the bits and reads them, so they are the ones of its own layers. The layer here differs
from those in what is computed with them: the weights are widened to the dtype of the input and multiplied, in
training and in evaluation, on a CPU and on a GPU. bitsandbytes' own layers take another path for each of
these four, some with 8-bit activations, so that no score would be that of the model that was trained.

What is quantised are the linear layers of the blocks, always on the CPU, so that all sides of a federation
hold the same bits. Embeddings, norms, biases, experts that a family keeps in one tensor, and heads stay.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.mapped import unread

BLOCK, NESTED = 64, 256  # weights with a scale, and scales with one
PIECE = 1 << 20  # weights of 8 bits that are widened at a time where the result is narrower than float32


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight, (out, in), is kept in few bits.

    Args:
        linear: What it stands for; its bias is taken over as it is.
        kind: nf4, fp4 or int8.
        dtype: Of `weight` where it is asked for.
        bits: The parameters that hold it, by name: `packed`, `absmax`, and with double quantisation
            `absmax_scale` and `absmax_offset`.
        block: Weights with a scale, of 4 bits.

    Attributes:
        transposed: Whether `linear` keeps its weight as (in, out), as GPT-2 does.
    """

    def __init__(
        self, linear: nn.Module, kind: str, dtype: torch.dtype, bits: dict[str, Tensor], block: int = BLOCK
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape_of(linear)
        self.kind, self.dtype, self.block = kind, dtype, block
        self.transposed = isinstance(linear, Conv1D)
        self.register_parameter("bias", cast("nn.Parameter | None", linear.bias))
        for name, tensor in bits.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # whoever asks gets it whole
        """The weight, (out, in), made anew each time."""
        return self.widened(self.dtype)

    @property
    def qweight(self) -> Tensor:
        """What PEFT asks for a layer's device before it asks for `weight`, 18 times a layer."""
        return self.get_parameter("packed")

    def bits(self) -> dict[str, Tensor]:
        """What the weight is kept in, by name: other tensors at another time where weights are offloaded."""
        return {name: tensor.data for name, tensor in _bits(self)}

    def widened(self, dtype: torch.dtype, bits: dict[str, Tensor] | None = None) -> Tensor:
        """The weight in a dtype, from `bits` that were taken before, or from what is held now."""
        bits = self.bits() if bits is None else bits
        packed, absmax = bits["packed"], bits["absmax"]
        if self.kind == "int8":
            return _widened_rows(packed, absmax, dtype)
        ops = torch.ops.bitsandbytes
        if absmax.dtype == torch.uint8:
            scale, offset = bits["absmax_scale"], bits["absmax_offset"]
            code = _nested_code(absmax.device)
            absmax = ops.dequantize_blockwise(absmax, scale, code, NESTED, torch.float32).add_(offset)
        shape = (self.out_features, self.in_features)
        return cast(Tensor, ops.dequantize_4bit(packed, absmax, self.block, self.kind, shape, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X Wᵀ + b."""
        # The bias by an operation of PyTorch's own, which just-in-time weights see.
        bias = None if self.bias is None else self.bias.view_as(self.bias)
        return cast(Tensor, _Product.apply(x, bias, self))

    def extra_repr(self) -> str:
        """As PyTorch prints it."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


class _Product(torch.autograd.Function):
    """X Wᵀ + b; the backward pass widens W once more, from the same bits, rather than keep it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.bits = layer, layer.bits()
        return nn.functional.linear(x, layer.widened(x.dtype, ctx.bits), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        for_x, for_bias = ctx.needs_input_grad[:2]
        return (
            gradient.matmul(ctx.layer.widened(gradient.dtype, ctx.bits)) if for_x else None,
            gradient.reshape(-1, gradient.shape[-1]).sum(0) if for_bias else None,
            None,
        )


def quantize(model: nn.Module, kind: str, name: str) -> None:
    """Quantises the linear layers of a model's blocks, in place; on torch's meta device their shapes alone.

    A weight goes as soon as its bits are there, and its pages with it where it is mapped from a file. What
    stays whole is copied first, so that each such file goes with the last weight of it.

    Args:
        model: On the CPU or the meta device, as it was loaded.
        kind: nf4 or int8.
        name: The model's, for errors.

    Raises:
        InputError: bitsandbytes is missing, or the blocks have no linear layers.
    """
    require_bitsandbytes(f"model.quantization: {kind}")
    linear: dict[int, nn.Module] = {}
    for block in find_blocks(model).modules:
        for module in block.modules():
            if type(module) is nn.Linear or isinstance(module, Conv1D):
                linear[id(module)] = module
    if not linear:
        raise InputError(
            f"model.quantization: {kind} is for linear layers, and the blocks of model {name} "
            f"({type(model).__name__}) have none; set model.quantization to none"
        )
    weights = {id(module.weight) for module in linear.values()}
    for parameter in model.parameters():
        if id(parameter) not in weights:
            copy = parameter.data.clone()
            unread([parameter.data])
            parameter.data = copy
    made: dict[int, QuantizedLinear] = {}
    for key, module in linear.items():
        made[key] = _quantized(module, kind)
        unread([cast(Tensor, module.weight)])
        module.register_parameter("weight", None)
    put(model, made)


def put(model: nn.Module, made: dict[int, QuantizedLinear]) -> None:
    """Puts quantised layers in the places of others, each wherever it is called."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() gives a module once
            if id(child) in made:
                setattr(parent, name, made[id(child)])


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantization_of(model: nn.Module) -> str:
    """How a model's layers are kept: "none", or their kinds."""
    return ", ".join(sorted({layer.kind for layer in quantized_layers(model).values()})) or "none"


def quantized_sha256(model: nn.Module) -> str:
    """SHA-256 of the bits that quantised layers keep, in the order of their names; "" if there are none."""
    layers, digest = quantized_layers(model), hashlib.sha256()
    for path, layer in sorted(layers.items()):
        for name, tensor in sorted(_bits(layer)):
            digest.update(f"{path}.{name} {layer.kind} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if layers else ""


def quantized_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What quantised layers keep, scales included; of layers of another package too."""
    own = [p for layer in quantized_layers(model).values() for _, p in _bits(layer)]
    packed = [
        parameter
        for layer in packed_layers(model)
        for name, parameter in layer.named_parameters(recurse=False)
        if name != "bias"
    ]
    return [*own, *packed, *_foreign(model)]


def held_by_others(model: nn.Module) -> bool:
    """Whether another package holds weights of a model in forms that it alone can copy and widen."""
    return bool(packed_layers(model) or _foreign(model))


def _foreign(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not type(p).__module__.startswith("torch.")]


def packed_layers(model: nn.Module) -> list[nn.Module]:
    """Layers of another package that keep whole numbers, which it alone can widen."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, QuantizedLinear)
        and (
            hasattr(module, "qweight")
            or any(not p.is_floating_point() for p in module.parameters(recurse=False))
        )
    ]


def weight_count(model: nn.Module) -> int:
    """How many parameters a model has, tied ones once; of quantised layers what they stand for."""
    layers = quantized_layers(model).values()
    kept = {id(parameter) for layer in layers for _, parameter in _bits(layer)}
    stood_for = sum(layer.in_features * layer.out_features for layer in layers)
    return stood_for + sum(p.numel() for p in model.parameters() if id(p) not in kept)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state as if nothing were quantised: whole weights, under the names that they had."""
    state, layers = model.state_dict(), quantized_layers(model)
    for path, layer in layers.items():
        for name, _ in _bits(layer):
            del state[f"{path}.{name}"]
        weight = layer.weight
        state[f"{path}.weight"] = weight.t().contiguous() if layer.transposed else weight
    return {name: whole(tensor) for name, tensor in state.items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is; of those that packages keep in few bits what they stand for."""
    own = type(tensor).__module__.partition(".")[0] == "torch"
    return tensor if own or not hasattr(tensor, "dequantize") else tensor.dequantize()


def describe(model: nn.Module) -> str:
    """What of a model is quantised, for a person; "" if nothing is."""
    layers = quantized_layers(model)
    if not layers:
        return ""
    kept, whole = sum(m.in_features * m.out_features for m in layers.values()), weight_count(model)
    bits = sum(tensor.nbytes for layer in layers.values() for _, tensor in _bits(layer))
    said = (
        f"{kept:,} of the model's {whole:,} weights are held in {quantization_of(model)}, in {bits:,} bytes, "
        "and stay as they are"
    )
    around = {id(p) for module in layers.values() for p in module.parameters()}
    inside = sum(p.numel() for b in find_blocks(model).modules for p in b.parameters() if id(p) not in around)
    if inside > kept / 10:
        said += f"; {inside:,} weights of its blocks are in no linear layers, and so not quantised"
    return said


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return cast(nn.Linear, linear).out_features, cast(nn.Linear, linear).in_features


def shapes_of(weight: Tensor, kind: str, *, nested: bool = True) -> dict[str, Tensor]:
    """The parameters of a quantised layer without values, on the meta device.

    Args:
        weight: Of the shape of the weight that it stands for.
        kind: nf4, fp4 or int8.
        nested: Whether the scales of 4 bits are quantised too.
    """

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if kind == "int8":
        return {
            "packed": empty(*weight.shape, dtype=torch.int8),
            "absmax": empty(weight.shape[0], dtype=torch.float32),
        }
    scales = -(-weight.numel() // BLOCK)
    bits = {
        "packed": empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8),
        "absmax": empty(scales, dtype=torch.uint8 if nested else torch.float32),
    }
    if nested:
        bits |= {
            "absmax_scale": empty(-(-scales // NESTED), dtype=torch.float32),
            "absmax_offset": empty(dtype=torch.float32),
        }
    return bits


def require_bitsandbytes(what: str) -> None:
    """Imports the package, whose operations PyTorch then knows. Raises InputError where it is missing."""
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{what} needs bitsandbytes; pip install 'fedtune[quant]'")
    importlib.import_module("bitsandbytes")


def _quantized(linear: nn.Module, kind: str) -> QuantizedLinear:
    weight = cast(Tensor, linear.weight).detach()
    weight = weight.t().contiguous() if isinstance(linear, Conv1D) else weight
    if weight.is_meta:
        return QuantizedLinear(linear, kind, weight.dtype, shapes_of(weight, kind))
    functional = importlib.import_module("bitsandbytes").functional
    if kind == "int8":
        packed, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        return QuantizedLinear(linear, kind, weight.dtype, {"packed": packed, "absmax": absmax})
    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=True, quant_type=kind
    )
    return QuantizedLinear(linear, kind, weight.dtype, of_state(packed, state))


def of_state(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """The parameters of a layer from what bitsandbytes keeps of its 4 bits."""
    bits = {"packed": packed.view(torch.uint8), "absmax": state.absmax}
    if state.nested:
        bits |= {"absmax_scale": state.state2.absmax, "absmax_offset": state.offset.reshape(())}
    return bits


def _bits(layer: QuantizedLinear) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, tensor) for name, tensor in layer.named_parameters() if name != "bias")


def _widened_rows(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Int8 rows times their scales / 127; narrower than float32 it is rounded once, some rows at a time."""
    scale = absmax.mul(1.0 / 127.0).unsqueeze(1)
    if dtype == torch.float32:
        return packed.to(dtype).mul_(scale)
    wide = torch.empty_like(packed, dtype=dtype)
    rows = max(1, PIECE // packed.shape[1])
    pieces = range(0, packed.shape[0], rows)
    for at in pieces[:1] if isinstance(wide, FakeTensor) else pieces:  # of a plan one says all
        wide[at : at + rows] = packed[at : at + rows].to(torch.float32).mul_(scale[at : at + rows])
    return wide


@cache
def _nested_code(device: torch.device) -> Tensor:
    """The 256 numbers that 8 bits stand for in scales of scales."""
    return cast(Tensor, importlib.import_module("bitsandbytes").functional.create_dynamic_map().to(device))
