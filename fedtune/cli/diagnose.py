"""The command `fedtune diagnose`. Heavy imports happen inside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedtune
from fedtune.cli.display import Json, Plugin, begun_configs, print_json

if TYPE_CHECKING:
    from rich.table import Table


def diagnose(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.", autocompletion=begun_configs)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients of the probe.")] = 8,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of each, over all rounds of the probe; 8 a round if not given."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Share of what training gains that fewer rounds may lose.")
    ] = 0.1,
    whole: Annotated[
        bool, typer.Option("--whole", help="Measure the whole run in both schemes; predict nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr, only warnings.")] = False,
    plugin: Plugin = None,
) -> None:
    """Predict from a short probe how far one-shot will be from multi-round, and how many rounds are enough.

    Example: fedtune diagnose bundled_multi_round --clients 10
    """
    document = fedtune.diagnose(
        config,
        *overrides or [],
        clients=clients,
        steps=steps,
        tolerance=tolerance,
        whole=whole,
        progress=not quiet,
    )
    if as_json:
        print_json(document)
        return
    from fedtune.report.tables import print_whole

    print_whole([quantities_table(document)])
    for line in verdict(document):
        print(line)


def quantities_table(document: dict[str, Any]) -> Table:
    """The theory's quantities on what was measured, and the bound for the whole run."""
    from rich.table import Table

    table = Table(title="One-shot theory", title_justify="left")
    for column in ("quantity", "value", "what"):
        table.add_column(column, justify="right" if column == "value" else "left")
    found = document["quantities"]
    rows = (
        ("L", found["smoothness"], f"smoothness, mean of {found['smoothness_batches']} mini-batches"),
        ("", found["smoothness_sd"], "its standard deviation over them"),
        ("L between", found["largest_smoothness"], "largest between the two trajectories"),
        ("τ", found["relative_update"], "update relative to the start"),
        ("‖w(0,0)‖", found["norm"], f"of {found['trainable_parameters']:,} trained numbers"),
        ("T·k", document["measured_on"]["steps"], "steps of a client, mean"),
        ("Γ", found["gamma"], "L τ T k"),
        ("Γ ‖w(0,0)‖", found["bound"], "bound of Theorem 1"),
        ("× m", found["bound_of_clients"], "bound of Eq. 13"),
        ("Σ‖ε_i‖, β = 1", found["sum_of_local_errors_without_rates"], "what Eq. 13 bounds (Eq. 10)"),
        ("‖ε‖", found["error"], "error of Eq. 7, with rates, mean of clients"),
        ("‖w_one − w_multi‖", found["distance"], "of the two global models"),
        ("‖w_multi − w(0,0)‖", found["moved"], "what multi-round training moves"),
    )
    for name, value, what in rows:
        table.add_row(name, "-" if value is None else f"{value:.4g}", what)
    return table


def verdict(document: dict[str, Any]) -> list[str]:
    """What it comes to, and what it rests on, in sentences."""
    on, run, losses = document["measured_on"], document["run"], document["losses"]
    prediction, rounds = document["prediction"], document["recommended_rounds"]
    spread = f" ± {prediction['gap_error']:.2g}" if on["loss_groups"] > 1 else ""
    low, high = prediction["gap_between"]
    if low < high:
        spread += f" (between {low:+.3g} and {high:+.3g})"
    asked = f"{len(on['clients'])} of {run['clients']} clients"
    taken = f"{on['steps']:g} of {run['steps']:g} steps each in {on['rounds']} rounds"
    basis = "Measured on the whole run" if on["whole_run"] else "Probe"
    number = "one round is" if rounds == 1 else f"{rounds} rounds are"
    fewest, most = document["recommended_between"]
    between = f", {fewest} to {most} over that range" if fewest < most else ""
    return [
        f"{basis}: {asked}, {taken}; loss on {on['loss_examples']} held-out examples: "
        f"{losses['start']:.4g} before, {losses['multi_round'][-1]:.4g} multi-round, "
        f"{losses['one_shot'][-1]:.4g} one-shot; spread over {on['loss_groups']} parts of them.",
        f"{'' if on['whole_run'] else 'Prediction: '}one-shot ends {prediction['gap']:+.3g}{spread} in loss "
        f"from {run['rounds']} rounds, {prediction['share']:.0%} of what training gains.",
        f"Recommended: {number} enough to lose at most {document['tolerance']:.0%} of the gain "
        f"(of {run['rounds']} rounds, same steps in all){between}. It rests on this share, and on an "
        "approximate law for fewer rounds (docs/theory.md).",
        *(f"Caveat: {caveat}." for caveat in document["caveats"]),
    ]
