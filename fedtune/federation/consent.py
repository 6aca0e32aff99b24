"""What a run asks of a client over a network (asked.py), shown, recorded, and held to what is accepted.

What a client does follows from the configuration that came with its invitation: its own program reads it,
trains by it, clips and adds noise by it. What is checked there therefore holds for every order, but for what
an order itself says: how many bytes it has (`transport/acceptance.py`), and under secure aggregation which
clients a round has and how many must stay. These are checked as they come (`Consent.before`), and stand in
what clients seal for each other (`protection/terms.py`). Noise and clipping without masks are the server's
work, and this machine has nothing but its word for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

from fedtune.core.types import ClientError, Payload
from fedtune.errors import InputError, foreign
from fedtune.federation.asked import Asked
from fedtune.federation.spending import Record
from fedtune.transport.acceptance import Acceptance, NotAccepted


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
            from fedtune.protection.terms import Terms  # cryptography only where it is used

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
