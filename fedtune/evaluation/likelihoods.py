"""Losses and likelihoods of tokens, and losses of classes, of one batch.

The head is run on the positions that are asked for, some of them at a time: whole logits never exist, unless
the family has no body to ask for (`lean_loss.is_lean`). What a batch took is gone when its numbers are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.data.batches import collate, index_of, on_device
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.evaluation.batches import cut, head_rows, scoring_room
from fedtune.models.lean_loss import ends, without_cache
from fedtune.models.memory_efficient import base_model

Found = TypeVar("Found")
Watched = Callable[[str, int, int], AbstractContextManager[None]]


def example_losses(
    model: nn.Module,
    items: Sequence[Encoded],
    *,
    batch_size: int,
    memory: int,
    pad_id: int,
    classes: bool = False,
    watched: Watched = lambda kind, rows, tokens: nullcontext(),
) -> tuple[list[float], list[int]]:
    """Of each example, in the order given, what `token_losses` or `class_losses` finds.

    Args:
        model: In eval mode, where no gradients are taken.
        items: Encoded examples.
        batch_size: Examples a batch, at most.
        memory: Bytes that a batch may take beside the weights, about.
        pad_id: A token id.
        classes: The model is a classifier.
        watched: Entered around each batch, with its kind, its examples and the tokens of the longest.
    """
    lengths, rows = [len(item.input_ids) for item in items], head_rows(model, memory)
    losses, counts = [0.0] * len(items), [0] * len(items)
    for places in cut(lengths, batch_size, scoring_room(model, memory)):
        batch = collate([items[p] for p in places], pad_id)
        with watched("classes" if classes else "loss", *batch["input_ids"].shape):
            found = class_losses(model, batch) if classes else token_losses(model, batch, rows)
        for place, loss, count in zip(places, *found, strict=True):
            losses[place], counts[place] = loss, count
    return losses, counts


def token_losses(model: nn.Module, batch: Mapping[str, Tensor], rows: int) -> tuple[list[float], list[int]]:
    """Of each example the sum of its tokens' losses in nats, and how many tokens carry loss.

    On a GPU the host waits once a batch.

    Args:
        model: A causal language model, wrapped by PEFT or not.
        batch: `input_ids`, `attention_mask` and `labels`, as `collate` makes them, on the host.
        rows: Positions whose logits are made at once.
    """
    device = next(model.parameters()).device
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs = on_device({name: value for name, value in batch.items() if name != "labels"}, device)
    chosen = targets != IGNORED
    wanted, counts = targets[chosen].to(device, non_blocking=True), chosen.sum(1).tolist()
    found = _of_pieces(model, inputs, chosen, rows, lambda logits, at: _losses(logits, wanted[at]))
    losses = torch.cat(found).cpu() if found else torch.zeros(0)
    return [float(part.sum()) for part in losses.split(counts)], counts


def class_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
    """A classifier's loss on each example, and the class of its highest output; else as `token_losses`."""
    device = next(model.parameters()).device
    moved = on_device(batch, device)
    inputs = {name: value for name, value in moved.items() if name != "labels"}
    with without_cache(model):
        logits = model(**inputs).logits
    return _losses(logits, moved["labels"]).tolist(), logits.argmax(-1).tolist()


def likelihoods(
    model: nn.Module, ids: Tensor, asked: Sequence[Sequence[tuple[int, Sequence[int]]]], rows: int
) -> list[list[tuple[float, bool]]]:
    """Of texts that may follow: the sum of their tokens' log-probabilities, and if all are the likeliest.

    Args:
        model: As for `token_losses`.
        ids: (batch, tokens), padded on the right, which no position before sees; on the host.
        asked: Of each row its texts: the position whose output predicts the first token, and the tokens.
        rows: Positions whose logits are made at once.

    Returns:
        As `asked`. Logarithms and sums are of the dtype of the logits.
    """
    texts = [(row, first, tokens) for row, several in enumerate(asked) for first, tokens in several]
    chosen = torch.zeros(ids.shape, dtype=torch.bool)
    for row, first, tokens in texts:
        chosen[row, first : first + len(tokens)] = True
    numbers = (chosen.flatten().cumsum(0) - 1).view(chosen.shape)  # of a position among the chosen ones
    where = torch.cat([numbers[row, first : first + len(tokens)] for row, first, tokens in texts])
    wanted = torch.tensor([token for _, _, tokens in texts for token in tokens])

    def take(logits: Tensor, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        own = ((where >= at.start) & (where < at.stop)).nonzero()[:, 0]
        logs, place, token = logits.log_softmax(-1), where[own] - at.start, wanted[own]
        there = [index.to(device, non_blocking=True) for index in (place, token)]
        return own, logs[there[0], there[1]].cpu(), logs.argmax(-1).cpu()[place] == token

    device = next(model.parameters()).device
    found = _of_pieces(model, {"input_ids": ids.to(device, non_blocking=True)}, chosen, rows, take)
    logs = torch.empty(len(where), dtype=found[0][1].dtype)
    likeliest = torch.empty(len(where), dtype=torch.bool)
    for own, some, same in found:
        logs[own], likeliest[own] = some, same
    lengths = [len(tokens) for _, _, tokens in texts]
    each = zip(logs.split(lengths), likeliest.split(lengths), strict=True)
    answers = iter([(float(some.sum()), bool(same.all())) for some, same in each])
    return [[next(answers) for _ in several] for several in asked]


def option_likelihoods(
    model: nn.Module,
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int,
    memory: int,
    watched: Watched = lambda kind, rows, tokens: nullcontext(),
) -> list[tuple[float, bool]]:
    """What `likelihoods` finds of each text after its own context.

    Those that differ in their last token alone are read once.

    Args:
        model: As for `token_losses`.
        asked: Token ids of a context and of the text that may follow; neither is empty.
        batch_size: Contexts a batch, at most.
        memory: Bytes that a batch may take beside the weights, about.
        watched: As of `example_losses`.
    """
    read = dict[tuple[int, ...], list[int]]()
    for place, (context, option) in enumerate(asked):
        read.setdefault((*context, *option)[:-1], []).append(place)
    inputs, answers = list(read), [(0.0, False)] * len(asked)
    lengths = [len(each) for each in inputs]
    rows, room = head_rows(model, memory), scoring_room(model, memory)
    for batch in cut(lengths, batch_size, room):
        width = lengths[batch[0]]
        padded = [inputs[at] + (0,) * (width - lengths[at]) for at in batch]
        options = [[asked[place][1] for place in read[inputs[at]]] for at in batch]
        wanted = [
            [(lengths[at] - len(option), option) for option in each]
            for at, each in zip(batch, options, strict=True)
        ]
        with watched("options", len(batch), width):
            found = likelihoods(model, torch.tensor(padded), wanted, rows)
        for at, each in zip(batch, found, strict=True):
            for place, answer in zip(read[inputs[at]], each, strict=True):
                answers[place] = answer
    return answers


def _of_pieces(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    chosen: Tensor,
    rows: int,
    take: Callable[[Tensor, slice], Found],
) -> list[Found]:
    """What `take` makes of each piece of the chosen positions: its logits and its place."""
    if isinstance(base_model(model), PreTrainedModel):
        head, hidden = ends(model, inputs, chosen)
        return [take(head.logits(hidden[at]), at) for at in _slices(len(hidden), rows)]
    whole = model(**inputs).logits
    logits = whole[:, -chosen.shape[1] :][index_of(chosen, whole.device)]
    return [take(logits[at], at) for at in _slices(len(logits), rows)]


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies in float64, so that how the set was cut into batches does not show in their sum."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none").double()
