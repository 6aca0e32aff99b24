"""Several methods on the same split, over several seeds, beside the reference rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.data.objects import ObjectData
from fedtune.errors import FederationError, InputError
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.evaluation.registry import possible
from fedtune.federation.data import prepare_data
from fedtune.federation.files import disk_errors, write_json
from fedtune.federation.progress import Progress
from fedtune.federation.several import Planned, run_all
from fedtune.methods.objective import Preferring
from fedtune.methods.settings import Training
from fedtune.methods.tuning import Tuning


@dataclass(frozen=True)
class Candidate:
    """One row of the comparison: a name and a configuration whose seed is filled in."""

    label: str
    config: RunConfig

    def with_seed(self, seed: int) -> RunConfig:
        """The configuration with another seed."""
        return parse_config({**self.config.resolved(), "seed": seed}, self.label)


def compare(
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    out: Path,
    progress: Progress,
    *,
    references: bool = True,
    objects: ObjectData | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Runs every candidate with every seed and gathers the results.

    Each run has its own folder under `out`. A second call with the same arguments takes over what is done
    and continues what is not. The document is also written to `out`/compare.json.

    Args:
        candidates: The rows, in order; differences are taken against the first.
        seeds: The seeds; each is one split, model initialisation and cohort sequence for all rows.
        out: Folder for the runs.
        progress: Told what happens.
        references: Add zero-shot, stand-alone and centralised rows for each model among the candidates.
        objects: The examples of all of them, with `data.train: objects`.
        workers: Runs at the same time.

    Returns:
        `rows`: one a run, with the fields of summary.json; `table`: means and spreads by row.

    Raises:
        InputError: Two candidates do not have the same split or held-out examples.
        FederationError: A run could not finish.
    """
    _same_split(candidates, seeds[0], objects)
    everyone = [*candidates, *(reference_candidates(candidates) if references else [])]
    for reference in everyone[len(candidates) :]:
        if any(c.label == reference.label and c.config != reference.config for c in candidates):
            raise InputError(
                f"{reference.label} is the name of a reference row too; give that configuration another name"
            )
    both = [(candidate, seed) for candidate in everyone for seed in seeds]
    planned = [
        Planned(f"{one.label}, seed {seed}", one.with_seed(seed), out / f"{one.label}-seed{seed}")
        for one, seed in both
    ]
    rows: list[dict[str, Any]] = []
    for (candidate, _), summary in zip(
        both, run_all(planned, progress, workers=workers, objects=objects), strict=True
    ):
        assert not isinstance(summary, FederationError)  # it was raised
        rows.append({"config": candidate.label, **summary})
    if references:
        rows += _zero_shot(candidates, rows)
    document = {"rows": rows, "table": table(rows)}
    with disk_errors("compare.json"):
        write_json(out / "compare.json", document)
    return document


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and spreads over the seeds, one entry a configuration, in order of appearance.

    Each metric has `mean`, `sd` (sample standard deviation; None for one seed), and `difference` and
    `difference_sd` of the per-seed differences from the first configuration. Where the runs have them, it
    also has `low` and `high`, the ends of the interval over examples, and `worst` and `client_sd`, the worst
    client's score and the spread over clients: each a mean over the seeds.
    """
    labels = list(dict.fromkeys(row["config"] for row in rows))
    by_label = {label: {row["seed"]: row for row in rows if row["config"] == label} for label in labels}
    first = by_label[labels[0]]
    result = []
    for label in labels:
        runs = by_label[label]
        some = next(iter(runs.values()))
        metrics, others = {}, _by_metric(first)
        for metric, values in _by_metric(runs).items():
            other = others.get(metric, {})
            pairs = [value - other[seed] for seed, value in values.items() if seed in other]
            metrics[metric] = {
                "mean": statistics.fmean(values.values()),
                "sd": _sd(list(values.values())),
                "difference": statistics.fmean(pairs) if pairs else None,
                "difference_sd": _sd(pairs),
                **_within(runs.values(), metric),
            }
        result.append(
            {
                "config": label,
                "method": some["method"],
                "seeds": sorted(runs),
                "metrics": metrics,
                "payload_bytes": {
                    way: statistics.fmean(row["payload_bytes"][way] for row in runs.values())
                    for way in ("down", "up")
                },
                "client_peak_memory_bytes": max(row["peak_memory_bytes"]["client"] for row in runs.values()),
                "seconds": statistics.fmean(row["seconds"]["total"] for row in runs.values()),
            }
        )
    return result


def _by_metric(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Each metric's scores by seed; NaN where one was not finite, which JSON files hold as null.

    A metric may be there for some seeds only: which categories are held out can depend on the seed.
    """
    values: dict[str, dict[int, float]] = {}
    for seed, row in runs.items():
        for task, scores in row["evaluation"].items():
            for metric in metrics_of(scores):
                of_metric = values.setdefault(f"{task}.{metric}", {})
                of_metric[seed] = math.nan if scores[metric] is None else float(scores[metric])
    return values


