"""`tracking`: a run's settings and rounds for TensorBoard, Weights & Biases, MLflow or trackio.

Each of them is a process of its own (trackers.py), which is told a line of JSON a round: what it prints,
asks, sets in its environment or waits for is not the run's, and if it fails or hangs the run goes on with the
same bits. Only what `told_settings` and `told_values` name reaches it: no data, no path, no text that anybody
wrote, nothing of a single client. A client is told nothing of it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from fedtune.config.schema import RunConfig
from fedtune.core.settings import Settings
from fedtune.evaluation.registry import TASKS
from fedtune.federation.callbacks import RoundState, Scores
from fedtune.federation.files import disk_errors, read_json, write_json
from fedtune.federation.folder import RunFolder
from fedtune.federation.round_table import WAYS, rows_of
from fedtune.models.folders import local_folder
from fedtune.version import __version__

TRACKING = "tracking.json"  # the run's name at its trackers, and the last round that each was told
PROJECT = "fedtune"
WAIT_S = 120.0  # for a tracker to take what is left when a run ends
TOOK_NOTHING = "it takes nothing any more"

Values = dict[str, float]


def told_settings(config: RunConfig) -> dict[str, float | bool | str]:
    """What of a configuration leaves: numbers, switches, and words out of a list of ours, by dotted name.

    A text that anybody may write (a place, a field's or a class's name, a prompt) does not, but for names of
    tasks that are registered and of a model that is no folder here.
    """
    found: dict[str, float | bool | str] = {"fedtune": __version__, **_plain(config, "")}
    name = config.model.name
    if local_folder(name) is None and not Path(name).is_absolute():
        found["model.name"] = name
    found["evaluation.tasks"] = ", ".join(task for task in config.evaluation.tasks if task in TASKS)
    return found


def _plain(block: Settings, prefix: str) -> dict[str, float | bool | str]:
    found: dict[str, float | bool | str] = {}
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(value, Settings):
            found |= _plain(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float) or (
            isinstance(value, str) and value in _words(field.annotation)
        ):
            found[prefix + name] = value
    return found


def _words(annotation: Any) -> Iterator[str]:
    """Those that an annotation lists."""
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from _words(part)


def told_values(entry: Mapping[str, Any], sums: Sequence[int], peaks: Mapping[str, int]) -> Values:
    """What of a round leaves, by the names of the columns of rounds.csv.

    Args:
        entry: Its line of rounds.jsonl.
        sums: Bytes of all messages so far, in the order of `WAYS`.
        peaks: Bytes of memory, the highest so far: `client`, `server`, `evaluation`.
    """
    values: dict[str, Any] = {
        "clients": len(entry["clients"]),
        "left_out": len(entry.get("left_out", {})),
        "train_loss": entry["train_loss"],
        "seconds": entry["seconds"],
        **{f"{task}.{metric}": score for task, of in entry["eval"].items() for metric, score in of.items()},
        **{f"privacy.{name}": value for name, value in entry.get("privacy", {}).items()},
        **dict(zip(WAYS, sums, strict=True)),
        **{f"peak_memory_bytes.{where}": peak for where, peak in peaks.items()},
    }
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class Tracking:
    """A callback that tells trackers of each round, and of the rounds before that they have not been told.

    Args:
        config: The run's.
        path: Its folder; what a tracker keeps on this machine is in `tracking/NAME` there.
        say: Gets a line for what a person should know.
    """

    def __init__(self, config: RunConfig, path: Path, say: Callable[[str], None]) -> None:
        self._config, self._folder, self._say = config, RunFolder(path), say
        self._id, self._trackers = "", list[Tracker]()

    def on_round(self, round: int, scores: Scores, state: RoundState) -> None:
        """Tells all trackers of the round, the first time also of the settings."""
        if not self._config.tracking:
            return
        self._begin()
        sums = [state.payload_bytes[way] for way in ("down", "up")]
        sums += [state.framed_bytes[way] for way in ("down", "up")]
        values = told_values(state.entry, sums, state.peak_memory_bytes)
        for tracker in self._trackers:
            if tracker.sent < round - 1:
                self._catch_up(tracker, round - 1)
            tracker.tell(round, values)
        self._keep()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Tells them what they have not been told and how the run ended, and waits until they are done."""
        if not self._config.tracking:
            return
        self._begin()
        for tracker in self._trackers:
            self._catch_up(tracker, math.inf)
            tracker.end(str(summary["status"]))
        limit = time.monotonic() + WAIT_S
        for tracker in self._trackers:
            tracker.wait(limit)
        self._keep()

    def _begin(self) -> None:
        if self._trackers:
            return
        file = self._folder.path / TRACKING
        kept: dict[str, Any] = read_json(file) if file.exists() else {}
        told: dict[str, int] = kept.get("told", {})
        self._id = str(kept.get("id") or secrets.token_hex(4))
        start = {
            "project": PROJECT,
            "name": self._folder.path.absolute().name,
            "id": self._id,
            "settings": told_settings(self._config),
        }
        for name in self._config.tracking:
            folder = self._folder.path / "tracking" / name
            with disk_errors(str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                self._trackers.append(Tracker(name, folder.absolute(), start, told.get(name, -1)))

    def _catch_up(self, tracker: Tracker, last: float) -> None:
        """Tells one tracker of the rounds up to `last` that came before, out of the run's logs."""
        peaks: dict[int, dict[str, int]] = defaultdict(dict)
        for scope in self._folder.entries("memory.jsonl"):
            of = peaks[scope["round"]]
            of[scope["where"]] = max(of.get(scope["where"], 0), scope["peak_bytes"])
        highest: dict[str, int] = {}
        for entry, row in zip(self._folder.entries("rounds.jsonl"), rows_of(self._folder), strict=True):
            for where, peak in peaks[entry["round"]].items():
                highest[where] = max(highest.get(where, 0), peak)
            if tracker.sent < entry["round"] <= last:
                tracker.tell(entry["round"], told_values(entry, [row[way] for way in WAYS], highest))

    def _keep(self) -> None:
        for tracker in self._trackers:
            if said := tracker.said():
                self._say(said)
        told = {tracker.name: tracker.told for tracker in self._trackers}
        with disk_errors(TRACKING):
            write_json(self._folder.path / TRACKING, {"id": self._id, "told": told})


class Tracker:
    """The process of one tracker, in which trackers.py is the program.

    Args:
        name: Which.
        folder: Its own, its working folder too; log.txt there has what it prints.
        start: What it is told first: project, name, id and settings of the run.
        told: The last round that it has taken in earlier; -1: none.

    Attributes:
        sent: The last round that was sent to it.
        told: The last round that it has taken.
    """

    def __init__(self, name: str, folder: Path, start: Mapping[str, Any], told: int) -> None:
        self.name, self.sent, self.told = name, told, told
        self._fault, self._shown, self._heard = "", False, b""
        path = [os.path.abspath(place or ".") for place in sys.path]
        with (folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedtune.federation.trackers", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # Ctrl-C is for the run, which then tells it
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._out, self._in = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        self._waiting = b""
        self._send({**start, "first": told + 1, "folder": str(folder)})

    def tell(self, round: int, values: Values) -> None:
        """Sends a round; nothing to a tracker that has failed."""
        self._send({"round": round, "values": values})
        self.sent = round

    def end(self, status: str) -> None:
        """Sends how the run ended."""
        self._send({"status": status})

    def wait(self, limit: float) -> None:
        """Waits until it has taken everything and has ended, or `limit` (monotonic seconds) has passed."""
        while not self._fault and self._process.poll() is None and time.monotonic() < limit:
            self._push()
            self._listen()
            time.sleep(0.05)
        if self._process.poll() is None:
            self._fault = self._fault or TOOK_NOTHING
            self._process.kill()
        status = self._process.wait()
        self._listen()
        if status != 0:
            self._fault = self._fault or f"its process ended ({status})"
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def said(self) -> str:
        """What a person should know and has not been told: that it failed, once; else nothing."""
        self._listen()
        if not self._fault or self._shown:
            return ""
        self._shown = True
        return f"tracking: {self.name} failed, and the run goes on without it: {self._fault}"

    def _send(self, line: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(line).encode() + b"\n"
        self._push()

    def _push(self) -> None:
        """Hands over as much as the pipe takes; never waits."""
        while self._waiting and not self._fault:
            try:
                self._waiting = self._waiting[os.write(self._out, self._waiting) :]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._listen()
                self._fault = self._fault or "its process ended"
        if self._fault:
            self._waiting = b""

    def _listen(self) -> None:
        while True:
            try:
                heard = os.read(self._in, 65536)
            except (BlockingIOError, ValueError, OSError):
                heard = b""
            if not heard:
                break
            self._heard += heard
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            answer: dict[Literal["told", "failed"], Any] = json.loads(line)
            self.told = answer.get("told", self.told)
            self._fault = self._fault or str(answer.get("failed", ""))
