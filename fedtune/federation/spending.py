"""What was asked of a client and what it sent: a file on its machine, to which lines are only added.

    {"time", "run", "asked": {...}}               it was invited: what the run asks
    {"time", "run", "round", "noise", "masked"}   it sent an update; on disk before that leaves

`noise` is the noise multiplier z of the sum that the update is in, and 0 without any. `masked` says that this
client added its own part of it; where it is false there is nothing but the server's word for it. Sums with
noise z_1, z_2, ... are together as one with 1/z² = Σ 1/z_i² (Balle and Wang 2018), of which
`protection/noise.py` gives the exact ε. A round that was done twice counts twice, for both were sent. Where
the server asks only some clients a round, no smaller ε is claimed: this client cannot see how it was chosen.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.errors import InputError
from fedtune.protection.noise import epsilon


class Record:
    """The record of one client, or of several with the same people's data.

    Args:
        path: The file; made with the first line, readable by its user alone.

    Raises:
        InputError: It is damaged, so that what was spent is not known.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sent()

    def asked(self, run: str, what: dict[str, Any]) -> None:
        """Enters what a run asks."""
        self._append({"run": run, "asked": what})

    def sent(self, run: str, round: int, noise: float, *, masked: bool, check: Callable[[], None]) -> None:
        """Enters that an update is about to be sent; it is on disk when this returns.

        Args:
            run: Whose update it is.
            round: Of the run.
            noise: z of the sum that it is in; 0: none.
            masked: Whether its noise is in it already, or the server says that it adds it.
            check: Called once nobody else can add a line; what it raises leaves the record as it was.

        Raises:
            OSError: The line cannot be written.
        """
        self._append({"run": run, "round": round, "noise": noise, "masked": masked}, check)

    def epsilon(
        self, run: str | None, noise: float, sums: int, delta: float, *, servers_word: bool = False
    ) -> float | None:
        """ε at δ of what was sent, and of `sums` more with noise z; None where it is infinite.

        Args:
            run: Of this run; None: of all in the record.
            noise: z of the sums to come; 0: they have none.
            sums: How many are to come.
            delta: δ.
            servers_word: Whether noise counts that the server said it would add.
        """
        own = [entry for entry in self._sent() if run is None or entry["run"] == run]
        sent = [float(entry["noise"]) if entry["masked"] or servers_word else 0.0 for entry in own]
        return together([*((z, 1) for z in sent), (noise, sums)], delta)

    def _sent(self) -> list[dict[str, Any]]:
        """The lines of what was sent. One that a kill cut short is of an update that did not leave."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read: {error.strerror}") from None
        try:
            entries = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
            sent = [entry for entry in entries if "asked" not in entry]
            if not all(
                (type(entry["run"]), type(entry["round"]), type(entry["masked"])) == (str, int, bool)
                and float(entry["noise"]) >= 0
                for entry in sent
            ):
                raise ValueError("a line is not what this program writes")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self._path} is damaged ({error}): what this client has spent is not known. Put it back as "
                "it was; or move it away, and the count begins at nothing"
            ) from None
        return sent

    def _append(self, entry: dict[str, Any], check: Callable[[], None] = lambda: None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry}) + "\n"
        with _locked(self._path) as file:
            check()
            size = os.fstat(file).st_size
            end = os.pread(file, size, 0).rfind(b"\n") + 1
            if end < size:  # cut short by a kill
                os.ftruncate(file, end)
            os.lseek(file, end, os.SEEK_SET)
            data = line.encode()
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open, for this process alone."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def together(sums: Iterable[tuple[float, int]], delta: float) -> float | None:
    """ε at δ of noisy sums together; None where it is infinite.

    Args:
        sums: z, and how many sums have it; 0: no noise.
        delta: δ.
    """
    counted = [(z, times) for z, times in sums if times]
    if not counted:
        return 0.0
    if any(z == 0 for z, _ in counted):
        return None
    return epsilon(math.fsum(times / z**2 for z, times in counted) ** -0.5, 1, delta)
