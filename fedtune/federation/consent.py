"""What a run asks of a client over a network, said in plain words, and held to what its operator accepts.

What a client does follows from the configuration that came with its invitation: its own program reads it,
trains by it, clips and adds noise by it. What is checked there therefore holds for every order, but for what
an order itself says: how many bytes it has (`transport/acceptance.py`), and under secure aggregation which
clients a round has and how many must stay. These are checked as they come (`Consent.before`), and stand in
what clients seal for each other (`protection/terms.py`). Noise and clipping without masks are the server's
work, and this machine has nothing but its word for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.types import ClientError, Method, Payload
from fedtune.data.examples import Example
from fedtune.data.sources import FIELDS
from fedtune.errors import InputError, foreign
from fedtune.federation.spending import Record
from fedtune.protection.terms import Terms
from fedtune.transport.acceptance import Acceptance, NotAccepted


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

    @staticmethod
    def of(
        config: RunConfig,
        method: Method[Any],
        examples: Sequence[Example],
        fields: Mapping[str, str | None],
        *,
        weights: str,
        signed: bool,
    ) -> Asked:
        """What a configuration asks.

        Args:
            config: Of the invitation.
            method: Its method.
            examples: This client's.
            fields: Our field names to the file's.
            weights: SHA-256 of the model's weights, as the server says.
            signed: Whether this client knows the other clients' keys.
        """
        federation, settings = config.federation, config.method
        secure, privacy = federation.secure_aggregation, federation.privacy
        named = {ours: fields.get(ours, ours) for ours in FIELDS}
        used = [str(t) for ours, t in named.items() if any(getattr(e, ours) for e in examples)]
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
        ("data", ("train", "split", "clients", "partition", "holdout", "public", "max_examples")),
    ):
        for key in elsewhere:  # where inputs lie, and what is done with examples of the server's own
            del document[block][key]
    both = [weights, {block: document[block] for block in ("seed", "model", "data", "method", "federation")}]
    return hashlib.sha256(json.dumps(both, sort_keys=True).encode()).digest()


def check(acceptance: Acceptance, asked: Asked) -> None:
    """Raises NotAccepted, with what is asked, what is accepted, and what to change."""
    accepts, accepted = "its operator accepts", acceptance
    if accepted.methods is not None and asked.method not in accepted.methods:
        raise NotAccepted(
            f"{accepts} {', '.join(accepted.methods)}, and the method is {asked.method}; set method.name, or "
            "have `methods` changed there"
        )
    if accepted.trainable is not None and asked.trainable not in accepted.trainable:
        raise NotAccepted(
            f"{accepts} what trains {', '.join(accepted.trainable)}, and {asked.method} trains "
            f"{asked.trainable}; set method.trainable, or have `trainable` changed there"
        )
    if accepted.models is not None and not asked.holds_model:
        raise NotAccepted(
            f"{accepts} certain models only, and {asked.method} sends its clients parts that they cannot "
            "check; take another method, or have `models` left out there"
        )
    if accepted.models is not None and asked.weights not in accepted.models:
        raise NotAccepted(
            f"{accepts} models with the SHA-256 {', '.join(name[:12] for name in accepted.models)}, and the "
            f"run's is {foreign(asked.weights, 64)}; set model.name, or have that added to `models` there"
        )
    unknown = [foreign(name, 80) for name in asked.fields if name not in (accepted.fields or asked.fields)]
    if unknown:
        raise NotAccepted(
            f"the run trains on {', '.join(unknown)} of its examples, which its operator does not accept; "
            "name other keys in data.fields, or have `fields` changed there"
        )
    if accepted.max_local_steps is not None and asked.local_steps > accepted.max_local_steps:
        raise NotAccepted(
            f"a round would take {asked.local_steps} local steps there, and {accepts} "
            f"{accepted.max_local_steps}; lower method.local_steps or local_epochs, or have "
            "`max_local_steps` changed there"
        )
    _check_masks(accepted, asked)
    _check_noise(accepted, asked)


def _check_masks(accepted: Acceptance, asked: Asked) -> None:
    wanted = ["secure_aggregation"] * accepted.secure_aggregation + accepted.needs_masks
    if wanted and not asked.masked:
        raise NotAccepted(
            "its operator accepts only runs with federation.secure_aggregation, and this one has none; set "
            f"it, or have `{wanted[0]}` left out there"
        )
    if wanted and not asked.signed:
        raise NotAccepted(
            "its operator accepts only runs whose updates are masked, and without a clients.json beside its "
            "key it cannot tell the other clients' keys from the server's; copy that file from where fedtune "
            "keys made it"
        )
    least = accepted.min_threshold
    if least is not None and type(asked.threshold) is int and asked.threshold < least:
        raise NotAccepted(_few(asked.threshold, least))


def _few(threshold: int, least: int) -> str:
    return (
        f"a sum could be of {threshold} clients, and its operator accepts {least} or more; raise "
        "federation.secure_aggregation.threshold, or have `min_threshold` changed there"
    )


def _check_noise(accepted: Acceptance, asked: Asked) -> None:
    if not accepted.needs_noise:
        return
    first = accepted.needs_noise[0]
    if asked.noise is None or asked.clip is None:
        raise NotAccepted(
            "its operator accepts only runs with federation.privacy, and this one has none; set it, or have "
            f"`{first}` left out there"
        )
    if accepted.noise_by == "clients" and not asked.masked:
        raise NotAccepted(
            "its operator accepts only noise that clients add themselves, which they do with "
            "federation.secure_aggregation; without it the server adds it, and a client has nothing but its "
            "word. Set it, or have `noise_by: server` written there"
        )
    for key, value, bound, least, setting in (
        ("min_clip", asked.clip, accepted.min_clip, True, "clip"),
        ("max_clip", asked.clip, accepted.max_clip, False, "clip"),
        ("min_noise", asked.noise, accepted.min_noise, True, "noise_multiplier"),
    ):
        if bound is not None and (value < bound if least else value > bound):
            raise NotAccepted(
                f"federation.privacy.{setting} is {value:g}, and its operator accepts {bound:g} "
                f"{'or more' if least else 'at most'}; change it, or have `{key}` changed there"
            )


@dataclass
class Consent:
    """What one client's operator accepts, kept from the invitation to the last order.

    Attributes:
        acceptance: The operator's limits.
        record: What was asked and sent; None: nothing is written down, and no ε is known.
        server: Where what is trained goes.
        tell: Gets a line for everything that a person wants to see.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    record: Record | None = None
    server: str = ""
    tell: Callable[[str], None] = lambda text: None
    _asked: Asked | None = None
    _run: str = ""

    def invited(self, run: str, asked: Asked) -> None:
        """Shows and records what a run asks, then checks it.

        Raises:
            NotAccepted: The operator does not accept it.
            InputError: ε is limited, and cannot be computed or counted here.
        """
        self._run, self._asked = run, asked
        limited = [self.acceptance.max_epsilon, self.acceptance.max_epsilon_total] != [None, None]
        counted = asked.noise is None or find_spec("dp_accounting") is not None
        if limited and (not counted or self.record is None):
            raise InputError(
                "the acceptance file limits ε, and it cannot be counted here; pip install 'fedtune[privacy]'"
            )
        words = asked.words(self.server)
        if asked.noise is not None and counted and self.record is not None:
            words.append(self._epsilons(asked, self.record))
        self.tell(f"run {foreign(run, 64)} asks:")
        for line in words:
            self.tell(f"    {line}")
        if self.record is not None:
            self.record.asked(run, {**asdict(asked), "server": self.server, "words": words})
        check(self.acceptance, asked)
        if reason := self._over(asked.rounds if asked.everyone else 1):
            raise NotAccepted(reason)

    def before(self, round: int, phase: str, order: Payload) -> None:
        """Holds an order to what is accepted. Raises ClientError if it asks for more."""
        accepted = self.acceptance
        if phase == "shares" and accepted.needs_masks:
            terms = Terms.of(order)
            if accepted.min_clients is not None and len(terms.clients) < accepted.min_clients:
                raise ClientError(
                    f"round {round} has {len(terms.clients)} clients, and its operator accepts "
                    f"{accepted.min_clients} or more; ask more, or have `min_clients` changed there"
                )
            if accepted.min_threshold is not None and terms.threshold < accepted.min_threshold:
                raise ClientError(_few(terms.threshold, accepted.min_threshold))
        if reason := self._over(1):
            raise ClientError(reason)

    def sending(self, round: int, phase: str) -> None:
        """Enters an update in the record before it leaves. Raises ClientError if ε would be too large."""
        if self.record is not None and self._asked is not None and phase in ("", "masked"):
            asked = self._asked
            self.record.sent(self._run, round, asked.noise or 0.0, masked=asked.masked, check=self._again)

    def _again(self) -> None:
        """As before the order, now that no other client can write into the record."""
        if reason := self._over(1):
            raise ClientError(reason)

    def _over(self, sums: int) -> str:
        """Why so many sums more are too many, or nothing."""
        asked, record, accepted = self._asked, self.record, self.acceptance
        if asked is None or record is None or asked.noise is None:
            return ""
        for key, run, limit, whole in (
            ("max_epsilon", self._run, accepted.max_epsilon, "of this run"),
            ("max_epsilon_total", None, accepted.max_epsilon_total, "of all runs in its record"),
        ):
            if limit is None:
                continue
            found = self._epsilon(record, run, asked, sums)
            if found is None or found > limit:
                return (
                    f"ε {whole} would be {'infinite' if found is None else f'{found:.3f}'} at δ = "
                    f"{accepted.delta:g} after {sums} more noisy sums, and its operator accepts {limit:g}; "
                    "raise federation.privacy.noise_multiplier, lower method.rounds, or have "
                    f"`{key}` changed there"
                )
        return ""

    def _epsilon(self, record: Record, run: str | None, asked: Asked, sums: int) -> float | None:
        word = self.acceptance.noise_by == "server"
        noise = (asked.noise or 0.0) if asked.masked or word else 0.0
        return record.epsilon(run, noise, sums, self.acceptance.delta, servers_word=word)

    def _epsilons(self, asked: Asked, record: Record) -> str:
        run, spent, every = (
            _shown(self._epsilon(record, *what))
            for what in ((self._run, asked, asked.rounds), (None, asked, 0), (None, asked, asked.rounds))
        )
        at_most = "" if asked.everyone else ", if it is asked in every round"
        return (
            f"ε at δ = {self.acceptance.delta:g}: {run} of this run{at_most}; {spent} spent so far by all "
            f"runs in the record, {every} with this one"
        )


def _shown(epsilon: float | None) -> str:
    return "infinite" if epsilon is None else f"{epsilon:.2f}"
