"""A language model's loss without its logits: labelled positions only, some of them at a time.

The logits are one number a position and word, and the usual loss makes three copies of all of them. Here
what a family does behind its body (the head, and whatever becomes of the logits) is run for a few positions,
whose loss and gradient are taken at once, and whose logits are then forgotten. What the backward pass finds
is the gradient of the hidden states, and of the head where that trains. Nothing is computed twice.

No family is known by name. Its own `forward` is run with its body's output cut to no position at all, and
inside it, where it asks for the loss, once more for each piece, with that piece as the body's output. So a
family's scaling or capping of logits, a LoRA in the head, and a router's loss that is added behind are all
its own code.

The numbers are those of the model's own loss but for the order of sums: of the loss over pieces; of the
head's gradient, in float32 at least. A row of a matrix product may be rounded otherwise beside fewer others.
A loss that is not of this kind (a classifier's; of a family that computes it itself) is the model's own:
`is_lean`. So is that of a batch with few logits, whose pieces would cost more time than they save memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from fedtune.data.batches import index_of
from fedtune.data.encoded import IGNORED
from fedtune.models.memory_efficient import base_model

ROWS = 256  # positions at a time: a matrix product of fewer is slower, and more sums of the head's gradient
ELEMENTS = 2**24  # logits at a time, where the head does not train
FEW = 2**20  # logits of a batch that are left to the model's own loss
Summed = Callable[[Tensor, slice], Tensor]


def batch_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, whole: bool = False, labels: Tensor | None = None
) -> Tensor:
    """`model(**batch).loss`, a scalar, with a gradient where that is enabled.

    Its backward pass can be run once. Keys and values are not cached.

    Args:
        model: Any model of transformers, wrapped by PEFT or not.
        batch: `input_ids`, `attention_mask` and `labels`, as `collate` makes them, and `position_ids` of rows
            of several examples.
        whole: Run the head once, on all labelled positions: for weights that cost time when they are used.
        labels: The batch's, on the host. With them a GPU is not waited for to find the labelled positions.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return cast(Tensor, outputs(model, batch).loss)
    with without_cache(base):
        if not is_lean(base) or _few(base, batch):
            return cast(Tensor, outputs(model, batch).loss)
        head = Head(base, whole=whole, labels=labels)
        with head.apart(), _replaced(base, "_loss_function", head.loss):
            return cast(Tensor, outputs(model, batch).loss)


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What a model makes of a batch, labels or none.

    Of rows of several examples it is given no mask and caches nothing: only then does transformers make a
    mask from positions that begin again, in which each token sees its own example alone.
    """
    if "position_ids" not in batch:
        return model(**batch)
    with _replaced(base_model(model).config, "use_cache", False):
        return model(**{name: tensor for name, tensor in batch.items() if name != "attention_mask"})


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a model of transformers, wrapped by PEFT or not, keeps no keys and values of what it reads."""
    base = base_model(model)
    with _replaced(base.config, "use_cache", False) if isinstance(base, PreTrainedModel) else nullcontext():
        yield


def vocabulary(base: PreTrainedModel) -> int:
    """Logits of a position."""
    return int(base.config.get_text_config().vocab_size)


def _few(base: PreTrainedModel, batch: Mapping[str, Tensor]) -> bool:
    """Whether all logits of a batch are so few that pieces save nothing."""
    return batch["input_ids"].numel() * vocabulary(base) <= FEW


def is_lean(base: PreTrainedModel) -> bool:
    """Whether a model's loss can be taken in pieces: the usual one of a causal model, behind a body."""
    forward: Any = inspect.unwrap(type(base).forward)
    asks = "loss_function" in forward.__code__.co_names
    return asks and base.loss_function is ForCausalLMLoss and base.get_decoder() is not base


