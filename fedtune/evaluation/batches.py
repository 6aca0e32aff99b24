"""How many examples are put to a model at once: as many as memory has room for, like lengths together.

What a batch takes beside the weights is estimated from the model's shape, by token and by pair of tokens of
which one sees the other; `tests/test_evaluation_memory.py` holds the estimates against what is measured.
Scores do not depend on the cut but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fedtune.models.context import virtual_tokens
from fedtune.models.lean_loss import ROWS, is_lean, vocabulary
from fedtune.models.memory_efficient import base_model

WIDEST, WIDTH = 5, 2  # so many of a block's widest activations and of its inputs are alive at once
SCORES = 16  # bytes of a head's pair of tokens, where attention is computed as written
LOGIT = 12  # bytes: as it comes, in float32, and its logarithm
DRAWN = 6 * 8  # bytes of a logit that a token is drawn from: six copies in float64
HEAD_SHARE = 4  # logits get one part of the memory in so many


@dataclass(frozen=True)
class Room:
    """What a batch may take beside the weights, and what it takes, about.

    Attributes:
        memory: Bytes that it may take.
        row: Bytes that an example of so many tokens takes.
    """

    memory: int
    row: Callable[[int], float]

    def rows(self, tokens: int) -> int:
        """How many examples of so many tokens fit; one is tried in any case."""
        return max(1, int(self.memory / max(self.row(tokens), 1.0)))

    def largest(self, batches: Iterable[list[int]], lengths: Sequence[int]) -> list[int]:
        """The batch of `cut` that takes most; empty without any."""
        return max(batches, key=lambda places: len(places) * self.row(lengths[places[0]]), default=[])


def cut(lengths: Sequence[int], most: int, room: Room | None) -> Iterator[list[int]]:
    """The places of each batch: longest first, those of equal length in their order.

    What does not fit in memory so shows at once.

    Args:
        lengths: Tokens of each example.
        most: Examples a batch, at most.
        room: None: there is enough for `most`.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        size = most if room is None else min(most, room.rows(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def head_rows(model: nn.Module, memory: int) -> int:
    """Positions whose logits are made at once."""
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return ROWS
    return max(1, min(ROWS, memory // (HEAD_SHARE * LOGIT * vocabulary(base))))


def scoring_room(model: nn.Module, memory: int) -> Room:
    """For a forward pass that keeps nothing; logits come after, `head_rows` at a time."""
    base = base_model(model)
    token, pair = _activations(base)
    causal = isinstance(base, PreTrainedModel) and base.get_output_embeddings() is not None
    if causal and not is_lean(base):  # logits of all positions, and those of the labelled ones once more
        token += 2 * _itemsize(base) * vocabulary(base)
    soft = virtual_tokens(model)
    return Room(memory, lambda tokens: token * (tokens + soft) + pair * (tokens + soft) ** 2)


def answering_room(model: nn.Module, memory: int, new: int, *, whole: bool, drawn: bool) -> Room:
    """For answers to prompts, with the keys and values of both.

    Args:
        model: Who answers.
        memory: Bytes.
        new: The most tokens of an answer.
        whole: The family gives the logits of all positions of a prompt.
        drawn: Tokens are drawn.
    """
    base = base_model(model)
    token, pair = _activations(base)
    kept = words = 0
    if isinstance(base, PreTrainedModel):
        shape, words = base.config.get_text_config(), vocabulary(base)
        heads = _number(shape, "num_attention_heads", 1)
        width = _number(shape, "head_dim", _number(shape, "hidden_size", 1) // heads)
        layers = _number(shape, "num_hidden_layers", 1) + 1  # one is written anew with each token
        kept = 2 * _itemsize(base) * layers * width * _number(shape, "num_key_value_heads", heads)
    logit, soft = DRAWN if drawn else LOGIT, virtual_tokens(model)

    def row(tokens: int) -> float:
        seen = tokens + soft
        logits = words * (logit + (_itemsize(base) * seen if whole else 0))
        return (token + kept) * seen + pair * seen**2 + kept * new + logits

    return Room(memory, row)


def _activations(base: nn.Module) -> tuple[float, float]:
    """Bytes that a forward pass takes by token, and by pair of tokens."""
    if not isinstance(base, PreTrainedModel):
        return 0.0, 0.0
    shape, size = base.config.get_text_config(), _itemsize(base)
    words = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)}
    blocks = [p.shape[-2:] for p in base.parameters() if p.dim() > 1 and id(p) not in words]
    head = base.get_output_embeddings()
    widest = max((max(s) for s in blocks if head is None or vocabulary(base) not in s), default=1)
    times = max(_number(shape, "num_experts_per_tok", 1), _number(shape, "state_size", 1))
    width = _number(shape, "hidden_size", widest)
    pair = size + 1.0  # masks
    if getattr(base.config, "_attn_implementation", "eager") == "eager":
        pair += SCORES * _number(shape, "num_attention_heads", 1)
    return size * (WIDEST * widest * times + WIDTH * width), pair


def _itemsize(base: nn.Module) -> int:
    return max((p.element_size() for p in base.parameters() if p.is_floating_point()), default=4)


def _number(shape: Any, name: str, default: int) -> int:
    found = getattr(shape, name, None)
    return found if isinstance(found, int) and found > 0 else default
