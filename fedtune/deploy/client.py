"""One client of a federation over a network: the worker in this process, and Flower's node beside it."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedtune.config.yaml_text import read_yaml
from fedtune.core.permissions import make_private
from fedtune.data.records import check_fields
from fedtune.deploy import processes
from fedtune.deploy.keys import check_client, read_identity
from fedtune.errors import FederationError, FedtuneError, InputError
from fedtune.federation.client import join, local_records
from fedtune.federation.consent import Consent
from fedtune.federation.process import torch_kept
from fedtune.federation.spending import Record
from fedtune.report.json_log import say_or_print
from fedtune.transport.acceptance import Acceptance, check_data, check_server, read_acceptance
from fedtune.transport.messages import Message, connect, listening, receive, send
from fedtune.transport.programs import supernode_command
from fedtune.transport.quiet import quiet_environment
from fedtune.transport.worker import Worker

log = logging.getLogger("fedtune")
LOOK_S = 1.0
HAND_ON_S = 3.0  # that the last answer has to reach the server, so that it need not wait for the deadline
AHEAD_S, BEHIND_S = (
    5,
    300,
)  # what Flower lets pass of a client's clock: its signatures say when they were made
TAKEN_S = 90.0  # a node that was killed blocks its key for 60 s
# After these Flower's node does nothing more, but does not end: for it a connection that closes in the middle
# of a TLS handshake, as through a proxy whose server is away, is one to the wrong server.
# The third: a message of a run that has ended is answered all the same, and from then on the node is one
# answer behind and sends each only when the next message is there.
BROKEN = ("Giving up reconnection", "SSL/TLS handshake error detected", "Ignoring message")


@dataclass(frozen=True)
class ClientSetup:
    """How a client takes part.

    Attributes:
        server: host:port of the server, or of the proxy in front of it.
        keys: The folder that `fedtune keys` made for this client.
        data: This client's examples.
        fields: Our field names to the file's; None: no example has that one.
        model: Where the base model is on this machine; None: where the configuration says.
        device: auto, cpu, cuda, or one GPU as cuda:1.
        accept: The operator's limits; None: no limits.
        state: The folder of what must outlive this process.
    """

    server: str
    keys: Path
    data: Path
    fields: Mapping[str, str | None]
    model: str | None
    device: str
    accept: Path | None
    state: Path


def run_client(setup: ClientSetup) -> None:
    """Takes part until it is stopped.

    Raises:
        InputError: Something on this machine is not usable: address, keys, data, the acceptance file.
        FederationError: The server does not take this client.
        ProgramError: Something broke here that would break in every round; the server was told.
    """
    acceptance = _acceptance(setup.accept)
    host, port = _address(setup.server)
    check_server(acceptance, setup.server)
    check_client(setup.keys)
    check_data(acceptance, setup.data)
    check_fields(setup.fields)
    log_line(f"{local_records(setup.data)} examples in {setup.data}")
    setup.state.mkdir(parents=True, exist_ok=True)
    make_private(setup.state)
    record = Record(Path(acceptance.record or setup.state / "record.jsonl").expanduser())
    joining = partial(
        join,
        data=setup.data,
        fields=setup.fields,
        model=setup.model,
        device=setup.device,
        consent=Consent(acceptance, record, setup.server, log_line),
        identity=read_identity(setup.keys),
    )
    worker = Worker(joining, acceptance, setup.state, log_line)
    with torch_kept(), quiet_environment(), listening() as (listener, address):
        node = Node(setup, host, port, address)
        try:
            while True:
                with listener.accept() as connection:
                    try:
                        message = receive(connection)
                        if message.fields.get("do") == "end":
                            raise node.error or FederationError("Flower's node ended")
                        send(connection, worker.answer(message))
                        if worker.broken is not None:
                            connection.poll(HAND_ON_S)  # its reader hangs up, and Flower takes the answer on
                            time.sleep(HAND_ON_S)
                            raise worker.broken
                    except (OSError, EOFError) as error:
                        log.debug("a message's process went away: %s", type(error).__name__)
        finally:
            node.stop()


def log_line(text: str) -> None:
    """One line for whoever watches or keeps the log of this client."""
    say_or_print("note", text, f"{time.strftime('%H:%M:%S')} {text}")


class Node:
    """Flower's node, started again whenever it ends by itself.

    It ends when it cannot connect, and when the server does not know it any more. Neither is final, except
    that the server does not take this client's key, or has another certificate than its authority signed.
    """

    def __init__(self, setup: ClientSetup, host: str, port: int, worker: str) -> None:
        self._setup, self._host, self._port, self._worker = setup, host, port, worker
        self._log = setup.state / "supernode.log"
        self._over = threading.Event()
        self.error: FedtuneError | None = None
        self._thread = threading.Thread(target=self._keep, name="supernode", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it for good."""
        self._over.set()
        self._thread.join(15)

    def _keep(self) -> None:
        try:
            self._run()
        except FedtuneError as error:
            self.error = error
            with connect(self._worker) as connection:  # wakes up who waits for messages
                send(connection, Message({"do": "end"}))

    def _run(self) -> None:
        began_refusing = None
        while not self._over.is_set():
            self.wait_for_server()
            if self._over.is_set():
                return
            start_of_log = self._log.stat().st_size if self._log.exists() else 0
            process = processes.start(
                supernode_command(self._setup.keys, self._setup.server, processes.free_port(), self._worker),
                {"FLWR_HOME": str((self._setup.state / "flower").resolve())},
                self._log,
            )
            try:
                connected = False
                while process.poll() is None and not self._over.wait(LOOK_S):
                    if not connected and "SuperNode ID" in self._since(start_of_log):
                        connected, began_refusing = True, None
                        log_line(f"connected to {self._setup.server}")
                    if connected and any(said in self._since(start_of_log) for said in BROKEN):
                        break
            finally:
                processes.stop(process)
            if self._over.is_set():
                return
            if connected:
                log_line("the connection ended; trying again")
                continue
            began_refusing = began_refusing or time.monotonic()
            self._refused(self._since(start_of_log), time.monotonic() - began_refusing)
            self._over.wait(5)

    def _since(self, start: int) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(start)
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _refused(self, text: str, seconds: float) -> None:
        """Whether to try again after the server did not take this node. Raises FederationError if not."""
        ahead = clock_ahead_s(self._host, self._port, self._setup.keys / "ca.crt")
        if ahead is not None and not -BEHIND_S < ahead < AHEAD_S:
            off = datetime.timedelta(seconds=round(abs(ahead)))
            log_line(
                f"this machine's clock is {off} {'ahead of' if ahead > 0 else 'behind'} the server's, and "
                f"Flower takes nobody whose clock is {AHEAD_S} s ahead or {BEHIND_S} s behind; set it, and "
                "this client goes on by itself"
            )
            return
        code = re.search(r"\[code: (\d+)\]", text)
        if code or re.search(r"\b401\b", text):
            if seconds < TAKEN_S:
                log_line("the server does not take this client's key now; trying again")
                return
            raise FederationError(
                f"{self._setup.server} does not take the key of {self._setup.keys}: it is not in the "
                "server's clients.json, or another client uses it now. Every client needs a key of its own; "
                "fedtune keys makes one, and the server has to be started again with the new clients.json"
            )
        log_line(f"Flower's node ended; trying again. {processes.last_lines(self._log, 1)}")

    def wait_for_server(self) -> None:
        """Waits until the server can be reached. Raises InputError if it has the wrong certificate."""
        told = False
        context = ssl.create_default_context(cafile=str(self._setup.keys / "ca.crt"))
        while not self._over.is_set():
            try:
                with (
                    socket.create_connection((self._host, self._port), timeout=10) as plain,
                    context.wrap_socket(plain, server_hostname=self._host),
                ):
                    return
            except ssl.SSLCertVerificationError as error:
                raise InputError(
                    f"{self._setup.server} has a certificate that {self._setup.keys / 'ca.crt'} does not "
                    f"vouch for: {error.verify_message}. If it has expired or the name is missing in it, its "
                    "operator makes a new one with fedtune keys; if the authority is another, get the right "
                    "ca.crt from them, and not over this network"
                ) from None
            except OSError as error:  # ssl.SSLError is one too
                if not told:
                    log_line(f"{self._setup.server} cannot be reached ({error}); trying until it can")
                    told = True
                self._over.wait(2)


def _acceptance(path: Path | None) -> Acceptance:
    if path is None:
        return Acceptance()
    return read_acceptance(read_yaml(path), str(path))


def _address(server: str) -> tuple[str, int]:
    host, colon, port = server.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--server {server!r}: write HOST:PORT, as in fed.example.org:443")
    return host.strip("[]"), int(port)


def clock_ahead_s(host: str, port: int, authority: Path) -> float | None:
    """Seconds that this machine's clock is ahead of a server's, to the second; None if it does not say.

    Args:
        host: Of the server.
        port: Of the server.
        authority: The certificate that vouches for it.
    """
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
    try:
        connection.request("GET", "/v1/fleet/")
        told = connection.getresponse().headers.get("Date", "")
        return time.time() - email.utils.parsedate_to_datetime(told).timestamp()
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