class Head:
    """What a causal language model does behind its body, for some positions at a time.

    Attributes:
        hidden: What the body gave last, (batch, tokens, width), while `apart`; None if it was not asked.
        parameters: What trains outside the body, the head's weight among it where that does.
    """

    def __init__(self, base: PreTrainedModel, *, whole: bool = False, labels: Tensor | None = None) -> None:
        self._base, self._body, self._whole = base, cast(nn.Module, base.get_decoder()), whole
        self._labels = labels
        inside = set(self._body.modules())
        outside = (module for module in base.modules() if module not in inside)
        trained = (p for m in outside for p in m.parameters(recurse=False) if p.requires_grad)
        self.parameters = list(dict.fromkeys(trained))
        self.hidden: Tensor | None = None
        self._output: type[ModelOutput] | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the body's output is put aside in `hidden`, and the model goes on with no position."""
        body = self._body.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = body(*args, **kwargs)
            if isinstance(out, ModelOutput):
                self._output, self.hidden = type(out), out["last_hidden_state"]
                out["last_hidden_state"] = out["last_hidden_state"][:, :0]
            return out

        with _replaced(self._body, "forward", forward):
            yield

    def logits(self, rows: Tensor) -> Tensor:
        """The logits (rows, vocabulary) of hidden states (rows, width) of the body that was asked last.

        Where the model gave its logits whole, for its body was not asked, `rows` are of those.
        """
        output = self._output
        if output is None:
            return rows
        with _replaced(self._body, "forward", lambda *_, **__: output(last_hidden_state=rows[None])):
            ids = torch.zeros((1, len(rows)), dtype=torch.long, device=rows.device)
            return cast(Tensor, self._base.forward(input_ids=ids).logits)[0]

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        """Mean cross-entropy of each token given those before it; in the place of the model's own.

        Args:
            logits: None are left, unless the body was not asked the usual way; then they are used.
            labels: (batch, tokens), not shifted; IGNORED where no loss is taken.
            vocab_size: The vocabulary.
            more: What else the model's own gets.
        """
        if self.hidden is None:
            return ForCausalLMLoss(logits, labels, vocab_size, **more)
        device = self.hidden.device
        if self._labels is not None and labels.device != self._labels.device:
            before = labels.shape[1] - self._labels.shape[1]  # a soft prompt's, which carry no loss
            labels = F.pad(self._labels, (before, 0), value=IGNORED)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        counted = (targets != IGNORED).nonzero()[:, 0]
        targets, counted = (t.to(device, non_blocking=True) for t in (targets[counted], counted))
        rows = self.hidden.flatten(0, 1)[counted]
        self.hidden = None
        most = max(1, min(ROWS, ELEMENTS // vocab_size))
        if self._whole:
            summed = partial(_cross_entropy, targets)
            return in_pieces(summed, self.logits(rows), [], most) / len(targets)
        size = ROWS if self.parameters else most
        return in_pieces(
            lambda some, at: _cross_entropy(targets, self.logits(some), at), rows, self.parameters, size
        ) / len(targets)


def ends(model: nn.Module, inputs: Mapping[str, Tensor], chosen: Tensor) -> tuple[Head, Tensor]:
    """The model up to its head, and what `Head.logits` makes logits of. Keys and values are not cached.

    Args:
        model: As in `batch_loss`.
        inputs: A batch without labels.
        chosen: Which positions, boolean (batch, tokens), best on the host (`index_of`); a soft prompt's,
            which come before, are not counted.

    Returns:
        The head, and hidden states (chosen, width).
    """
    base = base_model(model)
    head = Head(base)
    apart = head.apart() if is_lean(base) and not _few(base, inputs) else nullcontext()
    with without_cache(base), apart:
        whole = outputs(model, inputs).logits
    whole, head.hidden = whole if head.hidden is None else head.hidden, None
    return head, whole[:, -chosen.shape[1] :][index_of(chosen, whole.device)]


def in_pieces(summed: Summed, rows: Tensor, parameters: Sequence[Tensor], size: int) -> Tensor:
    """Σ `summed(rows[at], at)` over pieces `at` of so many rows; gradients are taken piece by piece too.

    Args:
        summed: A sum over rows, from rows (some, width), a leaf, and which they are.
        rows: (rows, width).
        parameters: Whose gradients are wanted beside that of `rows`; all else counts as constant.
        size: Rows of a piece.
    """
    pieces = [slice(at, at + size) for at in range(0, len(rows), size)]
    if torch.is_grad_enabled() and (rows.requires_grad or parameters):
        total: Tensor = _Pieces.apply(summed, pieces, rows, *parameters)
        return total
    zero = rows.new_zeros((), dtype=_wide(rows.dtype))
    return sum((summed(rows[at], at) for at in pieces), zero)


class _Pieces(torch.autograd.Function):
    """The sum, whose gradient is known when its value is."""

    @staticmethod
    def forward(ctx: Any, summed: Summed, pieces: list[slice], rows: Tensor, *parameters: Tensor) -> Tensor:
        total = rows.new_zeros((), dtype=_wide(rows.dtype))
        of_rows = torch.empty_like(rows) if rows.requires_grad else None
        sums: list[Tensor | None] = [None] * len(parameters)
        for at in pieces:
            piece = rows[at].detach().requires_grad_()
            with torch.enable_grad():
                value = summed(piece, at)
            total += value.detach()
            found = torch.autograd.grad(value, [piece, *parameters], allow_unused=True)
            if of_rows is not None:
                of_rows[at] = found[0]
            for place, more in enumerate(found[1:]):
                known = sums[place]
                if known is None:
                    # of one piece it is the gradient; a sum of several is not to lose what it adds
                    sums[place] = more if more is None or len(pieces) == 1 else more.to(_wide(more.dtype))
                elif more is not None:
                    known += more
        ctx.gradients = (
            of_rows,
            *(s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()  # scaled where they lie: the graph is good for one pass
        return None, None, *(None if each is None else each.mul_(slope) for each in gradients)


def _cross_entropy(targets: Tensor, logits: Tensor, at: slice) -> Tensor:
    loss: Tensor = _CrossEntropy.apply(logits, targets[at])
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Σ −log softmax(logits)[target], in float32 or wider; its gradient takes the logarithms' place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logs = logits.to(_wide(logits.dtype)).log_softmax(-1)
        ctx.save_for_backward(logs, targets)
        ctx.dtype = logits.dtype
        return -logs.gather(1, targets[:, None]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        logs, targets = ctx.saved_tensors
        gradient = logs.exp_().scatter_add_(1, targets[:, None], logs.new_full((len(targets), 1), -1.0))
        return gradient.mul_(slope).to(ctx.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the owner's own attribute is `value`."""
    own = vars(owner)
    before, had = own.get(name), name in own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
