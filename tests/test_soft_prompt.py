"""A soft prompt and texts of unlike lengths in one batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_families import DECODERS, ENCODERS, wake
from peft import PeftModel
from torch import nn

from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.models.tuning import attach_p_tuning, attach_prompt

TEXTS = [[5, 9, 11, 20, 30, 7, 8], [5, 40], [6, 7, 8, 9]]
FAMILIES = {**{name: DECODERS[name] for name in DECODERS}, **ENCODERS}


def classifier(family: str) -> Any:
    config = copy.deepcopy(FAMILIES[family])
    config.num_labels = 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    wake(model)
    return model.eval()


def logits(model: nn.Module, texts: list[list[int]]) -> torch.Tensor:
    batch = collate([Encoded(tuple(text), (0,)) for text in texts], pad_id=0)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("attach", [attach_prompt, attach_p_tuning])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_texts_class_does_not_depend_on_the_others_of_its_batch(
    family: str, attach: Any, tmp_path: Path
) -> None:
    more = {"hidden": 8} if attach is attach_p_tuning else {}
    model = attach(classifier(family), tokens=3, seed=0, **more).eval()
    alone = torch.cat([logits(model, [text]) for text in TEXTS])
    assert float(alone.std(dim=0).min()) > 1e-3  # the texts matter
    torch.testing.assert_close(logits(model, TEXTS), alone, rtol=1e-4, atol=1e-5)
    # a text alone is what PEFT gives without any of our work
    model.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(classifier(family), str(tmp_path)).eval()
    torch.testing.assert_close(torch.cat([logits(plain, [text]) for text in TEXTS]), alone)
