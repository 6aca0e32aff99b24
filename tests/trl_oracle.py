"""TRL's loss of a batch, for tests that hold ours to it; skips where TRL is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedtune.models.load import load_model
from fedtune.models.lora import attach_lora


def loss_of_trl(
    kind: str, rows: Sequence[dict[str, Any]], out: Path, **settings: float
) -> tuple[nn.Module, dict[str, Any], float]:
    """The bundled model with factors that are not 0, TRL's first batch of the rows, and its loss.

    Args:
        kind: What stands before `Config` and `Trainer`: DPO or KTO.
        rows: Pairs, or answers that were judged; eight are taken.
        out: A folder of its own.
        settings: Of its configuration.
    """
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    loaded = load_model("bundled", dtype="float32", initial="pretrained", seed=0, base=Path("."))
    model = attach_lora(loaded.model, rank=2, alpha=4.0, dropout=0.0, targets="auto", seed=0)
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(out),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=8,
        bf16=False,
        **settings,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(rows[:8])),
        processing_class=loaded.tokenizer,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # TRL has a copy of the adapter as it began, B = 0
        if ".lora_B.default." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    return model, batch, float(trainer.compute_loss(model, dict(batch)))
