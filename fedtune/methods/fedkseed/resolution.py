"""How far a slope can be trusted that is a difference of two rounded losses, and which ε it needs.

    S(ε) = (L(w + ε z; x) − L(w − ε z; x)) / 2ε                    Eq. 5
         = z·∇L + rounding / ε + O(ε²)

Weights, activations and the loss are rounded; in half precision that makes the losses' difference, 2ε |S|,
wrong by the loss's resolution, which no look at S(ε) alone can tell from a slope. S(2ε) on the same draw has
half of that error, and four times that of the truncated series. With ν² the mean square of the error by
rounding in S(ε), over some draws,

    mean (S(ε) − S(2ε))² = ν² (1 + ¼)        mean S(2ε)² = mean slope² + ¼ ν²         `doubt`

so that ν over the slopes' root mean square is known, and with it the correlation of S(ε) with exact slopes,
1 / √(1 + doubt²). Where ε is too large truncation makes the difference. `find` looks for what lies between.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedtune.core.seeds import torch_generator
from fedtune.core.types import ClientEnv, ClientError, Payload
from fedtune.data.batches import collate, endless_batches, on_device
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods.fedkseed.step import StepWeights, step_weights
from fedtune.models.tuning import trainable
from fedtune.zeroth import SeedPool

log = logging.getLogger("fedtune")

DRAWS = 16  # directions, each on a batch of its own
LIMIT = 0.3  # of `doubt`: a correlation of 0.96
TOKENS = 32  # of a made-up example
RUNGS = 12  # of ε, each half of the one before
FINE, COARSE = 1e-5, 1e-2  # between these ε float32 is exact enough; the papers' is 5e-4

Slopes = Callable[[float], Tensor]


@dataclass(frozen=True)
class Found:
    """A scale of perturbation and how good slopes are with it."""

    epsilon: float
    doubt: float


def correlation(doubt: float) -> float:
    """Of slopes with exact ones."""
    return 1 / math.sqrt(1 + doubt**2)


def doubt(fine: Tensor, coarse: Tensor) -> float:
    """The root mean square of the error in `fine` over that of the slopes; infinite where no slope is seen.

    Args:
        fine: S(ε), float64 (draws).
        coarse: S(2ε), float64 (draws).
    """
    if not bool(torch.isfinite(torch.cat([fine, coarse])).all()):
        return math.inf
    noise = float((fine - coarse).square().mean()) / 1.25
    slope = float(coarse.square().mean()) - noise / 4
    return math.sqrt(noise / slope) if slope > 0 else math.inf


def find(slopes: Slopes, largest: float) -> Found:
    """The ε to take, to one digit.

    Of `RUNGS` of them, each half of the one before, it is the smallest whose doubt is no more than twice the
    least: errors by rounding have no sign and average out over steps, those of truncation do not.

    Args:
        slopes: S of some draws by ε, float64 (draws).
        largest: The ε to begin below.
    """
    if not largest > 0:  # weights that are all zero, or no numbers
        return Found(largest, math.inf)
    coarse, tried = slopes(largest), []
    for rung in range(1, RUNGS + 1):
        epsilon = largest / 2**rung
        fine = slopes(epsilon)
        tried.append(Found(epsilon, doubt(fine, coarse)))
        coarse = fine
    least = min(each.doubt for each in tried)
    best = [each for each in tried if each.doubt <= 2 * least][-1]
    return Found(float(f"{best.epsilon:.0e}"), best.doubt)


def largest_epsilon(model: nn.Module) -> float:
    """A quarter of the weights' root mean square: with more than that nothing of a model is left."""
    parameters = list(trainable(model).values())
    squares = sum(float(torch.linalg.vector_norm(p.detach(), dtype=torch.float32)) ** 2 for p in parameters)
    return math.sqrt(squares / sum(p.numel() for p in parameters)) / 4


def scale_of(epsilon: float | Literal["auto"], model: nn.Module, pool: SeedPool) -> float:
    """The server's ε: the setting, or for auto what is measured at w0, on random tokens.

    The server has the model but no client's examples. All that it depends on is the model and the pool's key.

    Args:
        epsilon: The setting.
        model: Holds w0, and afterwards holds it again.
        pool: Directions.

    Raises:
        InputError: No ε gives slopes that can be told from rounding.
    """
    if epsilon != "auto":
        return epsilon
    generator, device = torch_generator(pool.key, "epsilon"), next(model.parameters()).device
    batches = [on_device(collate([item], 0), device) for item in _made_up(model, generator)]
    draws = torch.randint(pool.size, (len(batches),), generator=generator).tolist()
    with step_weights(model, pool, torch.zeros(pool.size), 0.0) as weights:
        found = find(_of(weights, batches, draws), largest_epsilon(model))
    if not math.isfinite(found.doubt):
        raise InputError(
            f"method.epsilon: auto found no scale at which the model, held as {_dtype(model)}, has slopes; "
            "set model.dtype=float32, or method.epsilon to a number"
        )
    log.info("epsilon: auto is %g (%s weights)", found.epsilon, _dtype(model))
    return found.epsilon


