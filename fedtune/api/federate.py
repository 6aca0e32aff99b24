"""What the front door's functions share: examples as objects, progress, and one federation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.errors import FederationError, InputError

if TYPE_CHECKING:
    from fedtune.config.schema import RunConfig
    from fedtune.data.objects import ObjectData


def objects_from(config: RunConfig, data: Any) -> ObjectData | None:
    """Python objects as examples, by the fields that a configuration names; None for None.

    Raises:
        InputError: They are not what `fedtune.run` takes.
    """
    if data is None:
        return None
    from fedtune.data.objects import ObjectData

    fields = {str(ours): theirs for ours, theirs in config.data.fields.items()}
    return ObjectData.read(data, fields, config.reading)


def with_objects(config: RunConfig, data: Any) -> tuple[RunConfig, ObjectData | None]:
    """A configuration whose examples are Python objects, and these; as it is without any.

    Raises:
        InputError: They are not what `fedtune.run` takes, or the configuration does not go with them.
    """
    objects = objects_from(config, data)
    if objects is None:
        return config, None
    from fedtune.config.file import parse_config

    return parse_config(config.for_objects(len(objects.clients) or None), "data"), objects


def seeds_of(given: Any, own: int) -> list[int]:
    """The seeds that somebody asked for; None: the configuration's own.

    Raises:
        InputError: They are not different whole numbers from 0 up, or not several.
    """
    if given is None:
        return [own]
    chosen = list(given) if isinstance(given, Iterable) else []
    whole = all(type(one) is int and one >= 0 for one in chosen)
    if not chosen or not whole or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds must be different whole numbers from 0 up, as in [0, 1, 2]; got {given!r}")
    return chosen


def check_workers(workers: int) -> None:
    """Raises InputError unless it is how many runs can be made at the same time."""
    if type(workers) is not int or workers < 1:
        raise InputError(f"workers must be a whole number from 1 up, got {workers!r}")


@contextmanager
def shown(progress: bool | Literal["json"]) -> Iterator[Any]:
    """Inside, what happens is shown, in a terminal, a notebook or a log; only notes without `progress`.

    With "json" it is lines of JSON on stderr.

    Raises:
        InputError: It is something else.
    """
    from fedtune.federation.process import settings_kept
    from fedtune.federation.progress import NotesOnly

    if not isinstance(progress, bool) and progress != "json":
        raise InputError(f'progress must be True, False or "json", got {progress!r}')
    display: AbstractContextManager[Any] = nullcontext(NotesOnly())
    if progress == "json":
        from fedtune.report.json_log import JsonLog

        display = JsonLog()
    elif progress:
        with settings_kept():
            from fedtune.report.display import Display
            from fedtune.report.notebook import NotebookDisplay, in_notebook
        display = NotebookDisplay() if in_notebook() else Display()
    with display as shows:
        yield shows


@contextmanager
def stopped(display: Any, path: Path, text: str) -> Iterator[None]:
    """Says how what is done inside goes on, should it be stopped: who gave no folder's name does not know it.

    Args:
        display: What `shown` gives.
        path: The folder; if it is not there, nothing is said.
        text: What is said: as a note of the error; in a notebook, which shows none of a KeyboardInterrupt, in
            the run's own output.
    """
    from fedtune.report.notebook import NotebookDisplay

    try:
        yield
    except (KeyboardInterrupt, FederationError) as error:
        if path.is_dir():
            if isinstance(display, NotebookDisplay):
                display.note(text)
            else:
                error.add_note(text)
        raise


def federate(
    config: RunConfig,
    path: Path,
    objects: ObjectData | None,
    callbacks: Sequence[Any],
    display: Any,
    *,
    resume: bool,
    deployment: Any = None,
) -> dict[str, Any]:
    """Runs a federation in the folder `path`, or continues the one that is there; returns its summary.

    Args:
        config: The configuration.
        path: The folder.
        objects: The examples, with `data.train: objects`.
        callbacks: Are told of clients, rounds and the end.
        display: What `shown` gives.
        resume: Continue what is there; a run that was killed before its folder was whole begins anew.
        deployment: The way to clients on other machines.
    """
    from fedtune.federation.callbacks import Callbacks
    from fedtune.federation.run import run
    from fedtune.federation.standing import Standing

    data = ", data=..." if objects is not None else ""
    how = f'fedtune.open("{path}"{data}).resume()'
    if deployment is not None:
        how = f'fedtune.serve(..., out="{path}", resume=True)'
    there = {} if deployment is None else {"there": deployment.there}
    with (
        stopped(display, path, f"The run is kept: {how} goes on."),
        Standing(path, display, **there) as standing,
    ):
        if deployment is not None:
            deployment.standing = standing.document
        return run(
            config,
            path,
            standing,
            resume=resume and path.exists(),
            deployment=deployment,
            objects=objects,
            callbacks=Callbacks(callbacks).behind(standing),
        )
