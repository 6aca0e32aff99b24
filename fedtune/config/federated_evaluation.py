"""What clients' scores of their own held-out examples go with (`evaluation.where: clients`)."""

from __future__ import annotations

from typing import Any

from fedtune.config.data import DataSettings
from fedtune.config.evaluation import Evaluation
from fedtune.evaluation.registry import certain, mean_of


def refusal(
    evaluation: Evaluation,
    data: DataSettings,
    method: Any,
    *,
    task: str,
    private: bool,
    best: str | None,
) -> str | None:
    """The first thing that they do not go with, and why; None where there is none.

    Args:
        evaluation: What is measured.
        data: Which examples there are.
        method: The method, built; of one whose clients send nothing all examples are in one process.
        task: As `model.task`.
        private: Whether updates are clipped and get noise.
        best: As `checkpoints.best`.
    """
    if evaluation.where != "clients" or not method.uses_wire:
        return None
    if data.holdout.client_fraction is None:
        return "a data.holdout of another kind; set data.holdout.client_fraction: each client keeps that part"
    if private:
        return "federation.privacy: scores have no noise on them, and would tell what ε must not"
    if task == "text-to-image":
        return f"model.task: {task}, whose pictures no mean over examples says anything of"
    if method.sends_model:
        return f"{method.config.name}: its clients never hold the model that is to be scored"
    if getattr(method, "personal", "") or getattr(method.config, "graph", "none") not in ("none", None):
        return f"models of clients' own, which {method.config.name} has with these settings"
    if evaluation.arrivals:
        return "evaluation.arrivals: clients would be asked for scores after each reply"
    names = [f"{name}.{mean_of(name)}" for name in certain(evaluation.tasks) if mean_of(name)]
    without = [name for name in certain(evaluation.tasks) if not mean_of(name)]
    if without:
        return f"task {without[0]}, whose score is no mean over held-out examples"
    chosen = {
        "checkpoints.best": best,
        "evaluation.stop.metric": evaluation.stop.metric if evaluation.stop else None,
    }
    for setting, metric in chosen.items():
        if metric is not None and metric not in [*names, "loss.perplexity"]:
            return f"{setting}: {metric}; of clients' scores there are {', '.join(names)}"
    return None
