"""The bundled text-to-image pipeline and CLIP: what they hold and draw, and what works with nothing given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers")

from PIL import Image
from reproduced import load
from small_pipelines import configuration, save_pictures, save_pipeline

import fedtune
from fedtune.api import starting
from fedtune.config.file import load_config, parse_config
from fedtune.data import shapes
from fedtune.data.shapes import SUBJECTS
from fedtune.errors import InputError
from fedtune.evaluation.pictures import load_clip
from fedtune.evaluation.shapes import right
from fedtune.models.names import bundled_clip, bundled_pipeline
from fedtune.models.pipelines import Drawing, draw_pictures, load_pipeline
from fedtune.models.text_to_image import Learning, text_to_image

MOST_BYTES = 8_000_000
FEW = ["method.local_epochs=1", "evaluation.pictures={steps: 2, each: 1}"]


def files() -> list[Path]:
    return sorted(file for file in bundled_pipeline().rglob("*") if file.is_file())


def test_it_is_small_and_holds_float16_in_safetensors_and_no_place_of_a_machine() -> None:
    assert sum(file.stat().st_size for file in files()) < MOST_BYTES
    assert {file.suffix for file in files()} == {".json", ".md", ".txt", ".safetensors"}
    weights = [file for file in files() if file.suffix == ".safetensors"]
    assert [file.parent.name for file in weights] == ["clip", "text_encoder", "unet", "vae"]
    for file in weights:
        with safe_open(file, framework="pt") as stream:
            kinds = {stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}
    for file in files():
        if file.suffix == ".json":
            assert "_name_or_path" not in file.read_text(encoding="utf-8")


def test_the_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    load("shape_tokenizer").tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (bundled_pipeline() / "tokenizer" / name).read_bytes()


def test_its_page_has_the_scores_and_the_steps_of_its_weights() -> None:
    page = (bundled_pipeline() / "README.md").read_text(encoding="utf-8")
    trained = json.loads((bundled_pipeline() / "training.json").read_text(encoding="utf-8"))
    assert trained.keys() == {"autoencoder", "clip", "unet"}
    assert load("score_pictures").told(trained) in page
    assert page.count("| pixel check of 100 pictures") == 10 and "| CLIP, right caption of eight" in page


def test_it_draws_the_shapes_that_are_asked_for() -> None:
    found = load_pipeline("bundled", dtype="float32", base=Path("."), learning=Learning())
    rng = np.random.default_rng(50)
    figures = [shapes.any_figure(rng) for _ in range(12)]
    how = Drawing(guidance=3.0, together=12)
    drawn = draw_pictures(found.model, found.tokenizer, [f.caption() for f in figures], list(range(12)), how)
    seen = [
        right(pixels, figure, shapes.SHAPES)
        for pixels, figure in zip(drawn.numpy().astype(np.float32) / 127.5 - 1, figures, strict=True)
    ]
    for name, least in (("background", 0.9), ("colour", 0.9), ("count", 0.75), ("shape", 0.6)):
        assert np.mean([one[name] for one in seen]) >= least, name


def test_its_clip_finds_the_caption_of_a_picture() -> None:
    clip, rng = load_clip("bundled"), np.random.default_rng(3)
    figures = [shapes.any_figure(rng, wide=True, held_out=None) for _ in range(20)]
    pictures = np.stack([shapes.picture(figure, rng) for figure in figures])
    pixels = torch.from_numpy(((pictures + 1) * 127.5).round().astype(np.uint8))
    texts, cut = clip.texts([figure.caption() for figure in figures])
    nearest = (clip.pictures(pixels) @ texts.T).argmax(1)
    assert cut == 0 and (nearest == torch.arange(20)).float().mean() >= 0.9


def test_the_template_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    starting.init(Path("mine"), template="text-to-image")
    run = fedtune.run("mine.yaml", *FEW, out="runs/mine", progress=False)
    assert run.scores.keys() == {"denoising-loss", "clip-score", "pixel-check"}
    with Image.open(run.path / "pictures" / "round-0001.png") as sheet:
        assert sheet.size == (104, len(SUBJECTS) * 100 + 4)
    about = json.loads((run.path / "final" / "text_to_image.json").read_text(encoding="utf-8"))
    assert about["base_model"] == "bundled"
    out = run.draw_to("a sks square on a red background", tmp_path / "picture.png")
    with Image.open(out) as picture:
        assert picture.size == (shapes.SIZE, shapes.SIZE)
    assert fedtune.open(run.path).resume(progress=False).scores == run.scores


def test_the_template_takes_a_pipeline_and_pictures_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline, pictures = save_pipeline(Path("mine-pipeline")), save_pictures(Path("mine-pictures"), {"a": 3})
    starting.init(Path("mine"), template="text-to-image", model=str(pipeline), data=str(pictures))
    config = load_config(Path("mine.yaml"))
    assert config.evaluation.tasks == ["denoising-loss"] and config.evaluation.pictures is not None
    assert config.evaluation.pictures.clip is None and config.data.holdout.fraction == 0.1
    assert fedtune.run("mine.yaml", *FEW, progress=False).scores["denoising-loss"]["denoising_loss"] > 0


def test_a_merged_result_needs_nothing_of_fedtune(tmp_path: Path) -> None:
    import diffusers

    config = {"model": {"task": "text-to-image"}, "data": {"clients": 2}, "method": {"name": "fedavg"}}
    quick = ["method.rounds=1", "method.trainable=lora", "evaluation.tasks=[denoising-loss]"]
    run = fedtune.run(config, *quick, out=tmp_path / "run", progress=False)
    (folder,) = run.export(tmp_path / "merged", merge=True)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, safety_checker=None
    )
    plain.set_progress_bar_config(disable=True)
    (image,) = plain("a red circle on a blue background", num_inference_steps=2, output_type="np").images
    assert image.shape == (shapes.SIZE, shapes.SIZE, 3) and np.isfinite(image).all()


CLIPS: list[tuple[dict[str, Any], str | None]] = [
    ({}, "bundled"),
    ({"evaluation": {"pictures": {"clip": "mine"}}}, "mine"),
    ({"model": {"name": "mine", "task": "text-to-image"}}, None),
    (
        {"model": {"name": "mine", "task": "text-to-image"}, "evaluation": {"pictures": {"clip": "bundled"}}},
        "bundled",
    ),
]


@pytest.mark.parametrize("change,clip", CLIPS)
def test_the_bundled_pipeline_brings_its_clip(change: dict[str, Any], clip: str | None) -> None:
    document = {"model": {"task": "text-to-image"}, "method": {"name": "fedavg"}, **change}
    before = json.dumps(document)
    config = parse_config(document, "c.yaml")
    assert config.evaluation.pictures is not None and config.evaluation.pictures.clip == clip
    assert json.dumps(document) == before
    assert parse_config(config.resolved(), "again") == config


def test_the_bundled_clip_is_a_folder_as_any_other() -> None:
    texts = ["a red circle on a blue background"]
    one, other = load_clip("bundled").texts(texts)[0], load_clip(str(bundled_clip())).texts(texts)[0]
    assert torch.equal(one, other)


def test_a_finished_run_knows_whether_its_pipeline_was_replaced(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    config = configuration(pipeline, save_pictures(tmp_path / "pictures", {"sks": 3, "zwx": 3}), rounds=1)
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    again = fedtune.run(config, out=tmp_path / "run", resume=True, progress=False)
    assert again.scores == run.scores
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        scheduler.read_text().replace('"num_train_timesteps": 100', '"num_train_timesteps": 90')
    )
    with pytest.raises(InputError, match=r"scheduler/scheduler_config\.json"):
        fedtune.run(config, out=tmp_path / "run", resume=True, progress=False)


def test_the_pixel_check_reads_true_pictures_of_the_subjects_through_the_autoencoder() -> None:
    """What no side of a comparison could reach says nothing of any of them."""
    found = load_pipeline("bundled", dtype="float32", base=Path("."), learning=Learning())
    vae = text_to_image(found.model).vae  # type: ignore[union-attr]
    for number, subject in enumerate(SUBJECTS):
        rng, colours = np.random.default_rng(number), shapes.backgrounds(subject)
        figures = [subject.before(colour) for colour in colours * 2]
        true = np.stack([shapes.picture(figure, rng) for figure in figures])
        with torch.no_grad():
            coded = vae.decode(vae.encode(torch.from_numpy(true)).latents).sample.clamp(-1, 1).numpy()
        for pictures in (true, coded):
            passed = [all(right(p, f).values()) for p, f in zip(pictures, figures, strict=True)]
            assert sum(passed) >= len(passed) - 1, subject.name
