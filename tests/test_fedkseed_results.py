"""The tables and the figure that reproduce/fedkseed.py makes, from run folders written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from reproduced import load

fedkseed = load("fedkseed")

Losses = dict[tuple[str, str], list[list[float]]]  # by method and noise: a curve a seed


def write(folder: Path, losses: Losses, seeds: int = 4096) -> None:
    rows = []
    for (method, noise), by_seed in losses.items():
        for seed, curve in enumerate(by_seed):
            path = folder / f"{method}-{noise}-seed{seed}"
            path.mkdir(parents=True)
            settings = {"name": method, "noise": noise, "local_steps": 500, "seeds": seeds}
            config = {"seed": seed, "model": {"name": "somewhere/tiny"}, "method": settings}
            (path / "config.yaml").write_text(yaml.dump(config))
            lines = [{"round": i, "eval": {"loss": {"loss": loss}}} for i, loss in enumerate(curve)]
            lines.insert(1, {"round": 99, "eval": {}})  # a round without evaluation
            (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            rows.append(
                {
                    "config": f"{method}-{noise}",
                    "seed": seed,
                    "zero_shot": {"loss": {"loss": curve[0]}, "rouge-l": {"rouge_l": 0.25}},
                    "evaluation": {"loss": {"loss": curve[-1]}, "rouge-l": {"rouge_l": 0.5 * seed}},
                    "peak_memory_bytes": {"client": 2_000_000 + seed * 1_000_000},
                    "seconds": {"training": 10.0 + 2 * seed},
                    "payload_bytes_per_client_round": 1000 * (seed + 1),
                }
            )
    (folder / "compare.json").write_text(json.dumps({"rows": rows}))


def test_curves(tmp_path: Path) -> None:
    gaussian, other = [[4.0, 3.0, 2.0, 2.0, 2.0], [4.0, 3.0, 3.0, 3.0, 4.0]], [[5.0] * 5, [5.0] * 4 + [6.0]]
    write(tmp_path, {("fedkseed", "gaussian"): gaussian, ("fedkseed", "hadamard4"): other})
    lines = fedkseed.curves(tmp_path).splitlines()
    # ends 2, 4 and 5, 6: differences 3 and 2; last four 9/4, 13/4 and 5, 21/4: differences 11/4 and 2
    assert "| gaussian | 3.0000 ± 1.4142 |  | 2.7500 ± 0.7071 |  |" in lines
    hadamard = "| hadamard4 | 5.5000 ± 0.7071 | +2.5000 ± 0.7071 | 5.1250 ± 0.1768 | +2.3750 ± 0.5303 |"
    assert hadamard in lines
    assert lines[-6:] == [
        "| --- | ---: | ---: |",
        "| 0 | 4.0000 | 5.0000 |",
        "| 500 | 3.0000 | 5.0000 |",
        "| 1,000 | 2.5000 | 5.0000 |",
        "| 1,500 | 2.5000 | 5.0000 |",
        "| 2,000 | 3.0000 | 5.5000 |",
    ]


def test_methods(tmp_path: Path) -> None:
    write(tmp_path, {("fedkseed", "hadamard4"): [[4.0, 1.0], [6.0, 4.0]]})
    lines = fedkseed.methods(tmp_path).splitlines()
    assert lines[-2] == "| zero-shot | 5.0000 ± 1.4142 |  | 0.2500 ± 0.0000 |  | 0 B |  |  |"
    # loss falls by 3 and 2; Rouge-L is 0 and 0.5
    scores = "2.5000 ± 2.1213 | -2.5000 ± 0.7071 | 0.2500 ± 0.3536 | +0.0000 ± 0.3536"
    assert lines[-1] == f"| fedkseed-hadamard4 | {scores} | 1.50 kB | 3.00 MB | 11 |"


def test_seeds(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, count in zip(folders, (64, 8192), strict=True):
        plain, pro = [[4.0, 1.0], [4.0, 2.0]], [[4.0, 3.0], [4.0, 3.0]]
        write(folder, {("fedkseed", "hadamard4"): plain, ("fedkseed-pro", "hadamard4"): pro}, count)
    lines = fedkseed.seeds(folders).splitlines()
    assert lines[0] == "Held-out loss after the last round, over 2 seeds; untrained 4.0000:"
    row = "| 1.5000 ± 0.7071 | 3.0000 ± 0.0000 | +1.5000 ± 0.7071 | 1,500 | 1,500 |"
    assert lines[-2:] == [f"| 64 {row}", f"| 8,192 {row}"]


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path / "a", {("fedkseed", "gaussian"): [[4.0, 3.0], [4.0, 2.0]]})
    first = fedkseed.plot([tmp_path / "a", tmp_path / "a"])
    assert fedkseed.plot([tmp_path / "a", tmp_path / "a"]) == first
    assert first.startswith(b"<?xml") and b"<svg" in first and 5_000 < len(first) < 100_000
