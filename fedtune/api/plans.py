"""What a run will cost, and what it will need: before it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.api.commands import load
from fedtune.api.federate import shown, with_objects
from fedtune.errors import InputError

if TYPE_CHECKING:
    from fedtune.config.schema import RunConfig


def plan(
    config: RunConfig | str | Path | Mapping[str, Any],
    *overrides: str,
    data: Any = None,
    client_memory: Sequence[str] = (),
) -> dict[str, Any]:
    """Bytes, memory, operations and trainable parameters of a run, before anything is loaded or run.

    Args:
        config: What `load` takes.
        overrides: As of `load`.
        data: As of `run`.
        client_memory: Of clients of unlike memory, with units: ["8GB", "2GB"]; each gets the highest LoRA
            rank that fits, up to `lora.rank`.

    Returns:
        The document of `fedtune plan --json`: `payload_bytes`, `client_peak_memory_bytes`,
        `evaluation_peak_memory_bytes`, `flops_per_token` and so on, in bytes and operations; and with
        `client_memory` `client_ranks`.

    Raises:
        InputError: As the run would raise it, a memory has no unit, or there are no ranks to give.
    """
    from fedtune.measure.quantities import BYTES, quantity
    from fedtune.planning.plan import plan as plan_one

    settings, objects = with_objects(load(config, *overrides), data)
    memories = [quantity(one, BYTES, "client_memory") for one in client_memory]
    document = plan_one(settings, objects=objects).document
    if memories:
        from fedtune.planning.by_memory import ranks_by_memory

        document["client_ranks"] = ranks_by_memory(settings, list(map(int, memories)), objects)
    return document


def data_report(
    config: RunConfig | str | Path | Mapping[str, Any],
    *overrides: str,
    data: Any = None,
    sample: int = 50_000,
    example: int | None = None,
) -> dict[str, Any]:
    """What a run will train on: clients, lengths in tokens, what stands twice or is cut, one example.

    No weights are loaded; of the model its tokenizer and config.json are read.

    Args:
        config: What `load` takes.
        overrides: As of `load`.
        data: As of `run`.
        sample: Tokens are counted of at most so many examples, evenly spread; texts are looked at whole.
        example: Which training example is shown, by its index as in partition.json; None: the first.

    Returns:
        The document of `fedtune data --json`: `clients`, `lengths`, `duplicates`, `padding`, `example`,
        `checks` and so on; lengths are in tokens.

    Raises:
        InputError: As the run would raise it, or there is no such example.
    """
    from fedtune.planning.data_report import data_report as report

    settings, objects = with_objects(load(config, *overrides), data)
    if settings.data.pictures is not None:
        from fedtune.planning.picture_report import picture_report

        return picture_report(settings, example=example)
    return report(settings, objects=objects, sample=sample, example=example)


def rank(
    model: str,
    *overrides: str,
    client_memory: str,
    uplink: str,
    downlink: str,
    model_private: bool = False,
    client_speed: str | None = None,
    examples: int | None = None,
    on_method: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """All methods on one model: which fit what clients have, what each costs, and what to pick.

    Args:
        model: Bundled, a folder or a hub name; its config.json is enough.
        overrides: Settings for all of them, such as "model.dtype=bfloat16".
        client_memory: Of a client, with its unit: "8GB".
        uplink: Of a client: "5Mbps".
        downlink: Of a client: "50Mbps".
        model_private: Clients may not hold the model.
        client_speed: Count computing too, at this speed: "10TFLOPS"; needs `examples`.
        examples: Training examples of a client.
        on_method: Called with each method's name before it is planned.

    Returns:
        The document of `fedtune plan --model ... --json`.

    Raises:
        InputError: A figure has no unit or is not above zero, or there is no such model.
    """
    from fedtune.measure.quantities import BITS_PER_SECOND, BYTES, FLOPS, quantity
    from fedtune.planning.rank import ClientResources, judge, plan_all

    if examples is not None and examples < 1:
        raise InputError(f"examples must be at least 1, got {examples}")
    if client_speed is not None and examples is None:
        raise InputError("client_speed needs examples: without their number no steps can be counted")
    resources = ClientResources(
        memory=quantity(client_memory, BYTES, "client_memory"),
        uplink=quantity(uplink, BITS_PER_SECOND, "uplink"),
        downlink=quantity(downlink, BITS_PER_SECOND, "downlink"),
        speed=None if client_speed is None else quantity(client_speed, FLOPS, "client_speed"),
        model_private=model_private,
    )
    return judge(plan_all(model, overrides, examples, on_method), resources)


def diagnose(
    config: RunConfig | str | Path | Mapping[str, Any],
    *overrides: str,
    clients: int = 8,
    steps: int | None = None,
    tolerance: float = 0.1,
    whole: bool = False,
    data: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Predicts from a short probe how far one-shot will be from multi-round, and how many rounds are enough.

    Args:
        config: What `load` takes.
        overrides: As of `load`.
        clients: Clients of the probe.
        steps: Steps of each, over all rounds of the probe; None: 8 a round.
        tolerance: Share of what training gains that fewer rounds may lose.
        whole: Measure the whole run in both schemes; predict nothing.
        data: As of `run`.
        progress: As of `run`.

    Raises:
        InputError: The theory does not cover the method, or as `run`.
    """
    from fedtune.federation.diagnose import diagnose as probe

    settings, objects = with_objects(load(config, *overrides), data)
    with shown(progress) as display:
        return probe(
            settings,
            display,
            clients=clients,
            steps=steps,
            tolerance=tolerance,
            whole=whole,
            objects=objects,
        )
