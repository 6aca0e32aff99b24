"""rounds.csv: a run's rounds as one flat table for other programs, a row a round, written whole each time."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedtune.federation.callbacks import RoundState, Scores
from fedtune.federation.files import disk_errors, dumps, write_text
from fedtune.federation.folder import RunFolder
from fedtune.federation.rows import flat

ROUNDS = "rounds.csv"
WAYS = ("payload_bytes.down", "payload_bytes.up", "framed_bytes.down", "framed_bytes.up")


class RoundTable:
    """A callback that writes rounds.csv once a round is safe.

    What is there of rounds before comes from rounds.jsonl and wire.jsonl, so that a table is whole whatever
    ended the run before.

    Args:
        path: The run's folder.
    """

    def __init__(self, path: Path) -> None:
        self._folder = RunFolder(path)
        self._rows: list[dict[str, Any]] = []

    def on_round(self, round: int, scores: Scores, state: RoundState) -> None:
        """Writes the table up to this round."""
        if self._rows and self._rows[-1]["round"] == round - 1:
            sums = [state.payload_bytes[way] for way in ("down", "up")]
            sums += [state.framed_bytes[way] for way in ("down", "up")]
            self._rows.append(flat(state.entry) | dict(zip(WAYS, sums, strict=True)))
        else:
            self._rows = rows_of(self._folder)
        with disk_errors(ROUNDS):
            write_text(self._folder.path / ROUNDS, table(self._rows))


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """A row a round of a run's logs: as `flat` of rounds.jsonl, and the bytes of all messages so far."""
    sent: dict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys(WAYS, 0))
    for message in folder.entries("wire.jsonl"):
        for kind in ("payload_bytes", "framed_bytes"):
            sent[message["round"]][f"{kind}.{message['direction']}"] += message[kind]
    sums, rows = dict.fromkeys(WAYS, 0), []
    for entry in folder.entries("rounds.jsonl"):
        sums = {way: total + sent[entry["round"]][way] for way, total in sums.items()}
        rows.append(flat(entry) | sums)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV: a column a name, in the order in which names first come up; empty where a row has none.

    Numbers are those of the JSON lines, to the last digit; a text is quoted where CSV needs it.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> str:
    """Empty for what JSON calls null, as infinity and NaN are there."""
    return value if isinstance(value, str) else "" if (text := dumps(value)) == "null" else text
