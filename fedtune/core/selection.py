"""Who of all clients takes part in a round: those of highest loss, of one speed, or those who are there.

By loss: Cho, Wang and Joshi, "Towards Understanding Biased Client Selection in Federated Learning" (2022),
power of choice. d candidates are drawn, client k in proportion to its share p_k of all examples  `candidates`
and of these the m take part on whose examples the global model's loss F_k(w) is highest             `highest`
where F_k is asked for before the round (the paper's pow-d; of a few examples, cpow-d), or is what the client
said when it trained last, infinite before it ever did (rpow-d).

By speed: Chai et al., "TiFL: A Tier-based Federated Learning System" (2020), with its uniform policy. Clients
are put into tiers by the time that their training takes, a round is of one tier drawn evenly, and its clients
are drawn from that tier evenly: nobody waits for a client of a slower tier.                        `tier`

By availability: a client is there at a moment with a chance of its own, and the server waits until as many as
it wants are there at once. Of those it draws evenly, or takes who was asked least often so far.   `there`

Deviations: a candidate is drawn in proportion to its examples only where clients weigh the same in the mean,
as the paper has it; where they weigh by their examples all are drawn evenly, for else these would count
twice. TiFL measures times in rounds of its own, here they are given; its adaptive policy is not here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from typing import Literal, Protocol

from fedtune.core.seeds import numpy_generator
from fedtune.errors import FederationError

MOMENTS = 10_000  # that a server waits for as many clients as it wants


class Selection(Protocol):
    """How a round's clients are chosen where that follows from the run's seed alone."""

    def chosen(self, clients: Sequence[int], wanted: int, *, seed: int, round: int) -> tuple[int, ...] | None:
        """As many of all clients as are wanted, in ascending order; None: an even draw, made elsewhere."""


def candidates(
    examples: Mapping[int, int], wanted: int, *, by_examples: bool, seed: int, round: int
) -> tuple[int, ...]:
    """Clients drawn without replacement, in ascending order.

    Args:
        examples: Of every client.
        wanted: d, how many.
        by_examples: A client's chance is in proportion to its examples; else all have the same. By keys
            log(u) / n, of which the highest are drawn (Efraimidis and Spirakis 2006).
        seed: The run's.
        round: Counted from 1.
    """
    everyone = sorted(examples)
    uniform = numpy_generator(seed, "candidates", round).random(len(everyone))
    keys = {
        client: math.log(u) / (examples[client] if by_examples else 1) if u > 0 else -math.inf
        for client, u in zip(everyone, uniform.tolist(), strict=True)
        if examples[client] or not by_examples
    }
    return tuple(sorted(sorted(keys, key=lambda client: (-keys[client], client))[:wanted]))


def highest(losses: Mapping[int, float], wanted: int) -> tuple[int, ...]:
    """The clients of highest loss, in ascending order; of the same loss those of lower number."""
    return tuple(sorted(sorted(losses, key=lambda client: (-losses[client], client))[:wanted]))


def tiers(clients: Sequence[int], seconds: Sequence[float], number: int) -> list[list[int]]:
    """All clients in tiers, the fastest first; the sizes of two differ by one at most.

    Args:
        clients: All.
        seconds: What a client's training takes: those of client i at i modulo their number.
        number: Of tiers.
    """
    ordered = sorted(clients, key=lambda client: (seconds[client % len(seconds)], client))
    size, more = divmod(len(ordered), number)
    ends = [(size + 1) * place if place < more else size * place + more for place in range(number + 1)]
    return [ordered[begin:end] for begin, end in pairwise(ends)]


def tier(
    clients: Sequence[int], seconds: Sequence[float], number: int, wanted: int, *, seed: int, round: int
) -> tuple[int, ...]:
    """Clients of one tier, in ascending order; all of it where it has fewer than are wanted."""
    rng = numpy_generator(seed, "tier", round)
    drawn = tiers(clients, seconds, number)[int(rng.integers(number))]
    return tuple(sorted(drawn[place] for place in rng.permutation(len(drawn))[:wanted]))


def there(
    clients: Sequence[int],
    chances: Sequence[float],
    wanted: int,
    *,
    prefer: Literal["random", "least-asked"],
    seed: int,
    round: int,
) -> tuple[int, ...]:
    """Clients who are there, in ascending order.

    Args:
        clients: All, in ascending order.
        chances: That a client is there at a moment: those of client i at i modulo their number.
        wanted: How many.
        prefer: `random`: all who are there alike. `least-asked`: who was asked in fewer rounds before this
            one; of those alike at random.
        seed: The run's.
        round: Counted from 1.

    Raises:
        FederationError: In none of ten thousand moments as many as are wanted are there.
    """
    times: Counter[int] = Counter()
    for earlier in range(1 if prefer == "least-asked" else round, round + 1):
        for moment in count():
            if moment == MOMENTS:
                raise FederationError(
                    f"round {earlier}: in none of {MOMENTS:,} moments were {wanted} clients there at once; "
                    "raise federation.selection.chances, or lower federation.clients_per_round"
                )
            rng = numpy_generator(seed, "there", earlier, moment)
            uniform = rng.random(len(clients)).tolist()
            present = [
                client
                for client, u in zip(clients, uniform, strict=True)
                if u < chances[client % len(chances)]
            ]
            if len(present) >= wanted:
                break
        shuffled = [present[place] for place in rng.permutation(len(present))]
        if prefer == "least-asked":
            shuffled.sort(key=lambda client: times[client])
        chosen = tuple(sorted(shuffled[:wanted]))
        times.update(chosen)
    return chosen
