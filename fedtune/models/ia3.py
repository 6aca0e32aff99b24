"""(IA)³ (Liu et al. 2022): trained factors of keys, values and feed-forward networks' inner activations.

    l_k ∘ k,  l_v ∘ v           what a layer gives, a factor for each of its outputs
    W₂ (l_ff ∘ γ(W₁ x))         what goes into a feed-forward network's last layer

All begin at 1, so the model starts as it was. A layer that gives query, key and value at once has factors for
all three (PEFT does the same); experts that are one parameter have none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from peft import IA3Config, PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks, find_feed_forward
from fedtune.models.lora_targets import find_targets, in_block, matched, tunable_layers
from fedtune.models.quantize import whole
from fedtune.models.wrapping import attach, task_type

# What gives queries alone, or takes the result back: it has no factors.
_QUERY_OR_OUT = re.compile(
    "^(q|q_.*|query|query_proj|wq|o|o_.*|out|out_.*|wo|dense|c_proj|post_proj|linear_out)$"
)


def attach_ia3(model: PreTrainedModel, *, targets: Sequence[str] | None, seed: int) -> PeftModel:
    """Adds factors to linear layers, in place.

    Args:
        targets: Names of linear layers, matched as the end of a module's path; those that are the last of a
            feed-forward network have them on their input. None: PEFT's choice for the architecture, else keys
            and values, or what holds them, and the feed-forward networks' last layers.
        seed: What a classification head is drawn from; factors begin at 1.

    Raises:
        InputError: A name matches no linear layer, or none is found.
    """
    linears = tunable_layers(model)
    last = list(dict.fromkeys(filter(None, map(_last, find_blocks(model).modules))))
    kind = model.config.model_type
    theirs = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if targets is not None:
        chosen = find_targets(model, list(targets), setting="method.ia3.targets")
        inside = [end for end in chosen if any(f".{path}".endswith(f".{end}") for path in last)]
    elif theirs and all(matched(linears, [end]) for end in theirs):
        chosen, inside = list(theirs), list(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind])
    else:
        mixing = find_targets(model, "attention", setting="method.ia3.targets")
        chosen = [path for path in mixing if not _QUERY_OR_OUT.match(_name(path))]
        inside = [path for path in last if matched(linears, [path])]
        chosen += inside
    if not chosen:
        raise InputError(
            f'method.ia3.targets: no keys and values are found in a model of type "{kind}"; name some of its '
            f"linear layers: {', '.join(dict.fromkeys(map(in_block, linears)))}"
        )
    config = IA3Config(
        task_type=task_type(model),
        target_modules=chosen,
        feedforward_modules=inside,
        fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears.values()),
    )
    return attach(model, config, seed)


def scaled_tensors(layer: IA3Layer) -> dict[str, Tensor]:
    """A layer's weight and bias with its factors in them, float32, by their names in it."""
    module, base = cast(nn.Module, layer), layer.get_base_layer()
    factors = module.get_parameter("ia3_l.default").detach().float().flatten()
    weight = whole(cast(Tensor, base.weight)).detach().float()
    bias = cast("Tensor | None", base.bias)
    transposed = isinstance(base, Conv1D)  # GPT-2 keeps its weights (in x out)
    if bool(layer.is_feedforward) != transposed:
        weight = weight * factors
    else:
        weight = weight * factors[:, None]
    if getattr(base, "transposed", False):
        weight = weight.T.contiguous()  # a quantised layer widens to (out, in)
    if bias is None or layer.is_feedforward:
        return {"weight": weight}
    return {"weight": weight, "bias": bias.detach().float() * factors}


def _last(block: nn.Module) -> str:
    """The last layer of a block's feed-forward network by its path inside it; "" where that is none alone."""
    try:
        linears = find_feed_forward(block).linears
    except InputError:
        return ""
    return list(linears)[-1] if linears else ""


def _name(path: str) -> str:
    """A layer's own name, in lower case; of BERT's attention.output.dense "out"."""
    around, _, name = path.rpartition(".")
    return "out" if around.rpartition(".")[2] == "output" else name.lower()
