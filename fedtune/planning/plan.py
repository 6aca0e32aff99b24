"""The plan of one configuration: parameters, bytes, memory, operations and steps, before anything is run.

Nothing here is a formula of a method. The method is built as a run builds it, on a model without content
(`fake.py`); its own orders give the bytes (`traffic.py`), its own steps memory and operations (`dry_run.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from fedtune.config.schema import RunConfig
from fedtune.core.asking import asked
from fedtune.core.cohort import sample_cohort
from fedtune.core.types import ServerEnv
from fedtune.data.encoded import Encoded
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError
from fedtune.evaluation.registry import certain
from fedtune.federation.base_model import refuse_quantized
from fedtune.federation.evaluator import asks_clients, federated
from fedtune.methods import registry
from fedtune.methods.settings import Training
from fedtune.models.lora_targets import tuned_modules
from fedtune.models.memory_efficient import base_model
from fedtune.models.offload import largest_weight
from fedtune.models.portable import name_classes
from fedtune.models.quantize import quantization_of
from fedtune.models.tuning import count_parameters
from fedtune.planning import dry_run, pictures, workload
from fedtune.planning.by_device import by_device
from fedtune.planning.evaluation import evaluation_step
from fedtune.planning.fake import Fakes
from fedtune.planning.memory import PARTS, PartsMeter
from fedtune.planning.modules import module_notes, pipeline_notes
from fedtune.planning.published import published
from fedtune.planning.traffic import CPU, Exchange, Traffic, simulate
from fedtune.planning.workload import Workload
from fedtune.protection.robust_mean import robust_mean


@dataclass(frozen=True)
class Plan:
    """What a configuration will cost, and the messages that its bytes are the sum of."""

    document: dict[str, Any]
    traffic: Traffic
    in_turn: bool


def plan(
    config: RunConfig,
    work: Workload | None = None,
    *,
    steps: bool = True,
    objects: ObjectData | None = None,
) -> Plan:
    """Plans a run. The document is the JSON of `fedtune plan`.

    Args:
        config: The run's configuration.
        work: What clients train on; read from the configuration's data unless given.
        steps: Also what steps need: memory and operations. Without, those are all 0.
        objects: The examples, with `data.train: objects`.

    Raises:
        InputError: As the run would raise it: no such model or no config.json, a method that the model does
            not go with, data that cannot be split.
    """
    method = registry.build(config.method, config.seed)
    size = getattr(config.method, "batch_size", 1)
    fakes = Fakes()
    drawn = pictures.pipeline_of(config, fakes)
    if work is None:
        rows = max(size, config.method.alignment.batch_size if hasattr(config.method, "alignment") else 1)
        if drawn is not None:
            work = pictures.read(config, drawn, pooled=method.pools_data, rows=rows)
        else:
            work = workload.read(config, pooled=method.pools_data, rows=rows, objects=objects)
    clients = work.clients or dict.fromkeys(range(work.population), 1)
    if method.uses_wire and isinstance(config.federation.clients_per_round, int):
        _check_count(config.federation.clients_per_round, len(clients))
    per_round = config.federation.clients_per_round if method.uses_wire else None
    cohort = sample_cohort(clients, asked(method, 1, clients, per_round), seed=config.seed, round=1)

    base: Any = drawn or fakes.model(
        config.model.place,
        base=Path("."),
        initial=config.model.initial,
        task=config.model.task,
        num_labels=len(work.labels) or None,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        attention=config.model.attention,
    )
    refuse_quantized(config, quantization_of(base))
    name_classes(base.config, work.labels)  # they travel with a model that is sent
    vocabulary = (
        base.config.vocab_size if drawn else cast(Tensor, base.get_input_embeddings().weight).shape[0]
    )
    method.prepare(ServerEnv(workload.within(work.public, vocabulary), 0, CPU))
    model = method.client_model(lambda: base)
    fakes.empty_out(model)
    parameters = count_parameters(model)
    items = workload.within(work.batch(size), vocabulary)
    most = _steps(config.method, work, max)
    settings, robust = config.federation.robust, None
    if settings is not None:
        robust = robust_mean(settings, cast(Any, method), None, lambda: dry_run.FakeGathered(fakes))
        if robust.norm_quantile is not None:  # of norms without values: every update may be a longer one
            robust = replace(robust, max_norm=1e-9)
    compression = config.federation.wire.compression(method)
    traffic = simulate(
        method,
        model,
        fakes,
        clients=clients,
        per_round=per_round,
        seed=config.seed,
        robust=robust,
        compression=compression,
        evaluation=federated(config, method) if asks_clients(config, method) else None,
        every=config.evaluation.every,
    )
    client, server, evaluation, tokens = PartsMeter(), PartsMeter(), PartsMeter(), 1.0
    if steps:
        whole: Iterable[nn.Module] = [model] if base_model(model) is base else [base, model]
        if hasattr(config.method, "alignment"):  # a second result is scored, made of other parts
            whole = dry_run.exported(method, model)
        held_out, classes = workload.within(work.held_out, vocabulary), config.model.task == "classification"
        evaluation = (
            pictures.evaluation_step(whole, config)
            if drawn
            else evaluation_step(whole, held_out, config.evaluation, classes=classes)
        )
    if steps and method.rounds:
        client, tokens = dry_run.client_step(
            method,
            model,
            fakes,
            pictures.beside_class(config, items),
            most,
            cohort,
            config.seed,
            traffic.turns,
            _together(config.method, work),
            compression,
        )
        if pictures.makes_class(config):  # clients make pictures as evaluation does
            client.highest(pictures.evaluation_step([model], config))
        server = dry_run.server_steps(method, model, fakes, cohort, config.seed, robust, compression)
    once = pictures.computed_once(drawn, items) if drawn and steps else {}
    if config.model.diffusion is not None and config.model.diffusion.keep and client.forward:
        client.forward -= len(items) * sum(once.values())  # of the first step alone
    offloaded = largest_weight(model) if getattr(config.method, "offload_params", "none") != "none" else 0
    loaded = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) if steps else 0
    document = {
        "method": config.method_name,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "quantization": quantization_of(base),
        "total_parameters": parameters.total,
        "trainable_parameters": parameters.trainable,
        "rounds": method.rounds,
        "clients": len(clients),
        "clients_per_round": len(cohort.clients) if method.rounds else 0,
        "payload_bytes": _bytes(traffic),
        "client_peak_memory_bytes": _memory(client),
        "server_peak_memory_bytes": _memory(server),
        "evaluation_peak_memory_bytes": _memory(evaluation),
        "memory_by_device": by_device(method, client, server, evaluation, items, offloaded, loaded),
        "flops_per_token": {
            "forward": round(client.forward / tokens),
            "backward": round(client.backward / tokens),
        },
        "flops_per_client_round": _whole_round(client, tokens, items, config.method, work, most),
        "clients_hold_model": _hold_model(config.method),
        "local_steps": {"least": _steps(config.method, work, min), "most": most},
        "batch": {
            "examples": len(items),
            "longest": max((len(item.input_ids) for item in items), default=0),
            "pixels": pictures.pixels(items),
            "padding": work.tokens and work.tokens[1] / work.tokens[0],
            "batching": config.data.batching,
        },
        "flops_once_a_picture": once,
        "published": published(config.method, base, traffic),
        "modules": {} if drawn else tuned_modules(model),
        "notes": [
            *work.notes,
            *(pipeline_notes(method, model) if drawn else []),
            *(module_notes(config.method, model) if tuned_modules(model) and not drawn else []),
            *_notes(config, method, traffic),
        ],
    }
    return Plan(document, traffic, method.arrival == "in-turn")


def _steps(settings: Any, work: Workload, choose: Any) -> int | None:
    """Local steps of the client that takes fewest or most; None where that depends on data not here."""
    if isinstance(settings, Training):
        if settings.local_steps is None and work.clients is None:
            return None
        return int(choose(settings.steps(n) for n in (work.passes or {0: 1}).values()))
    return getattr(settings, "local_steps", 0)


def _batches(settings: Training, work: Workload) -> int | None:
    """Batches of an epoch of the client that has most; None where that depends on data not here."""
    return None if work.passes is None else -(-max(work.passes.values()) // settings.batch_size)


def _together(settings: Any, work: Workload) -> int:
    """Batches of the largest step: an epoch may have fewer than a step takes together."""
    if not isinstance(settings, Training):
        return 1
    batches = None if settings.local_steps is not None else _batches(settings, work)
    return min(settings.gradient_accumulation, batches or settings.gradient_accumulation)


def _whole_round(
    client: PartsMeter,
    tokens: float,
    items: Sequence[Encoded],
    settings: Any,
    work: Workload,
    steps: int | None,
) -> int | None:
    """Operations of a client's round if all its batches were as large as the largest."""
    if steps is None:
        return None
    padded = len(items) * max((len(item.input_ids) for item in items), default=0)
    batches = steps * getattr(settings, "gradient_accumulation", 1)
    if isinstance(settings, Training) and settings.local_epochs is not None:
        batches = settings.local_epochs * (_batches(settings, work) or 0)
    models = 1 if getattr(settings, "ditto", None) is None else 2
    return round((client.forward + client.backward) / tokens * padded * batches * models)


