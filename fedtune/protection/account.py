"""What a run has spent of its privacy, and whom a round asks where that has to stay secret.

The account is a file of its own, privacy.jsonl: a line for each noisy sum, on disk before anything that was
made from the sum leaves the server. Nothing takes lines away again. A round that is done anew (its checkpoint
was damaged, the run was set back) has two lines, and both count: both sums were seen. A round that a kill
ended before its sum has none.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedtune.core.cohort import Cohort, round_half_up
from fedtune.errors import InputError
from fedtune.protection.noise import epsilon, poisson_cohort
from fedtune.protection.settings import Privacy

_SECRET = "sampling.secret"  # in the run's folder, for the server alone
ACCOUNT = "privacy.jsonl"


class PrivacyAccount:
    """ε of one run.

    Without secure aggregation the server is trusted: it alone knows whom it asks, which makes ε smaller. With
    it the server is among those who must learn nothing of a client, and knows who took part: ε is that of the
    client that took part most often, as if everyone knew.

    Args:
        settings: Clip, noise and δ.
        folder: The run's folder.
        per_round: federation.clients_per_round.
        population: Clients of the federation.
        secure: Whether updates are summed under masks.
        done: Rounds that the run has behind it.

    Raises:
        InputError: The account lacks one of these rounds, or is damaged: what was spent is not known.
    """

    def __init__(
        self,
        settings: Privacy,
        folder: Path,
        *,
        per_round: float | int | None,
        population: int,
        secure: bool,
        done: int = 0,
    ) -> None:
        self._settings, self._folder = settings, folder
        asked = population if per_round is None else per_round
        if isinstance(asked, float):
            asked = max(1, round_half_up(asked * population))
        self._expected, self._population = min(asked, population), population
        self._sampled = not secure and self._expected < population
        self._secure = secure
        self._releases = 0
        self._parts = Counter[int]()  # sums that each client was in
        entries = self._read()
        self.ahead = any(entry["round"] > done for entry in entries)
        """Whether the sum of a round that is to be done was used already."""
        missing = set(range(1, done + 1)) - {entry["round"] for entry in entries}
        if missing:
            raise InputError(
                f"{folder / ACCOUNT} has no entry of round {min(missing)}, which the run has behind it: what "
                "it has spent of its privacy is not known, and it cannot go on. Put the file back as it was, "
                "or begin a new run, and add up what both spend"
            )
        for entry in entries:
            self._count(entry["clients"])

    def cohort(self, examples: Mapping[int, int]) -> Cohort | None:
        """Whom the next round asks, or None where the run's seed may say so."""
        if not self._sampled:
            return None
        return poisson_cohort(dict(examples), self._expected, self._secret(), self._releases + 1)

    def spend(self, round: int, clients: Iterable[int]) -> dict[str, Any]:
        """Enters the sum of these clients in a round, for good; returns what rounds.jsonl says of it."""
        entry: dict[str, Any] = {"round": round, "clients": sorted(clients)}
        with (self._folder / ACCOUNT).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(entry["clients"])
        return self.spent()

    def spent(self) -> dict[str, Any]:
        """ε and δ of all sums so far; ε is None where it is infinite."""
        releases = max(self._parts.values(), default=0) if self._secure else self._releases
        rate = self._expected / self._population if self._sampled else 1.0
        settings = self._settings
        return {
            "epsilon": epsilon(settings.noise_multiplier, releases, settings.delta, rate=rate),
            "delta": settings.delta,
        }

    def _count(self, clients: Iterable[int]) -> None:
        self._releases += 1
        self._parts.update(clients)

    def _read(self) -> list[dict[str, Any]]:
        """The entries so far. A line that a kill cut short is of a sum that nobody saw, and is cut off."""
        path = self._folder / ACCOUNT
        if not path.exists():
            return []
        with path.open("r+b") as file:
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            file.truncate(len(whole))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
            if not all(
                type(entry["round"]) is int and all(type(client) is int for client in entry["clients"])
                for entry in entries
            ):
                raise ValueError("a round and its clients must be whole numbers")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged ({error}): what the run has spent of its privacy is not known, and it "
                "cannot go on. Put the file back as it was"
            ) from None
        return entries

    def _secret(self) -> int:
        """Made when it is first needed, and the same for as long as the run lasts."""
        path = self._folder / _SECRET
        if not path.exists():
            new = path.with_suffix(".new")
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(16))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        return int(path.read_text(encoding="utf-8"), 16)
