"""Theorem 1 of the FedKSeed paper, measured: how the smallest gradient falls with steps, and with weights.

A network of one layer of tanh on MNIST's pictures at 14 x 14, ten clients alike of 100 pictures, all in every
round, ten steps each of one picture and one direction, K = 1,024. The gradient is the exact one of all
clients' loss after each round; a run of T rounds has the rate η·√(20 / T), with η searched for 20 rounds on
another seed.

Table:   Theorem 1, the rate; docs/claims.md, block fedkseed-theorem
Command: python reproduce/fedkseed_theorem.py fedkseed-theorem
Time:    3 CPU minutes
Needs:   ../shared/data/mnist-t10k, matplotlib (extra `report`)
Result:  exponent in steps -0.4141 (-0.5297 to -0.2986), in weights +0.8394 (+0.7355 to +0.9434)
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from by_hand import federated
from claims import OUT, SEEDS, Claim, Outcome, all_of, below, drawn, entry, said
from common import ROOT, Prepared, main, spread, table
from search_rates import SEED, search
from small_models import MNIST, pictures
from torch import Tensor, nn

from fedtune.core.cohort import QuorumError, RoundOutcome
from fedtune.core.seeds import numpy_generator, torch_generator
from fedtune.data.encoded import Encoded
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config

MADE = OUT / "fedkseed-theorem.json"
CLIENTS, EXAMPLES, STEPS, POOL = 10, 100, 10, 1024
HORIZONS, MIDDLE = (5, 10, 20, 40, 80), 20  # rounds
WIDTHS, DECIDES = (4, 16, 64), 16
SLOWEST, STEEPEST = -0.4, 0.6  # exponents in steps and in weights; the theorem's are -1/2 and 1/2
START = 1e-3


class Network(nn.Module):
    """Pictures of 14 x 14 that are looked up by number, a layer of tanh, ten classes."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        images, self.right = pictures()
        small = nn.functional.avg_pool2d(images, 2).flatten(1)
        self.register_buffer("images", small, persistent=False)  # (10000, 196)
        generator = torch_generator(seed, "weights")
        self.hidden, self.head = nn.Linear(196, width), nn.Linear(width, 10)
        for layer in (self.hidden, self.head):
            with torch.no_grad():
                layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        """Loss of a batch."""
        logits = self.head(torch.tanh(self.hidden(self.images[input_ids[:, 0]])))  # type: ignore[index]
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits, self.right[input_ids[:, 0]]), logits=logits
        )


def squared_gradient(model: nn.Module, rows: Tensor) -> float:
    """‖∇f(w)‖² of the mean loss over `rows` (examples, 1)."""
    loss = model(rows, rows, rows[:, 0]).loss
    gradients = torch.autograd.grad(loss, [w.requires_grad_() for w in model.parameters()])
    return float(sum(g.double().square().sum() for g in gradients))


def federate(network: Network, config: Config, seed: int, look: Callable[[nn.Module, Tensor], None]) -> bool:
    """One federation; `look` is shown the model after each round, and the clients' rows.

    Returns:
        Whether it came to its end: slopes can grow beyond all bounds.
    """
    rows = order(network, seed)[: CLIENTS * EXAMPLES]
    data = {
        client: [Encoded((row,), (0,)) for row in rows[client * EXAMPLES : (client + 1) * EXAMPLES]]
        for client in range(CLIENTS)
    }
    method = FedKSeed(config, seed)
    client_model = method.client_model(lambda: network)

    def after(round: int, state: Any, outcome: RoundOutcome) -> None:
        for _, tuned in method.export(state, client_model):  # the weights are there for this long
            look(tuned, torch.tensor(rows)[:, None])

    try:
        federated(method, client_model, data, config.rounds, seed, after=after)
    except QuorumError:
        return False
    return True


def order(network: Network, seed: int) -> list[int]:
    """Numbers of all pictures as a seed orders them: the clients' come first."""
    found: list[int] = numpy_generator(seed, "split").permutation(len(network.right)).tolist()
    return found


def smallest(width: int, rounds: int, seed: int, lr: float) -> float:
    """The smallest ‖∇f‖² after any round; infinite where slopes grew beyond all bounds."""
    config = Config(rounds=rounds, seeds=POOL, epsilon=1e-3, lr=lr, local_steps=STEPS, batch_size=1)
    found: list[float] = []
    ended = federate(
        Network(width, seed), config, seed, lambda model, rows: found.append(squared_gradient(model, rows))
    )
    return min(found) if ended else math.inf


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent b of the least squares y = a·x^b on logarithms."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(xs, ys).slope


