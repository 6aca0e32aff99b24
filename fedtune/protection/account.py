"""What a run has spent of its privacy, and whom a round asks where that has to stay secret.

The account is the run's own rounds.jsonl: it holds a line for each noisy sum that was used. A round that is
done again after a kill has no line and its sum never left the server, so it counts once; rounds that were
rolled back have lines in their folders, and count for ever.
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
from fedtune.protection.noise import epsilon, poisson_cohort
from fedtune.protection.settings import Privacy

_SECRET = "sampling.secret"  # in the run's folder, for the server alone


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
    """

    def __init__(
        self, settings: Privacy, folder: Path, *, per_round: float | int | None, population: int, secure: bool
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
        for log in sorted([folder / "rounds.jsonl", *folder.glob("rolled-back-*/rounds.jsonl")]):
            if log.exists():
                with log.open(encoding="utf-8") as lines:
                    self.enter(entry for line in lines if "privacy" in (entry := json.loads(line)))

    def cohort(self, examples: Mapping[int, int]) -> Cohort | None:
        """Whom the next round asks, or None where the run's seed may say so."""
        if not self._sampled:
            return None
        return poisson_cohort(dict(examples), self._expected, self._secret(), self._releases + 1)

    def spend(self, clients: Iterable[int]) -> dict[str, Any]:
        """Enters a sum of these clients; returns what rounds.jsonl says of it."""
        self.enter([{"clients": list(clients)}])
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

    def enter(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Counts sums, each an entry of rounds.jsonl with the clients in it."""
        for entry in entries:
            self._releases += 1
            self._parts.update(entry["clients"])

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
