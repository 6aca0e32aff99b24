"""Emulator alignment: an emulator's LoRA is tuned on public data to do what the blocks do that it replaces.

Wu et al., FedBiOT (KDD 2024), section 3.1 step 3 and Eq. 7: for the tokens of the answer,

    ‖E(x) − E*(x)‖² + λ · KL(M(x; A, E*) ‖ M(x; A, E))

E(x) is what enters the adapter's blocks behind the emulator. The paper leaves open how tokens are combined:
here both terms are means over the answer's tokens. With t = E*(x) and s = E(x) the first term is one of

    mean              mean of (t − s)² over tokens and features
    paper             Eq. 7 as printed: its sum over the features, the mean over tokens; width · `mean`
    rms-normalized    mean of ((t − s) / r)², r the root mean square of t: mean square / mean square of t

The last is that of the authors' code, and of Offsite-tuning's before it; both its means are over all tokens,
of prompts too. That code counts padding as well, in both terms; here padding never counts, so that a loss
does not depend on what shares a batch, and the KL is over the answer's tokens in every form.

E* is frozen, so what it makes of a public example is computed once and kept; only the adapter behind it has
to be run again when the adapter has changed. Where blocks of the adapter stand before E* too, what they give
holds as long as they do not change: through one alignment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.data.batches import collate, index_of, on_device, trained_labels
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.errors import FederationError
from fedtune.models.lean_loss import ROWS, Head, ends, in_pieces, outputs

Form = Literal["mean", "paper", "rms-normalized"]
End = tuple[Head, Tensor]


@contextmanager
def entering(block: nn.Module, put: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Inside, what enters `block` is written down, (batch, tokens, width), and replaced by `put` if given."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = args[0] if args else kwargs["hidden_states"]
        seen.append(own)
        if put is None:
            return None
        return ((put, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": put})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def representation_loss(student: Tensor, teacher: Tensor, form: Form) -> Tensor:
    """The first term.

    Args:
        student: E(x) of the tokens that count, (tokens, width).
        teacher: E*(x), likewise.
        form: See the module's text.
    """
    student, teacher = student.float(), teacher.float()
    distance = (student - teacher).square()
    if form == "paper":
        return distance.sum(-1).mean()
    return distance.mean() if form == "mean" else distance.mean() / teacher.square().mean()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student), the mean over tokens in nats; both are logits (tokens, vocabulary)."""
    return _divergences(student, teacher) / len(student)


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="sum", log_target=True
    )


@dataclass
class Teacher:
    """The model with its own blocks, asked for what the emulator should do.

    Attributes:
        model: The whole model; its adapter holds the current weights whenever it is asked.
        tail: The adapter's blocks behind E* alone, with the same weights.
        block, tail_block: The first block behind E* in either.
        room: Bytes that may still be kept.
        kept: E*(x) of the public examples that were used so far, by their index, on the host.
    """

    model: nn.Module
    tail: nn.Module
    block: nn.Module
    tail_block: nn.Module
    room: int
    kept: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def ask(self, indices: Sequence[int], batch: Mapping[str, Tensor]) -> tuple[Tensor, End]:
        """E*(x), and what the head makes the answers' logits of, of a batch of examples with these indices.

        With room, E*(x) of each example is computed from that example alone and the rest from it: so no bit
        depends on what was kept before, and a resumed run, which begins with nothing, ends as it would have.

        Args:
            indices: Which public examples.
            batch: As `collate` makes it of them, on the host.
        """
        device = next(self.model.parameters()).device
        lengths = batch["attention_mask"].sum(1).tolist()
        inputs = on_device({name: value for name, value in batch.items() if name != "labels"}, device)
        answer = predicting(batch["labels"])
        if not self.room and not self.kept:
            with entering(self.block) as seen:
                end = ends(self.model, inputs, answer)
            return seen[0], end
        width = batch["input_ids"].shape[1]
        rows = []
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            alone = {name: value[row : row + 1, :length] for name, value in inputs.items()}
            rows.append(F.pad(self._of(index, alone), (0, 0, 0, width - length)))
        hidden = torch.stack(rows)
        with entering(self.tail_block, hidden):
            return hidden, ends(self.tail, inputs, answer)

    def _of(self, index: int, alone: Mapping[str, Tensor]) -> Tensor:
        """E*(x) of one example, (tokens, width)."""
        if index in self.kept:
            return self.kept[index].to(alone["input_ids"].device, non_blocking=True)
        with entering(self.block) as seen:
            outputs(self.model, alone)
        hidden = seen[0][0].clone()
        if hidden.nbytes <= self.room:
            self.kept[index] = hidden.cpu()
            self.room -= hidden.nbytes
        return hidden

    def forget(self) -> None:
        """Drops what was kept: what stands before E* has changed."""
        self.room += sum(hidden.nbytes for hidden in self.kept.values())
        self.kept.clear()


def align(
    student: nn.Module,
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    teacher: Teacher,
    batches: Iterator[list[int]],
    public: Sequence[Encoded],
    *,
    pad_id: int,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    distill_weight: float,
    form: Form,
) -> float:
    """Tunes `parameters` of the student; returns the mean loss over the steps.

    Args:
        student: The adapter on the emulator.
        block: The student's first block behind the emulator.
        parameters: The emulator's LoRA.
        teacher: The adapter on E*.
        batches: Indices into `public`.
        public: The public examples.
        pad_id: The padding token.
        steps: AdamW steps, with a constant rate and no weight decay.
        lr: Their rate.
        betas: Their momenta.
        distill_weight: λ.
        form: Of the first term.

    Raises:
        FederationError: The loss became NaN or infinite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0)
    total = 0.0
    for step in range(steps):
        indices = next(batches)
        batch = collate([public[i] for i in indices], pad_id)
        if not trained_labels(batch["labels"]):  # no answer to compare on: the step counts nothing
            continue
        hidden, end = teacher.ask(indices, batch)
        loss = alignment_loss(student, block, batch, hidden, end, distill_weight, form)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FederationError(
                f"the alignment loss became {value} at step {step + 1}; lower method.alignment.lr"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += value
    return total / max(steps, 1)


def alignment_loss(
    student: nn.Module,
    block: nn.Module,
    batch: Mapping[str, Tensor],
    hidden: Tensor,
    end: End,
    distill_weight: float,
    form: Form,
) -> Tensor:
    """Eq. 7 on one batch of the host, from what the teacher gave; logits exist for some tokens at a time."""
    answer = predicting(batch["labels"])
    with entering(block) as seen:
        device = next(student.parameters()).device
        inputs = on_device({name: value for name, value in batch.items() if name != "labels"}, device)
        own_head, own = ends(student, inputs, answer)
    counted = batch["attention_mask"].bool() if form == "rms-normalized" else answer
    places = index_of(counted, hidden.device)
    loss = representation_loss(seen[0][places], hidden[places], form)
    if distill_weight:
        head, rows = end

        def summed(some: Tensor, at: slice) -> Tensor:
            with torch.no_grad():
                wanted = head.logits(rows[at])
            return _divergences(own_head.logits(some), wanted)

        loss = loss + distill_weight * in_pieces(summed, own, own_head.parameters, ROWS) / len(own)
    return loss


def predicting(labels: Tensor) -> Tensor:
    """The positions whose output predicts a token of the answer, boolean (batch, tokens)."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))
