"""Model folders with something wrong in them: one sentence each, exit status 2, nothing written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from broken_models import FOLDERS, Broken
from command import write_config
from model_families import save_folder

from fedtune.cli.main import main

COMMANDS = {
    "validate": ("validate", "c.yaml"),
    "plan": ("plan", "c.yaml"),
    "run": ("run", "c.yaml", "--out", "run", "--quiet"),
    "eval": ("eval", "m", "--tasks", "loss", "data.train=d.jsonl", "data.clients=2"),
}


def called(arguments: tuple[str, ...], monkeypatch: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["fedtune", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_broken_model_folder_is_one_sentence(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken: Broken = FOLDERS[fault]
    broken.breaks(save_folder(tmp_path / "m"))
    monkeypatch.chdir(tmp_path)
    document = {
        "model": {"name": "m"},
        "data": {"train": "d.jsonl", "clients": 2, "max_length": 32, "holdout": {"fraction": 0.25}},
        "method": {"name": "fedavg", "rounds": 1, "local_steps": 1, "batch_size": 2},
        "evaluation": {"tasks": ["loss"], "max_examples": 2},
    }
    write_config(tmp_path / "c.yaml", document)
    rows = [
        json.dumps({"instruction": f"w5 w{number}", "output": word})
        for number in range(10, 18)
        for word in ("w7", "w8")
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    capfd.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for name, command in COMMANDS.items():
        settings = broken.settings if name in ("plan", "run") else ()
        if name == "eval":
            settings = tuple(s for s in broken.settings if s.startswith("model."))
        if name == "eval" and broken.settings and "eval" not in broken.commands:
            continue
        status = called((*command, *settings), monkeypatch)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        err = err.replace(f"{tmp_path}/", "")  # a run records where its inputs are
        if name not in broken.commands and (name, status) != ("validate", 2):
            assert status == 0 or name != "validate", err
            continue
        assert (status, out) == (2, ""), (name, status, err)
        assert err.startswith("fedtune: ") and err.count("\n") == 1, (name, err)
        for part in broken.says if name in broken.commands else ():
            assert part in err, (name, err)
        assert sorted(tmp_path.rglob("*")) == before, name
