"""LoRA: low-rank updates of linear layers (Hu et al. 2022), and their published forms.

    W + s B A          s = alpha / rank, or alpha / √rank (rsLoRA, Kalajdzievski 2023)   `attach_lora`
    m (W + s B A) / ‖W + s B A‖, a norm a row            (DoRA, Liu et al. 2024, eq. 5)
    W + s (B A − B₀ A₀)                                                                  `_begin_at`

The last is PiSSA (Meng et al. 2024), where B₀ A₀ are the r largest singular parts of W, and OLoRA
(Büyükakyüz 2024), where they are the first r columns of W's QR decomposition. Both train from B₀, A₀ on
top of the rest, W − s B₀ A₀.

Deviation: W stays as it is, and −s B₀ A₀ is a second, frozen half of the factors. So all clients share one
base in memory, nothing is rounded to a bfloat16 base's precision, and what is saved is plain LoRA of rank
2r on the model that everybody has, with the bits of what ran. B₀ and A₀ are computed in float64 and rounded
to bfloat16's eight bits, so that all sides of a federation have the same ones, however their linear algebra
rounds; what that rounding leaves stays in the rest. Dropout drops inputs of both halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.lora_targets import Targets, find_targets, taken_past, tunable_layers
from fedtune.models.quantize import whole
from fedtune.models.wrapping import attach, task_type

Start = Literal["default", "pissa", "olora"]
Bias = Literal["none", "all", "lora_only"]
_WHOLE = 1024  # up to this width a singular value decomposition is computed whole
_MORE, _POWERS = 8, 8  # beyond it: columns beside the rank, and times that the weight is applied


@dataclass(frozen=True)
class LoraForm:
    """What LoRA is beside its rank, see the module's text.

    Attributes:
        dora: Train the rows' lengths apart.
        rslora: Scale by alpha / √rank.
        start: What the factors begin as: A drawn and B 0, or parts of the weight.
        whole: Modules that are trained whole, as ends of paths.
        bias: Which biases train: none, all of the model's, or those of the layers that have LoRA.
    """

    dora: bool = False
    rslora: bool = False
    start: Start = "default"
    whole: tuple[str, ...] = ()
    bias: Bias = "none"


PLAIN = LoraForm()


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Targets,
    seed: int,
    layers: Sequence[int] | None = None,
    form: LoraForm = PLAIN,
) -> PeftModel:
    """Adds low-rank updates W + (alpha / rank) B A (Hu et al. 2022, eq. 3) to linear layers.

    A is drawn from `seed`, B is 0, so the model starts as it was.

    Args:
        rank: Columns of B.
        alpha: The update's scale is alpha / rank.
        dropout: On the input of A while training. torch draws it from its global generator.
        targets: Which linear layers, see lora_targets.py.
        seed: What A is drawn from.
        layers: The blocks that get it, counted from 0; None: all.
        form: Other forms of LoRA.

    Raises:
        InputError: A name in `targets` matches no linear layer, or there is none that LoRA can be on; a
            module to be trained whole is not there, or the form does not go with the model.
    """
    linears = tunable_layers(model)
    _require_modules(model, form.whole)
    config = LoraConfig(
        task_type=task_type(model),
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=dropout,
        target_modules=find_targets(model, targets, layers),
        fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears.values()),
        use_dora=form.dora,
        use_rslora=form.rslora,
        bias=form.bias,
    )
    before = {id(p) for p in model.parameters()}
    wrapped = attach(model, config, seed, form.whole)
    if form.bias != "none" and not any(p.requires_grad and id(p) in before for p in wrapped.parameters()):
        raise InputError(
            f"method.lora.bias {form.bias}: {type(model).__name__} has no such biases; set it to none"
        )
    for path in lora_layers(wrapped):
        where, _, name = path.rpartition(".")
        around = wrapped.get_base_model().get_submodule(where)
        if taken_past(around, name):
            around.register_forward_pre_hook(_unfused)
    if form.start != "default":
        for path, layer in lora_layers(wrapped).items():
            _begin_at(form.start, path, layer, rank)
    return wrapped


def _unfused(module: nn.Module, args: tuple[object, ...]) -> None:
    """Mamba's kernels for training take a layer's weight past LoRA; those for use call the layer."""
    module.training = False  # it has no dropout, and what is inside it keeps its own mode


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """LoRA layers by the module name that `trainable` gives their factors."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


class _Down(nn.Linear):
    """A with the frozen A₀ below it: (batch, tokens, in) to (batch, tokens, 2 rank)."""

    start: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.cat([self.weight, self.start]))


class _Up(nn.Linear):
    """B with the frozen −B₀ beside it: (batch, tokens, 2 rank) to (batch, tokens, out)."""

    start: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.cat([self.weight, self.start], dim=1))


