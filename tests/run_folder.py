"""A run's folder as a run leaves it, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.federation.folder import RunFolder


def config(**model: Any) -> RunConfig:
    return parse_config({"method": {"name": "fedavg"}, "model": model}, "test")


def made(path: Path, losses: list[float | None], **summary: Any) -> Path:
    """A run of one client: 1,000 bytes down and 500 up a round."""
    folder = RunFolder.create(path, config(), {}, {}, {})
    for round, loss in enumerate(losses):
        scores = {} if loss is None else {"loss": {"loss": loss, "loss_low": loss - 1, "loss_high": loss + 1}}
        left_out = {"7": "<late>"} if round == 1 else {}
        entry = {
            "round": round,
            "clients": [0],
            "left_out": left_out,
            "train_loss": None if round == 0 else 2.0,
        }
        folder.append("rounds.jsonl", entry | {"eval": scores, "seconds": 1.5})
        if round:
            for way, count in (("down", 1000), ("up", 500)):
                folder.append("wire.jsonl", {"round": round, "direction": way, "payload_bytes": count})
            folder.append("memory.jsonl", {"where": "client", "peak_bytes": 10 * round})
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path
