"""`fedtune diagnose`: a probe of both schemes, and what it says about the run.

The probe is the run in small: the same model, settings, examples and number of rounds, with some of the
clients and fewer steps a round. Losses are those of held-out examples, as in `fedtune compare`.

A probe has `STEPS_A_ROUND` steps a round, or as many as the run where that has fewer. Shorter ones are
refused: each round begins with a new optimiser and a rate that falls to 0, and with two steps a round little
else is seen; what they predicted had nothing to do with what was measured (docs/theory.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.config.evaluation import Evaluation
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import numpy_generator
from fedtune.data.encoded import Encoded
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError
from fedtune.evaluation.likelihoods import example_losses
from fedtune.federation.assembly import Assembly
from fedtune.federation.devices import device_of
from fedtune.federation.encoding import encode_for
from fedtune.federation.process import torch_settings
from fedtune.federation.progress import Progress
from fedtune.federation.room import picture_frame
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.settings import Config
from fedtune.theory.one_shot import measure
from fedtune.theory.prediction import Prediction, caveats, growth, mean, predict
from fedtune.theory.quantities import Measured, schemes

STEPS_A_ROUND = 8  # of a client in a probe, at least
HELD_OUT = 256  # examples for the losses of a probe, at most; the whole run takes all
PARTS = 8  # of the held-out examples, for the spread


@dataclass(frozen=True)
class Group:
    """A part of the held-out examples, whose loss is taken together.

    Attributes:
        items: With the place of each among all of them.
        weight: Tokens, or examples, that count.
    """

    items: Sequence[tuple[int, Encoded]]
    weight: float


def diagnose(
    config: RunConfig,
    progress: Progress,
    *,
    clients: int = 8,
    steps: int | None = None,
    tolerance: float = 0.1,
    whole: bool = False,
    objects: ObjectData | None = None,
) -> dict[str, Any]:
    """The document of `fedtune diagnose`: the quantities, and the prediction with what it rests on.

    Args:
        config: The run.
        progress: Told what happens.
        clients: Clients of the probe, drawn by the run's seed.
        steps: Steps of a client in the probe, over all its rounds; None: `STEPS_A_ROUND` in each.
        tolerance: The share of multi-round's improvement that may be lost.
        whole: No probe but the whole run in both schemes.
        objects: The examples, with `data.train: objects`.

    Raises:
        InputError: The theory does not cover the method, data or model are not usable, the probe is too
            short, or it diverges.
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
    federation = config.federation
    weighed = federation.weights != "examples" or federation.max_examples is not None
    if federation.robust is not None or weighed:
        raise InputError(
            "the one-shot theory has a mean that is weighted by examples; diagnose with "
            "federation.robust=null, federation.weights=examples and federation.max_examples=null"
        )
    progress.stage("loading data and model")
    with torch_settings(config.run, device_of(config.model.device)):
        assembly = Assembly.assemble(config, Clock(), objects)
        assembly.look_ahead()
        assembly.tell(progress)
        everyone = {client: count for client, count in assembly.client_examples.items() if count}
        if not everyone:
            raise InputError(
                "no client has an example on this machine; diagnose needs data of its own to probe"
            )
        steps_of = {client: multi.steps(assembly.rows(client)) for client in everyone}
        run_steps = multi.rounds * sum(steps_of.values()) / len(everyone)
        chosen = sorted(everyone) if whole else _drawn(everyone, clients, config.seed)
        a_round = None if whole else _steps_a_round(steps, run_steps, multi.rounds)
        data = {client: assembly.data[client] for client in chosen}
        if a_round is not None:
            shorter = {"local_epochs": None, "local_steps": a_round}
            multi = Config.model_validate({**multi.model_dump(), **shorter})
        groups = _held_out(config, assembly, None if whole else HELD_OUT)
        progress.begin(rounds=multi.rounds, name="diagnose")
        measured = measure(
            multi,
            assembly.loaded.model,
            data,
            pad_id=assembly.loaded.tokenizer.pad_token_id,
            seed=config.seed,
            device=assembly.device,
            batching=assembly.batching,
            watch=lambda model: tuple(
                mean_loss(model, group.items, config.evaluation, assembly) for group in groups
            ),
            on_round=progress.round,
            on_client=progress.client,
        )
    ratio = 1.0 if a_round is None else run_steps / measured.steps
    weights = [group.weight for group in groups]
    prediction = predict(measured, weights, ratio=ratio, rounds=multi.rounds, tolerance=tolerance)
    return _document(config, measured, prediction, groups, len(everyone), chosen, ratio, run_steps, tolerance)


