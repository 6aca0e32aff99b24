"""Whom a run asks in its rounds, where that is more than a draw: losses that are asked for or remembered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.config.selection import ByLoss
from fedtune.core.asking import asked
from fedtune.core.cohort import (
    Cohort,
    PerRound,
    QuorumError,
    RoundOutcome,
    quorum_of,
    sample_cohort,
    wanted_of,
    who_and_why,
)
from fedtune.core.loop import RoundLoop
from fedtune.core.personal import for_all
from fedtune.core.selection import candidates, highest
from fedtune.errors import FederationError
from fedtune.federation.assembly import Assembly

Rounds = Sequence[Mapping[str, Any]]  # the lines of rounds.jsonl


def whom(config: RunConfig, method: Any, examples: Mapping[int, int], round: int) -> PerRound:
    """What `sample_cohort` is to draw for a round, as far as the seed alone knows it; by loss the candidates.

    Args:
        config: The run's configuration.
        method: Its method.
        examples: Of each client.
        round: Counted from 1.
    """
    federation, seed = config.federation, config.seed
    selection, per_round = federation.selection, federation.clients_per_round
    if isinstance(selection, ByLoss) and not for_all(method, round):
        among = wanted_of(selection.candidates, len(examples))
        by_examples = federation.weights == "equal"
        return candidates(examples, among, by_examples=by_examples, seed=seed, round=round)
    return asked(method, round, examples, per_round, selection=selection, seed=seed)


@dataclass(frozen=True)
class Chosen:
    """Whom a round asks.

    Attributes:
        cohort: The clients.
        wanted: How many it was to ask: the quorum is of these.
        exchanges: With clients, that went before the round.
        entry: What rounds.jsonl says of the choice.
    """

    cohort: Cohort
    wanted: int
    exchanges: int
    entry: Mapping[str, Any]


def choose(
    loop: RoundLoop, state: Any, round: int, assembly: Assembly, rounds: Rounds, drawn: Cohort | None
) -> Chosen:
    """Whom a round asks.

    Args:
        loop: Asks candidates for their loss.
        state: The server's.
        round: Counted from 1.
        assembly: The run's.
        rounds: The rounds before.
        drawn: Whom a privacy account drew; None: there is none.

    Raises:
        QuorumError: Of those who were asked for their loss fewer than the round's quorum said one.
    """
    if drawn is not None:
        return Chosen(drawn, len(drawn.clients), 0, {})
    config, weights, examples = assembly.config, assembly.weights, assembly.client_examples
    selection, seed, quorum = config.federation.selection, config.seed, config.federation.quorum
    among = whom(config, assembly.method, examples, round)
    if not isinstance(selection, ByLoss) or not isinstance(among, tuple):
        cohort = sample_cohort(weights, among, seed=seed, round=round)
        return Chosen(cohort, len(cohort.clients), 0, {})
    wanted = wanted_of(config.federation.clients_per_round, len(examples))
    if selection.losses == "last":
        losses = remembered_losses(rounds, among)
        cohort = sample_cohort(weights, highest(losses, wanted), seed=seed, round=round)
        return Chosen(cohort, wanted, 0, {})
    losses, without = loop.losses(state, sample_cohort(weights, among, seed=seed, round=round), round)
    if len(losses) < quorum_of(wanted, quorum):
        raise QuorumError(
            f"round {round}: {len(losses)} of {len(among)} clients that were asked for their loss gave one, "
            f"the quorum is {quorum_of(wanted, quorum)}. Left out: {who_and_why(without)}. See to that and "
            "continue with --resume"
        )
    entry: dict[str, Any] = {"asked_losses": {str(client): loss for client, loss in sorted(losses.items())}}
    if without:
        entry["gave_no_loss"] = {str(client): why for client, why in sorted(without.items())}
    cohort = sample_cohort(weights, highest(losses, wanted), seed=seed, round=round)
    return Chosen(cohort, wanted, 1, entry)


def planned(
    config: RunConfig, method: Any, clients: Mapping[int, int], round: int
) -> tuple[tuple[int, ...], Cohort]:
    """Who is asked for a loss before a round, and whom it asks; of candidates those of lowest number.

    Args:
        config: The run's configuration.
        method: Its method.
        clients: Examples of each client.
        round: Counted from 1.
    """
    selection, among = config.federation.selection, whom(config, method, clients, round)
    if not isinstance(selection, ByLoss) or not isinstance(among, tuple):
        return (), sample_cohort(clients, among, seed=config.seed, round=round)
    chosen = among[: wanted_of(config.federation.clients_per_round, len(clients))]
    asked_first = among if selection.losses == "asked" else ()
    return asked_first, sample_cohort(clients, chosen, seed=config.seed, round=round)


def remembered_losses(rounds: Rounds, clients: Iterable[int]) -> dict[int, float]:
    """What each client trained at when it was in a round last, or infinite before it ever was asked.

    Who was asked and never replied counts as the mean of those known, so that it does not take the place of
    others in every round.

    Args:
        rounds: The rounds before.
        clients: Of whom it is wanted.
    """
    known, asked_once = dict[int, float](), set[int]()
    for entry in rounds:
        known |= {int(client): loss for client, loss in entry.get("client_losses", {}).items()}
        asked_once |= set(map(int, entry.get("left_out", {})))
    mean = statistics.fmean(known.values()) if known else math.inf
    return {c: known.get(c, mean if c in asked_once else math.inf) for c in clients}


def remembered(config: RunConfig, outcome: RoundOutcome) -> dict[str, Any]:
    """What rounds.jsonl keeps of a round for the choice of later ones.

    Raises:
        FederationError: A client's reply said no training loss.
    """
    selection = config.federation.selection
    if not isinstance(selection, ByLoss) or selection.losses != "last":
        return {}
    silent = [client for client in outcome.clients if "train_loss" not in outcome.metrics[client]]
    if silent:
        raise FederationError(
            f"round {outcome.round}: clients {', '.join(map(str, silent))} report no training loss, by which "
            "federation.selection chooses; start anew with losses: asked or another selection"
        )
    return {
        "client_losses": {str(c): float(outcome.metrics[c]["train_loss"]) for c in sorted(outcome.clients)}
    }
