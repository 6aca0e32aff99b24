"""Flower's own programs, and what they and its simulation are started with; the rest is in `flower.py`."""

from __future__ import annotations

import sys
from pathlib import Path


def superlink_command(keys: Path, database: Path, port: int) -> list[str]:
    """The server: TLS, known keys alone, on the loopback; what is on its way is in the database."""
    certificates = [f"--ssl-{name}={keys / file}" for name, file in TLS]
    return [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(port), *certificates),
        *("--enable-supernode-auth", "--database", str(database), "--isolation", "process"),
    ]


TLS = (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key"))


def superexec_command(keys: Path, port: int) -> list[str]:
    """What starts the server app; apart from the SuperLink, so that a run outlives a crash of that."""
    address = f"127.0.0.1:{port}"
    return ["flower-superexec", "--runtime-api-address", address, "--root-certificates", str(keys / "ca.crt")]


def supernode_command(keys: Path, server: str, port: int, worker: str) -> list[str]:
    """A client's node: Flower's program, started by `node.py`.

    Args:
        keys: The client's folder of keys.
        server: host:port of the server, or of the proxy in front of it.
        port: A free port of this machine's loopback.
        worker: The address of the worker's local socket; stays on this machine.
    """
    return [
        *(Path(sys.executable).name, "-P", "-m", "fedtune.transport.node", "--superlink", server),
        *("--root-certificates", str(keys / "ca.crt")),
        *("--auth-supernode-private-key", str(keys / "client.key")),
        *("--node-config", f'worker="{worker}"', "--host", "127.0.0.1", "--port", str(port)),
    ]


def gpu_share(workers: int, gpus: int) -> float:
    """The part of a GPU that a process gets, such that all find a place; a client never takes more than one.

    Ray places no process on parts of two GPUs, and counts in ten-thousandths.
    """
    if not gpus:
        return 0.0
    on_one = -(-workers // gpus)  # processes of the GPU that has most
    return (10_000 // on_one) / 10_000
