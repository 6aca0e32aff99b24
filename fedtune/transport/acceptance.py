"""What the operator of a client accepts: a YAML file on the client's machine that no server can change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedtune.core.settings import Settings
from fedtune.errors import InputError


class Acceptance(Settings):
    """Limits of one client; whatever is left out is not limited."""

    methods: list[str] | None = Field(None, min_length=1)  # names of methods
    max_bytes: int | None = Field(None, ge=1)  # of one order, and of one reply
    max_local_steps: int | None = Field(None, ge=1)  # training steps of one round
    secure_aggregation: bool = False  # true: only runs under masks whose clients' keys this client knows
    data_folder: str | None = None  # where the data must lie; links out of it do not count


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


def check_run(acceptance: Acceptance, method: str, local_steps: int, *, secure: bool, signed: bool) -> None:
    """Raises NotAccepted if a run is not what the operator accepts.

    Args:
        acceptance: The operator's limits.
        method: The method's name.
        local_steps: Training steps that an order would take on this client's examples.
        secure: Whether the run has `federation.secure_aggregation`.
        signed: Whether this client knows the others' keys, so that no server can take their places.
    """
    if acceptance.methods is not None and method not in acceptance.methods:
        raise NotAccepted(f"its operator accepts {', '.join(acceptance.methods)}, and the method is {method}")
    if acceptance.secure_aggregation and not secure:
        raise NotAccepted(
            "its operator accepts only runs with federation.secure_aggregation, and this one has none"
        )
    if acceptance.secure_aggregation and not signed:
        raise NotAccepted(
            "its operator accepts only runs whose server learns no single update, and without a clients.json "
            "beside its key it cannot tell the other clients' keys from the server's"
        )
    limit = acceptance.max_local_steps
    if limit is not None and local_steps > limit:
        raise NotAccepted(
            f"a round would take {local_steps} local steps there, and its operator accepts {limit}"
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
        problems = [
            f"{source}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        known = ", ".join(Acceptance.model_fields)
        raise InputError("\n".join([*problems, f"{source}: here are known: {known}"])) from None
