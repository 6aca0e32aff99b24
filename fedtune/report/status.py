"""How a run stands, as tables for an operator."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from fedtune.report.tables import score_line, size


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """What is said above the table of clients: state, where it is, scores, bytes, what to do."""
    now, last = status["now"], status["round"]
    lines = [f"{status['run']}: {status['state']}, {status['method']} on {status['model']}"]
    if now is not None:
        answered = f", {now['answered']} of {now['asked']} clients answered" if now["asked"] else ""
        was = "" if status["state"] == "under way" else "last known: "
        lines.append(
            f"{was}{now['stage']}{answered}; process {now['pid']}, since {now['started']}, seen "
            f"{_ago(now['updated'])}"
        )
    lines.append("finished: nothing yet" if last is None else f"finished: round {last} of {status['rounds']}")
    if status["evaluation"] and last is not None:
        lines.append(score_line(last, status["evaluation"]))
    for words, kind in (("payload", "payload_bytes"), ("on the wire", "framed_bytes")):
        lines.append(f"{words} down, up: {size(status[kind]['down'])}, {size(status[kind]['up'])}")
    if status["state"] in ("killed", "stopped", "interrupted"):
        lines.append(f"it goes on with --resume {status['run']}")
    return lines


def status_table(status: Mapping[str, Any]) -> Table:
    """A row a client."""
    network = any("here" in client for client in status["clients"])
    table = Table(title="Clients", title_justify="left")
    for column in ("client", "examples", "rounds", "left out", "payload down", "up"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for column in ("here", "last seen") if network else ():
        table.add_column(column)
    table.add_column("last fault")
    for client in status["clients"]:
        name = f"{client['client']} {client['name']}".rstrip()
        sent = client["payload_bytes"]
        cells = [name, f"{client['examples']:,}", str(client["rounds"]), str(client["left_out"])]
        cells += [size(sent["down"]), size(sent["up"])]
        if network:
            seen = client.get("seen")
            cells += ["yes" if client.get("here") else "no", _ago(seen) if seen else "never"]
        table.add_row(*cells, client["fault"])
    return table


def _ago(moment: str) -> str:
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))
    for unit, of in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * of:
            return f"{seconds // of} {unit} ago"
    return f"{seconds} s ago"