def mean_loss(
    model: nn.Module, items: Sequence[tuple[int, Encoded]], evaluation: Evaluation, assembly: Assembly
) -> float:
    """Mean loss over the tokens (of a classifier: examples, of a pipeline: pictures), without gradients."""
    model.eval()
    classes, pictures = bool(assembly.split.labels), assembly.config.data.pictures is not None
    if pictures:
        from fedtune.evaluation.pictures import denoising_losses  # diffusers only where it is used

        losses, counts = denoising_losses(model, items, assembly.config.seed), [1] * len(items)
    else:
        with torch.no_grad():
            losses, counts = example_losses(
                model,
                [item for _, item in items],
                batch_size=evaluation.batch_size,
                memory=evaluation.memory_bytes,
                pad_id=assembly.loaded.tokenizer.pad_token_id,
                classes=classes,
            )
    counted = len(items) if classes else sum(counts)
    value = sum(losses) / counted if counted else math.nan
    if not math.isfinite(value):
        what = f"is {value}" if counted else "is undefined: none of them has a token to predict"
        raise InputError(
            f"the loss on the held-out examples {what}; lower method.lr, or raise data.max_length"
        )
    return value


def _drawn(everyone: Mapping[int, int], clients: int, seed: int) -> list[int]:
    able = sorted(everyone)
    order = numpy_generator(seed, "diagnose", "clients").permutation(len(able))
    return sorted(able[i] for i in order[:clients])


def _steps_a_round(steps: int | None, run_steps: float, rounds: int) -> int | None:
    """Steps of a client and round of the probe, on average; None: as many as in the run.

    Raises:
        InputError: Fewer than a prediction can rest on.
    """
    needed = rounds * STEPS_A_ROUND
    wanted = needed if steps is None else steps
    if wanted >= run_steps:
        return None
    if wanted < needed:
        enough = min(needed, math.ceil(run_steps))
        raise InputError(
            f"a probe of {steps} steps has {wanted / rounds:.3g} in each of {rounds} rounds, and says "
            "nothing about the run: with few steps a round all is the beginning of a round. "
            f"Give --steps {enough} or more, or leave it out"
        )
    return wanted // rounds


def _held_out(config: RunConfig, assembly: Assembly, most: int | None) -> list[Group]:
    """Held-out examples in groups, whose weighted mean is the loss of `compare`; `most` of them."""
    examples = assembly.split.evaluation[:most]
    items = encode_for(
        config,
        examples,
        assembly.loaded.tokenizer,
        assembly.split.labels,
        max_length=assembly.room.tokens,
        whose="the held-out examples",
        too_long="cut",
        frame=picture_frame(config, assembly.loaded.model),
    ).items
    numbered = list(enumerate(items))
    groups = [numbered[at::PARTS] for at in range(min(PARTS, len(items)))]
    return [Group(part, float(sum(item.trained for _, item in part))) for part in groups]


def _document(
    config: RunConfig,
    measured: Measured,
    prediction: Prediction,
    groups: Sequence[Group],
    clients: int,
    probed: Sequence[int],
    ratio: float,
    run_steps: float,
    tolerance: float,
) -> dict[str, Any]:
    weights = [group.weight for group in groups]
    moved = measured.moved * ratio ** growth([end.moved for end in measured.ends])
    bound = measured.smoothness * run_steps * moved
    end = measured.ends[-1]
    whole_run = ratio == 1 and len(probed) == clients
    return {
        "model": config.model.name,
        "initial": config.model.initial,
        "method": config.method_name,
        "trainable": getattr(config.method, "trainable", None),
        "seed": config.seed,
        "run": {"rounds": measured.rounds, "clients": clients, "steps": run_steps},
        "measured_on": {
            "whole_run": whole_run,
            "clients": list(probed),
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
            "start": mean(measured.start, weights),
            "multi_round": [mean(e.multi_round, weights) for e in measured.ends],
            "one_shot": [mean(e.one_shot, weights) for e in measured.ends],
            "gap_by_group": [o - m for o, m in zip(end.one_shot, end.multi_round, strict=True)],
        },
        "prediction": {
            "gap": prediction.gap,
            "gap_between": [prediction.least, prediction.most],
            "gap_error": prediction.gap_error,
            "share": prediction.share,
            "distance": end.distance / end.moved,
            "bound": bound,
            "steps_ratio": ratio,
        },
        "caveats": caveats(measured, weights, prediction, clients=clients, ratio=ratio),
        "tolerance": tolerance,
        "recommended_rounds": prediction.rounds,
        "recommended_between": [prediction.fewest, prediction.most_rounds],
    }


def _sd(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values)
