"""Text-to-image models: folders that are no pipeline of ours, and settings that do not go with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from small_pipelines import loaded, save_pipeline

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.models.load import load_model

Change = Callable[[Path], None]


def broken(folder: Path, change: Change) -> str:
    copy = save_pipeline(folder)
    change(copy)
    with pytest.raises(InputError) as error:
        loaded(copy)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        about = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**about, **values}))

    return change


CHANGES: list[tuple[str, Change]] = [
    ("names no scheduler", edit("model_index.json", scheduler=None)),
    ("scheduler_config.json is missing", lambda f: (f / "scheduler" / "scheduler_config.json").unlink()),
    ("SDXL, SD3 and FLUX", edit("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])),
    ("its unet is a UNet1DModel", edit("model_index.json", unet=["diffusers", "UNet1DModel"])),
    ("no scheduler named NoScheduler", edit("model_index.json", scheduler=["diffusers", "NoScheduler"])),
    ("predicts sample", edit("scheduler/scheduler_config.json", prediction_type="sample")),
    (
        "pickle only",
        lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").rename(f / "unet" / "unet.bin"),
    ),
    ("has no model_index.json", lambda f: (f / "model_index.json").unlink()),
    ("cannot be read", lambda f: (f / "model_index.json").write_text("{")),
]


@pytest.mark.parametrize("said,change", CHANGES, ids=[said for said, _ in CHANGES])
def test_what_a_pipeline_can_lack(tmp_path: Path, said: str, change: Any) -> None:
    assert said in broken(tmp_path, change)


def test_a_language_model_is_no_pipeline_and_the_reverse(tmp_path: Path) -> None:
    from fedtune.models.names import bundled_folder

    with pytest.raises(InputError, match="holds a model of transformers and no pipeline"):
        loaded(bundled_folder())
    pipeline = str(save_pipeline(tmp_path))
    with pytest.raises(InputError, match="text-to-image"):
        load_model(pipeline, dtype="float32", initial="pretrained", seed=0, base=Path("."))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("method.name: fedkseed is not there", {"method": {"name": "fedkseed"}}),
    ("method.name: fedbiot is not there", {"method": {"name": "fedbiot"}}),
    ("method.trainable: prompt is not there", {"method": {"name": "fedavg", "trainable": "prompt"}}),
    ("method.lora.use_dora is not there", {"method": {"name": "fedavg", "lora": {"use_dora": True}}}),
    ("model.quantization: nf4", {"model": {"name": "m", "task": "text-to-image", "quantization": "nf4"}}),
    (
        "clip-score needs evaluation.pictures.clip",
        {"evaluation": {"tasks": ["clip-score"], "pictures": {"prompts": ["a"]}}},
    ),
    ("task rouge-l is not for", {"evaluation": {"tasks": ["rouge-l"]}}),
    (
        "clip-score needs evaluation.pictures.prompts",
        {"evaluation": {"tasks": ["clip-score"]}, "data": {"train": "x"}},
    ),
    ("data.pictures is for model.task", {"model": {}, "data": {"pictures": {}}}),
    ("task clip-score is for model.task", {"model": {}, "evaluation": {"tasks": ["clip-score"]}}),
]


@pytest.mark.parametrize("said,change", REFUSED, ids=[said for said, _ in REFUSED])
def test_what_does_not_go_with_pictures(said: str, change: dict[str, Any]) -> None:
    document = {"model": {"name": "m", "task": "text-to-image"}, "method": {"name": "fedavg"}, **change}
    with pytest.raises(InputError, match=said):
        parse_config(document, "c.yaml")