def weights(width: int) -> int:
    """How many numbers a network has: d."""
    return 196 * width + width + 10 * width + 10


def measure(path: Path) -> None:
    """All runs, once a rate is found for each width."""
    logging.getLogger("fedtune").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    for width in WIDTHS:
        tried: dict[float, float] = {}

        def loss(lr: float, width: int = width, tried: dict[float, float] = tried) -> float:
            tried[lr] = smallest(width, MIDDLE, SEED, lr)
            return tried[lr]

        search(loss, START)
        best = min(tried, key=lambda lr: tried[lr])
        runs = {
            rounds: [smallest(width, rounds, seed, best * math.sqrt(MIDDLE / rounds)) for seed in SEEDS]
            for rounds in (HORIZONS if width == DECIDES else (MIDDLE,))
        }
        found[str(width)] = {"rate": best, "runs": runs}
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def made() -> dict[int, tuple[float, dict[int, list[float]]]]:
    """Of each width: the rate, and the smallest gradients by rounds and seed."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    return {
        int(width): (some["rate"], {int(rounds): runs for rounds, runs in some["runs"].items()})
        for width, some in found.items()
    }


def exponents() -> tuple[list[float], list[float]]:
    """By seed: of the smallest gradient in all clients' steps, and in the number of weights."""
    found = made()
    steps = [
        slope([(CLIENTS * STEPS * rounds, runs[at]) for rounds, runs in found[DECIDES][1].items()])
        for at in range(len(SEEDS))
    ]
    sizes = [
        slope([(weights(width), runs[MIDDLE][at]) for width, (_, runs) in found.items()])
        for at in range(len(SEEDS))
    ]
    return steps, sizes


def theorem_table() -> str:
    """A row a run, mean and deviation over the seeds."""
    rows = []
    for width, (rate, runs) in made().items():
        for rounds, smallest_of in runs.items():
            lr = f"{rate * math.sqrt(MIDDLE / rounds):.1e}".replace("e-0", "e-")
            rows.append(
                [f"{weights(width):,}", str(rounds), f"{CLIENTS * STEPS * rounds:,}", lr, spread(smallest_of)]
            )
    return table(["weights", "rounds", "steps of all clients, τNT", "rate", "smallest ‖∇f‖²"], rows)


def theorem_outcome() -> Outcome:
    """By THEOREM's rule."""
    steps, sizes = exponents()
    because = f"Exponent in τNT {said(steps)}, in d {said(sizes)}; the theorem's are -1/2 and 1/2."
    return Outcome(all_of([below(steps, SLOWEST), below(sizes, STEEPEST)]), because)


def theorem_plot() -> bytes:
    """The smallest gradient over steps, a line a seed, and the theorem's slope."""

    def draw(axes: Any) -> None:
        runs = made()[DECIDES][1]
        steps = [CLIENTS * STEPS * rounds for rounds in runs]
        for at, seed in enumerate(SEEDS):
            axes.plot(steps, [some[at] for some in runs.values()], "o-", label=f"seed {seed}")
        first = statistics.fmean(runs[HORIZONS[0]])
        bound = [first * math.sqrt(steps[0] / count) for count in steps]
        axes.plot(steps, bound, "--", color="grey", label="slope -1/2")
        axes.set(xscale="log", yscale="log", xlabel="steps of all clients, τNT", ylabel="smallest ‖∇f‖²")
        axes.legend(frameon=False)

    return drawn(draw)


THEOREM = Claim(
    "The smallest squared gradient after any of T rounds falls at least as fast as √(d / τNT): a pool of "
    "seeds does not cost the rate.",
    "Theorem 1 is a bound; the paper measures no rate.",
    "By least squares on logarithms, by seed: seen if the exponent in all clients' steps, from "
    f"{HORIZONS[0]} to {HORIZONS[-1]} rounds with {weights(DECIDES):,} weights, is below {SLOWEST}, and that "
    f"in the number of weights, at {MIDDLE} rounds, below {STEEPEST}: a tenth for what so few points cannot "
    "tell.",
    theorem_table,
    theorem_outcome,
)

ENTRIES = {
    "fedkseed-theorem": entry(
        THEOREM,
        [Prepared("the smallest gradients of all runs", MADE, measure)],
        (MNIST, "matplotlib"),
        plots={"claims_fedkseed_theorem.svg": theorem_plot},
    ),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
