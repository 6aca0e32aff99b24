"""The server of a federation over a network: Flower's server beside the run, and who takes part.

Flower's SuperLink listens on this machine's loopback alone, because whoever reaches all of it can start runs;
what faces the clients' network is a reverse proxy that passes on the part that is for clients. The rounds run
in this process, as they do without a network.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedtune.config.schema import RunConfig
from fedtune.core.cohort import QuorumError, quorum_of
from fedtune.core.types import Transport
from fedtune.deploy import processes
from fedtune.deploy.keys import check_server, expected_examples, read_clients
from fedtune.errors import FederationError, InputError
from fedtune.federation.assembly import Assembly
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.transport.flower import Control, superexec_command, superlink_command
from fedtune.transport.messages import Message, listening, receive, send
from fedtune.transport.network import Invitation, RoundExchange, invite_clients, wait_for_clients
from fedtune.transport.quiet import quiet_environment
from fedtune.transport.remote import Remote, Unreachable

START_S = 180.0  # for Flower's processes to come up, on a busy machine
BACK_S = 90.0  # for the clients of a resumed run to come back: Flower takes 60 s to notice that one is gone
LOOK_S = 1.0  # between looking whether Flower's processes are alive


class Server:
    """A federation's server. Use as a context manager: what it started ends with it.

    Args:
        config: The run's configuration.
        keys: The folder `server` that `fedtune keys` made; Flower's state and logs are kept in it too.
        port: Of this machine's loopback.
        log_line: Gets a line for everything that a person wants to see.

    Raises:
        InputError: The keys are not usable, or too few for the clients of the configuration, or the method
            is none for a network.
    """

    def __init__(self, config: RunConfig, keys: Path, port: int, log_line: Callable[[str], None]) -> None:
        method = registry.build(config.method, config.seed)
        if not method.uses_wire or method.pools_data:
            raise InputError(
                f"method.name {config.method_name} has nothing to send or needs all data in one place; "
                "it does not run over a network"
            )
        check_server(keys)
        known = read_clients(keys)
        wanted = config.data.clients or len(known)
        if wanted > len(known):
            raise InputError(
                f"data.clients is {wanted}, but {keys / 'clients.json'} knows {len(known)} clients: "
                f"{', '.join(known)}; set data.clients={len(known)}, or make more keys with fedtune keys"
            )
        self._names = dict(enumerate(list(known)[:wanted]))
        most = expected_examples(keys)
        self._most = {client: most[name] for client, name in self._names.items() if name in most}
        self._public = {known[name]: client for client, name in self._names.items()}
        self._config, self._keys, self._port, self._log_line = config, keys, port, log_line
        self._folder = keys / "flower"
        self._stack, self._over = ExitStack(), threading.Event()
        self._channel: _ServerChannel | None = None
        self._invitation: Invitation | None = None
        self._examples: dict[int, int] = {}
        self.reply_limit: Callable[[int], int] = lambda client: 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._stack.close()

    def join(self, assembly: Assembly, known: Mapping[str, Any] | None) -> dict[int, int]:
        """Starts Flower's server and waits for clients; `known` is partition.json of a resumed run.

        Returns:
            Examples of each client that takes part.

        Raises:
            InputError: The port is taken.
            FederationError: Flower does not start, or too few clients take part.
        """
        run = str(known["run"]) if known else secrets.token_hex(8)
        document = self._config.resolved()
        document["data"]["max_length"] = assembly.max_length  # clients may not have the model to ask
        config = json.dumps(document, separators=(",", ":"))
        self._invitation = Invitation(run, config, assembly.loaded.weights_sha256)
        self._channel = self.start()
        if known:
            self._examples = {int(e["client"]): int(e["examples"]) for e in known["clients"]}
            names = {client: self._names.get(client, "") for client in self._examples}
            wait_for_clients(self._channel, names, wait_s=BACK_S)
            back = sorted(self._channel.online() & names.keys())
            self._log_line(
                f"{len(back)} of {len(names)} clients are back: {', '.join(map(str, back)) or 'none'}"
            )
            return dict(self._examples)
        self._log_line(f"waiting for {len(self._names)} clients: {', '.join(self._names.values())}")
        wait_s = self._config.transport.wait_s
        self._examples = invite_clients(
            self._channel,
            self._invitation,
            self._names,
            most=self._most,
            wait_s=wait_s,
            log_line=self._log_line,
        )
        needed = quorum_of(len(self._names), self._config.federation.quorum)
        if len(self._examples) < needed:
            raise QuorumError(
                f"{len(self._examples)} of {len(self._names)} clients take part, federation.quorum asks for "
                f"{needed}; what each of them said is above"
            )
        return dict(self._examples)

    def partition(self) -> dict[str, Any]:
        """What partition.json says of the clients, and the run's name, by which they know it again."""
        assert self._invitation is not None
        clients = [
            {"client": client, "name": self._names.get(client, ""), "examples": examples}
            for client, examples in sorted(self._examples.items())
        ]
        return {"run": self._invitation.run, "clients": clients}

    def transport(self, assembly: Assembly, clock: Clock) -> Transport:
        """The way to the clients that have joined."""
        assert self._channel is not None and self._invitation is not None
        states = assembly.runner.states
        exchange = RoundExchange(
            self._invitation, self._examples, states, limit=lambda client: self.reply_limit(client)
        )
        deadline_s = self._config.federation.deadline_s
        return Remote(self._channel, exchange, window=None, deadline_s=deadline_s, clock=clock)

    def start(self) -> _ServerChannel:
        """Starts Flower's server and its app; they end with this object.

        Raises:
            InputError: The port is taken.
            FederationError: Flower does not start.
        """
        if not processes.is_free(self._port):
            raise InputError(
                f"port {self._port} of this machine is in use; end what uses it, or give another --port "
                "(and tell the reverse proxy)"
            )
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._stack.enter_context(quiet_environment())  # Flower's programs inherit it
        listener, address = self._stack.enter_context(listening())
        environment = {"FLWR_HOME": str((self._folder / "home").resolve())}
        where = f"127.0.0.1:{self._port}"
        superlink = _Supervised(
            superlink_command(self._keys, self._folder / "state.db", self._port),
            environment,
            self._folder / "superlink.log",
            self._over,
            lambda: self._log_line("Flower's SuperLink ended and is started again"),
        )
        self._stack.callback(superlink.stop)
        control = Control(where, self._keys / "ca.crt")
        self._stack.callback(control.close)
        end = time.monotonic() + START_S
        while not control.is_up():
            superlink.require(end)
            time.sleep(0.2)
        for public in self._public:
            control.register(public)
        superexec = _Supervised(
            superexec_command(self._keys, self._port),
            environment,
            self._folder / "superexec.log",
            self._over,
            lambda: self._log_line("Flower's SuperExec ended and is started again"),
        )
        self._stack.callback(superexec.stop)
        self._log_line(f"Flower listens on {where}, behind the proxy; its logs are in {self._folder}")
        connection = _accept(listener, control, address, superexec)
        self._stack.callback(connection.close)
        return _ServerChannel(connection, self._public, superexec.log)


