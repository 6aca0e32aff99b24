"""Flower's records as any client can send them: what is not a message of ours is a fault of its sender."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.transport.flower import GridChannel

flwr = pytest.importorskip("flwr.app")


class Grid:
    """Gives out one answer."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def pull_messages(self, ids: list[str]) -> list[Any]:
        about = SimpleNamespace(reply_to_message_id="x")
        return [SimpleNamespace(metadata=about, has_error=lambda: False, content=self.content)]


def answer(**records: Any) -> Any:
    ((_, message),) = GridChannel(Grid(flwr.RecordDict(records))).pull(["x"])
    return message


def raw(data: bytes = b"frame") -> Any:
    return flwr.Array("uint8", (len(data),), "raw", data)


FIELDS = {"bytes": 5, "state": 0}


def test_a_message_of_ours_comes_through() -> None:
    message = answer(fields=flwr.ConfigRecord(FIELDS), bytes=flwr.ArrayRecord({"body": raw()}))
    assert dict(message.fields) == FIELDS and bytes(message.body) == b"frame"
    assert dict(answer(fields=flwr.ConfigRecord({"fault": "no battery"})).fields) == {"fault": "no battery"}


def foreign_records() -> dict[str, dict[str, Any]]:
    config, array = flwr.ConfigRecord, flwr.ArrayRecord
    return {
        "nothing": {},
        "bytes in a field": {"fields": config({"bytes": b"\x00" * 10})},
        "a list in a field": {"fields": config({"bytes": [1, 2, 3]})},
        "texts in a field": {"fields": config({"fault": ["a", "b"]})},
        "an infinite number": {"fields": config({"bytes": float("inf")})},
        "a megabyte of text": {"fields": config({"fault": "x" * (1 << 20)})},
        "quotes that double": {"fields": config({"fault": '"' * 300_000})},
        "many fields": {"fields": config({f"field {i}": i for i in range(50_000)})},
        "a long name": {"fields": config({"x" * 5000: 1})},
        "arrays as fields": {"fields": array({"bytes": raw()})},
        "metrics as fields": {"fields": flwr.MetricRecord({"bytes": [1.0]})},
        "settings as arrays": {"fields": config(FIELDS), "bytes": config({"body": "text"})},
        "metrics as arrays": {"fields": config(FIELDS), "bytes": flwr.MetricRecord({"body": 1.0})},
    }


@pytest.mark.parametrize("what", foreign_records())
def test_whatever_else_comes_is_a_fault_of_its_sender(what: str) -> None:
    message = answer(**foreign_records()[what])
    assert set(message.fields) == {"fault"}
    said = str(message.fields["fault"])
    assert said.startswith("its message is not one of fedtune's") and len(said) <= 300 and said.isprintable()