def given(epsilon: float | Literal["auto"], job: Payload) -> float:
    """A client's ε: the setting, or for auto what the order says.

    Raises:
        ClientError: The order says none.
    """
    if epsilon != "auto":
        return epsilon
    told = job.scalars.get("epsilon")
    if not isinstance(told, int | float) or not 0 < told < math.inf:
        raise ClientError(
            f"method.epsilon is auto here and the order says {told}; give all the same settings"
        )
    return float(told)


def warn_where_rounded(
    env: ClientEnv, pool: SeedPool, accumulator: Tensor, config: Any, epsilon: float
) -> None:
    """Looks at slopes of a client's first examples, and says which ε to take where they are not good.

    In float32, whose losses are exact to some 10⁻⁷, it looks only where ε is very small or very large. The
    model is afterwards as it was, and so are the streams that steps draw from.

    Args:
        env: The client's.
        pool: Directions.
        accumulator: a, float32 (K), of the weights that its steps begin with.
        config: The method's, of which `lr`, `batch_size` and `epsilon` are used.
        epsilon: ε.
    """
    if _dtype(env.model) == "float32" and FINE <= epsilon <= COARSE:
        return
    order = endless_batches(len(env.rows), config.batch_size, env.generator("batches"), env.lengths)
    batches = [
        on_device(collate([env.rows[i] for i in next(order)], env.pad_id), env.device) for _ in range(DRAWS)
    ]
    draws = torch.randint(pool.size, (DRAWS,), generator=env.generator("epsilon")).tolist()
    with step_weights(env.model, pool, accumulator, config.lr) as weights:
        said = advice(env.model, _of(weights, batches, draws), epsilon)
    if said:
        log.warning("client %d: %s%s", env.client, said, "" if config.epsilon == "auto" else ", or auto")


def not_finite(plus: float, minus: float, step: int, model: nn.Module) -> ClientError:
    """The error of a step whose losses are no numbers.

    Args:
        plus: The one loss.
        minus: The other.
        step: Counted from 0.
        model: Whose dtype may be the cause.
    """
    remedy = "lower method.lr"
    if _dtype(model) == "float16":
        remedy += f", or set model.dtype=bfloat16: float16 ends at {torch.finfo(torch.float16).max:,.0f}"
    return ClientError(f"the losses became {plus} and {minus} at step {step + 1}; {remedy}")


def advice(model: nn.Module, slopes: Slopes, epsilon: float) -> str:
    """What is wrong with `epsilon`, and which to take; empty where slopes are good, or no ε is better.

    Args:
        model: Whose slopes.
        slopes: S of some draws by ε.
        epsilon: ε.
    """
    fine, coarse = slopes(epsilon), slopes(2 * epsilon)
    now = doubt(fine, coarse)
    if now <= LIMIT:
        return ""
    found = find(slopes, largest_epsilon(model))
    if not found.doubt < now:
        return ""
    step, error = (2 * epsilon * float(x.square().mean()) ** 0.5 for x in (fine, (fine - coarse) / 1.25**0.5))
    seen = "the two losses of a step are equal"
    if step:
        seen = (
            f"the two losses of a step differ by {step:.1g}, of which {min(error, step):.1g} is error: "
            f"slopes have a correlation of about {correlation(now):.2f} with exact ones"
        )
    return (
        f"with epsilon {epsilon:g} and {_dtype(model)} weights {seen}; take method.epsilon={found.epsilon:g} "
        f"(about {correlation(found.doubt):.2f})"
    )


def _of(weights: StepWeights, batches: Sequence[Mapping[str, Tensor]], draws: Sequence[int]) -> Slopes:
    """S of each draw on the batch of its place."""

    def slopes(epsilon: float) -> Tensor:
        found = [
            (weights.loss(batch, j, epsilon) - weights.loss(batch, j, -epsilon)) / (2 * epsilon)
            for batch, j in zip(batches, draws, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)

    return slopes


def _dtype(model: nn.Module) -> str:
    return str(next(iter(trainable(model).values())).dtype).removeprefix("torch.")


def _made_up(model: nn.Module, generator: torch.Generator) -> Iterator[Encoded]:
    """Examples of random tokens, with classes where the model classifies."""
    config = getattr(model, "config", None)
    if config is None:
        raise InputError("method.epsilon: auto needs a language model; set a number")
    room = getattr(config, "max_position_embeddings", None) or TOKENS
    classes = config.num_labels if type(model).__name__.endswith("ForSequenceClassification") else 0
    for _ in range(DRAWS // 2):
        ids = torch.randint(config.vocab_size, (min(TOKENS, room),), generator=generator).tolist()
        label = torch.randint(max(classes, 1), (1,), generator=generator).tolist()
        yield Encoded(tuple(ids), tuple(label if classes else ids))
