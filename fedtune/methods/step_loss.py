"""The loss of a step: the mean over all its trained tokens, whatever batches they come in.

A model gives the mean of one batch. Where several make a step, each counts by its trained tokens, so that
how the step is cut into batches changes nothing but the rounding. A trained token is a label that carries
loss; of a classifier it is an example. What a model adds to its loss that belongs to the batch as a whole
(a router's balance, a z-loss) is weighted the same way: once a step, as the mean of what the batches give.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune.core.cohort import COMPUTED_TOKENS, PADDING_TOKENS, TRAINED_TOKENS
from fedtune.core.types import ClientEnv
from fedtune.data.batches import collate, of_one_size, on_device, trained_labels
from fedtune.data.encoded import Encoded
from fedtune.models.context import has_prefix, virtual_tokens
from fedtune.models.lean_loss import batch_loss
from fedtune.models.text_to_image import PRIOR, TextToImage, text_to_image

Batch = Mapping[str, Tensor]


@dataclass
class TokenMean:
    """A mean over trained tokens, put together from means over some of them.

    Attributes:
        total: Σ mean · tokens.
        tokens: Σ tokens; with epochs a token counts as often as it was trained on.
        computed: Tokens of the batches that they are in, those without a label and padding included.
        padding: Of these, padding.
    """

    total: float = 0.0
    tokens: int = 0
    computed: int = 0
    padding: int = 0

    def add(self, mean: float, tokens: int, batch: Batch) -> None:
        """Takes in the mean over so many tokens of a batch."""
        self.total += mean * tokens
        self.tokens += tokens
        self.computed += batch["input_ids"].numel()
        self.padding += batch["attention_mask"].numel() - int(batch["attention_mask"].sum())

    def join(self, other: TokenMean) -> None:
        """Takes in another's tokens."""
        self.total += other.total
        self.tokens += other.tokens
        self.computed += other.computed
        self.padding += other.padding

    @property
    def value(self) -> float | None:
        """The mean; None where no token was trained on."""
        return self.total / self.tokens if self.tokens else None

    @property
    def metrics(self) -> dict[str, float]:
        """What a client reports of it: `train_loss`, where there is one, and the three counts of tokens."""
        value = self.value
        return ({} if value is None else {"train_loss": value}) | {
            TRAINED_TOKENS: self.tokens,
            COMPUTED_TOKENS: self.computed,
            PADDING_TOKENS: self.padding,
        }


@dataclass(frozen=True)
class StepBatches:
    """The batches of one step that have something to train, on the host, and the trained tokens of each."""

    batches: Sequence[Batch]
    tokens: Sequence[int]

    @staticmethod
    def of(model: nn.Module, batches: Iterable[Batch]) -> StepBatches:
        """Counts the trained tokens; a batch without one is left out."""
        counted = [(batch, trained_tokens(model, batch)) for batch in batches]
        kept = [pair for pair in counted if pair[1]]
        return StepBatches([batch for batch, _ in kept], [tokens for _, tokens in kept])

    @property
    def size(self) -> int:
        """Elements of the largest, padding included, for the account of memory."""
        return max((batch["input_ids"].numel() for batch in self.batches), default=0)

    @property
    def form(self) -> Hashable:
        """What a step's memory depends on of them: shapes, trained tokens, and whether there is padding."""
        return tuple(map(form_of, self.batches, self.tokens))


def form_of(batch: Batch, tokens: int) -> Hashable:
    """What memory depends on of one batch with so many trained tokens."""
    shapes = tuple((name, tensor.shape) for name, tensor in batch.items())
    return shapes, tokens, bool(batch["attention_mask"].all())


def drawn(env: ClientEnv, group: Iterable[Sequence[int]], step: int) -> StepBatches:
    """The batches of one of a client's steps, from the indices of its rows.

    What a text-to-image model's loss needs beside the examples (noise, time steps) is drawn here, from the
    client's stream of this round and step. Pictures of several sizes are a batch each.
    """
    parts = [some for part in group for some in of_one_size([env.rows[i] for i in part])]
    batches = [collate(some, env.pad_id) for some in parts]
    pipeline = text_to_image(env.model)
    if pipeline is not None:
        generator = env.generator("noise", step)
        batches = [batch | pipeline.draws(batch["pixels"], generator) for batch in batches]
        if others := getattr(env.items, "of_class", ()):
            generator = env.generator("prior", step)
            batches = [batch | _prior(pipeline, others, batch, generator, env.pad_id) for batch in batches]
    return StepBatches.of(env.model, batches)


def _prior(
    pipeline: TextToImage, others: Sequence[Encoded], batch: Batch, generator: torch.Generator, pad_id: int
) -> dict[str, Tensor]:
    """As many pictures of the class as a batch has of its own, with what is drawn for them."""
    places = torch.randint(len(others), (len(batch["pixels"]),), generator=generator).tolist()
    beside = collate([others[i] for i in places], pad_id)
    drawn = {**beside, **pipeline.draws(beside["pixels"], generator)}
    return {f"{PRIOR}{name}": tensor for name, tensor in drawn.items()}


def trained_tokens(model: nn.Module, batch: Batch) -> int:
    """Labels of a batch that carry loss in this model; of a classifier its examples."""
    # behind a soft prompt the text's first token is predicted too
    return trained_labels(batch["labels"], first=bool(virtual_tokens(model)) and not has_prefix(model))


def add_gradient(model: nn.Module, step: StepBatches, device: torch.device) -> TokenMean:
    """Adds the gradient of the step's loss to the parameters' `.grad`, one batch on the device at a time.

    On a GPU the host waits once a step, for the losses of all batches together.

    Returns:
        The step's loss; NaN or infinite where that of a batch is.
    """
    total, means = sum(step.tokens), list[Tensor]()
    for batch, tokens in zip(step.batches, step.tokens, strict=True):
        mean = batch_loss(model, on_device(batch, device), labels=batch["labels"])
        (mean / (total / tokens)).backward()  # one batch, or n alike: divided by 1 or n, to the bit
        means.append(mean.detach().flatten())
    loss, values = TokenMean(), torch.cat(means).tolist() if means else []
    for value, tokens, batch in zip(values, step.tokens, step.batches, strict=True):
        loss.add(value, tokens, batch)
    return loss
