"""One configuration at every point of a grid of settings, over several seeds; which point is best.

The point is chosen by scores on held-out examples, so these are no fair result of it any more. With
`validation` they are a part of the training examples instead, and the configuration's own held-out examples
are not looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.seeds import numpy_generator
from fedtune.data.objects import ObjectData
from fedtune.errors import FederationError, InputError
from fedtune.evaluation.better import better
from fedtune.federation.compare import Candidate, main_metrics, table
from fedtune.federation.files import disk_errors, write_json
from fedtune.federation.progress import Progress
from fedtune.federation.several import Planned, run_all

MOST = 1000  # points; more are a slip of the hand


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes, as they were written."""

    key: str
    values: tuple[str, ...]


def axis(word: str) -> Axis:
    """An axis from `key=value,value,...`; commas inside brackets, braces and quotes belong to a value.

    Raises:
        InputError: It has no key or no value, or a value twice.
    """
    key, equals, text = word.partition("=")
    values = _split(text)
    if not equals or not all(key.split(".")) or not all(values):
        raise InputError(f"{word!r} is no axis of a sweep; write key=value,value, as in method.lr=1e-4,3e-4")
    if len(set(values)) != len(values):
        raise InputError(f"{word!r} has a value twice; give each once")
    return Axis(key, tuple(values))


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "[{(") - (character in ")}]") if not quote else 0
        parts[-1] += character
    return [part.strip() for part in parts]


@dataclass(frozen=True)
class Point:
    """Values of all axes: `settings` by key, and the name that tells it from the others."""

    name: str
    settings: Mapping[str, str]


def points(axes: Sequence[Axis], trials: int | None, seed: int) -> list[Point]:
    """All points of the grid in order, or `trials` of them, drawn with the seed and in the grid's order.

    Raises:
        InputError: An axis is there twice, there are too many points, or fewer than the trials.
    """
    keys = [each.key for each in axes]
    if not axes or len(set(keys)) != len(keys):
        raise InputError(
            "a sweep takes one or more settings, each once, as in method.lr=1e-4,3e-4; got "
            f"{', '.join(keys) or 'none'}"
        )
    if "seed" in keys:
        raise InputError("seed is no axis of a sweep: a point's score is its mean over seeds; set seeds")
    count = math.prod(len(each.values) for each in axes)
    if count > MOST and trials is None:
        raise InputError(f"the grid has {count:,} points, more than {MOST:,}; set trials to draw some of it")
    if trials is not None and not 1 <= trials <= count:
        raise InputError(f"trials must be from 1 to the grid's {count:,} points, got {trials}")
    last = [key.rpartition(".")[2] for key in keys]
    short = last if len(set(last)) == len(last) else keys
    order = numpy_generator(seed, "sweep").permutation(count)
    chosen = range(count) if trials is None else sorted(order[:trials])
    found = []
    for at in chosen:
        values = []
        for each in reversed(axes):
            at, place = divmod(int(at), len(each.values))
            values.append(each.values[place])
        named = dict(zip(keys, reversed(values), strict=True))
        text = ",".join(f"{name}={value}" for name, value in zip(short, named.values(), strict=True))
        found.append(Point(re.sub(r"[^\w.=,+-]", "_", text), named))
    names = [point.name for point in found]
    if len(set(names)) != len(names):  # values that differ in what no folder's name can hold
        found = [Point(f"{point.name}-{at}", point.settings) for at, point in enumerate(found)]
    return found


def sweep(
    candidates: Sequence[tuple[Point, RunConfig]],
    seeds: Sequence[int],
    out: Path,
    progress: Progress,
    *,
    metric: str | None = None,
    objects: ObjectData | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Runs every point with every seed. What is done is taken over, and what was interrupted goes on.

    A point of which a run cannot finish, as one whose loss became infinite, is kept with what ended it, and
    the others go on.

    Args:
        candidates: The points, with their configurations.
        seeds: The seeds.
        out: Folder for the runs; sweep.json is written there.
        progress: Told what happens.
        metric: By which the best is found, as `task.metric`; None: the first task's main metric.
        objects: The examples, with `data.train: objects`.
        workers: Runs at the same time.

    Returns:
        `points`, in order: `name`, `settings`, and what `compare.table` says of it, or `error`; `rows`, one a
        run, with the fields of summary.json; `metric`, by which `best` names a point (None if all failed).

    Raises:
        InputError: The data or the model are not there, or there is no such metric.
    """
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    both = [(point, config, seed) for point, config in candidates for seed in seeds]
    planned = [
        Planned(
            f"{point.name}, seed {seed}",
            Candidate(point.name, config).with_seed(seed),
            out / f"{point.name}-seed{seed}",
        )
        for point, config, seed in both
    ]
    summaries = run_all(planned, progress, workers=workers, objects=objects, go_on=True)
    for (point, _, seed), summary in zip(both, summaries, strict=True):
        if isinstance(summary, FederationError):
            failed.setdefault(point.name, f"seed {seed}: {summary}")
        else:
            rows.append({"config": point.name, **summary})
    document = _document(candidates, rows, failed, metric)
    with disk_errors("sweep.json"):
        out.mkdir(parents=True, exist_ok=True)  # no run may have begun
        write_json(out / "sweep.json", document)
    return document


def _document(
    candidates: Sequence[tuple[Point, RunConfig]],
    rows: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    metric: str | None,
) -> dict[str, Any]:
    metrics = main_metrics(rows, candidates[0][1].evaluation.tasks)
    entries = {entry["config"]: entry for entry in table(rows)} if rows else {}
    known = sorted({name for entry in entries.values() for name in entry["metrics"]})
    if metric is not None and entries and metric not in known:
        raise InputError(f"there is no metric {metric} in these runs; there are {', '.join(known)}")
    chosen = metric or (metrics[0] if metrics else None)
    found = []
    for point, _ in candidates:
        about: dict[str, Any] = {"name": point.name, "settings": dict(point.settings)}
        if point.name in failed:
            about["error"] = failed[point.name]
        elif point.name in entries:
            about |= {key: value for key, value in entries[point.name].items() if key != "config"}
        found.append(about)
    done = [entry for entry in found if "error" not in entry and chosen in entry.get("metrics", {})]
    best = min(done, key=lambda entry: better(chosen or "")(entry["metrics"][chosen]["mean"]), default=None)
    return {
        "metric": chosen,
        "best": best and best["name"],
        "metrics": metrics,
        "points": found,
        "rows": list(rows),
    }
