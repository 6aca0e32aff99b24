"""Whether the clients of a round have somebody to pass their sums on to (`method.graph`)."""

from __future__ import annotations

from fedtune.core.cohort import PerRound, sample_cohort
from fedtune.core.settings import Settings


def refusal(method: Settings, per_round: PerRound, clients: int) -> str | None:
    """Why a graph makes no sense with so few clients in a round; None if there is none, or they are enough.

    Args:
        method: The method's settings.
        per_round: As `federation.clients_per_round`.
        clients: Of the federation.
    """
    graph = getattr(method, "graph", None)
    asked = len(sample_cohort(dict.fromkeys(range(clients), 1), per_round, seed=0, round=1).clients)
    if graph is None or asked > 1:
        return None
    why = f"federation.clients_per_round: {per_round} asks one of {clients}"
    why = why if clients > 1 else "there is one client"
    return (
        f"method.graph: {graph} has each client of a round pass its sums on to others of that round, and "
        f"{why}: nobody would hear of anybody. Ask at least two, or leave graph out"
    )
