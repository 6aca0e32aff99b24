"""Trees of answers, as OpenAssistant has them, to conversations: a way from the root to a leaf is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fedtune.data.examples import ASSISTANT, Example, Turn
from fedtune.data.turns import category_of, example_of, kind_of, turn_of
from fedtune.errors import InputError

Trees = Literal["best", "all"]


def is_tree(row: Mapping[str, Any]) -> bool:
    """Whether a record is a tree of answers."""
    root = row.get("prompt", row)
    return isinstance(root, dict) and isinstance(root.get("replies"), list) and "text" in root


def is_node(row: Mapping[str, Any]) -> bool:
    """Whether a record is one message of a tree, each of which is a record of its own."""
    return {"message_id", "parent_id", "text", "role"} <= row.keys()


def ways(root: Any, place: str, category: str, trees: Trees) -> Iterator[Example]:
    """Conversations in a tree. A way ends at its last answer; one without any is left out."""
    found = False
    stack: list[tuple[Any, tuple[Turn, ...]]] = [(root, ())]
    while stack:
        node, before = stack.pop()
        if not isinstance(node, dict):
            raise InputError(f"{place}: a reply must be an object, got {kind_of(node)}.")
        turns = (*before, turn_of({"role": node.get("role"), "content": node.get("text")}, place))
        replies = _ranked(node.get("replies"))
        if replies:
            stack += [(reply, turns) for reply in reversed(replies[:1] if trees == "best" else replies)]
            continue
        while turns and turns[-1].role != ASSISTANT:
            turns = turns[:-1]
        if turns:
            found = True
            yield example_of(list(turns), None, place, category)
    if not found and trees == "best" and _ranked(root.get("replies") if isinstance(root, dict) else None):
        raise InputError(f"{place}: no way through this tree has an assistant's turn.")


def _ranked(replies: Any) -> list[Any]:
    """Answers that were not deleted, the best first: by rank from 0, and those without one as they come."""
    kept = [r for r in replies or () if not (isinstance(r, dict) and r.get("deleted"))]
    return sorted(kept, key=lambda r: _rank(r) if isinstance(r, dict) else float("inf"))


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def of_nodes(
    nodes: list[tuple[str, dict[str, Any]]], category: str | None, trees: Trees
) -> Iterator[Example]:
    """Conversations of trees whose messages are records of their own."""
    whole = {row["message_id"]: {**row, "replies": []} for _, row in nodes}
    if len(whole) < len(nodes):
        raise InputError(f'{nodes[0][0]}: a "message_id" stands twice among these records.')
    roots = []
    for place, row in nodes:
        parent = row["parent_id"]
        if parent is None:
            roots.append((place, row))
        elif parent in whole:
            whole[parent]["replies"].append(whole[row["message_id"]])
    for place, row in roots:
        yield from ways(whole[row["message_id"]], place, category_of(row, category, place), trees)
