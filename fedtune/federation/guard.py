"""Whether what a round gave is taken as the next state; if not, the round is done without who stands out.

A result is refused if

    a number of it is NaN or infinite;
    a client's update is more than `federation.max_norm_ratio` times as long as it may be (core/watch.py) and
    goes into a plain mean;
    its held-out loss is NaN, infinite, or more than `federation.max_loss_jump` above the one that was
    measured before; where the round is evaluated with the task `loss`.

The round is then done again from the replies that came, without those that stand out: nobody trains or sends
anything twice, and no byte is counted twice. Every try has fewer clients than the one before, so there is an
end to it. Where nobody stands out, the server sees no update, or clients come in turn (who came later went on
from what is refused), the run stops.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from fedtune.config.schema import Federation
from fedtune.core.cohort import RoundOutcome
from fedtune.core.state import to_payload
from fedtune.core.types import Method
from fedtune.core.watch import Standing, standings
from fedtune.errors import FederationError
from fedtune.federation.scored import Evaluated

log = logging.getLogger("fedtune")
S = TypeVar("S")


class RoundRefused(FederationError):
    """What a round gave cannot be taken as the next state, and it cannot be done without who is to blame."""


@dataclass(frozen=True)
class Settled(Generic[S]):
    """A round that was taken.

    Attributes:
        state: The server's state after it.
        outcome: What happened.
        scores: Of the state; empty if the round was not evaluated.
        entry: What rounds.jsonl says of the updates: `updates`, `stands_out`, `refused`.
    """

    state: S
    outcome: RoundOutcome
    scores: Evaluated
    entry: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Guard:
    """The rules of one run.

    Attributes:
        settings: Of its federation.
        method: Its method.
    """

    settings: Federation
    method: Method[Any]

    @property
    def sees_updates(self) -> bool:
        """Whether the server may look at one client's update."""
        settings = self.settings
        return self.method.uses_wire and not (settings.secure_aggregation or settings.privacy)

    def settle(
        self,
        once: Callable[[Mapping[int, str]], tuple[S, RoundOutcome]],
        scored: Callable[[S], Evaluated],
        *,
        loss: float | None,
    ) -> Settled[S]:
        """One round, done until its result can be taken.

        Args:
            once: Does the round without these clients (and why): first without nobody, then again.
            scored: Evaluates its state, if that is due.
            loss: The held-out loss that was measured last.

        Raises:
            RoundRefused: It cannot be taken, and leaving out who stands out is not possible or not enough.
            QuorumError: Of `once`.
        """
        without: dict[int, str] = {}
        found: dict[int, Standing] = {}
        refused: list[dict[str, Any]] = []
        while True:
            state, outcome = once(without)
            now = standings(outcome.seen, outcome.examples, alike=self.method.arrival != "in-turn")
            found |= now
            out = {client: standing.why for client, standing in now.items() if standing.why}
            scores, why, long = Evaluated(), self._not_finite(state), self._too_long(now)
            if not why and long:
                why, out = "of the length of an update", long
            if not why:
                scores = scored(state)
                why = self._jump(scores, loss)
            if not why:
                break
            if not out or not self._repeats:
                raise RoundRefused(self._said(outcome.round, why, out))
            refused.append({"why": why, "without": {str(c): out[c] for c in sorted(out)}})
            for client, reason in sorted(out.items()):
                without[client] = f"{reason}; the round's result was refused because {why}"
                log.warning("round %d: client %d is left out: %s", outcome.round, client, without[client])
        for client, reason in sorted(out.items()):
            log.warning("round %d: client %d stands out: %s", outcome.round, client, reason)
        entry: dict[str, Any] = {}
        if found:
            entry["updates"] = {str(client): found[client].entry for client in sorted(found)}
        if out:
            entry["stands_out"] = {str(client): out[client] for client in sorted(out)}
        if refused:
            entry["refused"] = refused
        return Settled(state, outcome, scores, entry)

    @property
    def _repeats(self) -> bool:
        return self.sees_updates and self.method.arrival != "in-turn"

    def _not_finite(self, state: object) -> str:
        for name, tensor in to_payload(state).tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"its {name} holds NaN or infinite values"
        return ""

    def _too_long(self, now: Mapping[int, Standing]) -> dict[int, str]:
        """Who sent an update that a plain mean must not have."""
        most = self.settings.max_norm_ratio
        if most is None or not self._plain_mean:
            return {}
        return {c: s.why for c, s in now.items() if s.times is not None and s.times > most}

    @property
    def _plain_mean(self) -> bool:
        config, robust = self.method.config, self.settings.robust
        own = getattr(config, "aggregation", "mean") in ("trimmed-mean", "median-of-means")
        return robust is None and not own and getattr(config, "clip", None) is None

    def _jump(self, scores: Evaluated, before: float | None) -> str:
        if not self.method.uses_wire:  # nobody but this machine takes part
            return ""
        now, most = held_out_loss(scores.result), self.settings.loss_jump
        if now is None:
            return ""
        if not math.isfinite(now):
            return f"its held-out loss is {now}"
        if most is not None and before is not None and now > before + most:
            return f"its held-out loss is {now:.4g}, and was {before:.4g}"
        return ""

    def _said(self, round: int, why: str, out: Mapping[int, str]) -> str:
        if not self.sees_updates:
            who = "The server sees no single update in this run, so that no client can be named."
        elif out:
            named = "; ".join(f"client {client}: {reason}" for client, reason in sorted(out.items()))
            who = f"Who stands out: {named}. Clients come in turn, and who came later went on from that."
        else:
            who = "No client's update stands out from the others'."
        return (
            f"round {round}: its result is not taken, because {why}. {who} The state before it is kept. If a "
            "client is to blame, see to it and go on with --resume: everybody is asked anew. If training "
            "itself diverges, start a new run with a lower method.lr. A higher federation.max_loss_jump or "
            "max_norm_ratio lets more through (null: everything)."
        )


def last_loss(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """The held-out loss that was measured last in these lines of rounds.jsonl."""
    found = (held_out_loss(entry["eval"]) for entry in reversed(rounds))
    return next((loss for loss in found if loss is not None), None)


def held_out_loss(result: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The loss that the task `loss` measured; None where it did not."""
    value = result.get("loss", {}).get("loss")
    return None if value is None else float(value)
