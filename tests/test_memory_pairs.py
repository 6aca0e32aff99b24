"""Settings that save memory, together: a run has the bits of the one without them, or is refused.

Each alone is held to its bits where it is told; a pair can be wrong where neither of the two is.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from model_families import save_folder

import fedtune
from fedtune.errors import InputError

WORDS = [f"w{index}" for index in range(4, 64)]
ROWS = [
    {"instruction": " ".join(WORDS[i : i + 6]), "output": " ".join(WORDS[i + 1 : i + 5])} for i in range(12)
]
STEPS: dict[str, Any] = {"rounds": 2, "local_steps": 2, "batch_size": 2, "lr": 0.01}
LORA = {"name": "fedavg", **STEPS, "lora": {"rank": 2, "dropout": 0.5}}
FULL = {"name": "fedavg", **STEPS, "trainable": "full"}
BLOCKS = {"name": "fedcybgd", **STEPS}
EMULATED = {
    "name": "fedbiot",
    **STEPS,
    "adapter_layers": 1,
    "layer_dropout": 0.3,
    "lora": {"rank": 2},
    "alignment": {"steps_before": 2, "steps": 1, "batch_size": 2, "lr": 1e-2},
}
NF4, NARROW = {"model": {"quantization": "nf4"}}, {"model": {"dtype": "bfloat16"}}
PACKED = {"data": {"batching": "packed"}}
# A method and what stands beside it: what a run has with and without the settings below.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora, nf4, packed": (LORA, {**NF4, **PACKED}),
    "lora, accumulated": ({**LORA, "batch_size": 1, "gradient_accumulation": 2}, PACKED),
    "dora, bfloat16": ({**LORA, "lora": {"rank": 2, "use_dora": True}}, NARROW),
    "own parts": ({**LORA, "own": ["lora_B"]}, NF4),
    "a second model": ({**LORA, "ditto": 0.5}, PACKED),
    "control variates": ({**LORA, "optimizer": "sgd", "control_variates": True}, {}),
    "kept optimiser": ({**LORA, "keep_optimizer": True}, {}),
    "stacked": ({**LORA, "aggregation": "stack"}, {}),
    "residual, bfloat16": ({**LORA, "aggregation": "residual"}, NARROW),
    "adapter": ({"name": "fedavg", **STEPS, "trainable": "adapter", "adapter": {"size": 3}}, PACKED),
    "prefix": ({"name": "fedavg", **STEPS, "trainable": "prefix", "prefix": {"tokens": 3}}, {}),
    "full, 8 bits": ({**FULL, "optimizer": "adamw-8bit", "masters": "stochastic"}, {**NARROW, **PACKED}),
    "full, kahan": ({**FULL, "masters": "kahan"}, NARROW),
    "blocks, 8 bits": ({**BLOCKS, "optimizer": "adamw-8bit", "masters": "kahan"}, NARROW),
    "blocks, hybrid": ({**BLOCKS, "compression": "hybrid"}, {}),
    "blocks, two at a time, hybrid": (
        {**BLOCKS, "compression": "hybrid", "blocks_per_client": 2},
        NARROW,
    ),
    "blocks, layer-drop": ({**BLOCKS, "compression": "layer-drop"}, PACKED),
    "blocks, lora, layer-drop": (
        {**BLOCKS, "trainable": "lora", "lora": {"rank": 2, "dropout": 0.5}, "compression": "layer-drop"},
        {},
    ),
    "emulator": (EMULATED, PACKED),
    "emulator, pruned": ({**EMULATED, "emulator": "channel-pruning"}, NARROW),
}
SAVERS: dict[str, dict[str, Any]] = {
    "disk": {"offload_params": "disk"},
    "again": {"gradient_checkpointing": "full"},
    "again, each second": {"gradient_checkpointing": 2},
    "in backward": {"optimizer_in_backward": True},
}
TOGETHER = [
    ("disk", "again", "in backward"),
    ("disk", "again, each second"),
    ("again, each second", "in backward"),
]
NOTHING_FROZEN = (
    r"offload_params: disk is for frozen weights, and trainable: full freezes none; set it to none"
)
ADDED_UP = (
    r"optimizer_in_backward takes each weight's step .* gradient_accumulation: 2, .* Leave one of the two out"
)
AGAIN_BEHIND = (
    r"gradient_checkpointing: \w+ computes keys and values again behind a prefix, .*; set it to none"
)
REFUSED = {  # by form and setting
    ("full, 8 bits", "disk"): NOTHING_FROZEN,
    ("full, kahan", "disk"): NOTHING_FROZEN,
    ("lora, accumulated", "in backward"): ADDED_UP,
    ("prefix", "again"): AGAIN_BEHIND,
    ("prefix", "again, each second"): AGAIN_BEHIND,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "tiny", blocks=4)
    (folder / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
    return folder


def document(models: Path, form: str, *savers: str, **more: Any) -> dict[str, Any]:
    """The form's configuration with some of the settings; without them everything stays in memory."""
    own, beside = FORMS[form]
    method = {**own, "gradient_checkpointing": "none"}
    for saver in savers:
        method |= SAVERS[saver]
    public = {"public": {"source": str(models / "public.jsonl")}} if "alignment" in own else {}
    return {
        "model": {"name": str(models / "tiny"), **beside.get("model", {})},
        "data": {"clients": 2, "template": "plain", "max_length": 32, **public, **beside.get("data", {})},
        "method": method,
        "evaluation": {"tasks": ["loss"], "max_examples": 2, "bootstrap": 0},
        **more,
    }


def came_to(given: dict[str, Any], out: Path) -> tuple[dict[str, str], Any, list[Any]]:
    """Digests of a run's weights, its scores, the losses of its rounds."""
    run = fedtune.run(given, data=ROWS, out=out, progress=False)
    files = sorted((run.path / "final").rglob("*.safetensors"))
    digests = {str(f.relative_to(run.path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert digests
    return digests, run.summary["evaluation"], [row["train_loss"] for row in run.rounds]


def needs(form: str) -> None:
    if "quantization" in FORMS[form][1].get("model", {}) and find_spec("bitsandbytes") is None:
        pytest.skip("needs fedtune[quant]")


@pytest.mark.parametrize("form", FORMS)
def test_what_saves_memory_changes_no_bit_together(form: str, models: Path, tmp_path: Path) -> None:
    needs(form)
    plain = came_to(document(models, form), tmp_path / "plain")
    for number, savers in enumerate(TOGETHER):
        given, out = document(models, form, *savers), tmp_path / str(number)
        said = [REFUSED[form, saver] for saver in savers if (form, saver) in REFUSED]
        if said:
            with pytest.raises(InputError) as refused:
                came_to(given, out)
            assert any(re.search(text, str(refused.value)) for text in said), refused.value
            assert not out.exists()
        else:
            assert came_to(given, out) == plain, savers


@pytest.mark.parametrize("form", ["lora, nf4, packed", "blocks, hybrid", "emulator"])
def test_nor_in_processes_of_their_own(form: str, models: Path, tmp_path: Path) -> None:
    needs(form)
    savers, workers = ("disk", "again"), {"transport": {"workers": 2}}
    plain = came_to(document(models, form), tmp_path / "plain")
    assert came_to(document(models, form, *savers, **workers), tmp_path / "workers") == plain