def joined_factors(layer: LoraLayer) -> tuple[Tensor, Tensor] | None:
    """[A; A₀] and [B | −B₀] of a layer that began at parts of its weight; None of others."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if not (isinstance(a, _Down) and isinstance(b, _Up)):
        return None
    return torch.cat([a.weight, a.start]).detach(), torch.cat([b.weight, b.start], dim=1).detach()


def joined_rank(model: nn.Module) -> int:
    """The rank of joined factors, which is twice what is trained; 0 where LoRA began with B at 0."""
    joined = map(joined_factors, lora_layers(model).values())
    return next((len(a) for a, _ in filter(None, joined)), 0)


def delta_weight(layer: LoraLayer) -> Tensor:
    """What LoRA adds to a layer's weight, in that one's shape, float32; DoRA also scales the sum."""
    joined = joined_factors(layer)
    if joined is None:
        return cast(Linear, layer).get_delta_weight("default").float()
    a, b = joined
    delta = float(layer.scaling["default"]) * (b @ a)
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def lora_parameter(layer: LoraLayer) -> str:
    """The name of the parameter that LoRA is on: a layer's weight, or one that holds all experts' weights."""
    return str(getattr(layer, "parameter_name", "weight"))


def merged_weight(layer: LoraLayer) -> Tensor:
    """A layer's weight with LoRA in it, in its own shape, float32; of a quantised one what it stands for."""
    module, base = cast(nn.Module, layer), layer.get_base_layer()
    weight = whole(getattr(base, lora_parameter(layer))).detach().float() + delta_weight(layer)
    if not layer.use_dora.get("default"):
        return weight.T.contiguous() if getattr(base, "transposed", False) else weight
    magnitude = module.get_parameter("lora_magnitude_vector.default.weight").detach().float()
    rows = 0 if getattr(layer, "fan_in_fan_out", False) else 1  # GPT-2 keeps its weights (in x out)
    norms = weight.norm(dim=rows, keepdim=True)
    return weight * (magnitude.unsqueeze(rows) / norms)


def _begin_at(start: str, path: str, layer: LoraLayer, rank: int) -> None:
    """Makes B₀ and A₀ of a layer's weight the factors' start, and −s B₀ A₀ their frozen half."""
    weight = whole(getattr(layer.get_base_layer(), lora_parameter(layer))).detach()
    if getattr(layer, "fan_in_fan_out", False):
        weight = weight.T
    if rank > min(weight.shape):
        raise InputError(
            f"method.lora.rank: with init {start} at most {min(weight.shape)}, the rank of {path}, got {rank}"
        )
    old_a, old_b = (cast(nn.Linear, held["default"]) for held in (layer.lora_A, layer.lora_B))
    down = _Down(old_a.in_features, rank, bias=False, device="meta")
    up = _Up(rank, old_b.out_features, bias=False, device="meta")
    down.weight, up.weight = old_a.weight, old_b.weight
    if weight.is_meta or isinstance(weight, FakeTensor):  # a plan: shapes count
        a, b = old_a.weight.detach().clone(), old_b.weight.detach().clone()
    else:
        found = _singular(weight.double(), rank) if start == "pissa" else _orthogonal(weight.double(), rank)
        size = float(layer.scaling["default"]) ** 0.5 if start == "pissa" else 1.0
        a, b = ((t / size).to(torch.bfloat16).float().contiguous() for t in found)
        with torch.no_grad():
            down.weight.copy_(a)
            up.weight.copy_(b)
    down.register_buffer("start", a, persistent=False)
    up.register_buffer("start", -b, persistent=False)
    layer.lora_A["default"], layer.lora_B["default"] = down, up


def _singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A₀ = √S Vᵀ (rank x in) and B₀ = U √S (out x rank) of the largest singular values."""
    if min(weight.shape) <= _WHOLE:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:  # subspace iteration (Halko et al. 2011, algorithm 4.4)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(weight.shape[1], rank + _MORE, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(weight @ drawn.to(weight.device)).Q
        for _ in range(_POWERS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        u = basis @ u
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:rank]
    largest = v.abs().argmax(1, keepdim=True)  # a singular vector's sign is anybody's choice
    sign = v.gather(1, largest).sign()
    return s[:, None] * v * sign, u * s * sign.T


def _orthogonal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A₀: the first rows of R (rank x in), B₀: the first columns of Q (out x rank), R's diagonal above 0."""
    q, r = torch.linalg.qr(weight[:, : min(weight.shape)])
    q = q[:, :rank] * torch.where(r.diagonal()[:rank] < 0, -1.0, 1.0)
    return q.T @ weight, q


def _require_modules(model: PreTrainedModel, whole: Sequence[str]) -> None:
    """Raises InputError if a module that is to be trained whole is not there, or cannot be trained apart."""
    blocks = find_blocks(model).path
    weighty = [
        path
        for path, module in model.named_modules()
        if path and not path.startswith(blocks) and any(True for _ in module.parameters(recurse=False))
    ]
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    for name in whole:
        found = [path for path in weighty if path == name or path.endswith(f".{name}")]
        if not found:
            raise InputError(
                f'method.lora.modules_to_save: no module around the blocks is named "{name}"; there are '
                f"{', '.join(weighty)}"
            )
        if tied and any(model.get_submodule(path) in (inputs, outputs) for path in found):
            raise InputError(
                f"method.lora.modules_to_save: {found[0]} shares its weight with the other end of "
                f"{type(model).__name__}, and only one of the two would be trained; leave it out"
            )
