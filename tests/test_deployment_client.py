"""The process of one client, with what Flower's node does played by a thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from test_deployment_messages import INVITATION, Runner

from fedtune.deploy import client as deployed_client
from fedtune.deploy.client import ClientSetup, run_client
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
