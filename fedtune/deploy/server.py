"""The server of a federation over a network: Flower's server beside the run, and who takes part.

Flower's SuperLink listens on this machine's loopback alone, because whoever reaches all of it can start runs;
what faces the clients' network is a reverse proxy that passes on the part that is for clients. The rounds run
in this process, as they do without a network.
"""

from __future__ import annotations

import json
import math
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
from fedtune.core.permissions import make_private
from fedtune.core.types import Frame, Transport
from fedtune.deploy import processes
from fedtune.deploy.health import answering
from fedtune.deploy.keys import check_server, expected_examples, read_clients
from fedtune.deploy.supervised import RESTARTS, Supervised
from fedtune.errors import FederationError, InputError
from fedtune.federation.assembly import Assembly
from fedtune.federation.standing import now
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.transport.flower import Control
from fedtune.transport.lost import Noticing
from fedtune.transport.messages import Message, listening, receive, send
from fedtune.transport.network import Invitation, RoundExchange, invite_clients, wait_for_clients
from fedtune.transport.programs import superexec_command, superlink_command
from fedtune.transport.quiet import quiet_environment
from fedtune.transport.remote import Remote, Unreachable

START_S = 180.0  # for Flower's processes to come up, on a busy machine
BACK_S = 90.0  # for the clients of a resumed run to come back: Flower takes 60 s to notice that one is gone
AGAIN_S = 30.0  # after which it is asked again who is connected, while answers are waited for


