"""The batch of evaluation that needs most, without values: the runs' own code, for its peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fedtune.config.evaluation import Evaluation
from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.evaluation.batches import cut, head_rows, scoring_room
from fedtune.evaluation.likelihoods import class_losses, token_losses
from fedtune.planning.fake import values
from fedtune.planning.memory import PartsMeter


def evaluation_step(
    models: Iterable[nn.Module], items: Sequence[Encoded], settings: Evaluation, *, classes: bool
) -> PartsMeter:
    """Losses of held-out examples, or their classes.

    Args:
        models: Of fake tensors, in eval mode: those that a run scores.
        items: The held-out examples.
        settings: How they are put to a model.
        classes: The models are classifiers.
    """
    meter, memory = PartsMeter(), settings.memory_bytes
    lengths = [len(item.input_ids) for item in items]
    for model in models:
        room, rows = scoring_room(model, memory), head_rows(model, memory)
        largest = room.largest(cut(lengths, settings.batch_size, room), lengths)
        if not largest:
            continue
        batch = collate([items[place] for place in largest], 0)
        with values(), torch.no_grad(), meter.whole([model]):
            if classes:
                class_losses(model, batch)
            else:
                token_losses(model, batch, rows)
    return meter
