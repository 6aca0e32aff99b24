"""The command `fedtune`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import fedtune
from fedtune.cli.answer import chat, generate
from fedtune.cli.client import client
from fedtune.cli.data import data
from fedtune.cli.diagnose import diagnose
from fedtune.cli.display import (
    Json,
    Log,
    LogFormat,
    PlainHelp,
    Plugin,
    Workers,
    begun_configs,
    print_json,
    seeds_of,
    show_run,
    shown_as,
)
from fedtune.cli.keys import keys
from fedtune.cli.plan import plan
from fedtune.cli.push import Format, push
from fedtune.cli.report import report
from fedtune.cli.serve import serve
from fedtune.cli.server import server
from fedtune.cli.start import cp, init
from fedtune.cli.status import status
from fedtune.cli.stopping import stoppable
from fedtune.cli.sweep import sweep
from fedtune.cli.validate import validate
from fedtune.errors import FedtuneError, InputError, ProgramError
from fedtune.report.json_log import say_or_print
from fedtune.version import __version__

app = typer.Typer(
    name="fedtune",
    help="Fine-tune one foundation model on data that stays with many owners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

command = partial(app.command, cls=PlainHelp, no_args_is_help=True)

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr, only warnings.")]

Places = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Where inputs were moved to, as model.name=/data/base."),
]
DEBUG = "--debug"  # `main` takes it away, wherever it stands


class Listing(StrEnum):
    """What `fedtune ls` can list."""

    methods = "methods"
    partitioners = "partitioners"
    tasks = "tasks"
    templates = "templates"
    models = "models"
    configs = "configs"


def main() -> None:
    """Runs the command line; every error ends in one message on stderr and its exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    debug = len(arguments) < len(sys.argv) - 1
    if debug:
        logging.getLogger("fedtune").setLevel(logging.DEBUG)
    with stoppable() as stopped:
        status = _status(arguments, debug)
    if status == 130:  # of typer, and of a shell, for Ctrl-C
        status = stopped.status
        said = f"fedtune: interrupted by {stopped.by.name}; a run continues with --resume"
        say_or_print("interrupted", said, said)
    if status:
        raise SystemExit(status)


def _status(arguments: list[str], debug: bool) -> int:
    """Runs a command to its end; returns its exit status, 130 where a signal stopped it."""
    try:
        # typer turns Ctrl-C into 130 and returns it; older ones abort
        return int(app(args=arguments, standalone_mode=False) or 0)
    except FedtuneError as error:
        _fail(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            text = error.format_message()  # of a command without arguments it is the whole help
            text = re.sub(r"( Did you mean [^?]*\?)\1+", r"\1", text)  # click says it, and typer once more
            shown = text if text.startswith("Usage") else f"fedtune: {text} Try fedtune --help."
            print(shown, file=sys.stderr)
            raise SystemExit(2) from None
        from fedtune.core.faults import faults

        try:
            with faults(" ".join(["fedtune", *arguments[:1]])):
                raise
        except FedtuneError as fault:
            _fail(fault, debug)


def _fail(error: FedtuneError, debug: bool) -> NoReturn:
    """Ends with an error's message and status; with its traceback, if that is wanted, before them."""
    if debug:
        traceback.print_exception(error)
    text = f"fedtune: {error}"
    if isinstance(error, ProgramError) and not debug:
        text += f" The same command with {DEBUG} shows the traceback."
    say_or_print("error", text, text)
    raise SystemExit(error.exit_status) from None


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedtune {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of whatever ends a command; wherever it stands.")
    ] = False,
) -> None:
    """Fine-tune one foundation model on data that stays with many owners."""


@command()
def run(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="Settings file; with --resume not needed.", autocompletion=begun_configs
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default runs/NAME, numbered if taken.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log_format: LogFormat = Log.text,
    plugin: Plugin = None,
) -> None:
    """Run one federation.

    Example: fedtune run demo method.rounds=1 method.local_epochs=3

    Example: fedtune run --resume runs/demo method.rounds=5
    """
    if out is not None and resume is not None:
        raise InputError("--out starts a new run and --resume continues one; give one of them")
    settings = list(overrides or [])
    if resume is not None and (config is None or ("=" in config.name and not config.exists())):
        settings, config = [*([str(config)] if config else []), *settings], resume / "config.yaml"
        if not config.is_file():
            raise InputError(f"{resume}: not a run folder: it has no config.yaml")
    if config is None:
        raise InputError("a run needs a settings file: fedtune run CONFIG, or --resume FOLDER")
    progress = shown_as(quiet, log_format)
    done = fedtune.run(config, *settings, out=resume or out, resume=resume is not None, progress=progress)
    show_run(done, as_json=as_json)


