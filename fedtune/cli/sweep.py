"""`fedtune sweep`: a grid of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Json, Plugin, Workers, begun_configs, print_json, seeds_of


def sweep(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="Settings file, or a name, as demo.", autocompletion=begun_configs
        ),
    ],
    grid: Annotated[
        list[str], typer.Argument(metavar="KEY=A,B...", help="Settings and the values that each takes.")
    ],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting at all points.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; scores are their means.")] = "",
    trials: Annotated[
        int | None, typer.Option(min=1, help="So many points drawn from the grid, instead of all.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="Score on this share of the training examples; held-out ones are not looked at."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="By which the best is found, as accuracy.accuracy.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; what is done there is taken over.")
    ] = None,
    workers: Workers = 1,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr, only warnings.")] = False,
    plugin: Plugin = None,
) -> None:
    """Run one configuration at every point of a grid of settings and find the best.

    Example: fedtune sweep demo method.lr=1e-3,3e-3 method.lora.rank=4,8 --validation 0.1 --seeds 0,1
    """
    found = fedtune.sweep(
        config,
        grid,
        *override or [],
        seeds=seeds_of(seeds),
        trials=trials,
        validation=validation,
        metric=metric,
        out=out,
        progress=not quiet,
        workers=workers,
    )
    if as_json:
        print_json(found.document)
        return
    from fedtune.report.sweeps import sweep_table
    from fedtune.report.tables import print_whole

    print_whole([sweep_table(found.document)])
    made = "sweep.json, table.md" + (", sweep.svg" if (found.path / "sweep.svg").exists() else "")
    print(f"Runs, {made}: {found.path}")
    if found.best is not None:
        print(f"The best: fedtune run {found.path / 'best.yaml'}")
