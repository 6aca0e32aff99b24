"""All methods on one model, under what clients have: which fit, which do not and why, and what to pick.

A method fits if a client's peak memory is within what it has, if what its clients get to hold is theirs to
hold, and if training examples stay with their owners. Those that fit are ordered by the time that they need:
on the wire, and where the clients' speed is given also in computing. Plans know nothing of accuracy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.config.file import apply_overrides, parse_config
from fedtune.config.schema import RunConfig
from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.models.load import meta_model
from fedtune.models.memory_efficient import can_compute_again
from fedtune.planning import workload
from fedtune.planning.plan import Plan, plan
from fedtune.planning.workload import Workload
from fedtune.report.tables import size

CANDIDATES: dict[str, dict[str, Any]] = {
    "fedavg, full": {"name": "fedavg", "trainable": "full"},
    "fedavg, full, one-shot": {"name": "fedavg", "trainable": "full", "rounds": 1, "local_epochs": 3},
    "fedavg, lora": {"name": "fedavg", "trainable": "lora"},
    "fedavg, lora, one-shot": {"name": "fedavg", "trainable": "lora", "rounds": 1, "local_epochs": 3},
    "fedavg, adapter": {"name": "fedavg", "trainable": "adapter"},
    "fedavg, prompt": {"name": "fedavg", "trainable": "prompt"},
    "fedavg, p-tuning": {"name": "fedavg", "trainable": "p-tuning"},
    "fedkseed": {"name": "fedkseed"},
    "fedkseed-pro": {"name": "fedkseed-pro"},
    "infinite-pool": {"name": "infinite-pool"},
    "fedbiot": {"name": "fedbiot"},
    "fedot": {"name": "fedot"},
    "offsite-tuning": {"name": "offsite-tuning"},
    "fedcybgd": {"name": "fedcybgd"},
    "fedcybgd, layer-drop": {"name": "fedcybgd", "compression": "layer-drop"},
    "fedcybgd, hybrid": {"name": "fedcybgd", "compression": "hybrid"},
    "fedbavg": {"name": "fedbavg"},
    "badam": {"name": "badam"},
    "standalone": {"name": "standalone"},
    "centralized": {"name": "centralized"},
    "zero-shot": {"name": "zero-shot"},
}
"""What is ranked, with each method's own defaults where nothing is said; `SAME` is the same for all."""

SAME = ("gradient_checkpointing", "offload_params")  # of methods that take gradients; they cost time alone
QUANTIZATION = "model.quantization"
SETTINGS = (
    "seed",
    "model.dtype",
    "model.task",
    QUANTIZATION,
    "model.attention",
    "data.max_length",
    "data.clients",
    "federation.clients_per_round",
    *(f"method.{name}" for name in SAME),
)
"""What can be set for all of them."""


@dataclass(frozen=True)
class ClientResources:
    """What clients have.

    Attributes:
        memory: Bytes.
        uplink, downlink: Bits a second of each client's own link.
        model_private: Clients may not hold the model.
        speed: Floating-point operations a second; None: computing is not counted.
    """

    memory: float
    uplink: float
    downlink: float
    model_private: bool
    speed: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A method on the model: its plan, or why there is none."""

    name: str
    config: RunConfig
    plan: Plan | None
    refusal: str = ""


def plan_all(
    model: str,
    overrides: Sequence[str] = (),
    examples: int | None = None,
    on_candidate: Callable[[str], None] = lambda _: None,
) -> list[Candidate]:
    """Plans every candidate.

    Args:
        model: A folder, a hub name or "bundled".
        overrides: `key=value`, of `SETTINGS`.
        examples: Of each client; None: not known.
        on_candidate: Called with the name of each before it is planned.

    Raises:
        InputError: There is no such model or no config.json, or a setting is none of `SETTINGS`.
    """
    for override in overrides:
        if override.partition("=")[0] not in SETTINGS:
            raise InputError(
                f"{override!r} cannot be set for all methods at once; {', '.join(SETTINGS)} can. "
                "For anything else write a configuration and plan that: fedtune plan CONFIG"
            )
    alike = [override for override in overrides if override.startswith("method.")]
    overrides = [override for override in overrides if override not in alike]
    task = _config(model, CANDIDATES["zero-shot"], overrides).model.task
    base = meta_model(model, base=Path("."), task=task)  # a wrong name is an error, not a row
    again = "full" if can_compute_again(base) else "none"
    alike = [f"method.gradient_checkpointing={again}", *alike]
    found = []
    for name, settings in CANDIDATES.items():
        on_candidate(name)
        own = [*overrides, *filter(partial(_has, settings), alike)]
        try:
            config = _config(model, settings, own)
        except InputError as error:  # it does not go with the quantisation; any other setting goes with all
            whole = _config(model, settings, [one for one in own if not one.startswith(QUANTIZATION)])
            found.append(Candidate(name, whole, None, str(error).rpartition("the configuration: ")[2]))
            continue
        try:
            found.append(Candidate(name, config, plan(config, _work(config, examples))))
        except InputError as error:
            found.append(Candidate(name, config, None, str(error)))
    return found


def judge(candidates: Sequence[Candidate], resources: ClientResources) -> dict[str, Any]:
    """Which fit, ordered by the time that they need. The document is the JSON of `fedtune plan --model`."""
    first = next((one for one in candidates if one.plan is not None), candidates[0]).config
    rows = [_row(candidate, resources) for candidate in candidates]
    rows.sort(key=_order)
    return {
        "model": first.model.name,
        "dtype": first.model.dtype,
        "quantization": first.model.quantization,
        "client_memory_bytes": round(resources.memory),
        "uplink_bits_per_second": resources.uplink,
        "downlink_bits_per_second": resources.downlink,
        "model_private": resources.model_private,
        "client_flops_per_second": resources.speed,
        "clients": first.data.clients,
        "max_length": workload.room_of(first).tokens,
        "same_settings": _same(candidates),
        "methods": rows,
        "pick": _pick([row for row in rows if row["fits"]]),
    }


def _order(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """Those that fit first, those that do not apply last, each by time."""
    return not row["fits"], row["plan"] is None, row["seconds"]["total"] if row["seconds"] else 0.0


def _has(settings: Mapping[str, Any], override: str) -> bool:
    """Whether it is a setting of a method; where nothing is frozen, nothing of that is offloaded."""
    key = override.partition("=")[0].removeprefix("method.")
    known = registry.config_class(settings["name"]).model_fields
    return key in known and (key != "offload_params" or settings.get("trainable") != "full")


def _same(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The values of `SAME`, by name; a candidate that lacks one takes no gradients, or freezes nothing."""
    methods = [candidate.config.method for candidate in candidates]
    values = {name: {getattr(method, name, None) for method in methods} - {None} for name in SAME}
    return {name: max(found, key=lambda value: value != "none") for name, found in values.items() if found}


