"""Simulated clients in several processes of this machine.

Each process holds the model and answers one message at a time, whichever client's it is; the next message
goes to the one that is free first. Messages are JSON and bytes, so nothing is pickled, and a process is a new
Python and no fork, which would take locks of PyTorch's threads along. It ends with the process that started
it, however that ends: its standard input is a pipe that nothing is written to, and that closes then.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO

from fedtune.transport.messages import Message, receive, send


class Processes:
    """A channel to processes that serve any client; use `processes`, which ends them.

    Args:
        module: What they run, as `python -m` takes it; it calls `serve`.
        start: What each is told first.
        environments: Of each process: what differs from this one's environment.
    """

    def __init__(self, module: str, start: Message, environments: Sequence[Mapping[str, str]]) -> None:
        self._tasks: queue.SimpleQueue[tuple[str, Message] | None] = queue.SimpleQueue()
        self._answers: dict[str, Message] = {}
        self._came, self._pushed = threading.Event(), 0
        self._processes: list[_Process] = []
        self._threads: list[threading.Thread] = []
        try:
            for number, environment in enumerate(environments):
                process = _Process(module, environment)
                self._processes.append(process)
                thread = threading.Thread(
                    target=self._serve, args=(process, start), name=f"process-{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes' numbers."""
        return [process.pid for process in self._processes]

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        """Sends a message to the process that is free first; returns its id."""
        self._pushed += 1
        self._tasks.put((str(self._pushed), message))
        return str(self._pushed)

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        """The answers that are there. One says `died` if the process ended that had the message."""
        for name in ids:
            if (answer := self._answers.pop(name, None)) is not None:
                yield name, answer

    def wait(self, seconds: float) -> None:
        """Waits until an answer comes, or one has come since this was called last; no longer than that."""
        self._came.wait(seconds)
        self._came.clear()

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self._processes:
            process.end()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.close()

    def _serve(self, process: _Process, start: Message) -> None:
        """Hands messages on to one process, in a thread of its own, as long as it lives."""
        told = False
        while (task := self._tasks.get()) is not None:
            name, message = task
            try:
                if not told:
                    send(process.connection, start)
                    told = True
                send(process.connection, message)
                del message, task  # an order may be as large as a model
                answer = receive(process.connection)
            except (OSError, EOFError):
                answer = Message({"fault": process.why(), "died": True})
            self._answers[name] = answer
            self._came.set()
            if answer.fields.get("died"):
                return


class _Process:
    """One of them."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self.connection, other = Pipe()
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # has no name; closed in `close`
        path = [os.path.abspath(folder or ".") for folder in sys.path]
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(other.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C is for the process that started it, which then ends it
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def why(self) -> str:
        """How it ended, after its connection broke."""
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        said = os.pread(self._said.fileno(), 4096, max(0, os.fstat(self._said.fileno()).st_size - 4096))
        last = (said.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"{how}{': ' if last else ''}{last}"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.connection.close()
        self._said.close()


@contextmanager
def processes(
    module: str, start: Message, *, workers: int, threads: int, cards: Sequence[int] = ()
) -> Iterator[Processes]:
    """Processes that answer messages, for as long as the context lasts.

    Args:
        module: What they run, as `python -m` takes it; it calls `serve`.
        start: What each is told first.
        workers: How many there are.
        threads: Of each; what it starts must not take all cores either.
        cards: GPUs by their number among those that this process sees. Each process sees one, in turn.
    """
    few = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    devices = [
        {"CUDA_VISIBLE_DEVICES": gpu_of(number, cards, os.environ.get("CUDA_VISIBLE_DEVICES"))}
        if cards
        else {}
        for number in range(workers)
    ]
    channel = Processes(module, start, [{**few, **device} for device in devices])
    try:
        yield channel
    finally:
        channel.close()


def gpu_of(worker: int, cards: Sequence[int], visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES is in a process: one GPU, each in turn.

    Args:
        worker: The process's number, from 0.
        cards: As in `processes`; at least one.
        visible: CUDA_VISIBLE_DEVICES here; None or empty: all are.
    """
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    card = cards[worker % len(cards)]
    return names[card] if names else str(card)


def serve(answer_of: Callable[[Message], Callable[[Message], Message]]) -> None:
    """The main program of such a process: answers messages until there are no more.

    Args:
        answer_of: What the first message says -> message -> its answer.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(int(sys.argv[1])) as connection, contextlib.suppress(EOFError, OSError):
        answer = answer_of(receive(connection))
        while True:
            send(connection, answer(receive(connection)))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
