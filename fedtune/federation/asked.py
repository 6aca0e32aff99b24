"""What a run asks of a client over a network: from its configuration, in plain words, and as a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.types import Method
from fedtune.data.examples import Example
from fedtune.data.keys import names_in
from fedtune.data.records import CHOICES, FIELDS
from fedtune.errors import foreign


@dataclass(frozen=True)
class Asked:
    """What a run asks of one client.

    Attributes:
        method: Its name.
        trainable: What of the model is trained: full, lora, adapter, prompt, p-tuning.
        rounds: Of the run.
        local_steps: Training steps of one order.
        model: The base model's name.
        weights: SHA-256 of its weights, as the server says; checked here where the client holds the model.
        holds_model: Whether it does, or is sent what it trains.
        fields: Keys of the data file that are trained on.
        examples: Of the data file.
        threshold: With secure aggregation: clients that must stay, a count or a fraction; else None.
        signed: Whether this client knows the other clients' keys.
        clip: With privacy: the longest update.
        noise: With privacy: the noise multiplier; else None.
        delta: The run's own δ.
        everyone: Whether all clients are asked in every round.
        scored: Of the data file's examples, those that this client does not train on and scores itself.
    """

    method: str
    trainable: str
    rounds: int
    local_steps: int
    model: str
    weights: str
    holds_model: bool
    fields: tuple[str, ...]
    examples: int
    threshold: int | float | None
    signed: bool
    clip: float | None
    noise: float | None
    delta: float | None
    everyone: bool
    scored: int = 0

    @staticmethod
    def of(
        config: RunConfig,
        method: Method[Any],
        examples: Sequence[Example],
        fields: Mapping[str, str | None],
        *,
        weights: str,
        signed: bool,
        scored: int = 0,
    ) -> Asked:
        """What a configuration asks.

        Args:
            config: Of the invitation.
            method: Its method.
            examples: This client's.
            fields: Our field names to the file's.
            weights: SHA-256 of the model's weights, as the server says.
            signed: Whether this client knows the other clients' keys.
            scored: How many others of its examples it scores the model on.
        """
        federation, settings = config.federation, config.method
        secure, privacy = federation.secure_aggregation, federation.privacy
        named = {ours: fields.get(ours, ours) for ours in FIELDS}
        used = [t for ours, t in named.items() if t and any(getattr(e, ours) for e in examples)]
        used += [t for t in [fields.get(CHOICES)] if t]
        if config.data.pictures is not None:
            used = ["picture", "caption"]
        used = list(dict.fromkeys(name for key in used for name in names_in(key)))
        return Asked(
            method=config.method_name,
            trainable=getattr(settings, "trainable", "lora" if hasattr(settings, "lora") else "full"),
            rounds=method.rounds,
            local_steps=local_steps(config, len(examples)),
            model=config.model.name,
            weights=weights,
            holds_model=not method.sends_model,
            fields=tuple(used),
            examples=len(examples),
            threshold=secure.threshold if secure else None,
            signed=signed,
            clip=privacy.clip if privacy else None,
            noise=privacy.noise_multiplier if privacy else None,
            delta=privacy.delta if privacy else None,
            everyone=federation.clients_per_round in (None, 1.0),
            scored=scored,
        )

    @property
    def masked(self) -> bool:
        """Whether the server learns sums alone."""
        return self.threshold is not None

    def words(self, server: str) -> list[str]:
        """A line for each thing that an operator wants to know, in plain words."""
        steps, what = f"up to {self.local_steps:,} steps", foreign(self.model, 80)
        lines = [
            f"it trains {what} by {self.method} ({self.trainable}) on your {self.examples:,} examples: "
            f"{self.rounds} rounds of {steps}",
            f"it reads of each example: {', '.join(foreign(name, 80) for name in self.fields)}",
            f"what is trained goes to {server or 'the server'} after every round; what is done with it there "
            "this machine cannot see",
        ]
        if self.scored:
            whose = "their sums over all clients" if self.masked else "this client's own"
            lines.append(
                f"it scores the model on {self.scored:,} more of your examples, which are not trained on; "
                f"the server gets sums of scores and counts, {whose}"
            )
        if not self.masked:
            lines.append("the server sees this client's update as it is")
        elif not self.signed:
            lines.append(
                "updates are masked, but without a clients.json beside its key this client cannot tell other "
                "clients from the server: it may see this client's update"
            )
        else:
            lines.append(
                "updates are masked: the server sees their sum alone, unless so many clients of a round work "
                "with it that they can stand in for the others"
            )
        if self.noise is None:
            lines.append("there is no noise: who gets the models may learn of single examples")
        else:
            whose = (
                "this client clips and adds its part of the noise"
                if self.masked
                else "the server says that it clips and adds noise, which this machine cannot see"
            )
            lines.append(
                f"{whose}: clip {self.clip:g}, noise {self.noise:g} clips, δ of the run {self.delta:g}"
            )
        return lines


def local_steps(config: RunConfig, examples: int) -> int:
    """Training steps of one order on so many examples."""
    method = config.method
    if hasattr(method, "steps"):
        return int(method.steps(examples))
    return int(getattr(method, "local_steps", 0))


def settings_digest(config: RunConfig, weights: str) -> bytes:
    """SHA-256 of all that clients of a run go by, wherever their inputs lie.

    What clients seal for each other names it: who was told other settings is in no sum with the others.
    """
    document = config.resolved()
    for block, elsewhere in (
        ("model", ("name", "device")),
        ("data", ("train", "split", "clients", "partition", "holdout", "public", "max_examples", "cache")),
    ):
        for key in elsewhere:  # where inputs lie, and what is done with examples of the server's own
            del document[block][key]
    both = [weights, {block: document[block] for block in ("seed", "model", "data", "method", "federation")}]
    return hashlib.sha256(json.dumps(both, sort_keys=True).encode()).digest()
