"""How far one-shot will be from multi-round, told from a short probe, and how many rounds are enough.

The probe is the run in small: the same model, data, optimiser and number of rounds, but few clients and few
steps a round. Both schemes are run side by side (`one_shot.measure`) and their losses F taken on examples of
those clients that the probe does not train on. I is what multi-round gains, F(w(0,0)) − F(w_multi), and G the
share of it that one-shot loses, (F(w_one) − F(w_multi)) / I. With ρ times the probe's steps in the run:

    I / (F(w(0,0)) − I)   grows by ρ^c   c is the power of the gain over the rounds of the probe, in 0..1
    G / (1 − G)           grows by ρ     so that G doubles with the steps where it is small, and stays below 1
    G · I                 is the gap, what `fedtune compare` shows as a difference in loss

With R rounds instead of one, the odds of losing what endlessly many would gain are o / R, since a round is R
times as short. Against T rounds, R then lose o (T − R) / (T (R + o)), with o from what one round loses; the
smallest R that loses no more than is tolerated is recommended.

That G grows with the steps and falls as 1/R − 1/T is the leading order in the step size. With gradients g_i
and Hessians H_i of the clients, s steps of rate β in R rounds end at

    w0 − βs ḡ + (βs)²/2 [ (1/R) Σ p_i H_i g_i + (1 − 1/R) H̄ ḡ ] + O((βs)³)

so that two schemes part by the difference of their 1/R and as the square of the steps, where the gain is
linear in them. Odds in place of shares are no theory. `docs/theory.md` holds all of it to measurements, and
says where it fails: a probe of two steps a round predicted nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.core.seeds import numpy_generator
from fedtune.data.batches import collate
from fedtune.data.encode import IGNORED, Encoded
from fedtune.errors import InputError
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg import Config
from fedtune.run.assemble import Parts
from fedtune.run.config import RunConfig
from fedtune.run.data import encode_for
from fedtune.run.federation import torch_settings
from fedtune.run.progress import Progress
from fedtune.theory.one_shot import measure
from fedtune.theory.quantities import Measured, schemes

HELD_BACK = 32  # examples a probed client keeps for the losses, at most; and at most a quarter of its own
PARTS = 8  # of the held-out examples of a whole run, for the spread


@dataclass(frozen=True)
class Group:
    """Examples whose loss is taken together, a client's or a part of the held-out ones, and their weight."""

    items: Sequence[Encoded]
    weight: float


@dataclass(frozen=True)
class Prediction:
    """What the probe says about the run; losses are those of `watch`, in nats.

    Attributes:
        improvement: I, by how much multi-round lowers the loss.
        share: G, how much of that one-shot loses.
        gap: G · I, by how much one-shot stays behind.
        gap_error: Standard error of the probe's gap over its groups, scaled like the gap.
        rounds: The smallest number of rounds that lose no more than the tolerance.
    """

    improvement: float
    share: float
    gap: float
    gap_error: float
    rounds: int


def predict(
    measured: Measured, weights: Sequence[float], *, ratio: float, rounds: int, tolerance: float
) -> Prediction:
    """From a probe of `measured.rounds` rounds to a run of `rounds` with `ratio` times the probe's steps.

    Args:
        measured: The probe; its `watch` gave one loss a group.
        weights: Of the groups.
        ratio: ρ, at least 1.
        rounds: T of the run.
        tolerance: The share of the improvement that may be lost.

    Raises:
        InputError: The probe did not lower the loss.
    """
    start = _mean(measured.start, weights)
    multi = [_mean(end.multi_round, weights) for end in measured.ends]
    one = [_mean(end.one_shot, weights) for end in measured.ends]
    gained = start - multi[-1]
    if not gained > 0:
        raise InputError(
            f"the probe did not lower the loss ({start:.4g} before, {multi[-1]:.4g} after {measured.steps:g} "
            "steps), so there is nothing that one-shot could lose. Lower method.lr, or raise --steps"
        )
    power = growth([start - loss for loss in multi])
    improvement = start * odds_times(gained / start, ratio**power)
    end = measured.ends[-1]
    differences = [o - m for o, m in zip(end.one_shot, end.multi_round, strict=True)]
    lost = (one[-1] - multi[-1]) / gained
    share = odds_times(lost, ratio)
    scale = improvement / gained * (share / lost if lost else ratio)
    return Prediction(
        improvement=improvement,
        share=share,
        gap=share * improvement,
        gap_error=_error(differences, weights) * scale,
        rounds=enough_rounds(share, rounds, tolerance),
    )


def growth(values: Sequence[float]) -> float:
    """The power of the number of rounds with which a quantity grows from the first to the last, in 0..1.

    0 where it cannot be told: one round, or a first value that is not positive.
    """
    if len(values) < 2 or values[0] <= 0 or values[-1] <= 0:
        return 0.0
    return min(1.0, max(0.0, math.log(values[-1] / values[0]) / math.log(len(values))))


