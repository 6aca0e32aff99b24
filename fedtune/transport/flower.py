"""Flower: the only file that imports flwr, written against its 1.41 and 1.42.

Flower carries messages and does nothing else: no strategy, no rounds, no weights of its own. In the
simulation its grid is used by the run's own process. In a deployment Flower starts a short-lived process for
every message, so both of its apps are thin and hand messages on over a local socket: `client_app` to the
worker that holds the model, `server_app` to the process that runs the rounds. What they do not need is
imported where it is used, and torch nowhere here: every message would wait for it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.errors import FederationError, foreign
from fedtune.transport.messages import Message, checked, connect, fault, receive, send
from fedtune.transport.programs import gpu_share
from fedtune.transport.quiet import quiet_environment, quiet_logs

with quiet_environment():  # read when it is imported
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

KIND = "train"  # Flower knows three kinds of messages; ours says itself what it is about
NODE_LOOP = "flwr.supernode.start_client_internal"


class GridChannel:
    """Messages over Flower's grid, to nodes by their ids."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[tuple[int, str]]:
        """Ids of the nodes that are online now, and their public keys in PEM."""
        return [
            (int(node.node_id), bytes(node.public_key).decode("ascii", "replace"))
            for node in self._grid.get_nodes()
        ]

    def push(self, node: int, message: Message, *, lifetime_s: float) -> str:
        """Sends a message; returns its id, empty if Flower does not take it."""
        carrier = FlowerMessage(_record(message), node, KIND, ttl=lifetime_s)
        (name,) = list(self._grid.push_messages([carrier])) or [""]
        return str(name or "")

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        """The answers that are there."""
        for carrier in self._grid.pull_messages(list(ids)) if ids else []:
            name = carrier.metadata.reply_to_message_id
            if not carrier.has_error():
                yield name, _message(carrier)
            elif carrier.error.code in LOST:
                yield name, Message({"fault": LOST[carrier.error.code], "lost": True})
            else:
                said = f"Flower reports error {carrier.error.code}: {carrier.error.reason}"
                yield name, Message({"fault": said, "died": True})


# Of flwr.common.constant.ErrorCode: those that say nothing of what the client did.
LOST = {
    3: "it was lost: nothing came before its message expired",  # message unavailable
    4: "it was lost: its reply came too late",  # reply message unavailable
    5: "it was lost: its connection ended, or it stopped",  # node unavailable
}


def _record(message: Message) -> RecordDict:
    """Our message as the content of Flower's: each run of bytes is one flat array."""
    records: dict[str, Any] = {"fields": ConfigRecord(dict(message.fields))}
    arrays = {
        name: Array("uint8", (len(data),), "raw", bytes(data))
        for name, data in (("body", message.body), ("state", message.state))
        if len(data)
    }
    if arrays:
        records["bytes"] = ArrayRecord(arrays)
    return RecordDict(records)


def _message(carrier: FlowerMessage) -> Message:
    """Our message in one of Flower's; one that is not ours becomes a fault, whoever sent it."""
    try:
        arrays = carrier.content.get("bytes", {})
        body, state = (arrays[name].data if name in arrays else b"" for name in ("body", "state"))
        return checked(dict(carrier.content["fields"]), body, state)  # who reads a field checks its type
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return fault(foreign(f"its message is not one of fedtune's: {type(error).__name__}: {error}"))


# --- in the simulation ---


class SimulatedChannel:
    """Messages to simulated clients. Which node carries one does not matter: each serves any client."""

    def __init__(self, channel: GridChannel) -> None:
        self._channel = channel
        self._nodes = sorted(node for node, _ in channel.nodes())

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        """Sends a message; returns its id."""
        return self._channel.push(self._nodes[client % len(self._nodes)], message, lifetime_s=lifetime_s)

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        """The answers that are there."""
        return self._channel.pull(ids)


