"""`fedtune data` of pictures: what stands with whom, what stands twice, what is cut or enlarged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from small_pipelines import SIDE, configuration, save_pictures, save_pipeline

import fedtune
from fedtune.cli.main import app
from fedtune.errors import InputError


def test_pictures_of_each_client_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    pictures = save_pictures(tmp_path / "pictures", {"sks": 4, "zwx": 4}, caption=False)
    shutil.copy(pictures / "sks" / "0.png", pictures / "zwx" / "9.png")
    shutil.copy(pictures / "zwx" / "1.png", pictures / "zwx" / "8.png")
    (pictures / "sks" / "1.txt").write_text("a " * 30)  # 32 tokens with start and end, of 24
    config = configuration(pipeline, pictures)
    config["data"] |= {"pictures": {"caption": "a {folder} square"}, "holdout": {"fraction": 0.0}}
    config["data"]["holdout"] = {"source": str(pictures / "sks")}
    found = fedtune.data_report(config)
    assert [(c["labels"], c["duplicates"], c["cut"]) for c in found["clients"]] == [
        ({"sks": 4}, 0, 1),
        ({"zwx": 6}, 1, 0),
    ]
    assert found["duplicates"] == {"within": 1, "between": 1, "held_out": 4, "held_out_questions": 0}
    assert found["max_length"] == 24 and found["padding"]["computed"] == 10 * 24
    assert found["padding"]["padding"] == 9 * (24 - 5)  # start, a, sks, square, end
    assert any(
        line.startswith(f"pictures of 24 x 20 to 24 x 20 pixels, brought to {SIDE} x")
        for line in found["sources"]
    )
    assert [check["text"][:30] for check in found["checks"]] == [
        "LEAK: 4 held-out pictures are ",
        "1 training pictures stand with",
        "1 repeat an earlier picture of",
        "1 captions are cut to 24 token",
        "1 captions of held-out picture",
    ]
    shown = fedtune.data_report(config, example=4)["example"]
    assert shown["client"] == 1 and shown["picture"] == str(pictures / "zwx" / "0.png")
    assert shown["pieces"][0]["text"] == "a zwx square"
    with pytest.raises(InputError, match="example 10 is no training picture; their indices go from 0 to 9"):
        fedtune.data_report(config, example=10)
    enlarged = fedtune.data_report(
        {**config, "data": {**config["data"], "pictures": {"side": 24, "caption": "a"}}}
    )
    assert "14 pictures have a side of less than 24 pixels" in enlarged["checks"][-1]["text"]


def test_the_first_picture_that_is_trained_on_is_shown(tmp_path: Path) -> None:
    """Picture 0 is held out with some seeds, and is no training picture then."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    config = configuration(pipeline, save_pictures(tmp_path / "pictures", {"sks": 2, "zwx": 2}))
    config["data"]["holdout"] = {"client_fraction": 0.5}
    found = set()
    for seed in range(6):
        shown = fedtune.data_report({**config, "seed": seed})["example"]
        found.add(shown["index"])
        assert shown["picture"] == str(tmp_path / "pictures" / "sks" / f"{shown['index']}.png")
    assert found == {0, 1}


def test_the_first_text_that_is_trained_on_is_shown() -> None:
    rows = [{"instruction": f"say {n}", "output": str(n)} for n in range(8)]
    found = set()
    for seed in range(6):
        data = {"clients": 2, "partition": {"name": "iid"}, "holdout": {"client_fraction": 0.5}}
        shown = fedtune.data_report({"data": data, "seed": seed}, data=rows)["example"]
        found.add(shown["index"])
        assert any(f"say {shown['index']}" in piece["text"] for piece in shown["pieces"])
    assert len(found) > 1


def test_the_bundled_ones_by_the_command_line() -> None:
    done = CliRunner().invoke(app, ["data", "pictures_one_shot"])
    assert done.exit_code == 0, done.output
    assert "25 training examples of 5 clients, 10 held out" in done.output
    assert "pictures of 32 x 32 to 32 x 32 pixels, brought to 32 x 32" in done.output
    assert "Training picture 0 (client" in done.output
