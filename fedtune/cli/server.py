"""`fedtune server`: a federation over a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.display import Plugin, free_name, print_json, progress_on
from fedtune.cli.keys import require_flower
from fedtune.errors import InputError


def server(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.")],
    keys: Annotated[Path, typer.Option(help="The folder `server` that fedtune keys made.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine's loopback alone.")] = 9443,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/NAME, numbered if taken.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    plugin: Plugin = None,
) -> None:
    """Run one federation with clients on other machines.

    Example: fedtune server fed.yaml --keys server --out runs/first
    """
    from fedtune.config.file import load_config
    from fedtune.federation.plugins import require_plugins

    require_plugins(resume)
    settings = load_config(config, ["transport.name=flower", *(overrides or [])])
    if out is not None and resume is not None:
        raise InputError("--out starts a new run and --resume continues one; give one of them")
    require_flower()
    path = resume or out or free_name(Path("runs") / config.stem)
    with progress_on(quiet) as progress:
        from fedtune.deploy.server import Server
        from fedtune.federation.run import run as federate

        with Server(settings, keys, port, progress.note) as deployment:
            resumed = resume is not None and resume.exists()
            summary = federate(settings, path, progress, resume=resumed, deployment=deployment)
    if as_json:
        print_json(summary)
        return
    from fedtune.report.tables import print_whole, summary_tables

    print_whole(summary_tables(summary))
    print(f"Run folder: {path}")
