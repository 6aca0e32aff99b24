"""`fedtune keys`: certificates and keys of a federation, and what to copy where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune


def keys(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of the federation; made if it is missing.")
    ],
    server: Annotated[
        list[str] | None,
        typer.Option(help="A name or address by which clients reach the server; can stand several times."),
    ] = None,
    clients: Annotated[str, typer.Option(help="Names of clients, separated by commas.")] = "",
    days: Annotated[int, typer.Option(min=1, help="How long the server's certificate is valid.")] = 365,
) -> None:
    """Make the keys of a federation over a network, or of more clients.

    Example: fedtune keys federation --server fed.example.org --clients north,south,west
    """
    names = [name.strip() for name in clients.split(",") if name.strip()]
    known = fedtune.make_keys(folder, server or [], names, days=days)
    print(f"Keep here, and nowhere else: {folder / 'ca.key'}")
    print(f"Copy to the server:          {folder / 'server'}/")
    for number, name in enumerate(known):
        print(f"Copy to client {number} ({name}): {folder / 'clients' / name}/")
    print("Private keys (*.key) are readable by you alone; keep it so when you copy them (scp -p, rsync -a).")
