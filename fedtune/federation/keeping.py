"""What a run keeps of its rounds: the newest checkpoints, and the state of the round with the best score.

The best round is chosen by scores on held-out examples: with `data.holdout.validation` these are not the
ones that the result is later scored on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.client import ClientRunner
from fedtune.errors import InputError
from fedtune.evaluation.better import better
from fedtune.federation import checkpoint
from fedtune.federation.checkpoint import Checkpoint

Rounds = Sequence[Mapping[str, Any]]  # the lines of rounds.jsonl


class Keeping:
    """The checkpoints of one run.

    Args:
        config: The run's configuration: `checkpoints` and `evaluation.stop`.
        identity: The digest that its checkpoints carry.
        folder: Where they are.
        runner: Whose store is told what no checkpoint names any more.
    """

    def __init__(self, config: RunConfig, identity: str, folder: Path, runner: ClientRunner) -> None:
        self._metric, self._stop = config.checkpoints.best, config.evaluation.stop
        self._keep, self._identity, self._folder, self._runner = (
            config.checkpoints.keep,
            identity,
            folder,
            runner,
        )
        self._personal = bool(getattr(config.method, "personal", ""))
        self._held: dict[int, set[str]] = {}  # digests of what clients hold, by checkpoint

    def check(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises InputError for a metric that an evaluation does not have."""
        asked = {
            "checkpoints.best": self._metric,
            "evaluation.stop": self._stop.metric if self._stop else None,
        }
        known = [f"{task}.{metric}" for task, found in scores.items() for metric in found]
        for setting, metric in asked.items():
            if metric is not None and scores and metric not in known:
                there = ", ".join(name for name in known if not name.endswith(("_low", "_high", "_stderr")))
                raise InputError(f"{setting}: there is no metric {metric}; there are {there}")
            if metric is not None:
                better(metric)  # refused now where its direction is not known

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint; None before the first. Raises InputError if it is damaged."""
        saved = checkpoint.rounds(self._folder)
        return checkpoint.load(self._folder, saved[-1], config_sha256=self._identity) if saved else None

    def restore(self, newest: Checkpoint, rounds: Rounds) -> None:
        """Keeps the newest round as the best, if it is and a kill came before that was written."""
        if newest.round not in checkpoint.rounds(self._folder / "best"):
            self._save_best(newest, rounds)

    def save(self, whole: Checkpoint, rounds: Rounds) -> None:
        """Keeps a round, and its state as the best if no earlier one had as good a score.

        Args:
            whole: The round's checkpoint.
            rounds: All rounds so far.

        Raises:
            FederationError: The disk is full or cannot be written.
        """
        checkpoint.save(self._folder, whole, config_sha256=self._identity, keep=self._keep)
        self._save_best(whole, rounds)
        there = checkpoint.rounds(self._folder)  # what none of them names, no resumed run asks for
        self._held = {r: self._held.get(r) or checkpoint.held(self._folder, r) for r in there}
        self._runner.store.retain(set().union(*self._held.values()))

    def exhausted(self, rounds: Rounds) -> bool:
        """Whether `evaluation.stop` ends the run here: its metric has not got better for so long."""
        if self._stop is None:
            return False
        best = best_round(rounds, self._stop.metric)
        return sum(round > best for round in _scores(rounds, self._stop.metric)) >= self._stop.patience

    def best(self, rounds: Rounds) -> Checkpoint | None:
        """The best round; None without `checkpoints.best`, and where the last is the best.

        Raises:
            InputError: It is damaged, or gone.
        """
        folder = self._folder / "best"
        wanted = best_round(rounds, self._metric) if self._metric else 0
        if not wanted or wanted == rounds[-1]["round"]:
            return None
        if wanted not in checkpoint.rounds(folder):
            raise InputError(f"{folder} has no state of round {wanted}, which has the best {self._metric}")
        return checkpoint.load(folder, wanted, config_sha256=self._identity)

    def document(self, rounds: Rounds) -> dict[str, Any]:
        """What summary.json says of it: the best round with its scores, and whether the run ended early."""
        found: dict[str, Any] = {}
        if self._metric and (best := best_round(rounds, self._metric)):
            entry = next(entry for entry in rounds if entry["round"] == best)
            found["best"] = {"round": best, "metric": self._metric}
            found |= {"evaluation": entry["eval"], "per_client": entry.get("per_client", {})}
            found |= {"scored": entry["scored"]} if "scored" in entry else {}
        if self._stop and self.exhausted(rounds):
            best = best_round(rounds, self._stop.metric)
            found["stopped_early"] = {**self._stop.model_dump(), "best_round": best}
        return found

    def _save_best(self, whole: Checkpoint, rounds: Rounds) -> None:
        if self._metric is not None and best_round(rounds, self._metric) == whole.round:
            alone = whole if self._personal else replace(whole, clients={})  # of use in their models alone
            checkpoint.save(self._folder / "best", alone, config_sha256=self._identity, keep=1)


def best_round(rounds: Rounds, metric: str) -> int:
    """The first round with the best score of `task.metric`; 0 where none has one that is finite."""
    key, scores = better(metric), _scores(rounds, metric)
    finite = {round: score for round, score in scores.items() if key(score) < float("inf")}
    return min(finite, key=lambda round: key(finite[round]), default=0)


def _scores(rounds: Rounds, metric: str) -> dict[int, float | None]:
    """Scores by round, the model before any training left out."""
    task, _, name = metric.partition(".")
    return {
        entry["round"]: entry["eval"][task][name]
        for entry in rounds
        if entry["round"] and name in entry["eval"].get(task, {})
    }