def _hold_model(settings: Any) -> bool:
    """Whether clients get to hold the model's own weights, at once or over the rounds."""
    if hasattr(settings, "alignment"):
        return bool(settings.layer_dropout == 0)  # an emulator without compression is the model
    return bool(settings.name != "zero-shot")


def _bytes(traffic: Traffic) -> dict[str, Any]:
    """Means over clients and rounds, and what the first time a client is asked differs from later ones."""
    seen: set[int] = set()
    first: list[Exchange] = []
    later: list[Exchange] = []
    for exchange in traffic.exchanges:
        (later if exchange.client in seen else first).append(exchange)
        seen.add(exchange.client)
    count = max(len(traffic.exchanges), 1)
    training = {way: sum(getattr(e, way) for e in traffic.exchanges) for way in ("down", "up")}

    scored = {way: sum(getattr(e, way) for e in traffic.scores) for way in ("down", "up")}

    def means(exchanges: Sequence[Exchange]) -> dict[str, float | int] | None:
        if not exchanges:
            return None
        return {
            "down": _whole(statistics.fmean(e.down for e in exchanges)),
            "up": _whole(statistics.fmean(e.up for e in exchanges)),
            "model_down": _whole(statistics.fmean(e.model for e in exchanges)),
        }

    return {
        "down_per_client_round": _whole(training["down"] / count),
        "up_per_client_round": _whole(training["up"] / count),
        "per_client_round": _whole(sum(training.values()) / count),
        "down": traffic.down,
        "up": traffic.up,
        "total": traffic.down + traffic.up,
        **({"evaluation": scored} if traffic.scores else {}),
        "first_time": means(first),
        "later": means(later),
        "exact": traffic.exact,
    }


