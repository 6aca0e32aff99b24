"""What a report reads of run folders: their logs, in order, and which differ in nothing but their seed."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config.yaml_text import read_yaml
from fedtune.errors import InputError
from fedtune.federation.files import read_json
from fedtune.federation.folder import EVALUATIONS, RunFolder

log = logging.getLogger("fedtune")
_OWN = ("seed", "run.")  # settings that runs of one kind may have of their own


@dataclass(frozen=True)
class RunData:
    """What a report shows of one run: its settings as text, and its logs."""

    name: str
    config: str
    method: str
    rounds: Sequence[Mapping[str, Any]]
    payload: Mapping[int, Mapping[str, int]]  # by round and direction
    peaks: Mapping[str, int]  # by client, server and evaluation
    summary: Mapping[str, Any]  # empty while the run goes on
    settings: Mapping[str, Any] = field(default_factory=dict)  # by their names, as method.lr
    taken: Mapping[str, str] = field(default_factory=dict)  # what settings that are auto stood for
    changed: Sequence[str] = ()  # which of its inputs are not any more what it had
    evaluations: Sequence[Mapping[str, Any]] = ()  # lines of evaluations.jsonl
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # PNG files of what it drew, by their names
    split: Sequence[Mapping[str, Any]] = ()  # of each client: examples, labels

    def curve(self, task: str, metric: str) -> dict[int, float]:
        """A score by round, of the rounds that were evaluated."""
        found = {entry["round"]: entry["eval"].get(task, {}).get(metric) for entry in self.rounds}
        return {round: value for round, value in found.items() if value is not None}

    def sent(self) -> dict[int, int]:
        """Payload bytes until the end of each round, down and up together."""
        total, sums = 0, {}
        for entry in self.rounds:
            total += sum(self.payload.get(entry["round"], {}).values())
            sums[entry["round"]] = total
        return sums

    def seconds(self) -> dict[int, float]:
        """Seconds until the end of each round."""
        total, sums = 0.0, {}
        for entry in self.rounds:
            total += entry["seconds"]
            sums[entry["round"]] = total
        return sums

    def clients(self, task: str, metric: str) -> dict[int, float]:
        """Each client's score in the last round that has them."""
        for entry in reversed(self.rounds):
            found = entry.get("per_client", {}).get(task, {}).get(metric, {}).get("clients", {})
            if found:
                return {int(client): value for client, value in found.items() if value is not None}
        return {}


def read_run(path: Path, name: str) -> RunData:
    """A run's folder as a report needs it.

    Raises:
        InputError: It is not a run folder, or nothing has been recorded in it yet.
    """
    folder = RunFolder.open(path)
    rounds = list(folder.entries("rounds.jsonl"))
    if not rounds:
        raise InputError(f"{path} has no round yet; a report needs at least the scores before the first one")
    payload: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for message in folder.entries("wire.jsonl"):
        payload[message["round"]][message["direction"]] += message["payload_bytes"]
    peaks: dict[str, int] = {}
    for scope in folder.entries("memory.jsonl"):
        peaks[scope["where"]] = max(peaks.get(scope["where"], 0), scope["peak_bytes"])
    text = (path / "config.yaml").read_text(encoding="utf-8")
    from fedtune.federation.recorded import changed_inputs  # it imports what loads models

    config = folder.config()
    changed = changed_inputs(path, config)
    for sentence in changed:
        log.warning("%s", sentence)
    return RunData(
        name,
        text,
        config.method_name,
        rounds,
        payload,
        peaks,
        folder.summary() or {},
        dict(flat(read_yaml(path / "config.yaml"))),
        read_json(path / "environment.json").get("taken", {}),
        tuple(changed),
        list(folder.entries(EVALUATIONS)),
        {file.stem: file.read_bytes() for file in sorted((path / "pictures").glob("*.png"))},
        read_json(path / "partition.json").get("clients", []),
    )


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Several runs, under names that tell them apart: the folder's, with its parents' where two are equal.

    Raises:
        InputError: As `read_run`, or a folder is named twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise InputError("a run is named twice; name each folder once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    named = zip(paths, resolved, strict=True)
    return [read_run(path, "/".join(whole.parts[-depth:])) for path, whole in named]


def flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their names, as method.lr; a list, or a block without settings, is one value."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, settings


def differences(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """The settings in which runs differ, a text for each run; empty where one has no such setting."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    texts = {name: [_said(run.settings, name) for run in runs] for name in names}
    return {name: said for name, said in texts.items() if len(set(said)) > 1}


def _said(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return ""
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def kinds(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Runs that differ in their seed, and in nothing else, together, under a name for all of them."""
    alike: dict[str, list[RunData]] = {}
    for run in runs:
        same = {name: value for name, value in run.settings.items() if not name.startswith(_OWN)}
        alike.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(run)
    found: dict[str, list[RunData]] = {}
    for some in alike.values():
        unlike = len({run.settings.get("seed") for run in some}) == len(some)
        found |= {_together(some): some} if unlike else {run.name: [run] for run in some}
    return found


def _together(runs: Sequence[RunData]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} ({len(runs)} seeds)"
