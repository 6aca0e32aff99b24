"""Results of text-to-image models: in plain diffusers, as whole pipelines, pictures drawn, scores again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from PIL import Image
from small_pipelines import PROMPTS, configuration, drawn_plainly, loaded, save_pictures, save_pipeline

import fedtune
from fedtune.errors import InputError
from fedtune.models.pipelines import Drawing, draw_pictures
from fedtune.models.text_to_image import text_to_image


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), {"sks": 4, "zwx": 4})


@pytest.fixture(scope="module")
def done(pipeline: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    out = tmp_path_factory.mktemp("run") / "run"
    return fedtune.run(configuration(pipeline, pictures), out=out, progress=False)


def test_plain_diffusers_draws_the_same_pictures(done: fedtune.Run, pipeline: Path, tmp_path: Path) -> None:
    (folder,) = done.export(tmp_path / "lora")
    ours = draw_pictures(done.model(), done.tokenizer(), PROMPTS, [5, 6], Drawing(steps=3, guidance=2.0))
    before = drawn_plainly(pipeline, None)
    theirs = drawn_plainly(pipeline, folder)
    assert np.array_equal(theirs, ours.numpy())
    assert not np.array_equal(theirs, before)


def test_a_merged_result_is_a_whole_pipeline(done: fedtune.Run, tmp_path: Path) -> None:
    (folder,) = done.export(tmp_path / "merged", merge=True)
    model = cast(Any, text_to_image(done.model()))
    path = next(p for p, m in model.unet.named_modules() if hasattr(m, "lora_A"))
    layer, merged = model.unet.get_submodule(path), loaded(folder)
    wanted = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged.unet.get_parameter(f"{path}.weight"), wanted)
    again = draw_pictures(merged, done.tokenizer(), PROMPTS, [5, 6], Drawing(steps=3, guidance=2.0))
    ours = draw_pictures(done.model(), done.tokenizer(), PROMPTS, [5, 6], Drawing(steps=3, guidance=2.0))
    assert (again.int() - ours.int()).abs().max() <= 1


def test_all_weights_of_the_unet_and_no_others(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    config = configuration(pipeline, pictures, trainable="full", rounds=1)
    del config["method"]["lora"]
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    before, after = loaded(pipeline), loaded(run.path / "final")
    assert all(
        torch.equal(a, b) for a, b in zip(before.vae.parameters(), after.vae.parameters(), strict=True)
    )
    text = zip(before.text_encoder.parameters(), after.text_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in text)
    moved = [
        not torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2


def test_a_picture_by_the_command_line(done: fedtune.Run, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    assert done.draw_to(PROMPTS[0], out, seed=5) == out
    drawing = Drawing(steps=20, guidance=3.0)
    (wanted,) = draw_pictures(done.model(), done.tokenizer(), PROMPTS[:1], [5], drawing)
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), wanted.numpy())
    for text, prompt, place in (
        ("exists already", PROMPTS[0], out),
        ("written as .png", PROMPTS[0], tmp_path / "picture.jpg"),
        ("no folder", PROMPTS[0], tmp_path / "none" / "picture.png"),
        ("the prompt is empty", " ", tmp_path / "empty.png"),
    ):
        with pytest.raises(InputError, match=text):
            done.draw_to(prompt, place)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    with pytest.raises(InputError, match="is of a text-to-image model"):
        done.generate(PROMPTS)


def test_a_long_prompt_is_cut_without_a_word_of_the_libraries(
    done: fedtune.Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`fedtune generate` says it in one line (test_text_to_image_input.py); theirs repeats the prompt."""
    done.draw_to("word " * 200, tmp_path / "long.png")
    assert "truncated" not in "".join(capfd.readouterr()) and (tmp_path / "long.png").is_file()


def test_pictures_have_no_gguf(done: fedtune.Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format gguf is for language models.*take merged"):
        done.export(tmp_path / "gguf", format="gguf")
    with pytest.raises(InputError, match="format gguf is for language models"):
        done.push(f"{tmp_path}/pushed", format="gguf")
    assert not list(tmp_path.iterdir())


def test_results_are_scored_again_and_reported(done: fedtune.Run, tmp_path: Path) -> None:
    found = fedtune.evaluate(str(done.path), ["denoising-loss"])
    assert found["scores"]["global"] == done.scores
    with pytest.raises(InputError, match="task loss is not for pictures; take denoising-loss"):
        fedtune.evaluate(str(done.path), ["loss"])
    page = done.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "denoising" in page and "<h2>Pictures</h2>" not in page