@contextmanager
def simulation(
    answer: Callable[[Message], Message], *, workers: int, gpus: int = 0
) -> Iterator[SimulatedChannel]:
    """Flower's simulation on Ray for as long as the context lasts.

    Args:
        answer: What a client answers; runs in the worker processes. A function of a module, with arguments
            that Ray can copy.
        workers: Processes that work at the same time.
        gpus: GPUs that they share.

    Raises:
        FederationError: Ray does not start.
    """
    from flwr.simulation import run_simulation

    came: queue.Queue[Grid | BaseException] = queue.Queue()
    over = threading.Event()
    app = ServerApp()

    @app.main()
    def _hand_over(grid: Grid, context: Context) -> None:
        came.put(grid)
        over.wait()

    def _run() -> None:
        try:
            run_simulation(
                app,
                _client_app(answer),
                num_supernodes=4 * workers,  # a node takes up a message in 0.1 s
                backend_config={
                    "init_args": {
                        "num_cpus": workers,
                        "num_gpus": gpus,
                        "logging_level": "ERROR",
                        "log_to_driver": False,
                        "include_dashboard": False,
                    },
                    "client_resources": {"num_cpus": 1, "num_gpus": gpu_share(workers, gpus)},
                },
            )
        except BaseException as error:  # SystemExit too: the thread must not end unseen
            came.put(error)

    thread = threading.Thread(target=_run, name="flower-simulation", daemon=True)
    with quiet_environment(), quiet_logs():
        thread.start()
        try:
            grid = came.get()
            if isinstance(grid, BaseException):
                raise FederationError(f"Flower's simulation did not start: {type(grid).__name__}: {grid}")
            channel = _wait_for_nodes(grid, came)
            _own_signals()
            yield SimulatedChannel(channel)
        finally:
            over.set()
            thread.join(60)


def _own_signals() -> None:
    """Ray puts a handler below Python's, which prints a stack trace and aborts the process 3 s later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _wait_for_nodes(grid: Grid, came: queue.Queue[Any]) -> GridChannel:
    """The grid's channel once its nodes and Ray are there; they are not always at the start."""
    import ray

    channel = GridChannel(grid)
    while not channel.nodes() or not ray.is_initialized():
        try:
            error = came.get(timeout=0.05)
        except queue.Empty:
            continue
        raise FederationError(f"Flower's simulation did not start: {type(error).__name__}: {error}")
    return channel


