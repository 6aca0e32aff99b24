"""`fedtune client`: one client of a federation over a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Log, LogFormat, Plugin, shown_as
from fedtune.errors import InputError


def client(
    server: Annotated[str, typer.Option(help="HOST:PORT of the server, or of the proxy in front of it.")],
    keys: Annotated[Path, typer.Option(help="The folder that fedtune keys made for this client.")],
    data: Annotated[
        Path, typer.Option(help="This client's examples, a file or a folder; never leaves this machine.")
    ],
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS",
            help="A field of the file that has another name; input= for none.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the base model is here, if not where the server's settings say.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or one GPU as cuda:1.")] = "auto",
    accept: Annotated[
        Path | None, typer.Option(help="YAML file of what this machine's operator accepts.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of what must outlive this process; default KEYS/state.")
    ] = None,
    log_format: LogFormat = Log.text,
    plugin: Plugin = None,
) -> None:
    """Take part in a federation with examples that stay here.

    Runs until it is stopped; comes back by itself after the server or the network was away.

    Example: fedtune client --server fed.example.org:443 --keys north --data /srv/north.jsonl
    """
    shown_as(False, log_format)
    named: dict[str, str | None] = {}
    for pair in field or []:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours:
            raise InputError(f"--field {pair!r}: write OURS=THEIRS, as in instruction=question")
        named[ours] = theirs or None
    fedtune.take_part(
        server,
        keys=keys,
        data=data,
        fields=named,
        model=model,
        device=device,
        accept=accept,
        state=state,
    )