def _within(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Ends of the interval over examples, and the spread over clients; means over the rows that have them."""
    task, _, name = metric.partition(".")
    found: dict[str, list[float]] = {}
    for row in rows:
        scores = row["evaluation"].get(task, {})
        clients = row.get("per_client", {}).get(task, {}).get(name, {})
        ends = {"low": f"{name}_low", "high": f"{name}_high"}
        of_row = {end: scores[key] for end, key in ends.items() if key in scores}
        of_row |= {
            ours: clients[theirs] for ours, theirs in (("worst", "worst"), ("client_sd", "sd")) if clients
        }
        for key, value in of_row.items():
            found.setdefault(key, []).append(math.nan if value is None else value)
    return {key: statistics.fmean(values) for key, values in found.items()}


def main_metrics(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """The first metric of each task, as `task.metric`; a task that no row could score is left out."""
    found: dict[str, str] = {}
    for row in rows:
        for task, scores in row["evaluation"].items():
            if "examples" in scores:
                found.setdefault(task, f"{task}.{next(iter(scores))}")
    return [found[task] for task in possible(tasks) if task in found]


def _sd(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _same_split(candidates: Sequence[Candidate], seed: int, objects: ObjectData | None) -> None:
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) != len(labels):
        raise InputError(
            f"configurations need different names, got {', '.join(labels)}; rename one of the files"
        )
    seen: tuple[str, Any] | None = None
    for candidate in candidates:
        split = prepare_data(candidate.with_seed(seed), pooled=False, objects=objects)
        mine = (split.sha256, split.partition)
        if seen is None:
            seen = mine
        elif mine != seen:
            what = "examples" if mine[0] != seen[0] else "partition"
            raise InputError(
                f"{candidate.label} has other {what} than {labels[0]}: a comparison needs one split. "
                "Give both the same data block, or compare them in two calls"
            )


def reference_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Stand-alone and centralised training, as long as the first candidate of each model trains in all."""
    added = []
    for source, suffix in _one_a_model(candidates):
        method = source.config.method
        settings: dict[str, Any] = {}
        if isinstance(method, Tuning):
            settings |= method.model_dump(include=set(Tuning.model_fields))
        if isinstance(method, Preferring):
            settings |= method.model_dump(include={"objective"})
        if isinstance(method, Training):
            settings |= method.model_dump(include=set(Training.model_fields))
            rounds = getattr(method, "rounds", 1)
            for length in ("local_epochs", "local_steps"):
                if settings[length] is not None:
                    settings[length] *= rounds
            if settings.get("trainable") != "full":  # of what is added to a model the weights are float32
                del settings["masters"]
        for name in ("standalone", "centralized"):
            if not any(
                c.config.method_name == name and c.config.model == source.config.model for c in candidates
            ):
                document = {**source.config.resolved(), "method": {"name": name, **settings}}
                if source.config.model.dtype == "float16":  # which has no room for their gradients
                    document["model"] = {**document["model"], "dtype": "bfloat16"}
                document["evaluation"] = {**document["evaluation"], "arrivals": False}
                document["data"] = {**document["data"], "public": None}  # they train nothing on the server
                protection: dict[str, Any] = {
                    "secure_aggregation": None,
                    "privacy": None,
                    "wire": {},
                }  # and send nothing
                document["federation"] = {**document["federation"], **protection}
                added.append(Candidate(f"{name}{suffix}", parse_config(document, name)))
    return added


def _zero_shot(candidates: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the untrained models, from what every run measured before its first round."""
    nothing = {"down": 0, "up": 0}
    return [
        {
            **{key: value for key, value in row.items() if key != "privacy"},
            "config": f"zero-shot{suffix}",
            "method": "zero-shot",
            "rounds": 0,
            "trainable_parameters": 0,
            "payload_bytes": nothing,
            "framed_bytes": nothing,
            "payload_bytes_per_client_round": 0,
            "peak_memory_bytes": {"client": 0, "server": 0},
            "seconds": dict.fromkeys(row["seconds"], 0.0),
            "train_loss": None,
            "evaluation": row["zero_shot"],
            "per_client": row.get("zero_shot_per_client", {}),
        }
        for source, suffix in _one_a_model(candidates)
        if not any(
            c.config.method_name == "zero-shot" and c.config.model == source.config.model for c in candidates
        )
        for row in rows
        if row["config"] == source.label
    ]


def _one_a_model(candidates: Sequence[Candidate]) -> list[tuple[Candidate, str]]:
    """The first candidate of each model, and what tells their reference rows apart."""
    firsts: list[Candidate] = []
    for candidate in candidates:
        if all(candidate.config.model != first.config.model for first in firsts):
            firsts.append(candidate)
    return [(first, "" if len(firsts) == 1 else f"-{first.label}") for first in firsts]
