"""Several runs, one after another or some at the same time in processes of their own, with the same results.

A process is told a run's configuration and folder as JSON and answers with its summary; it takes the next one
that is left. One that ends with its parent, or is killed with it, leaves a run that goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.data.objects import ObjectData
from fedtune.errors import FederationError, FedtuneError, InputError, ProgramError
from fedtune.federation.plugins import refuse_this_process
from fedtune.federation.progress import Named, Progress
from fedtune.federation.run import run
from fedtune.federation.workers import cores_here, threads_of
from fedtune.registry import plugins
from fedtune.transport.messages import Message
from fedtune.transport.processes import Processes, processes

PROGRAM = "fedtune.federation.run_process"
LOOK_S = 0.5


@dataclass(frozen=True)
class Planned:
    """One of the runs: what it is called, and where it is to be."""

    name: str
    config: RunConfig
    path: Path


def run_all(
    planned: Sequence[Planned],
    progress: Progress,
    *,
    workers: int = 1,
    objects: ObjectData | None = None,
    go_on: bool = False,
) -> Iterator[dict[str, Any] | FederationError]:
    """Their summaries, in order; a run that is there is taken over or goes on.

    Args:
        planned: The runs.
        progress: Told what happens; of runs at the same time what is noted, and how many are done.
        workers: How many at the same time. With more than one each is in a process, and they share the cores.
        objects: The examples of all of them, with `data.train: objects`.
        go_on: A run that cannot finish is noted, its error stands in its place, and the others go on.

    Raises:
        InputError: Of any of them, or a part of one is of this process alone.
        FederationError: Without `go_on`, of any of them.
    """
    if workers > 1:
        yield from _at_once(planned, progress, min(workers, len(planned)), objects, go_on)
        return
    for one in planned:
        named = Named(progress, one.name)
        try:
            yield run(one.config, one.path, named, resume=one.path.exists(), objects=objects)
        except FederationError as error:
            if not go_on:
                raise
            named.note(str(error))
            yield error


def _at_once(
    planned: Sequence[Planned], progress: Progress, workers: int, objects: ObjectData | None, go_on: bool
) -> Iterator[dict[str, Any] | FederationError]:
    for one in planned:
        refuse_this_process(
            one.config, f"{workers} runs are made at the same time, in processes of their own"
        )
    start = {
        "objects": objects.to_json() if objects else "",
        "plugins": [(str(plugin.file), plugin.sha256) for plugin in plugins()],
    }
    threads = threads_of(workers, cores_here())
    progress.begin(rounds=1, name=f"{len(planned)} runs, {workers} at a time")
    progress.round(1, len(planned))
    told = Message({}, json.dumps(start).encode())
    found: dict[int, dict[str, Any] | FederationError] = {}
    with processes(PROGRAM, told, workers=workers, threads=threads) as channel:
        for done, (place, answer) in enumerate(_sent(channel, planned), 1):
            one = planned[place]
            try:
                found[place] = _summary(answer, Named(progress, one.name))
            except FederationError as error:
                if not go_on:
                    raise
                Named(progress, one.name).note(str(error))
                found[place] = error
            progress.client(done)
    yield from (found[place] for place in range(len(planned)))


def _sent(channel: Processes, planned: Sequence[Planned]) -> Iterator[tuple[int, Message]]:
    """Sends each run to the process that is free first; the answers as they come, each with its place."""
    waiting = dict[str, int]()
    for place, one in enumerate(planned):
        fields = {"path": str(one.path.absolute()), "name": one.name}
        body = json.dumps(one.config.resolved()).encode()
        waiting[channel.push(place, Message(fields, body), lifetime_s=0)] = place
    while waiting:
        for name, answer in list(channel.pull(list(waiting))):
            yield waiting.pop(name), answer
        channel.wait(LOOK_S)


def _summary(answer: Message, named: Progress) -> dict[str, Any]:
    """A run's summary. Raises what ended it."""
    if "fault" in answer.fields:
        raise ProgramError(f"its process ended {answer.fields['fault']}; the same call goes on where it was")
    for line in json.loads(answer.text("said")):
        named.note(line)
    if "error" not in answer.fields:
        summary: dict[str, Any] = json.loads(bytes(answer.body))
        return summary
    kinds: Mapping[str, type[FedtuneError]] = {"InputError": InputError, "ProgramError": ProgramError}
    raise kinds.get(answer.text("error"), FederationError)(answer.text("text"))
