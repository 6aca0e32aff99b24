"""Examples that are given as Python objects: rows, a data set, or one of either a client."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.data.examples import Example
from fedtune.data.reading import NONE_THERE, Reading
from fedtune.data.records import examples_from
from fedtune.errors import InputError


@dataclass(frozen=True)
class ObjectData:
    """Examples in memory, and whose they are.

    Attributes:
        examples: All of them; a client's stand together.
        clients: Examples of each client by name, in the order of `examples`; empty if they are to be split.
        said: What they were taken for, and why, a line each.
        skipped: Place and reason of each row that did not fit and was skipped.
    """

    examples: tuple[Example, ...]
    clients: Mapping[str, int]
    said: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def read(data: Any, fields: Mapping[str, str | None], reading: Reading | None = None) -> ObjectData:
        """Examples from rows: `{"instruction": ..., "output": ...}`, with `input` and `category` if wanted.

        Args:
            data: A list of rows (mappings), a `datasets.Dataset`, or a mapping from each client's name to one
                of either.
            fields: Our field names to the rows' keys, as `data.fields`.
            reading: Whether rows are instructions, conversations or plain texts, and whether bad ones are
                skipped; see `examples_from`. None: instructions, and none is skipped.

        Raises:
            InputError: It is something else, empty, or a row does not fit; names the row.
        """
        account = Reading("instruction") if reading is None else reading
        if not isinstance(data, Mapping):
            found = _some(examples_from(_rows(data, "data"), fields, "data", reading=account), "data")
            return ObjectData(tuple(found), {}, tuple(account.said), tuple(account.skipped))
        if not data:
            raise InputError("data has no clients; give at least one, as in {'north': [...]}")
        examples: list[Example] = []
        clients = {}
        for client, own in data.items():
            if not isinstance(client, str) or not client:
                raise InputError(f"data must map clients' names to rows; {client!r} is not a name")
            place = f'data["{client}"]'
            if isinstance(own, Mapping):
                raise InputError(
                    f"{place} must be a list of rows or a data set, got a mapping. One row is a list of one: "
                    "[{'instruction': ..., 'output': ...}]"
                )
            found = _some(examples_from(_rows(own, place), fields, place, reading=account), place)
            examples += found
            clients[client] = len(found)
        if type(data).__name__ in ("DatasetDict", "IterableDatasetDict"):
            raise InputError(
                f"data is a {type(data).__name__} with the splits {', '.join(data)}; give one of them, as in "
                'data["train"], or dict(data) if they are clients'
            )
        return ObjectData(tuple(examples), clients, tuple(account.said), tuple(account.skipped))

    def to_json(self) -> str:
        """As text, for another process."""
        return json.dumps({"examples": [e.document() for e in self.examples], "clients": dict(self.clients)})

    @staticmethod
    def from_json(text: str) -> ObjectData:
        """What `to_json` made text."""
        document = json.loads(text)
        return ObjectData(tuple(Example.of(row) for row in document["examples"]), document["clients"])


def _some(examples: list[Example], place: str) -> list[Example]:
    if not examples:
        raise InputError(f"{place}: {NONE_THERE}")
    return examples


def _rows(data: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Each row with its place, for errors."""
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise InputError(
            f"{place} must be a list of rows or a datasets.Dataset, or map clients' names to such; got "
            f"{type(data).__name__}. A file goes into data.train of the configuration"
        )
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):
        raise InputError(f'{place} is a pandas table; give its rows: {place}.to_dict("records")')
    return ((f"{place}[{number}]", row) for number, row in enumerate(data))
