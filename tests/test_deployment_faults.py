"""Faults of a federation over a network, one after another in one run, with real processes."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import lines, write_config
from deployed import Site
from test_deployment import HERE, METHODS, THERE

pytestmark = pytest.mark.network

ROUNDS = 8
NORTH, SOUTH, EAST, WEST, HOSTILE = range(5)


@pytest.mark.slow
def test_a_run_survives_what_happens_to_its_clients_its_network_and_itself(tmp_path: Path) -> None:
    names = "north,south,east,west,hostile"
    data = {"clients": 5, "max_examples": 40}
    document = {
        "data": {**THERE, "clients": 5},
        "method": {**METHODS["fedavg-lora"], "rounds": ROUNDS},
        "model": {"device": "cpu"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
        "federation": {"deadline_s": 150.0, "quorum": 2},
    }
    write_config(tmp_path / "c.yaml", document)
    with Site(tmp_path, names, seconds=1800) as site:
        site.split({**document, "data": {**HERE, **data}, "federation": {}})
        proxy = site.proxy()
        for client in (NORTH, EAST, WEST):
            site.client(client)
        site.client(SOUTH, port=proxy.port)
        hostile = (sys.executable, str(Path(__file__).with_name("hostile_client.py")), "nan,shape,cut,long")
        site.client(HOSTILE, program=hostile)
        site.server("c.yaml", "--out", "run")

        # a client whose key the server does not know
        (tmp_path / "other").mkdir()
        site.run("keys", "other/keys", "--server", "localhost", "--clients", "stranger")
        (tmp_path / "other/keys/clients/stranger/ca.crt").write_bytes(
            (tmp_path / "keys/server/ca.crt").read_bytes()
        )
        stranger = ("--server", f"localhost:{site.port}", "--keys", "other/keys/clients/stranger")
        site.wait(lambda: site.says("server", "waiting for 5 clients"), "the server's start")
        site.start(
            "stranger",
            str(Path(sys.executable).with_name("fedtune")),
            "client",
            *stranger,
            "--data",
            "data-0.jsonl",
        )

        # another client with the key of one that takes part
        site.wait(lambda: site.says("server", "client 0 (north) has joined"), "north")
        site.client(NORTH, name="twin", state="twin")

        # round 1: a client is killed with an order in its hands, as its machine loses power
        site.wait(lambda: site.says("east", "round 1: order"), "an order for east")
        site.kill("east")
        site.wait(lambda: len(site.rounds("run")) >= 2, "round 1")
        site.client(EAST)

        # round 3: a client hangs, and goes on in a later round
        site.wait(lambda: len(site.rounds("run")) >= 3, "round 2")
        site.signal("west", signal.SIGSTOP)
        site.wait(lambda: len(site.rounds("run")) >= 4, "round 3")
        site.signal("west", signal.SIGCONT)

        # round 5: the server is killed when some replies have come; nothing of those is asked again
        replies = tmp_path / "run/checkpoints/round-0005.replies"
        site.wait(lambda: replies.exists() and replies.stat().st_size > 0, "a reply of round 5")
        site.kill("server")
        before = [site.log(name).read_text().count("round 5: reply") for name in site.names]
        kept = _clients_in(replies)
        assert kept
        site.server("c.yaml", "--resume", "run")

        # round 6: the network is away for 30 seconds
        site.wait(lambda: len(site.rounds("run")) >= 6, "round 5")
        proxy.cut(30)
        site.wait(lambda: len(site.rounds("run")) >= 7, "round 6")
        assert site.status("server") == 0, site.logs()
        assert site.status("stranger") == site.status("twin") == 3
        for client in kept:
            name = site.names[client]
            assert site.log(name).read_text().count("round 5: reply") == before[client], name

    rounds = {entry["round"]: entry for entry in lines(tmp_path / "run/rounds.jsonl")}
    assert sorted(rounds) == list(range(ROUNDS + 1))
    said = {number: rounds[number]["left_out"].get(str(HOSTILE), "") for number in range(1, 5)}
    assert "NaN" in said[1] or "finite" in said[1]
    assert "shape" in said[2]
    assert "its header says" in said[3]
    assert "2,147,483,648 bytes" in said[4]
    # Flower takes 60 s to notice, and then it is waited for; on a slow machine the deadline comes first
    said_of_east = rounds[1]["left_out"][str(EAST)]
    assert said_of_east in ("it was lost, and not back within 60 s", "no reply within 150 s")
    assert "no reply within 150 s" in rounds[3]["left_out"][str(WEST)]
    for number in range(1, ROUNDS + 1):  # who did nothing wrong was always counted
        assert NORTH in rounds[number]["clients"]
        assert len(rounds[number]["clients"]) + len(rounds[number]["left_out"]) == 5
    assert rounds[6]["clients"].count(SOUTH) == 1  # its reply came late, but within the deadline
    assert EAST in rounds[ROUNDS]["clients"] and WEST in rounds[ROUNDS]["clients"]
    assert HOSTILE in rounds[ROUNDS]["clients"]
    assert site.says("stranger", "does not take the key")
    assert site.says("twin", "another client uses it now")
    assert "Traceback" not in site.log("server").read_text()


def _clients_in(replies: Path) -> set[int]:
    """The clients whose replies a journal holds."""
    from fedtune.core.types import Payload
    from fedtune.federation.journal import Journal

    time.sleep(0.1)
    states: dict[int, Payload] = {}
    journal = Journal(None, replies.parent, states)  # type: ignore[arg-type]
    return {arrival.client for _, arrival, _ in journal.kept(5, 0) if not arrival.fault}
