"""`fedtune plan`: what a configuration will cost, and which methods fit what clients have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedtune
from fedtune.cli.display import Json, Plugin, begun_configs, print_json
from fedtune.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table


def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="YAML file, and settings to change.",
            autocompletion=begun_configs,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead of CONFIG: rank all methods on this model."),
    ] = None,
    client_memory: Annotated[
        str | None,
        typer.Option(help="Of a client, as in 8GB; with CONFIG of several, as in 8GB,2GB: their LoRA ranks."),
    ] = None,
    uplink: Annotated[str | None, typer.Option(help="Of a client, as in 5Mbps.")] = None,
    downlink: Annotated[str | None, typer.Option(help="Of a client, as in 50Mbps.")] = None,
    model_private: Annotated[
        bool, typer.Option("--model-private", help="Clients may not hold the model.")
    ] = False,
    client_speed: Annotated[
        str | None, typer.Option(help="Count computing too, at this speed, as in 10TFLOPS; needs --examples.")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Training examples of a client.")] = None,
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """What a run will cost: bytes, memory, operations and steps, from the model's config.json alone.

    Example: fedtune plan fedbiot model.name=owner/model model.dtype=bfloat16

    Example: fedtune plan --model M --client-memory 8GB --uplink 5Mbps --downlink 50Mbps --model-private
    """
    given = list(arguments or [])
    figures = {
        "--client-memory": client_memory,
        "--uplink": uplink,
        "--downlink": downlink,
        "--client-speed": client_speed,
        "--examples": examples,
    }
    if model is None:
        _refuse_figures(figures, model_private)
        if not given or "=" in given[0]:
            raise InputError(
                "fedtune plan needs a CONFIG, or --model with --client-memory, --uplink and --downlink"
            )
        document = fedtune.plan(*given, client_memory=client_memory.split(",") if client_memory else ())
        tables = _plan_tables
    else:
        configs = [argument for argument in given if "=" not in argument]
        if configs:
            raise InputError(f"give a CONFIG or --model, not both; got {configs[0]} and --model {model}")
        document = _ranked(model, figures, model_private, given, quiet=as_json)
        tables = _rank_tables
    if as_json:
        print_json(document)
        return
    from fedtune.report.tables import print_whole

    print_whole(tables(document))
    for line in _said(document) if model is None else _conclusion(document):
        print(line)


def _said(document: Mapping[str, Any]) -> list[str]:
    from fedtune.planning.by_memory import said

    ranks = document.get("client_ranks")
    return [*document["notes"], *(said(ranks) if ranks else [])]


def _ranked(
    model: str, figures: Mapping[str, Any], private: bool, overrides: Sequence[str], *, quiet: bool
) -> dict[str, Any]:
    missing = [name for name in ("--client-memory", "--uplink", "--downlink") if figures[name] is None]
    if missing:
        raise InputError(f"--model also needs {', '.join(missing)}, as in --client-memory 8GB --uplink 5Mbps")
    from rich.console import Console

    named = {option.removeprefix("--").replace("-", "_"): value for option, value in figures.items()}
    with Console(stderr=True, quiet=quiet).status("planning") as status:
        return fedtune.rank(
            model,
            *overrides,
            **named,
            model_private=private,
            on_method=lambda name: status.update(f"planning {name}"),
        )


def _refuse_figures(figures: Mapping[str, Any], private: bool) -> None:
    given = [name for name, value in figures.items() if value is not None and name != "--client-memory"]
    given += ["--model-private"] if private else []
    if given:
        raise InputError(f"{', '.join(given)}: only together with --model, which ranks all methods")


def _plan_tables(document: Mapping[str, Any]) -> list[Table]:
    from rich.table import Table

    from fedtune.planning.memory import PARTS
    from fedtune.report.tables import size

    cost = Table(
        title=f"{document['method']} on {document['model']}", title_justify="left", show_header=False
    )
    cost.add_column()
    cost.add_column(justify="right")
    trainable, total = document["trainable_parameters"], document["total_parameters"]
    cost.add_row("trainable parameters", f"{trainable:,} of {total:,}")
    cost.add_row(
        "rounds x clients in each, of",
        f"{document['rounds']} x {document['clients_per_round']}, {document['clients']}",
    )
    steps, batch = document["local_steps"], document["batch"]
    if steps["most"] is None:
        shown = "not known"
    elif steps["least"] == steps["most"]:
        shown = f"{steps['most']:,}"
    else:
        shown = f"{steps['least']:,} to {steps['most']:,}"
    cost.add_row("local steps", shown)
    what = "rows of several examples" if batch["batching"] == "packed" else batch["batching"]
    pixels = batch["pixels"]
    size_of = f"pictures of {pixels} x {pixels} pixels" if pixels else f"x {batch['longest']} tokens ({what})"
    cost.add_row("largest batch", f"{batch['examples']} {size_of}")
    if batch["padding"] is not None:
        cost.add_row("padding, of all tokens", f"{batch['padding']:.1%} of the tokens")
    payload = document["payload_bytes"]
    for key, label in (
        ("first_time", "payload down, up, a client's first time"),
        ("later", "payload down, up, later"),
    ):
        if payload[key] is not None:
            cost.add_row(label, f"{size(payload[key]['down'])}, {size(payload[key]['up'])}")
    cost.add_row("payload of the run down, up", f"{size(payload['down'])}, {size(payload['up'])}")
    if asked := payload.get("evaluation"):
        cost.add_row("of that for clients' scores", f"{size(asked['down'])}, {size(asked['up'])}")
    unit, times = ("picture", batch["longest"]) if pixels else ("token", 1)
    for direction, count in document["flops_per_token"].items():
        cost.add_row(f"GFLOP a {unit}, {direction}", f"{count * times / 1e9:,.4g}")
    for part, count in document["flops_once_a_picture"].items():
        cost.add_row(f"GFLOP a picture, {part.replace('_', ' ')}", f"{count / 1e9:,.4g}")
    for key, value in document["published"].items():
        label = f"as the paper counts: {key.replace('_', ' ')}"
        cost.add_row(label, f"{value:,}" if key.startswith("bytes") else f"{value / 1e9:,.4g} G")
    memory = Table(title="Peak memory", title_justify="left")
    memory.add_column("")
    for part in (*PARTS, "total"):
        memory.add_column(part, justify="right")
    for where in ("client", "server", "evaluation"):
        peak = document[f"{where}_peak_memory_bytes"]
        memory.add_row(where, *(size(peak[part]) for part in (*PARTS, "total")))
    simulated = document["memory_by_device"]["simulation"]
    memory.caption = (
        f"Simulated in one process: {size(simulated['cpu_bytes'])}, or "
        f"{size(simulated['device_bytes'])} of a GPU and {size(simulated['host_bytes'])} of the host."
    )
    return [cost, memory]


def _rank_tables(document: Mapping[str, Any]) -> list[Table]:
    from rich.table import Table

    from fedtune.report.tables import size

    held = "" if document["quantization"] == "none" else f", {document['quantization']}"
    table = Table(title=f"Methods on {document['model']}{held}", title_justify="left")
    table.add_column("method")
    table.add_column("fits")
    for column in (
        "client memory, same settings",
        "trainable",
        "rounds",
        "payload down, up",
        "first round",
        "later round",
        "wire",
    ):
        table.add_column(column, justify="right")
    computes = document["client_flops_per_second"] is not None
    if computes:
        table.add_column("computing", justify="right")
    table.add_column("why not")
    for row in document["methods"]:
        planned, seconds, why = row["plan"], row["seconds"], "; ".join(row["reasons"])
        if planned is None:
            table.add_row(row["method"], "no", *[""] * (8 if computes else 7), why)
            continue
        payload = planned["payload_bytes"]
        cells = [size(planned["client_peak_memory_bytes"]["total"]), f"{planned['trainable_parameters']:,}"]
        cells += [f"{planned['rounds']}", f"{size(payload['down'])}, {size(payload['up'])}"]
        cells += [_time(seconds[key]) for key in ("first_round", "later_round", "wire")]
        cells += [_time(seconds["compute"])] if computes else []
        table.add_row(row["method"], "yes" if row["fits"] else "no", *cells, why)
    return [table]


def _conclusion(document: Mapping[str, Any]) -> list[str]:
    pick = document["pick"]
    same = ", ".join(f"method.{name}: {value}" for name, value in document["same_settings"].items())
    lines = [
        f"Taken: {document['clients']} clients, examples of {document['max_length']} tokens, "
        f"{document['dtype']}, each method's own defaults for everything else.",
        f"The same settings for all that take gradients: {same}.",
    ]
    if pick["method"] is None:
        return [*lines, "No method fits."]
    lines.append(f"Pick: {pick['method']}; {pick['why']}.")
    others = "; ".join(f"{what}: {method}" for what, method in pick["others"].items())
    lines.append(f"Of those that fit, the least {others}.")
    return [*lines, "A plan says nothing of accuracy: fedtune compare does."]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
