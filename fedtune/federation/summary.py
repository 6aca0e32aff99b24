"""What summary.json says of a run: its rounds in short, what crossed the wire, who was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.cohort import COMPUTED_TOKENS, PADDING_TOKENS, RoundOutcome
from fedtune.core.ledger import Ledger
from fedtune.core.state import TellingMethod
from fedtune.data.encoded import Counts
from fedtune.evaluation.tasks import scorer
from fedtune.federation.assembly import Assembly
from fedtune.federation.data import scored_tasks
from fedtune.federation.encoding import describe
from fedtune.federation.evaluator import eval_settings
from fedtune.federation.files import disk_errors, write_json
from fedtune.federation.left_out import left_out
from fedtune.federation.progress import Progress


def of_training(outcome: RoundOutcome, method: Any, state: Any) -> dict[str, Any]:
    """What a round's clients did: their loss, and the tokens of their batches, where all said it.

    And what the method says of the state that it came to.
    """
    computed, padding = (outcome.total(name) for name in (COMPUTED_TOKENS, PADDING_TOKENS))
    known = computed is not None and padding is not None
    return {
        "train_loss": outcome.mean("train_loss"),
        "tokens": {"computed": computed, "padding": padding} if known else None,
        **(method.told(state) if isinstance(method, TellingMethod) else {}),
    }


def of_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first and the newest of a run's rounds.

    Args:
        rounds: The lines of rounds.jsonl, from round 0 (the model before any training) on.
    """
    evaluated = [entry for entry in rounds if entry["eval"]]
    trained = [entry for entry in rounds if entry["train_loss"] is not None]
    tokens = [entry.get("tokens") or {} for entry in rounds if entry["round"]]
    return {
        "rounds": rounds[-1]["round"] if rounds else 0,
        "tokens": _sum(tokens) if tokens and all(tokens) else None,
        "train_loss": trained[-1]["train_loss"] if trained else None,
        "evaluation": evaluated[-1]["eval"] if evaluated else {},
        "per_client": evaluated[-1].get("per_client", {}) if evaluated else {},
        **({"scored": evaluated[-1]["scored"]} if evaluated and "scored" in evaluated[-1] else {}),
        "zero_shot": rounds[0]["eval"] if rounds else {},
        "zero_shot_per_client": rounds[0].get("per_client", {}) if rounds else {},
    }


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(each[key] for each in counts) for key in ("computed", "padding")}


def of_run(
    config: RunConfig, assembly: Assembly, ledger: Ledger, rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was run, on what, and what it took."""
    settings = eval_settings(config, assembly.split.labels)
    skipped = {"skipped": assembly.split.reading.document()} if config.data.bad_rows == "skip" else {}
    named = {str(e["client"]): e["name"] for e in assembly.split.partition["clients"] if e.get("name")}
    return {
        "method": config.method_name,
        "model": config.model.name,
        "seed": config.seed,
        "clients": len(assembly.client_examples),
        **({"client_names": named} if named else {}),
        "left_out": left_out(rounds, assembly.split.partition["clients"]),
        "examples": {group: one and one.document() for group, one in assembly.counts.items()},
        **skipped,
        "payload_bytes": dict(ledger.payload_bytes),
        "framed_bytes": dict(ledger.framed_bytes),
        **({"evaluation_bytes": dict(ledger.evaluation_bytes)} if ledger.evaluation_bytes.total() else {}),
        "payload_bytes_per_client_round": ledger.payload_bytes_per_client_round(),
        "peak_memory_bytes": ledger.peak_memory_bytes,
        **({"peak_by_device": ledger.peaks_by_device} if any(ledger.peaks_by_device.values()) else {}),
        "scorers": {task: scorer(task, settings) for task in scored_tasks(config, assembly.split)},
    }


def count_asked(
    assembly: Assembly, rounds: Sequence[Mapping[str, Any]], path: Path, progress: Progress
) -> None:
    """Says, and writes into partition.json, what became of examples that no round had asked for at the start.

    Args:
        assembly: The run's.
        rounds: The lines of rounds.jsonl.
        path: The run's folder.
        progress: Is told.
    """
    asked = {client for entry in rounds for client in entry["clients"]}
    asked |= {int(client) for entry in rounds for client in entry.get("left_out", {})}
    before = assembly.split.partition.get("encoded")
    if not assembly.look(sorted(asked)):
        return
    with disk_errors("partition.json"):
        write_json(path / "partition.json", assembly.split.partition)
    known = {group: Counts(**one) for group, one in (before or {}).items() if one}
    said = describe(known, assembly.room.tokens)
    for note in describe({g: one for g, one in assembly.counts.items() if one}, assembly.room.tokens):
        if note not in said:
            progress.note(note)