class _Supervised:
    """A program of Flower's that is started again when it ends by itself."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        over: threading.Event,
        ended: Callable[[], None],
    ) -> None:
        self._command, self._environment, self.log = command, environment, log
        self._over, self._ended = over, ended
        self._process = processes.start(command, environment, log)
        self._required = False
        self._lock = threading.Lock()
        threading.Thread(target=self._keep, name=command[0], daemon=True).start()

    def require(self, end: float) -> None:
        """Raises FederationError if the program ended while it was to come up, or `end` has passed."""
        if self._process.poll() is not None or time.monotonic() > end:
            raise FederationError(
                f"{self._command[0]} does not come up; the end of {self.log} says:\n"
                f"{processes.last_lines(self.log)}"
            )
        self._required = True

    def stop(self) -> None:
        """Ends it for good."""
        self._over.set()
        with self._lock:
            processes.stop(self._process)

    def _keep(self) -> None:
        began = time.monotonic()
        while not self._over.wait(LOOK_S):
            with self._lock:
                if self._over.is_set() or self._process.poll() is None:
                    continue
                if time.monotonic() - began < LOOK_S * 5:
                    return  # it cannot start at all: `require` says so
                self._ended()
                self._process = processes.start(self._command, self._environment, self.log)
                began = time.monotonic()
        # the thread must not end before the program that it started: on Linux that would end it


def _accept(listener: Listener, control: Control, address: str, superexec: _Supervised) -> Connection:
    """The connection of the server app, which Flower starts; more than once if it does not come.

    On a busy machine its process may come up so late that Flower does not accept it any more.
    """
    came: list[Connection] = []
    thread = threading.Thread(target=lambda: came.append(listener.accept()), daemon=True)
    thread.start()
    end, again = time.monotonic() + START_S, 0.0
    while not came:
        superexec.require(end)
        if time.monotonic() >= again:
            control.stop_runs()  # also those of a server that was killed
            control.start_run(address)
            again = time.monotonic() + START_S / 3
        thread.join(0.2)
    return came[0]


class _ServerChannel:
    """Messages to clients by way of Flower's server app, which takes its orders over the local socket."""

    def __init__(self, connection: Connection, public: Mapping[str, int], log: Path) -> None:
        self._connection, self._public, self._log = connection, public, log
        self._nodes: dict[int, int] = {}

    def online(self) -> set[int]:
        """The clients that are connected now, told apart by their keys."""
        (answer,) = self._ask({"ask": "nodes"})
        self._nodes = {
            self._public[public]: node
            for node, public in json.loads(answer.text("nodes"))
            if public in self._public
        }
        return set(self._nodes)

    def push(self, client: int, message: Message, *, lifetime_s: float) -> str:
        """Sends a message. Raises Unreachable if the client is not connected."""
        if client not in self._nodes and client not in self.online():
            raise Unreachable("it is not connected")
        fields = json.dumps(dict(message.fields))
        ask = {"ask": "post", "node": self._nodes[client], "lifetime_s": lifetime_s, "letter": fields}
        (answer,) = self._ask(ask, message.body)
        if not answer.text("id"):
            self._nodes.pop(client, None)
            raise Unreachable("it is not connected any more")
        return answer.text("id")

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        """The answers that are there."""
        if not ids:
            return
        answers = self._ask({"ask": "collect", "ids": json.dumps(list(ids))}, many=True)
        for answer in answers:
            fields = json.loads(answer.text("letter"))
            if fields.get("lost"):
                self._nodes.clear()  # who is connected is asked anew before the next message
            yield answer.text("id"), Message(fields, answer.body)

    def _ask(
        self, fields: Mapping[str, Any], body: bytes | memoryview = b"", *, many: bool = False
    ) -> list[Message]:
        try:
            send(self._connection, Message(fields, body))
            answers = [receive(self._connection)]
            while many and answers[-1].text("id"):
                answers.append(receive(self._connection))
        except (OSError, EOFError) as error:
            raise FederationError(
                f"Flower's server app ended ({type(error).__name__}); the end of {self._log} says:\n"
                f"{processes.last_lines(self._log)}\nContinue with --resume."
            ) from None
        return answers[:-1] if many else answers
