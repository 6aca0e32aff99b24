"""Rows of a run as plain dictionaries, and as a flat table where pandas is there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fedtune.errors import InputError


class Rows(list[dict[str, Any]]):
    """A list of plain dictionaries."""

    def to_pandas(self) -> Any:
        """One flat row a dictionary: a nested value's column is its path with dots, a list's its length.

        Returns:
            A pandas.DataFrame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas needs pandas; pip install pandas") from None
        return pandas.DataFrame([flat(row) for row in self])


_CLIENTS = ("asked_losses", "client_losses", "gave_no_loss", "left_out", "updates", "stands_out")


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary without dictionaries or lists in it.

    What stands under `eval` loses that word, so that a score's column is `task.metric`; what is said of
    single clients (`left_out`, `updates`, `stands_out`) becomes their number.
    """
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list) or (key in _CLIENTS and isinstance(value, Mapping)):
            cells[key] = len(value)
        elif isinstance(value, Mapping):
            prefix = "" if key == "eval" else f"{key}."
            cells |= {f"{prefix}{inner}": cell for inner, cell in flat(value).items()}
        else:
            cells[key] = value
    return cells


def client_rows(
    partition: Mapping[str, Any],
    rounds: Iterable[Mapping[str, Any]],
    messages: Iterable[Mapping[str, Any]],
    memory: Iterable[Mapping[str, Any]],
) -> Rows:
    """One row a client: what it has, how often it took part, what it sent and got, and its peak memory.

    Args:
        partition: partition.json.
        rounds: The lines of rounds.jsonl.
        messages: Those of wire.jsonl.
        memory: Those of memory.jsonl.
    """
    took: dict[int, int] = defaultdict(int)
    left: dict[int, int] = defaultdict(int)
    payload: dict[int, dict[str, int]] = defaultdict(lambda: {"down": 0, "up": 0})
    peaks: dict[int, int] = defaultdict(int)
    for entry in rounds:
        for client in entry["clients"]:
            took[client] += 1
        for name in entry.get("left_out", {}):
            left[int(name)] += 1
    for message in messages:
        payload[message["client"]][message["direction"]] += message["payload_bytes"]
    for scope in memory:
        if scope["where"] == "client":
            peaks[scope["client"]] = max(peaks[scope["client"]], scope["peak_bytes"])
    return Rows(
        {
            "client": about["client"],
            "name": about.get("name", ""),
            "examples": about["examples"],
            "rounds": took[about["client"]],
            "left_out": left[about["client"]],
            "payload_bytes": payload[about["client"]],
            "peak_memory_bytes": peaks[about["client"]],
        }
        for about in partition["clients"]
    )