def _client_app(answer: Callable[[Message], Message]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def _train(carrier: FlowerMessage, context: Context) -> FlowerMessage:
        return FlowerMessage(_record(answer(_message(carrier))), reply_to=carrier)

    return app


# --- in a deployment ---


def run_node(rests: object) -> None:
    """Flower's node in this process, with the command line's arguments. Its loop sleeps by `rests`."""
    from flwr.supernode.cli import flower_supernode

    rest_by(rests)
    flower_supernode()


def rest_by(rests: object) -> None:
    """Lets the loop of Flower's node sleep by `rests`. Raises FederationError if it sleeps by no `time`."""
    loop = importlib.import_module(NODE_LOOP)
    if not hasattr(loop, "time"):
        raise FederationError(
            f"{NODE_LOOP} sleeps by no module `time`; install a Flower that fedtune knows: "
            'pip install "flwr[simulation]>=1.41,<1.43"'
        )
    vars(loop)["time"] = rests


def _to_worker(carrier: FlowerMessage, context: Context) -> FlowerMessage:
    """A message handed on to the worker of this node, and its answer."""
    try:
        with connect(str(context.node_config["worker"])) as connection:
            send(connection, _message(carrier))
            answer = receive(connection)
    except (OSError, EOFError) as error:
        answer = fault(f"its worker does not answer: {type(error).__name__}")
    return FlowerMessage(_record(answer), reply_to=carrier)


client_app = ClientApp()
client_app.train()(_to_worker)

server_app = ServerApp()


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    """Does what the process that runs the rounds says, until it hangs up."""
    channel = GridChannel(grid)
    with connect(str(context.run_config["socket"])) as connection:
        while True:
            try:
                asked = receive(connection)
            except EOFError:
                return
            match asked.fields["ask"]:
                case "nodes":
                    send(connection, Message({"nodes": json.dumps(channel.nodes())}))
                case "post":
                    message = Message(json.loads(str(asked.fields["letter"])), asked.body)
                    node, lifetime_s = int(asked.fields["node"]), float(asked.fields["lifetime_s"])
                    send(connection, Message({"id": channel.push(node, message, lifetime_s=lifetime_s)}))
                case "collect":
                    for name, answer in channel.pull(json.loads(str(asked.fields["ids"]))):
                        send(
                            connection,
                            Message({"id": name, "letter": json.dumps(dict(answer.fields))}, answer.body),
                        )
                    send(connection, Message({"id": ""}))


APP = """\
[project]
name = "fedtune-letters"
version = "1.0.0"
description = "Hands messages on; what does the work is installed on every machine."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune.transport.flower:server_app"
clientapp = "fedtune.transport.flower:client_app"

[tool.flwr.app.config]
socket = ""
"""


class Control:
    """What is asked of the SuperLink beside messages: known keys and runs.

    Args:
        address: host:port of the SuperLink.
        authority: The file of the certificate that signed its own.
    """

    def __init__(self, address: str, authority: Path) -> None:
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def is_up(self) -> bool:
        """Whether the SuperLink answers."""
        import httpx
        from flwr.proto import control_pb2

        try:
            self._client.ListNodes(control_pb2.ListNodesRequest())
        except (httpx.TransportError, httpx.HTTPStatusError):
            return False
        return True

    def register(self, public: str) -> None:
        """Makes a public key (PEM) known; one that is known already stays so.

        Raises:
            FederationError: The SuperLink refuses it for another reason, or does not answer.
        """
        import httpx
        from flwr.proto import control_pb2
        from flwr.supercore.error import ApiErrorCode, FlowerError

        try:
            patiently(
                lambda: self._client.RegisterNode(control_pb2.RegisterNodeRequest(public_key=public.encode()))
            )
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            if known is None or known.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise FederationError(f"Flower refuses a client's key: {error.response.text}") from None

    def stop_runs(self) -> None:
        """Ends every run that has not ended. Raises FederationError if the SuperLink does not answer."""
        from flwr.proto import control_pb2

        runs = patiently(lambda: self._client.ListRuns(control_pb2.ListRunsRequest())).run_dict
        for number, run in runs.items():
            if run.status.status != "finished":
                request = control_pb2.StopRunRequest(run_id=number)
                patiently(partial(self._client.StopRun, request))

    def start_run(self, socket: str) -> None:
        """Starts `server_app`, which will connect to the local socket at that address.

        Raises:
            FederationError: The SuperLink does not start it, or does not answer.
        """
        from flwr.cli.build import build_fab_from_files
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto import control_pb2
        from flwr.supercore.fab import Fab

        bundle = build_fab_from_files({"pyproject.toml": APP.encode()})[0]
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        config = user_config_to_proto({"socket": socket})
        request = control_pb2.StartRunRequest(fab=fab_to_proto(fab), override_config=config)
        started = patiently(lambda: self._client.StartRun(request))
        if not started.run_id:
            raise FederationError("Flower did not start the run; its log says why")

    def close(self) -> None:
        """Hangs up."""
        self._client.close()


def patiently(call: Callable[[], Any]) -> Any:
    """What the SuperLink answers; asked again where a busy machine lets the connection time out."""
    import httpx

    for _ in range(TRIES - 1):
        try:
            return call()
        except httpx.TransportError:
            time.sleep(1.0)
    try:
        return call()
    except httpx.TransportError as error:
        raise FederationError(
            f"Flower's SuperLink does not answer: {type(error).__name__}: {error}; its log says more. "
            "Continue with --resume."
        ) from None


TRIES = 5  # of a question to the SuperLink
