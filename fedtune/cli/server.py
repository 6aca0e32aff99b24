"""`fedtune server`: a federation over a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Json, Log, LogFormat, Plugin, begun_configs, show_run, shown_as
from fedtune.errors import InputError


def server(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.", autocompletion=begun_configs)
    ],
    keys: Annotated[Path, typer.Option(help="The folder `server` that fedtune keys made.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine's loopback alone.")] = 9443,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/NAME, numbered if taken.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr, only warnings.")] = False,
    log_format: LogFormat = Log.text,
    health_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Say how the run stands at /health and /status, on this loopback."
        ),
    ] = None,
    plugin: Plugin = None,
) -> None:
    """Run one federation with clients on other machines.

    Example: fedtune server fed.yaml --keys server --out runs/first
    """
    if out is not None and resume is not None:
        raise InputError("--out starts a new run and --resume continues one; give one of them")
    done = fedtune.serve(
        config,
        *overrides or [],
        keys=keys,
        port=port,
        out=resume or out,
        resume=resume is not None,
        progress=shown_as(quiet, log_format),
        health_port=health_port,
    )
    show_run(done, as_json=as_json)
