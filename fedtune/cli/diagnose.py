"""The command `fedtune diagnose`. Heavy imports happen inside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def diagnose(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients of the probe.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each, over all rounds of the probe.")] = 24,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Share of what training gains that fewer rounds may lose.")
    ] = 0.1,
    whole: Annotated[
        bool, typer.Option("--whole", help="Measure the whole run in both schemes; predict nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Predict from a short probe how far one-shot will be from multi-round, and how many rounds are enough.

    Example: fedtune diagnose configs/bundled_multi_round.yaml --steps 24
    """
    from contextlib import nullcontext

    from fedtune.cli.display import Display
    from fedtune.run.config_file import load_config
    from fedtune.run.files import dumps
    from fedtune.run.progress import Silent

    settings = load_config(config, overrides or [])
    with nullcontext(Silent()) if quiet else Display() as progress:
        from fedtune.theory.diagnose import diagnose as probe

        document = probe(settings, progress, clients=clients, steps=steps, tolerance=tolerance, whole=whole)
    if as_json:
        print(dumps(document, indent=2))
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
    share = f"{prediction['share']:.0%} of what training gains ({prediction['improvement']:.3g})"
    if on["whole_run"]:
        basis = (
            f"Measured on the whole run: {run['clients']} clients, {on['steps']:g} steps each in "
            f"{on['rounds']} rounds; loss on {on['loss_examples']} held-out examples, "
            f"spread over {on['loss_groups']} parts."
        )
        gap = f"One-shot ends {prediction['gap']:+.3g}{spread} in loss from {run['rounds']} rounds: {share}."
    else:
        basis = (
            f"Probe: clients {', '.join(map(str, on['clients']))} of {run['clients']}, {on['steps']:g} of "
            f"{run['steps']:g} steps each in {on['rounds']} rounds; loss on {on['loss_examples']} of their "
            f"examples that it did not train on: {losses['start']:.4g} before, "
            f"{losses['multi_round'][-1]:.4g} multi-round, {losses['one_shot'][-1]:.4g} one-shot; "
            f"spread over {on['loss_groups']} clients."
        )
        gap = (
            f"Prediction: one-shot ends {prediction['gap']:+.3g}{spread} in loss from {run['rounds']} "
            f"rounds: {share}."
        )
    number = "one round is" if rounds == 1 else f"{rounds} rounds are"
    return [
        basis,
        gap,
        f"Recommended: {number} enough to lose at most {document['tolerance']:.0%} of the gain "
        f"(of {run['rounds']} rounds, same steps in all).",
    ]
