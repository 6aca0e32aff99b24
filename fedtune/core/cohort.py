"""A round's cohort: who is asked, how many must answer, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedtune.core.seeds import numpy_generator
from fedtune.errors import FederationError

if TYPE_CHECKING:
    from fedtune.core.watch import Seen

TRAINED_TOKENS = "trained_tokens"  # metric of a client: what its `train_loss` is the mean over
MOST_NAMED = 5  # clients, and reasons, in one sentence
COMPUTED_TOKENS, PADDING_TOKENS = "computed_tokens", "padding_tokens"  # of its batches; padding is of both


class QuorumError(FederationError):
    """A round had fewer usable replies than its quorum."""


@dataclass(frozen=True)
class Cohort:
    """The clients asked in one round, in the order in which they are asked."""

    clients: tuple[int, ...]
    examples: Mapping[
        int, int
    ]  # what each of them weighs: the examples it registered, or what counts of them
    population: int  # clients of the whole federation
    expected: int | None = None  # clients asked on average, where chance decides how many (privacy)

    @property
    def total_examples(self) -> int:
        """Examples of all clients of the cohort together."""
        return sum(self.examples[client] for client in self.clients)


@dataclass
class RoundOutcome:
    """What happened in one round, for rounds.jsonl."""

    round: int
    asked: tuple[int, ...] = ()
    clients: list[int] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)  # means of which nothing but the mean is known
    seen: dict[int, Seen] = field(default_factory=dict)  # the updates, where the server sees them

    def mean(self, metric: str) -> float | None:
        """A metric's mean over the clients that replied; None if none has it.

        Weighted by their examples; `train_loss` by their trained tokens, where all who report it count them
        (a method of one's own may not, nor replies that an earlier version kept).
        """
        if metric in self.totals:
            return self.totals[metric]
        having = [c for c in self.clients if metric in self.metrics[c]]
        weights: Mapping[int, float] = self.examples
        if metric == "train_loss" and all(TRAINED_TOKENS in self.metrics[c] for c in having):
            weights = {c: self.metrics[c][TRAINED_TOKENS] for c in having}
        total = sum(weights[c] for c in having)
        return sum(self.metrics[c][metric] * weights[c] for c in having) / total if total else None

    def total(self, metric: str) -> int | None:
        """A count's sum over the clients that replied; None where one of them did not report it."""
        if not self.clients or any(metric not in self.metrics[c] for c in self.clients):
            return None
        return int(sum(self.metrics[c][metric] for c in self.clients))


def weights_of(
    examples: Mapping[int, int], how: Literal["examples", "equal", "capped"], most: int | None
) -> dict[int, int]:
    """What each client weighs in a mean. A client's number of examples is what it says of itself.

    Args:
        examples: As registered, of every client of the federation.
        how: `examples`: as many; `capped`: at most the median of what all registered (of an even count the
            lower one), so that no claim is worth more than the middle one; `equal`: 1 each.
        most: No client weighs more than this; None: no such bound.
    """
    if how == "equal":
        return {client: min(count, 1) for client, count in examples.items()}
    bounds = [most] if most is not None else []
    if how == "capped" and examples:
        bounds.append(sorted(examples.values())[(len(examples) - 1) // 2])
    return {client: min([count, *bounds]) for client, count in examples.items()}


PerRound = float | int | tuple[int, ...] | None  # a fraction, a count, who they are, or everyone


def sample_cohort(examples: Mapping[int, int], per_round: PerRound, *, seed: int, round: int) -> Cohort:
    """Draws a round's clients without replacement, in ascending order.

    Args:
        examples: Examples of every client.
        per_round: How many: an integer is a count, a float a fraction (at least one client), None all; or
            who they are.
        seed: The run's seed.
        round: The round, counted from 1.
    """
    everyone = sorted(examples)
    if per_round is None:
        chosen = everyone
    elif isinstance(per_round, tuple):
        chosen = sorted(per_round)
    else:
        rng = numpy_generator(seed, "cohort", round)
        chosen = sorted(
            everyone[i] for i in rng.permutation(len(everyone))[: wanted_of(per_round, len(everyone))]
        )
    return Cohort(tuple(chosen), {client: examples[client] for client in chosen}, len(everyone))


def wanted_of(per_round: PerRound, clients: int) -> int:
    """How many of so many clients a round asks."""
    if per_round is None:
        return clients
    if isinstance(per_round, tuple):
        return len(per_round)
    count = per_round if isinstance(per_round, int) else max(1, round_half_up(per_round * clients))
    return min(count, clients)


def quorum_of(cohort: int, quorum: float | int) -> int:
    """Replies a round needs: an integer is a count, a float the fraction of the cohort, rounded up."""
    return max(1, quorum if isinstance(quorum, int) else math.ceil(quorum * cohort - 1e-9))


def replies_needed(asked: int, quorum: float | int, *, drawn: bool, sends: bool) -> int:
    """Replies that a round needs of those that it asks.

    Args:
        asked: How many clients it asks.
        quorum: As of `quorum_of`.
        drawn: Chance says how many are asked: one, or nobody. It is rounded down then, so that such a round
            has its noise.
        sends: The method's clients send something. Of reference rows it is a count that is meant for the
            methods beside them.
    """
    if drawn:
        return min(asked, quorum if isinstance(quorum, int) else int(quorum * asked))
    return quorum_of(asked, quorum) if sends else min(quorum_of(asked, quorum), asked)


def trimmed(trim: float, clients: int) -> int:
    """Clients that a trimmed mean leaves out at each end."""
    return math.floor(trim * clients + 1e-9)


def most_byzantine(clients: int) -> int:
    """The largest f for which n >= 2f + 3 holds, Krum's condition."""
    return max(0, (clients - 3) // 2)


def round_half_up(x: float) -> int:
    """The nearest integer; halves go up (Python's round sends 2.5 to 2)."""
    return math.floor(x + 0.5)


def hold_quorum(outcome: RoundOutcome, quorum: int) -> None:
    """Raises QuorumError, which names who was left out, if fewer clients are in the outcome."""
    if len(outcome.clients) >= quorum:
        return
    raise QuorumError(
        f"round {outcome.round}: {len(outcome.clients)} of {len(outcome.asked)} clients gave a usable "
        f"reply, the quorum is {quorum}. Left out: {who_and_why(outcome.left_out)}. See to that and continue "
        "with --resume; other settings, such as a lower federation.quorum, need a new run."
    )


def who_and_why(left_out: Mapping[int, str]) -> str:
    """Clients by reason, at most five of each: `clients 0, 3: timed out; client 1: no examples`."""
    clients: dict[str, list[int]] = {}
    for client, reason in sorted(left_out.items()):
        clients.setdefault(reason, []).append(client)
    parts = []
    for reason, those in list(clients.items())[:MOST_NAMED]:
        names = ", ".join(map(str, those[:MOST_NAMED]))
        more = f" and {len(those) - MOST_NAMED} more" if len(those) > MOST_NAMED else ""
        parts.append(f"client{'s' * (len(those) > 1)} {names}{more}: {reason}")
    rest = sum(len(those) for those in list(clients.values())[MOST_NAMED:])
    return "; ".join(parts) + (f"; and {rest} more" if rest else "")