@command()
def compare(
    configs: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG...", help="Settings files, one a row.", autocompletion=begun_configs),
    ],
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting in all of them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; what is done there is taken over.")
    ] = None,
    references: Annotated[bool, typer.Option(help="Add zero-shot, stand-alone and centralised rows.")] = True,
    workers: Workers = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Run several configurations on the same split and print one table.

    Example: fedtune compare bundled_multi_round bundled_one_shot --seeds 0,1,2
    """
    found = fedtune.compare(
        configs,
        *override or [],
        seeds=seeds_of(seeds),
        out=out,
        references=references,
        progress=not quiet,
        workers=workers,
    )
    if as_json:
        print_json(found.document)
        return
    from fedtune.report.tables import compare_table, print_whole

    print_whole([compare_table(found.document, found.metrics)])
    print(f"Runs, compare.json and table.md: {found.path}")


command()(status)
command()(sweep)
command()(validate)
command()(data)
command()(plan)
command()(diagnose)


@command("eval")
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A folder of a run, a model or an adapter; or a model's name."
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; see fedtune ls tasks.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as data.train=x.jsonl."),
    ] = None,
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """Evaluate what a run made, or any model: on held-out examples, files, or lm-evaluation-harness's tasks.

    Scores of a run are kept in its folder, in evaluations.jsonl, and reports show them.

    Example: fedtune eval runs/demo --tasks loss,accuracy
    """
    scores = fedtune.evaluate(target, [task.strip() for task in tasks.split(",")], *overrides or [])
    if as_json:
        print_json(scores)
        return
    from fedtune.report.tables import score_lines

    for line in score_lines(scores):
        print(line)


command()(report)
command()(generate)
command()(chat)
command()(serve)


@command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    places: Places = None,
    merge: Annotated[bool, typer.Option(help="As --format merged.")] = False,
    format: Annotated[
        Format | None,
        typer.Option(
            help="peft: the adapter; merged: a whole model; gguf: for llama.cpp, with its converter; "
            "default: as the run made it."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="One result alone, as client-0003; all there are by default.")
    ] = None,
    plugin: Plugin = None,
) -> None:
    """Write a run's result as a Hugging Face model, PEFT adapter or GGUF file.

    Example: fedtune export runs/demo --out model --format merged
    """
    for path in fedtune.open(run, *places or []).export(out, merge=merge, format=format, name=name):
        print(path)


command()(push)


@command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    round: Annotated[int, typer.Option(help="The round, counted from 1.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    places: Places = None,
    plugin: Plugin = None,
) -> None:
    """Rebuild the model of an earlier round from its checkpoint.

    Example: fedtune replay runs/demo --round 2 --out round-2
    """
    for path in fedtune.open(run, *places or []).replay(round, out):
        print(path)


@command("ls")
def list_things(
    what: Annotated[Listing, typer.Argument(help="What to list.")],
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """List what there is, a line each.

    Example: fedtune ls methods
    """
    entries = fedtune.available(what)
    if as_json:
        print_json(entries)
        return
    name, origin = (max(len(entry[key]) for entry in entries) for key in ("name", "origin"))
    for entry in entries:
        print(f"{entry['name']:{name}}  {entry['origin']:{origin}}  {entry['summary']}")
    if what is Listing.tasks:
        print("Those of lm-evaluation-harness: lm_eval ls tasks [--include_path FOLDER]", file=sys.stderr)


@command(no_args_is_help=False)
def bench(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One benchmark, or all; without it, what there is."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure against plain references, as ratios within one run.

    Example: fedtune bench aggregation
    """
    from fedtune.bench import BENCHES, run_benches

    if name is None:
        if as_json:
            print_json([{"name": each, "summary": summary} for each, summary in BENCHES.items()])
            return
        for each, summary in {
            **BENCHES,
            "all": "all that need no GPU, one after another; an hour or more",
        }.items():
            print(f"{each:{max(map(len, BENCHES))}}  {summary}")
        return
    documents = run_benches(name)
    if as_json:
        print_json(documents if name == "all" else documents[0])
        return
    from fedtune.bench import bench_table
    from fedtune.report.tables import print_whole

    for document in documents:
        print_whole([bench_table(document)])
        for ratio, value in document["ratios"].items():
            print(f"{ratio}: {value:.3g}")


command()(init)
command()(cp)
command()(keys)
command()(server)
command()(client)


if __name__ == "__main__":
    main()
