"""The folder of one run: what DESIGN calls its files, created whole, appended to line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.file import dump_config, load_config
from fedtune.config.schema import RunConfig, document_sha256
from fedtune.config.yaml_text import read_yaml
from fedtune.errors import InputError
from fedtune.federation.files import atomic_folder, disk_errors, dumps, read_json, write_json, write_text
from fedtune.federation.plugins import require_plugins

SKIPPED = "skipped.jsonl"
EVALUATIONS = "evaluations.jsonl"  # scores that were asked for once the run had a result
LOGS = ("rounds.jsonl", "wire.jsonl", "memory.jsonl", "answers.jsonl")


class RunFolder:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(
        path: Path,
        config: RunConfig,
        environment: dict[str, Any],
        partition: dict[str, Any],
        examples: dict[str, Any],
        skipped: Sequence[tuple[str, str]] = (),
    ) -> RunFolder:
        """Makes the folder with its configuration, environment, partition and examples, all at once.

        Rows of the data that were skipped (place, reason) stand in skipped.jsonl, if some were.

        Raises:
            InputError: `path` exists and is not empty.
        """
        refuse_existing(path)
        with disk_errors(f"run folder {path}"), atomic_folder(path) as new:
            (new / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            write_json(new / "environment.json", environment)
            write_json(new / "partition.json", partition)
            write_json(new / "examples.json", examples)
            if skipped:
                lines = (dumps({"place": place, "reason": why}) + "\n" for place, why in skipped)
                write_text(new / SKIPPED, "".join(lines))
            (new / "checkpoints").mkdir()
        return RunFolder(path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run. Raises InputError if `path` is not a run folder."""
        if not (path / "config.yaml").is_file():
            what = "no such folder" if not path.exists() else "not a run folder: it has no config.yaml"
            raise InputError(f"{path}: {what}; give the folder that `fedtune run` printed")
        return RunFolder(path)

    def config(self) -> RunConfig:
        """The run's resolved configuration. Raises InputError if a plugin file of the run is not loaded."""
        require_plugins(self.path)
        return load_config(self.path / "config.yaml")

    def config_sha256(self) -> str:
        """Identifies the configuration as the version that began the run wrote it.

        A later version may know more settings; a checkpoint of the run names this digest all the same.
        """
        return document_sha256(read_yaml(self.path / "config.yaml"))

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None while the run has not ended."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else None

    def append(self, log: str, entry: dict[str, Any]) -> None:
        """Adds one line to a log and hands it to the operating system, so that a killed run keeps it."""
        with disk_errors(log), (self.path / log).open("a", encoding="utf-8") as file:
            file.write(dumps(entry) + "\n")

    def entries(self, log: str) -> Iterator[dict[str, Any]]:
        """The lines of a log."""
        path = self.path / log
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def sizes(self) -> dict[str, int]:
        """Bytes of each log, for a checkpoint to remember."""
        return {log: (self.path / log).stat().st_size if (self.path / log).exists() else 0 for log in LOGS}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Cuts the logs back to what they held at a checkpoint."""
        for log in LOGS:
            path = self.path / log
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(sizes.get(log, 0))


def refuse_existing(path: Path) -> None:
    """Raises InputError if `path` holds anything, so that no run overwrites another."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"{path} exists already; give another --out. A run in it goes on with --resume {path}, in Python "
            "with resume=True"
        )


def kept(path: Path) -> str:
    """A sentence on what a run that broke has kept."""
    return f"What was done is kept: once that is mended, --resume {path} goes on."