def odds_times(share: float, factor: float) -> float:
    """The share with `factor` times the odds, share / (1 − share); outside 0..1 it stays as it is."""
    return share * factor / (1 + share * (factor - 1)) if 0 < share < 1 else share


def lost_with(few: int, share: float, rounds: int) -> float:
    """The share of the gain of T rounds that R lose, where one loses `share`: o (T − R) / (T (R + o))."""
    ceiling = min(share, (rounds - 1) / rounds)  # what R = 1 can lose at most by the law, with o infinite
    return share * (rounds - few) / (few * (rounds - 1) - ceiling * rounds * (few - 1))


def enough_rounds(share: float, rounds: int, tolerance: float) -> int:
    """The smallest R in 1..T that loses no more than `tolerance` by `lost_with`."""
    return next(few for few in range(1, rounds + 1) if lost_with(few, share, rounds) <= tolerance)


def diagnose(
    config: RunConfig,
    progress: Progress,
    *,
    clients: int = 4,
    steps: int = 24,
    tolerance: float = 0.1,
    whole: bool = False,
) -> dict[str, Any]:
    """The document of `fedtune diagnose`: the quantities, and the prediction with what it rests on.

    Args:
        config: The run.
        progress: Told what happens.
        clients: Clients of the probe, drawn by the run's seed.
        steps: Steps of a client in the probe, over all its rounds.
        tolerance: The share of multi-round's improvement that may be lost.
        whole: No probe but the whole run in both schemes, with losses on the held-out examples.

    Raises:
        InputError: The theory does not cover the method, data or model are not usable, or the probe diverges.
    """
    multi, _ = schemes(config.method)
    if config.federation.clients_per_round is not None:
        raise InputError(
            "the one-shot theory has every client train in every round; "
            "diagnose with federation.clients_per_round=null"
        )
    if config.federation.privacy is not None:
        raise InputError(
            "the one-shot theory has no clipping and no noise; diagnose with federation.privacy=null"
        )
    progress.stage("loading data and model")
    with torch_settings():
        parts = Parts.assemble(config, Clock())
        everyone = {client: count for client, count in parts.client_examples.items() if count}
        if not everyone:
            raise InputError(
                "no client has an example on this machine; diagnose needs data of its own to probe"
            )
        run_steps = multi.rounds * sum(multi.steps(count) for count in everyone.values()) / len(everyone)
        data: Mapping[int, Sequence[Encoded]]
        if whole:
            data, groups = {c: _encoded(config, parts, c) for c in everyone}, _held_out(config, parts)
        else:
            data, groups = _held_back(config, parts, everyone, clients)
            longest = max(1, int(min(multi.steps(len(items)) for items in data.values())))
            settings = {"local_epochs": None, "local_steps": min(longest, -(-steps // multi.rounds))}
            multi = Config.model_validate({**multi.model_dump(), **settings})
        progress.begin(rounds=multi.rounds, name="diagnose")
        measured = measure(
            multi,
            parts.loaded.model,
            data,
            pad_id=parts.loaded.tokenizer.pad_token_id,
            seed=config.seed,
            device=parts.device,
            watch=lambda model: tuple(
                mean_loss(model, group.items, config.evaluation.batch_size, parts) for group in groups
            ),
            progress=progress,
        )
    ratio = max(1.0, run_steps / measured.steps)
    weights = [group.weight for group in groups]
    prediction = predict(measured, weights, ratio=ratio, rounds=multi.rounds, tolerance=tolerance)
    return _document(config, measured, prediction, groups, everyone, sorted(data), ratio, tolerance, whole)


def mean_loss(model: nn.Module, items: Sequence[Encoded], batch_size: int, parts: Parts) -> float:
    """Mean loss over the tokens (of a classifier: examples) of `items`, without gradients."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for at in range(0, len(items), batch_size):
            batch = collate(items[at : at + batch_size], parts.loaded.tokenizer.pad_token_id)
            labels = batch["labels"]
            counted = len(labels) if labels.shape[1] == 1 else int((labels[:, 1:] != IGNORED).sum())
            if counted:
                loss = model(**{key: value.to(parts.device) for key, value in batch.items()}).loss
                total, count = total + float(loss) * counted, count + counted
    if not count or not math.isfinite(total):
        what = f"is {total}" if count else "is undefined: none of them has a token to predict"
        raise InputError(
            f"the loss on the examples kept for it {what}; lower method.lr, or raise data.max_length"
        )
    return total / count


def _encoded(config: RunConfig, parts: Parts, client: int) -> list[Encoded]:
    return encode_for(config, parts.split.clients[client], parts.loaded.tokenizer, parts.split.labels)


def _held_back(
    config: RunConfig, parts: Parts, everyone: Mapping[int, int], clients: int
) -> tuple[dict[int, list[Encoded]], list[Group]]:
    """The probe's clients with what they train on, and each one's held-back examples."""
    seed = config.seed
    able = [client for client, count in sorted(everyone.items()) if count >= 2]
    if not able:
        raise InputError("no client has two examples: a probe trains on one and takes the loss on another")
    drawn = numpy_generator(seed, "diagnose", "clients").permutation(len(able))[:clients]
    data, groups = {}, []
    for client in sorted(able[i] for i in drawn):
        items = _encoded(config, parts, client)
        order = numpy_generator(seed, "diagnose", "held back", client).permutation(len(items)).tolist()
        kept = max(1, min(HELD_BACK, len(items) // 4))
        data[client] = [items[i] for i in sorted(order[kept:])]
        groups.append(Group([items[i] for i in order[:kept]], float(sum(map(_counted, items)))))
    return data, groups


def _held_out(config: RunConfig, parts: Parts) -> list[Group]:
    """The run's held-out examples in parts, whose weighted mean is the loss of `compare`."""
    items = encode_for(config, parts.split.evaluation, parts.loaded.tokenizer, parts.split.labels)
    groups = [items[at::PARTS] for at in range(min(PARTS, len(items)))]
    return [Group(part, float(sum(map(_counted, part)))) for part in groups]


def _counted(item: Encoded) -> int:
    """Tokens that carry loss; a classifier's example counts once."""
    return 1 if len(item.labels) == 1 else sum(label != IGNORED for label in item.labels[1:])


def _document(
    config: RunConfig,
    measured: Measured,
    prediction: Prediction,
    groups: Sequence[Group],
    everyone: Mapping[int, int],
    clients: Sequence[int],
    ratio: float,
    tolerance: float,
    whole: bool,
) -> dict[str, Any]:
    weights = [group.weight for group in groups]
    moved = measured.moved * ratio ** growth([end.moved for end in measured.ends])
    steps = measured.steps * ratio
    bound = measured.smoothness * steps * moved
    end = measured.ends[-1]
    return {
        "model": config.model.name,
        "initial": config.model.initial,
        "method": config.method_name,
        "trainable": getattr(config.method, "trainable", None),
        "seed": config.seed,
        "run": {"rounds": measured.rounds, "clients": len(everyone), "steps": steps},
        "measured_on": {
            "whole_run": whole,
            "clients": list(clients),
            "rounds": measured.rounds,
            "steps": measured.steps,
            "loss_examples": sum(len(group.items) for group in groups),
            "loss_groups": len(groups),
        },
        "quantities": {
            "trainable_parameters": measured.trainable,
            "smoothness": measured.smoothness,
            "smoothness_sd": _sd(measured.smoothnesses),
            "smoothness_batches": len(measured.smoothnesses),
            "largest_smoothness": measured.largest_smoothness,
            "relative_update": measured.relative_update,
            "largest_relative_update": measured.largest_move / measured.norm if measured.norm else None,
            "norm": measured.norm,
            "gamma": measured.gamma,
            "bound": measured.bound,
            "bound_of_clients": measured.bound_of_clients,
            "error": measured.error,
            "error_without_rates": measured.error_without_rates,
            "local_errors": list(measured.local_errors),
            "sum_of_local_errors_without_rates": sum(measured.local_errors_without_rates),
            "sum_of_gradient_differences": measured.gradient_differences,
            "sum_of_distances": measured.distances,
            "distance": end.distance,
            "moved": measured.moved,
        },
        "losses": {
            "start": _mean(measured.start, weights),
            "multi_round": [_mean(e.multi_round, weights) for e in measured.ends],
            "one_shot": [_mean(e.one_shot, weights) for e in measured.ends],
            "gap_by_group": [o - m for o, m in zip(end.one_shot, end.multi_round, strict=True)],
        },
        "prediction": {
            "gap": prediction.gap,
            "gap_error": prediction.gap_error,
            "improvement": prediction.improvement,
            "share": prediction.share,
            "distance": end.distance / end.moved,
            "bound": bound,
            "steps_ratio": ratio,
        },
        "tolerance": tolerance,
        "recommended_rounds": prediction.rounds,
    }


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _error(values: Sequence[float], weights: Sequence[float]) -> float:
    """Standard error of the weighted mean over groups; infinite for one group."""
    if len(values) < 2:
        return math.inf
    mean, total = _mean(values, weights), sum(weights)
    squares = sum((w / total * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return math.sqrt(squares * len(values) / (len(values) - 1))


def _sd(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
