"""Who was left out of a run's rounds: counted for summary.json, and said in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 5  # clients that a sentence names


def left_out(
    rounds: Iterable[Mapping[str, Any]], clients: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Every client that was left out of a round, for summary.json.

    Args:
        rounds: The lines of rounds.jsonl.
        clients: `clients` of partition.json, for their names.

    Returns:
        By the client's number: its `name` where it has one, how many rounds `asked` it, the `rounds` that it
        was left out of, and `why`: the reason of the last of them.
    """
    names = {int(client["client"]): client["name"] for client in clients if client.get("name")}
    asked: dict[int, int] = {}
    found: dict[int, dict[str, Any]] = {}
    for entry in rounds:
        without = {int(client): why for client, why in entry.get("left_out", {}).items()}
        for client in {*entry["clients"], *without}:
            asked[client] = asked.get(client, 0) + 1
        for client, why in without.items():
            name = {"name": names[client]} if client in names else {}
            now = found.setdefault(client, {**name, "asked": 0, "rounds": []})
            now["rounds"].append(entry["round"])
            now["why"] = why
    for client, now in found.items():
        now["asked"] = asked[client]
    return {str(client): found[client] for client in sorted(found)}


def said(summary: Mapping[str, Any]) -> str:
    """A sentence on the clients that were left out; empty if none was."""
    found = summary.get("left_out", {})  # a run of an older version does not say
    never = {c: about for c, about in found.items() if len(about["rounds"]) == about["asked"]}
    if never:
        shown = [f"{_named(client, about)}: {about['why']}" for client, about in list(never.items())[:SHOWN]]
        return (
            f"the result is without {len(never)} of {summary['clients']} clients, which were left out of "
            f"every round that asked them. {'; '.join(shown)}{_more(never)}"
        )
    if found:
        return f"left out of some rounds: {counted(summary)}; rounds.jsonl says why"
    return ""


def counted(summary: Mapping[str, Any]) -> str:
    """Who was left out, and of how many rounds; empty if nobody was."""
    found = summary.get("left_out", {})
    shown = [
        f"{_named(client, about)} of {len(about['rounds'])} of {about['asked']}"
        for client, about in list(found.items())[:SHOWN]
    ]
    return "; ".join(shown) + _more(found)


def _more(found: Mapping[str, Any]) -> str:
    return f"; and {len(found) - SHOWN} more, see summary.json" if len(found) > SHOWN else ""


def _named(client: str, about: Mapping[str, Any]) -> str:
    return f"client {client} ({about['name']})" if "name" in about else f"client {client}"
