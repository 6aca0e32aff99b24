"""What summary.json says of a run: its rounds in short, what crossed the wire, who was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.ledger import Ledger
from fedtune.evaluation.tasks import scorer
from fedtune.federation.assembly import Assembly
from fedtune.federation.left_out import left_out
from fedtune.federation.scoring import eval_settings


def of_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first and the newest of a run's rounds.

    Args:
        rounds: The lines of rounds.jsonl, from round 0 (the model before any training) on.
    """
    evaluated = [entry for entry in rounds if entry["eval"]]
    trained = [entry for entry in rounds if entry["train_loss"] is not None]
    return {
        "rounds": rounds[-1]["round"] if rounds else 0,
        "train_loss": trained[-1]["train_loss"] if trained else None,
        "evaluation": evaluated[-1]["eval"] if evaluated else {},
        "per_client": evaluated[-1].get("per_client", {}) if evaluated else {},
        "zero_shot": rounds[0]["eval"] if rounds else {},
        "zero_shot_per_client": rounds[0].get("per_client", {}) if rounds else {},
    }


def of_run(
    config: RunConfig, assembly: Assembly, ledger: Ledger, rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was run, on what, and what it took."""
    settings = eval_settings(config, assembly.split.labels)
    return {
        "method": config.method_name,
        "model": config.model.name,
        "seed": config.seed,
        "clients": len(assembly.client_examples),
        "left_out": left_out(rounds, assembly.split.partition["clients"]),
        "examples": {group: one and asdict(one) for group, one in assembly.counts.items()},
        "payload_bytes": dict(ledger.payload_bytes),
        "framed_bytes": dict(ledger.framed_bytes),
        "payload_bytes_per_client_round": ledger.payload_bytes_per_client_round(),
        "peak_memory_bytes": ledger.peak_memory_bytes,
        "scorers": {task: scorer(task, settings) for task in config.evaluation.tasks},
    }
