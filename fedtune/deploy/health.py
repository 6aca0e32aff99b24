"""How a server's run stands, over HTTP on this machine's loopback: `/health` in short, `/status` in full.

For a supervisor, a probe in the same container, or an operator who has a tunnel to the machine. It says no
more than status.json does, asks nothing of the run, and goes on answering while a round waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedtune.deploy.http_json import JsonServer


@contextmanager
def answering(port: int, standing: Callable[[], Mapping[str, Any]]) -> Iterator[str]:
    """Inside, the routes are answered; gives their address.

    Args:
        port: Of the loopback; 0: one that is free.
        standing: How the run stands; empty before anything is known.

    Raises:
        InputError: The port is taken.
    """

    def health() -> dict[str, Any]:
        known = standing()
        short = {key: known[key] for key in ("stage", "round", "rounds", "updated") if key in known}
        return {"status": "ok", **short}

    gets = {"/health": health, "/status": lambda: {"status": "ok", **standing()}}
    server = JsonServer("127.0.0.1", port, gets, {}, key=None, quiet=True)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.2), daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.end()
        thread.join()
