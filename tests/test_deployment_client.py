"""The process of one client, with what Flower's node does played by a thread."""

from __future__ import annotations

import email.utils
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from test_deployment_messages import INVITATION, Runner

from fedtune.deploy import client as deployed_client
from fedtune.deploy.client import ClientSetup, clock_ahead_s, run_client
from fedtune.deploy.keys import make_keys
from fedtune.errors import ProgramError
from fedtune.transport.messages import Message, connect, receive, send
from fedtune.transport.worker import JoinedRun


def test_a_fault_of_a_clients_program_ends_it_once_the_server_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Message] = []

    class Node:
        """What Flower's node does with two messages."""

        error = None

        def __init__(self, setup: ClientSetup, host: str, port: int, address: str) -> None:
            threading.Thread(target=self.letters, args=(address,), daemon=True).start()

        def letters(self, address: str) -> None:
            order = {"do": "order", "run": "ab12", "round": 2, "state": 0, "at": 0, "bytes": 1}
            for message in (INVITATION.message(0), Message(order, b"a")):
                with connect(address) as connection:
                    send(connection, message)
                    told.append(receive(connection))

        def stop(self) -> None:
            assert len(told) == 2  # only now does the process end

    runner = Runner(RuntimeError("CUDA error: out of memory"))
    monkeypatch.setattr(deployed_client, "Node", Node)
    monkeypatch.setattr(deployed_client, "HAND_ON_S", 0.2)
    monkeypatch.setattr(deployed_client, "check_client", lambda keys: None)
    monkeypatch.setattr(deployed_client, "join", lambda invitation, **about: JoinedRun(runner, 3, "echo"))  # type: ignore[arg-type]
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    setup = ClientSetup(
        "localhost:1", tmp_path, tmp_path / "d.jsonl", {}, None, "cpu", None, tmp_path / "state"
    )
    with pytest.raises(ProgramError, match=r"out of memory \(CUDA error: out of memory\.\)") as ended:
        run_client(setup)
    assert ended.value.exit_status == 3
    assert told[1].fields == {"fault": "it failed: RuntimeError; its own log says more"}


@contextmanager
def dated(keys: Path, date: str | None) -> Iterator[int]:
    """A server that says it is another day; its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(404)  # which no server of ours says more to, and no date of its own
            if date is not None:
                self.send_header("Date", date)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys / "server/server.crt", keys / "server/server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_how_far_a_clock_is_off_is_what_the_server_says(tmp_path: Path) -> None:
    keys, authority = tmp_path / "keys", tmp_path / "keys/server/ca.crt"
    make_keys(keys, ["localhost"], ["a"], days=2)
    make_keys(tmp_path / "other", ["localhost"], ["a"], days=2)
    for ahead in (-86_400, 0, 40, 86_400):
        with dated(keys, email.utils.formatdate(time.time() - ahead, usegmt=True)) as port:
            found = clock_ahead_s("localhost", port, authority)
            assert found is not None and abs(found - ahead) < 5
    for date in (None, "", "yesterday", "Mon, 99 Foo 2026 99:99:99 GMT"):
        with dated(keys, date) as port:
            assert clock_ahead_s("localhost", port, authority) is None
    with dated(keys, email.utils.formatdate(0)) as port:  # of another federation
        assert clock_ahead_s("localhost", port, tmp_path / "other/server/ca.crt") is None
    assert clock_ahead_s("localhost", port, authority) is None  # nobody is there any more


@pytest.mark.parametrize(
    ("said", "starts"),
    [
        ("Run ID 1 is not in `RUNNING` status. Ignoring message ab12.", 2),
        ("Run ID 1 is not in `RUNNING` status. Ignoring reply message ab12.", 1),
        ("Giving up reconnection", 2),
    ],
)
def test_a_node_that_is_one_answer_behind_is_started_anew(
    said: str, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    class Process:
        def poll(self) -> None:
            return None

    def start(command: list[str], environment: dict[str, str], log: Path) -> Process:
        with log.open("a") as file:
            file.write("SuperNode ID: 7\n" + ("" if started else f"{said}\n"))
        started.append(log)
        return Process()

    monkeypatch.setattr(deployed_client.processes, "start", start)
    monkeypatch.setattr(deployed_client.processes, "stop", lambda process: None)
    monkeypatch.setattr(deployed_client, "supernode_command", lambda *about: ["node"])
    monkeypatch.setattr(deployed_client, "LOOK_S", 0.01)
    monkeypatch.setattr(deployed_client.Node, "wait_for_server", lambda self: None)
    about = (tmp_path, tmp_path / "d.jsonl", {}, None, "cpu", None, tmp_path)
    node = deployed_client.Node(ClientSetup("localhost:1", *about), "localhost", 1, "nobody")
    until = time.monotonic() + 10
    while len(started) < starts and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)  # it is not started again and again
    node.stop()
    assert len(started) == starts and node.error is None
