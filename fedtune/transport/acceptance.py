"""What the operator of a client accepts: a YAML file on the client's machine that no server can change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedtune.core.settings import Settings
from fedtune.errors import InputError, nearest, short

Names = Annotated[list[str], Field(min_length=1)]
Digests = Annotated[list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]], Field(min_length=1)]


class Acceptance(Settings):
    """Limits of one client; whatever is left out is not limited."""

    servers: Names | None = None  # HOST:PORT; what this client has trained goes nowhere else
    methods: Names | None = None  # method.name
    trainable: Names | None = None  # method.trainable: full, lora, adapter, prompt, p-tuning
    models: Digests | None = None  # SHA-256 of the base model's weights
    fields: Names | None = None  # keys of the data file that may be trained on
    data_folder: str | None = None  # where the data must lie; links out of it do not count
    max_bytes: int | None = Field(None, ge=1)  # of one order, and of one reply
    max_local_steps: int | None = Field(None, ge=1)  # training steps of one round
    secure_aggregation: bool = False  # true: only runs under masks whose clients' keys this client knows
    min_clients: int | None = Field(None, ge=2)  # under masks: clients that a round has
    min_threshold: int | None = Field(None, ge=2)  # under masks: clients that any sum holds
    min_clip: float | None = Field(None, gt=0)  # federation.privacy.clip
    max_clip: float | None = Field(None, gt=0)
    min_noise: float | None = Field(None, gt=0)  # federation.privacy.noise_multiplier
    max_epsilon: float | None = Field(None, gt=0)  # of one run, by this client's own count
    max_epsilon_total: float | None = Field(None, gt=0)  # of all runs in the record
    delta: float = Field(1e-5, gt=0, lt=1)  # that both are at, whatever a run's own is
    noise_by: Literal["clients", "server"] = "clients"  # server: its word for noise and clipping is enough
    record: str | None = None  # file of what was asked and sent; null: record.jsonl in the client's state

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for low, high in (("min_clip", "max_clip"), ("min_threshold", "min_clients")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least:g} is above {high} {most:g}: no run has both")
        return self

    @property
    def needs_masks(self) -> list[str]:
        """The demands that only a run with secure aggregation can meet."""
        return [name for name in ("min_clients", "min_threshold") if getattr(self, name) is not None]

    @property
    def needs_noise(self) -> list[str]:
        """The demands that only a run with differential privacy can meet."""
        names = ("min_clip", "max_clip", "min_noise", "max_epsilon", "max_epsilon_total")
        return [name for name in names if getattr(self, name) is not None]


class NotAccepted(Exception):
    """The operator does not accept what the server asks; the message goes to both sides."""


def check_data(acceptance: Acceptance, data: Path) -> None:
    """Raises InputError if the data lie outside the folder that the operator allows."""
    if acceptance.data_folder is None:
        return
    folder = Path(acceptance.data_folder).expanduser().resolve()
    if not data.resolve().is_relative_to(folder):
        raise InputError(
            f"{data} is not in {folder}, the data_folder that this machine's acceptance file allows; "
            "put the data there, or have the file changed"
        )


def check_server(acceptance: Acceptance, server: str) -> None:
    """Raises InputError if what is trained here would go to a server that the operator does not allow."""
    if acceptance.servers is not None and server not in acceptance.servers:
        raise InputError(
            f"--server is {server}, and the servers of this machine's acceptance file are "
            f"{', '.join(acceptance.servers)}; give one of them, written as there, or have the file changed"
        )


def check_bytes(acceptance: Acceptance, size: int, what: str) -> None:
    """Raises NotAccepted if a frame is longer than the operator accepts; `what` names it."""
    if acceptance.max_bytes is not None and size > acceptance.max_bytes:
        raise NotAccepted(f"the {what} has {size:,} bytes, and its operator accepts {acceptance.max_bytes:,}")


def read_acceptance(document: Any, source: str) -> Acceptance:
    """The limits in a mapping. Raises InputError, which names each wrong setting."""
    try:
        return Acceptance.model_validate(document or {})
    except ValidationError as error:
        problems, known = [], list(Acceptance.model_fields)
        for problem in error.errors(include_url=False):
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                said = f"is not known here.{nearest(name, known)}"
            else:
                said = problem["msg"].removeprefix("Value error, ")
                said += "" if problem["type"] == "value_error" else f", got {short(repr(problem['input']))}"
            problems.append(f"{source}: {name + ': ' if name else ''}{said}")
        raise InputError("\n".join([*problems, f"{source}: here are known: {', '.join(known)}"])) from None


EXAMPLE = """\
# What this machine takes part in: fedtune client --accept THIS_FILE. No server can change it.
# Remove the # of a line to demand it; what is left out is not limited. docs/deployment.md says what each one
# keeps, and what it does not.

# --- where results go, and what is done here
# servers: ["fed.example.org:443"]      # what is trained here is sent to no other
# methods: [fedavg]                     # method.name
# trainable: [lora]                     # method.trainable: full, lora, adapter, prompt, p-tuning
# models: ["0000000000000000000000000000000000000000000000000000000000000000"]   # SHA-256 of the weights
# max_local_steps: 5000                 # training steps of one round
# max_bytes: 2000000000                 # of one order, and of one reply

# --- what is read
# data_folder: /srv/data                # the data lie in it; links out of it do not count
# fields: [instruction, output]         # keys of the data file that may be trained on

# --- what the server sees: demands that this machine keeps by its own arithmetic
# secure_aggregation: true              # only runs under masks, with the others' keys in KEYS/clients.json
# min_clients: 5                        # clients that a round has
# min_threshold: 4                      # clients that any sum holds
# max_clip: 1.0                         # longest that an update of this client can be
# min_clip: 0.1
# min_noise: 1.0                        # standard deviation of a sum's noise, in clips
# max_epsilon: 8.0                      # of one run, for this client
# max_epsilon_total: 20.0               # of all runs in the record together
# delta: 1.0e-5                         # that both are at
# noise_by: clients                     # server: take its word where it clips and adds noise, without masks
# record: /srv/fedtune/record.jsonl     # one file for all clients of this machine with the same people's data
"""
