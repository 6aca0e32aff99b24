"""A federation over a network, in Python: what `fedtune keys`, `server` and `client` do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.api.commands import load
from fedtune.api.federate import federate, shown
from fedtune.api.runs import Run
from fedtune.errors import InputError

if TYPE_CHECKING:
    from fedtune.api.callbacks import Callback
    from fedtune.config.schema import RunConfig


def make_keys(
    folder: str | Path, server: Sequence[str] = (), clients: Sequence[str] = (), *, days: int = 365
) -> list[str]:
    """Makes the keys of a federation over a network, or of more clients.

    Args:
        folder: Of the federation; made if it is missing. `server/` and `clients/NAME/` in it are to be copied
            to these machines; `ca.key` stays.
        server: Names or addresses by which clients reach the server.
        clients: Names of clients.
        days: How long the server's certificate is valid.

    Returns:
        The names of all clients that have keys, in the order of their numbers.

    Raises:
        InputError: A name cannot be one, or Flower is not installed.
    """
    require_flower()
    from fedtune.deploy.keys import make_keys

    return list(make_keys(Path(folder), list(server), list(clients), days=days))


def serve(
    config: RunConfig | str | Path | Mapping[str, Any],
    *overrides: str,
    keys: str | Path,
    port: int = 9443,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback | Any] = (),
    progress: bool | Literal["json"] = True,
    health_port: int | None = None,
) -> Run:
    """Runs one federation with clients on other machines, to its end.

    Args:
        config: What `fedtune.load` takes; `transport.name` is flower.
        overrides: As of `fedtune.load`.
        keys: The folder `server` that `make_keys` made.
        port: On this machine's loopback alone; a reverse proxy stands in front of it.
        out: As of `fedtune.run`.
        resume: As of `fedtune.run`.
        callbacks: As of `fedtune.run`.
        progress: As of `fedtune.run`.
        health_port: Of the loopback; it answers `/health` and `/status` as long as the run lasts. None: none.

    Raises:
        InputError: Configuration, keys or port are not usable; nothing was written.
        FederationError: Too few clients came or stayed, or Flower does not start.
    """
    from fedtune.config.places import located
    from fedtune.core.permissions import make_private, private
    from fedtune.federation.claim import claimed
    from fedtune.federation.plugins import require_plugins

    if resume and out is not None:
        require_plugins(Path(out))
    settings = load(config, "transport.name=flower", *overrides)
    require_flower()
    stem = Path(config).stem if isinstance(config, str | Path) else settings.method_name
    from fedtune.deploy.server import Server

    with (
        private(),
        claimed(None if out is None else Path(out), Path("runs") / stem) as path,
        shown(progress) as display,
        Server(settings, Path(keys), port, display.note, health=health_port) as deployment,
    ):
        make_private(path)  # one that an earlier version began
        federate(settings, path, None, callbacks, display, resume=resume, deployment=deployment)
    return Run(path, located(settings))


def take_part(
    server: str,
    *,
    keys: str | Path,
    data: str | Path,
    fields: Mapping[str, str | None] | None = None,
    model: str | None = None,
    device: str = "auto",
    accept: str | Path | None = None,
    state: str | Path | None = None,
) -> None:
    """Takes part in a federation, with examples that stay here, until it is stopped.

    Args:
        server: HOST:PORT of the server, or of the proxy in front of it.
        keys: The folder that `make_keys` made for this client.
        data: This client's examples, a .jsonl file; never leaves this machine.
        fields: Our field names to the file's, as `data.fields`; None: no example has that one.
        model: Where the base model is here; None: where the server's configuration says.
        device: auto, cpu, cuda, or one GPU as cuda:1.
        accept: YAML file of what this machine's operator accepts.
        state: Folder of what must outlive this process; None: KEYS/state.

    Raises:
        InputError: Address, keys, data or acceptance file are not usable.
        FederationError: The server does not take this client.
    """
    require_flower()
    from fedtune.config.model import CARD

    if device not in ("auto", "cpu", "cuda") and not re.match(CARD, device):
        raise InputError(f"device must be auto, cpu, cuda or a GPU's name as cuda:1, got {device}")
    from fedtune.core.permissions import private
    from fedtune.deploy.client import ClientSetup, run_client

    setup = ClientSetup(
        server=server,
        keys=Path(keys),
        data=Path(data),
        fields=dict(fields or {}),
        model=model,
        device=device,
        accept=None if accept is None else Path(accept),
        state=Path(state) if state is not None else Path(keys) / "state",
    )
    with private():
        run_client(setup)


def require_flower() -> None:
    """Raises InputError where the extra `flower` is not installed."""
    if find_spec("flwr") is None:
        raise InputError("Flower is not installed here; pip install 'fedtune[flower]'")
