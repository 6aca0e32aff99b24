"""`fedtune serve`: a run's result behind the OpenAI-compatible routes."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.answer import TUNED, Finished, Moved, Name
from fedtune.cli.display import Plugin


class Engine(StrEnum):
    """Whose server answers."""

    fedtune = "fedtune"
    transformers = "transformers"
    vllm = "vllm"


def serve(
    run: Finished,
    host: Annotated[
        str, typer.Option(help="Address to bind; one that other machines reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0: one that is free.")] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key that callers must send; or set FEDTUNE_API_KEY."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most of an answer that a request may ask for.")
    ] = 1024,
    name: Name = TUNED,
    engine: Annotated[
        Engine,
        typer.Option(help="Whose server: fedtune's own, or one of these programs, if it is installed."),
    ] = Engine.fedtune,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line a request on stderr.")] = False,
    moved: Moved = None,
    plugin: Plugin = None,
) -> None:
    """Answer OpenAI-compatible requests with what a run made, in the template that it was tuned in.

    The server has the routes /v1/models, /v1/completions, /v1/chat/completions (both also as a stream) and
    /health, and answers one request at a time. Ctrl-C or SIGTERM ends it. Callers get answers and never the
    model.

    Example: fedtune serve runs/demo --port 8000
    """
    from fedtune.deploy.openai_api import read_key

    key = read_key(key_file, os.environ)
    opened = fedtune.open(run, *moved or [])
    if engine is Engine.fedtune:
        opened.serve_api(host=host, port=port, key=key, name=name, max_tokens=max_tokens, quiet=quiet)
        return
    from fedtune.deploy.engines import serve_with

    serve_with(
        engine,
        lambda folder: opened.export(folder, merge=True),
        opened.folder.name,
        result=name,
        host=host,
        port=port,
        key=key,
    )