def _memory(meter: PartsMeter) -> dict[str, int]:
    return {part: meter.parts[part] for part in PARTS} | {"total": meter.peak_bytes}


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _notes(config: RunConfig, method: Any, traffic: Traffic) -> list[str]:
    notes = []
    if not method.uses_wire:
        notes.append(f"{config.method_name} sends nothing: it is a reference beside the methods")
    if config.federation.secure_aggregation is not None:
        notes.append("what secure aggregation adds to each message is not planned")
    if config.federation.privacy is not None:
        notes.append(
            "with federation.privacy chance decides how many clients a round asks; planned as without"
        )
    robust = config.federation.robust
    if robust is not None and robust.gathers and traffic.exchanges:
        first = sum(e.up for e in traffic.exchanges if e.round == 1)
        notes.append(
            f"federation.robust needs all replies of a round at once: {first:,} bytes of the server's disk, "
            "read piece by piece"
        )
    if config.federation.simulate.dropout or config.federation.deadline_s is not None:
        notes.append("planned as if every client that is asked replied")
    if getattr(config.method, "prune", None) is not None:
        notes.append("clients that give up ranks (method.prune) send fewer bytes: these are the most")
    elif not traffic.exact:
        notes.append(
            "what a client is sent from the third round on depends on which seeds matter, and so on losses: "
            "these bytes are what is to be expected"
        )
    others = [task for task in certain(config.evaluation.tasks) if task != "loss"]
    if others and config.model.task == "causal-lm":
        notes.append(
            f"of evaluation the loss of held-out examples is planned; batches of {', '.join(others)} are cut "
            f"to about {config.evaluation.memory}"
        )
    if config.model.device == "cuda" or config.model.cards:
        notes.append("memory is that of tensors; a GPU's allocator adds what it rounds up and keeps")
    return notes


def _check_count(asked: int, clients: int) -> None:
    if asked > clients:
        raise InputError(f"federation.clients_per_round is {asked}, but there are {clients} clients")
