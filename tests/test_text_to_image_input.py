"""Text-to-image models: folders that are no pipeline of ours, and settings that do not go with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from small_pipelines import configuration, loaded, save_pictures, save_pipeline

import fedtune
from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.models.load import load_model
from fedtune.models.pipelines import Drawing, draw_pictures, load_pipeline
from fedtune.models.text_to_image import Learning, text_to_image

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


def test_whole_runs_on_a_model_of_the_other_kind(tmp_path: Path) -> None:
    """A language model as text-to-image, and a pipeline as a language model: refused, and no folder begun."""
    from fedtune.models.names import bundled_folder

    pictures = save_pictures(tmp_path / "pictures", {"a": 3, "b": 3})
    language = configuration(bundled_folder(), pictures)
    with pytest.raises(
        InputError, match="holds a model of transformers and no pipeline; text-to-image needs"
    ):
        fedtune.run(language, out=tmp_path / "run", progress=False)
    pipeline = save_pipeline(tmp_path / "pipeline")
    words = {"model": {"name": str(pipeline)}, "method": {"name": "fedavg"}}
    with pytest.raises(InputError, match="text-to-image"):
        fedtune.run(words, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_client_without_pictures(tmp_path: Path) -> None:
    config = configuration(save_pipeline(tmp_path / "m"), save_pictures(tmp_path / "p", {"a": 3}))
    config["data"] |= {"partition": {"name": "iid"}, "clients": 5}
    said = r"data\.clients is 5, but there are only 3 examples, so some clients would be empty"
    with pytest.raises(InputError, match=said) as error:
        fedtune.run(config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists() and "\n" not in str(error.value)


def test_an_autoencoder_that_overflows_in_float16_is_named(tmp_path: Path) -> None:
    """Its weights are in reach of float16, and what they make of a picture is not."""
    folder = save_pipeline(tmp_path / "m")
    found = load_pipeline(str(folder), dtype="float16", base=Path("."), learning=Learning())
    wide = load_pipeline(str(folder), dtype="float32", base=Path("."), learning=Learning())
    pixels = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    for one in (found, wide):
        with torch.no_grad():
            for name, weight in text_to_image(one.model).vae.named_parameters():  # type: ignore[union-attr]
                if name.endswith("weight"):
                    weight.mul_(100)
    assert wide.model.moments(pixels, torch.tensor([False])).isfinite().all()
    with pytest.raises(InputError, match=r"infinity in float16; set model\.dtype to float32 or bfloat16"):
        found.model.moments(pixels, torch.tensor([False]))
    with pytest.raises(InputError, match=r"in float16; set model\.dtype to float32 or bfloat16"):
        draw_pictures(found.model, found.tokenizer, ["a red square"], [0], Drawing(steps=2))


def test_prompts_and_captions_that_are_too_long_are_cut_and_counted(tmp_path: Path) -> None:
    """The text encoder takes 24 tokens, with start and end; a word is one."""
    pictures = save_pictures(tmp_path / "p", {"a": 3, "b": 3}, caption=False)
    (pictures / "a" / "0.txt").write_text("red " * 40)
    config = configuration(save_pipeline(tmp_path / "m"), pictures)
    config["data"]["pictures"] = {"caption": "a square"}
    config["method"] = {"name": "zero-shot"}
    config["data"]["holdout"] = {"source": str(pictures / "a")}
    long = {"text": "blue " * 40, "says": "a red circle on a blue background"}
    drawn = {"prompts": [long, "a red circle on a blue background"], "steps": 1, "each": 1}
    config["evaluation"] = {"tasks": ["denoising-loss", "pixel-check"], "pictures": drawn}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    notes = next(iter(run.rounds))["eval_notes"]
    assert notes["pixel-check"] == ["1 of 2 prompts are cut to 24 tokens"]
    assert notes["denoising-loss"] == ["1 of 3 captions are cut to 24 tokens"]
    partition = json.loads((run.path / "partition.json").read_text())
    assert partition["encoded"]["held_out"]["cut"] == 1


def test_a_long_prompt_of_a_drawn_picture_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = save_pictures(tmp_path / "p", {"a": 2, "b": 2})
    run = fedtune.run(
        configuration(save_pipeline(tmp_path / "m"), pictures, rounds=1), out=tmp_path / "run", progress=False
    )
    with caplog.at_level("WARNING", logger="fedtune"):
        run.draw_to("blue " * 40, tmp_path / "long.png")
        run.draw_to("blue", tmp_path / "short.png")
    assert [record.getMessage() for record in caplog.records if record.name == "fedtune"] == [
        "the prompt is longer than the text encoder takes, and is cut to 24 tokens"
    ]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("method.name: fedkseed is not there", {"method": {"name": "fedkseed"}}),
    ("method.name: fedbiot is not there", {"method": {"name": "fedbiot"}}),
    ("method.name: fedcybgd is not there", {"method": {"name": "fedcybgd"}}),
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
