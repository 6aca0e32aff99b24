"""Batches: padding, and the order in which examples are seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedtune.data.encoded import IGNORED, Encoded

ALIKE = 100  # batches that are sorted by length together: more leave hardly less padding, and less to chance


def collate(items: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Pads encoded examples on the right into one batch.

    The attention mask is made from lengths, not by comparing with `pad_id`: many tokenizers pad with their
    end-of-sequence token, which must stay visible where it ends an answer.

    Args:
        items: At least one encoded example, all for the same task; or all are rows of several.
        pad_id: The token id that fills `input_ids`.

    Returns:
        int64 tensors `input_ids` and `attention_mask`, (batch, tokens), and `labels`: (batch, tokens) padded
        with -100 for a causal model, (batch,) for classification, where an example has one label. Of rows
        also `position_ids`, (batch, tokens), which begin at 0 with each example, and with the padding. Of
        pictures also `pixels`, uint8 (batch, 3, height, width).

    Raises:
        ValueError: `items` is empty, or of both kinds.
    """
    if not items:
        raise ValueError("collate needs at least one example")
    if len({bool(item.parts) for item in items}) > 1:
        raise ValueError("collate needs examples or rows of them, got both")
    width = max(len(item.input_ids) for item in items)
    label_width = max(len(item.labels) for item in items)
    labels = torch.tensor([_padded(item.labels, label_width, IGNORED) for item in items])
    places = {}
    if items[0].parts:
        each = ((*item.parts, width - len(item.input_ids)) for item in items)
        places["position_ids"] = torch.tensor([[at for part in row for at in range(part)] for row in each])
    if getattr(items[0], "pixels", None) is not None:
        places["pixels"] = torch.stack([item.pixels for item in items])  # type: ignore[attr-defined]
    return {
        "input_ids": torch.tensor([_padded(item.input_ids, width, pad_id) for item in items]),
        "attention_mask": torch.tensor([_padded((1,) * len(item.input_ids), width, 0) for item in items]),
        "labels": labels.squeeze(1) if label_width == 1 else labels,
        **places,
    }


def of_one_size(items: Sequence[Encoded]) -> list[list[Encoded]]:
    """The items in lists that `collate` takes: pictures of one size each; texts are all in one."""
    found: dict[tuple[int, ...], list[Encoded]] = {}
    for item in items:
        pixels = getattr(item, "pixels", None)
        found.setdefault(() if pixels is None else tuple(pixels.shape), []).append(item)
    return list(found.values())


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch of the host on a device; on a CPU the same tensors.

    To a GPU it goes from pinned memory, and nobody waits: a plain copy waits until all that the GPU was told
    before is done. Whoever needs a number of a batch, such as its labels that carry loss, asks the host's.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def index_of(mask: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """What picks from a tensor on a device where a mask on the host is true.

    A mask on a GPU would have the host wait until it is known how many are picked.

    Args:
        mask: Boolean.
        device: Where the tensor is whose leading dimensions are the mask's.

    Returns:
        The mask itself if it is there already, else places, one tensor (picked) for each of its dimensions.
    """
    if mask.device == device:
        return (mask,)
    return tuple(places.to(device, non_blocking=True) for places in mask.nonzero(as_tuple=True))


def trained_labels(labels: Tensor, *, first: bool = False) -> int:
    """How many labels of a batch carry loss.

    Args:
        labels: As `collate` gives them. Of a causal model's rows the first label does not count, since
            nothing comes before it; a class, (batch, 1) or (batch), does.
        first: The first does count, for a model that puts a soft prompt before the text.
    """
    # a causal example of one token has no label (`encode_causal`), so a single column is of classes
    if labels.ndim == 2 and labels.shape[1] > 1 and not first:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def epoch_batches(
    n: int, batch_size: int, generator: torch.Generator, lengths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yields one shuffled pass over 0..n-1 in batches; one of them, the last of a random pass, may be short.

    Args:
        n: The number of examples.
        batch_size: Examples a batch.
        generator: A CPU generator; one permutation is drawn when the pass starts, and with `lengths` another.
        lengths: Tokens of each example. Then examples of like length share a batch: the shuffled ones are
            sorted by length, `ALIKE` batches' worth of them at a time, cut, and the batches shuffled.

    Raises:
        ValueError: `n` or `batch_size` is under 1.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    order = torch.randperm(n, generator=generator).tolist()
    if lengths is None:
        yield from (order[start : start + batch_size] for start in range(0, n, batch_size))
        return
    window = ALIKE * batch_size
    order = [
        i for at in range(0, n, window) for i in sorted(order[at : at + window], key=lengths.__getitem__)
    ]
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def endless_batches(
    n: int, batch_size: int, generator: torch.Generator, lengths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yields `epoch_batches` again and again, shuffled anew each pass. Arguments and errors are the same."""
    while True:
        yield from epoch_batches(n, batch_size, generator, lengths)


def padding(batches: Iterable[Sequence[int]], lengths: Sequence[int]) -> tuple[int, int]:
    """Tokens of batches: those that are computed, padding among them, and those that are padding."""
    computed = own = 0
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        computed, own = computed + len(sizes) * max(sizes), own + sum(sizes)
    return computed, computed - own


def _padded(values: tuple[int, ...], width: int, fill: int) -> tuple[int, ...]:
    return values + (fill,) * (width - len(values))
