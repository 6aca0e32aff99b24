"""What a run tells Python code that wants to know: each client, each round, the end.

A callback is an object with any of the three methods of `Callback`; what it lacks is not called. It is told
of what has happened and changes nothing. A round is reported once its checkpoint is written, so what a
callback has seen is never taken back by a resumed run, except by a rollback that someone asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.core.cohort import RoundOutcome
from fedtune.errors import FederationError, InputError

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ClientReport:
    """What came of one client in a round.

    Attributes:
        metrics: What its reply reported (`train_loss`, `trained_tokens`, `steps`, ...); empty if it was left
            out, and where the server may not see it (secure aggregation, privacy).
        fault: Why it was left out; empty if it was not.
    """

    metrics: Mapping[str, float]
    fault: str = ""


@dataclass(frozen=True)
class RoundState:
    """Where a run stands after a round.

    Attributes:
        entry: The round's line of rounds.jsonl: clients, left_out, updates, train_loss, eval, privacy,
            seconds, ...
        server: The method's server state, to be read only; None after round 0, the untrained model.
        payload_bytes: Of all messages so far, as the papers count them: `down`, `up`.
        framed_bytes: The same as the socket carries them.
        peak_memory_bytes: The highest so far: `client`, `server`, `evaluation`.
    """

    entry: Mapping[str, Any]
    server: Any
    payload_bytes: Mapping[str, int]
    framed_bytes: Mapping[str, int]
    peak_memory_bytes: Mapping[str, int]


class Callback:
    """Base of callbacks; override what is of interest. Any object with one of these methods will do."""

    def on_client(self, round: int, client: int, report: ClientReport) -> None:
        """A client has replied in a round, or is left out of it.

        Args:
            round: Counted from 1.
            client: Its number.
            report: What came of it.
        """

    def on_round(self, round: int, scores: Scores, state: RoundState) -> None:
        """A round is over and safe on disk.

        Args:
            round: Counted from 1; 0 is the untrained model.
            scores: `{task: {metric: value}}`; empty if the round was not evaluated.
            state: Where the run stands.
        """

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run has ended; `summary` is summary.json, whose `status` says how."""


NAMES = ("on_client", "on_round", "on_end")


class Callbacks:
    """Calls several callbacks in turn.

    Args:
        callbacks: In the order in which they are called.

    Raises:
        InputError: It is no list, or one of them has none of the three methods or is a class.
    """

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        if not isinstance(callbacks, Iterable):
            raise InputError(f"callbacks is a list, as in [{callbacks!r}]")
        for callback in callbacks:
            if isinstance(callback, type):
                raise InputError(
                    f"{callback.__name__} is a class; a callback is an object: {callback.__name__}()"
                )
            if not any(callable(getattr(callback, name, None)) for name in NAMES):
                raise InputError(
                    f"{callback!r} is no callback: it has none of the methods {', '.join(NAMES)}"
                )
        self._callbacks = list(callbacks)
        self._reported: set[int] = set()

    def behind(self, *first: Any) -> Callbacks:
        """The same, with others called before them."""
        return Callbacks([*first, *self._callbacks])

    def clients(self, outcome: RoundOutcome) -> None:
        """Reports those clients of a round that are new in its outcome."""
        done = {c: ClientReport(outcome.metrics.get(c, {})) for c in outcome.clients}
        done |= {c: ClientReport({}, fault) for c, fault in outcome.left_out.items()}
        for client, report in done.items():
            if client not in self._reported:
                self._reported.add(client)
                self._call("on_client", outcome.round, client, report)

    def round(self, round: int, scores: Scores, state: RoundState) -> None:
        """Reports a round."""
        self._reported.clear()
        self._call("on_round", round, scores, state)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Reports the end."""
        self._call("on_end", summary)

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            method = getattr(callback, name, None)
            if method is None:
                continue
            try:
                method(*arguments)
            except Exception as error:  # code that is not ours: it must not pass for a fault of the run
                raise FederationError(
                    f"the callback {type(callback).__name__} failed in {name}: {type(error).__name__}: "
                    f"{error}. The run is kept as it was after its last round; mend the callback and resume"
                ) from error