def _config(model: str, method: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    document: dict[str, Any] = {
        "model": {"name": model},
        "data": {"template": "alpaca"},
        "method": dict(method),
    }
    apply_overrides(document, overrides)
    document["model"]["name"] = model
    if document["model"].get("task") == "classification":
        document["evaluation"] = {"tasks": ["accuracy"]}
    return parse_config(document, "fedtune plan")


def _work(config: RunConfig, examples: int | None) -> Workload:
    pools = registry.build(config.method, config.seed).pools_data
    method: Any = config.method
    aligns = hasattr(method, "alignment")
    rows = max(getattr(method, "batch_size", 1), method.alignment.batch_size if aligns else 1)
    clients = config.data.clients
    assert isinstance(clients, int)  # refused by the configuration with every partition but by-field
    work = workload.assumed(config, 1 if pools else clients, rows)
    if examples is not None:
        each = examples * (clients if pools else 1)
        work = replace(work, clients=dict.fromkeys(range(work.population), each))
    return work if aligns else replace(work, public=())


def _row(candidate: Candidate, resources: ClientResources) -> dict[str, Any]:
    row: dict[str, Any] = {"method": candidate.name, "fits": False, "plan": None, "seconds": None}
    if candidate.plan is None:
        return row | {"reasons": [f"does not apply: {candidate.refusal}"]}
    document, method = candidate.plan.document, registry.build(candidate.config.method, candidate.config.seed)
    reasons = []
    peak = document["client_peak_memory_bytes"]["total"]
    if peak > resources.memory:
        reasons.append(f"a client needs {size(peak)} of memory and has {size(resources.memory)}")
    if resources.model_private and document["clients_hold_model"]:
        reasons.append("clients hold the model's weights, and the model is private")
    if method.pools_data:
        reasons.append("all examples have to be in one place")
    elif not method.uses_wire:
        reasons.append("a reference: nobody learns from anyone else")
    seconds = _seconds(candidate.plan, resources)
    return row | {"fits": not reasons, "reasons": reasons, "plan": document, "seconds": seconds}


def _seconds(planned: Plan, resources: ClientResources) -> dict[str, float | None]:
    """Of a round, clients at the same time or in turn, and of all of them."""
    by_round: dict[int, list[float]] = defaultdict(list)
    for exchange in planned.traffic.exchanges:
        by_round[exchange.round].append(
            8 * exchange.down / resources.downlink + 8 * exchange.up / resources.uplink
        )
    wire = [sum(times) if planned.in_turn else max(times) for times in by_round.values()]
    compute: float | None = None
    if resources.speed is not None:
        document = planned.document
        turns = document["clients_per_round"] if planned.in_turn else 1
        compute = document["rounds"] * turns * document["flops_per_client_round"] / resources.speed
    return {
        "first_round": wire[0] if wire else 0.0,
        "later_round": sum(wire[1:]) / len(wire[1:]) if wire[1:] else None,
        "wire": sum(wire),
        "compute": compute,
        "total": sum(wire) + (compute or 0.0),
    }


def _pick(fitting: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The one that needs least time, and which others are least in something else."""
    if not fitting:
        return {"method": None, "why": "no method fits", "others": {}}
    best = fitting[0]
    seconds, rounds = best["seconds"], best["plan"]["rounds"]
    spent = f"{seconds['wire']:,.1f} s on the wire"
    if seconds["compute"] is not None:
        spent += f" and {seconds['compute']:,.1f} s of computing"
    why = (
        f"of {len(fitting)} that fit it needs the least time: {spent} over {rounds} "
        f"{'round' if rounds == 1 else 'rounds'}"
    )
    least: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "client memory": lambda row: float(row["plan"]["client_peak_memory_bytes"]["total"]),
        "bytes": lambda row: float(row["plan"]["payload_bytes"]["total"]),
        "operations a token": lambda row: float(sum(row["plan"]["flops_per_token"].values())),
    }
    others = {what: min(fitting, key=measure)["method"] for what, measure in least.items()}
    most = max(fitting, key=lambda row: int(row["plan"]["trainable_parameters"]))
    others["trained parameters (most)"] = most["method"]
    return {"method": best["method"], "why": why, "others": others}
