"""What commands share: plugin files, JSON on stdout, a run's summary."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from click import Context, HelpFormatter
from typer.core import TyperCommand

if TYPE_CHECKING:
    from fedtune.api.runs import Run


def _load_plugins(files: list[Path] | None) -> list[Path] | None:
    from fedtune.registry import load_plugin

    for file in files or []:
        load_plugin(file)
    return files


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]


Workers = Annotated[
    int, typer.Option(min=1, help="So many runs at the same time, each in a process; the same result.")
]


class Log(StrEnum):
    """How what happens is written on stderr."""

    text = "text"
    json = "json"


LogFormat = Annotated[
    Log, typer.Option("--log-format", help="On stderr: text for people, or json, one object a line.")
]


def shown_as(quiet: bool, log_format: Log) -> bool | Literal["json"]:
    """What `progress` is for two options; from then on warnings are of that form too.

    Raises:
        InputError: One leaves out what the other is for.
    """
    from fedtune.errors import InputError
    from fedtune.report.json_log import log_as_json

    if log_format is Log.text:
        return not quiet
    if quiet:
        raise InputError("--quiet leaves out what --log-format json writes; give one of them")
    log_as_json()
    return "json"


# The files are imported while the command line is read, so that a command finds their parts like any other.
Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        callback=_load_plugins,
        help="Python file with parts of your own (docs/plugins.md); can be repeated.",
    ),
]


def begun_configs(incomplete: str) -> list[str]:
    """For a shell: the configurations that come with fedtune and the YAML files and folders that begin so."""
    from fedtune.config.shipped import shipped

    place, _, begin = incomplete.rpartition("/")
    there = Path(place or ("/" if incomplete.startswith("/") else "."))
    inside = sorted(there.iterdir()) if there.is_dir() else []
    paths = [path for path in inside if path.name.startswith(begin)]
    front = incomplete.removesuffix(begin)
    found = [f"{front}{path.name}/" for path in paths if path.is_dir() and (begin or path.name[0] != ".")]
    found += [f"{front}{path.name}" for path in paths if path.suffix in (".yaml", ".yml") and path.is_file()]
    return [*(name for name in shipped() if name.startswith(incomplete)), *found]


class PlainHelp(TyperCommand):
    """A command whose help has no backslash before a bracket, which typer escapes for rich."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Writes the help."""
        super().format_help(ctx, formatter)
        formatter.buffer = [part.replace("\\[", "[") for part in formatter.buffer]


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    from fedtune.federation.files import dumps

    print(dumps(document, indent=2))


def seeds_of(text: str) -> list[int] | None:
    """The numbers in `0,1,2`; None for nothing. Raises InputError for anything else."""
    from fedtune.errors import InputError

    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise InputError(
            f"--seeds must be different whole numbers from 0 up, as in 0,1,2; got {text!r}"
        ) from None


def show_run(run: Run, *, as_json: bool) -> None:
    """A run's summary: as JSON, or as tables and where it is. Last, on stderr, whose data are not in it."""
    from fedtune.federation.left_out import said
    from fedtune.report.json_log import say_or_print

    if as_json:
        print_json(run.summary)
    else:
        from fedtune.report.tables import print_whole, summary_tables

        print_whole(summary_tables(run.summary))
        print(f"Run folder: {run.path}", flush=True)
    if sentence := said(run.summary):
        say_or_print("note", f"fedtune: {sentence}", f"fedtune: {sentence}")