class Server:
    """A federation's server. Use as a context manager: what it started ends with it.

    Args:
        config: The run's configuration.
        keys: The folder `server` that `fedtune keys` made; Flower's state and logs are kept in it too.
        port: Of this machine's loopback.
        log_line: Gets a line for everything that a person wants to see.
        health: Port of the loopback that answers how the run stands (health.py); None: nothing does.

    Raises:
        InputError: The keys are not usable, or too few for the clients of the configuration, or the method
            is none for a network.
    """

    def __init__(
        self,
        config: RunConfig,
        keys: Path,
        port: int,
        log_line: Callable[[str], None],
        *,
        health: int | None = None,
    ) -> None:
        method = registry.build(config.method, config.seed)
        if not method.uses_wire or method.pools_data:
            raise InputError(
                f"method.name {config.method_name} has nothing to send or needs all data in one place; "
                "it does not run over a network"
            )
        check_server(keys)
        known = read_clients(keys)
        asked = config.data.clients
        wanted = asked if isinstance(asked, int) else len(known)
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
        self._channel: ServerChannel | None = None
        self._invitation: Invitation | None = None
        self._examples: dict[int, int] = {}
        self._health = health
        self.reply_limit: Callable[[int], int] = lambda client: 0
        self.standing: Callable[[], Mapping[str, Any]] = dict

    def __enter__(self) -> Self:
        if self._health is not None:
            url = self._stack.enter_context(answering(self._health, lambda: self.standing()))
            self._log_line(f"how the run stands is at {url}/health and {url}/status")
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
        document["data"]["max_length"] = assembly.room.tokens  # clients may not have the model to ask
        document["data"]["template"] = assembly.template_told
        del document["tracking"]  # the server's own affair
        config = json.dumps(document, separators=(",", ":"))
        loaded = assembly.loaded
        self._invitation = Invitation(
            run, config, loaded.weights_sha256, loaded.quantization, loaded.quantized_sha256
        )
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
            Noticing(self._channel),
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

    def there(self) -> dict[int, dict[str, Any]]:
        """Each client's name, whether it was connected when last looked, and when it was last heard of."""
        seen, here = (self._channel.seen, self._channel.here) if self._channel else ({}, frozenset())
        return {
            client: {"name": name, "here": client in here, "seen": seen.get(client)}
            for client, name in self._names.items()
        }

    def transport(self, assembly: Assembly, clock: Clock) -> Transport:
        """The way to the clients that have joined."""
        assert self._channel is not None and self._invitation is not None
        states = assembly.runner.states
        exchange = RoundExchange(
            self._invitation, self._examples, states, limit=lambda client: self.reply_limit(client)
        )
        deadline_s = self._config.federation.deadline_s
        channel = Noticing(self._channel)
        return Remote(channel, exchange, window=None, deadline_s=deadline_s, clock=clock)

    def start(self) -> ServerChannel:
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
        self._folder.mkdir(exist_ok=True)
        make_private(self._folder)
        self._stack.enter_context(quiet_environment())  # Flower's programs inherit it
        listener, address = self._stack.enter_context(listening())
        environment = {"FLWR_HOME": str((self._folder / "home").resolve())}
        where = f"127.0.0.1:{self._port}"
        superlink = Supervised(
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
        superexec = Supervised(
            superexec_command(self._keys, self._port),
            environment,
            self._folder / "superexec.log",
            self._over,
            lambda: self._log_line("Flower's SuperExec ended and is started again"),
        )
        self._stack.callback(superexec.stop)
        self._log_line(f"Flower listens on {where}, behind the proxy; its logs are in {self._folder}")
        channel = ServerChannel(
            lambda: _accept(listener, control, address, superexec),
            self._public,
            superexec.log,
            self._log_line,
        )
        self._stack.callback(channel.close)
        return channel


def _accept(listener: Listener, control: Control, address: str, superexec: Supervised) -> Connection:
    """The connection of the server app, which Flower starts; more than once if it does not come.

    On a busy machine its process may come up so late that Flower does not accept it any more.

    Raises:
        FederationError: It does not come, or what starts it fails again and again.
    """
    came: list[Connection] = []
    thread = threading.Thread(target=lambda: came.append(listener.accept()), daemon=True)
    thread.start()
    end, again = time.monotonic() + START_S, 0.0
    while not came:
        superexec.require(end)
        if time.monotonic() >= again and control.is_up():
            control.stop_runs()  # also those of a server that was killed
            control.start_run(address)
            again = time.monotonic() + START_S / 3
        thread.join(0.2)
    return came[0]


class ServerChannel:
    """Messages to clients by way of Flower's server app, which takes its orders over the local socket.

    The app ends with what started it, Flower's SuperExec. It is started again then, as a run of Flower's of
    its own: what was on its way in the one before is lost, and whoever waits for it is told so.

    Args:
        start: Starts the app; the connection to it.
        public: The clients by their public keys.
        log: Of what starts the app.
        log_line: Gets a line for everything that a person wants to see.
    """

    def __init__(
        self,
        start: Callable[[], Connection],
        public: Mapping[str, int],
        log: Path,
        log_line: Callable[[str], None],
    ) -> None:
        self._start, self._public, self._log, self._log_line = start, public, log, log_line
        self._nodes: dict[int, int] = {}
        self._sent: dict[str, int] = {}  # whose each message is that has no answer
        self._looked = -math.inf
        self.here = frozenset[int]()  # who was connected when that was asked last
        self.seen: dict[int, str] = {}  # when each client was last heard of
        self._apps = 1  # so far; stands in front of each id
        self._connection = start()

    def close(self) -> None:
        """Hangs up, and with that ends the app."""
        self._connection.close()

    def online(self) -> set[int]:
        """The clients that are connected now, told apart by their keys."""
        (answer,) = self._ask({"ask": "nodes"})
        self._nodes = {
            self._public[public]: node
            for node, public in json.loads(answer.text("nodes"))
            if public in self._public
        }
        self._looked, self.here = time.monotonic(), frozenset(self._nodes)
        self.seen = {**self.seen, **dict.fromkeys(self._nodes, now())}
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
        name = f"{self._apps} {answer.text('id')}"
        self._sent[name] = client
        return name

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Message]]:
        """The answers that are there."""
        if time.monotonic() - self._looked > AGAIN_S:
            self.online()
        app = f"{self._apps} "
        own = [name.removeprefix(app) for name in ids if name.startswith(app)]
        ask = {"ask": "collect", "ids": json.dumps(own)}
        answers = self._ask(ask, many=True, app=self._apps) if own else []
        if app != f"{self._apps} ":  # it ended while it was asked
            answers = []
        for name in ids:
            if not name.startswith(f"{self._apps} "):
                self._sent.pop(name, None)
                yield name, Message({"fault": "it was lost with Flower's server app", "lost": True})
        for answer in answers:
            fields = json.loads(answer.text("letter"))
            client = self._sent.pop(app + answer.text("id"), None)
            if fields.get("lost"):
                self._nodes.clear()  # who is connected is asked anew before the next message
            elif client is not None:
                self.seen = {**self.seen, client: now()}
            yield app + answer.text("id"), Message(fields, answer.body)

    def _ask(
        self,
        fields: Mapping[str, Any],
        body: Frame = b"",
        *,
        many: bool = False,
        app: int | None = None,
    ) -> list[Message]:
        """What the app says; of an app that has ended, of the next one, unless `app` alone can answer."""
        while True:
            try:
                send(self._connection, Message(fields, body))
                answers = [receive(self._connection)]
                while many and answers[-1].text("id"):
                    answers.append(receive(self._connection))
                return answers[:-1] if many else answers
            except (OSError, EOFError) as error:
                self._again(error)
                if app is not None:
                    return []

    def _again(self, error: Exception) -> None:
        """Starts the app once more. Raises FederationError if it has ended too often."""
        self._connection.close()
        if self._apps > RESTARTS:
            raise FederationError(
                f"Flower's server app ended {self._apps} times ({type(error).__name__}); the end of "
                f"{self._log} says:\n{processes.last_lines(self._log)}\nContinue with --resume."
            ) from None
        self._log_line("Flower's server app ended and is started again; what was on its way is asked anew")
        self._connection = self._start()
        self._apps += 1
