"""A federation of three over TLS, of which one sends in each round something else that is meant to harm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import lines, write_config
from deployed import Site
from test_deployment import HERE, METHODS, THERE

pytestmark = pytest.mark.network

HOSTILE = 2
# By wish, what the server must say of the client. What harms nobody has no place here.
SAID = {
    "overflow": "shape",
    "digits": "64 bits",
    "negative": "peak_bytes",
    "unasked": "balance",
    "surrogate": "Unicode",
    "dimensions": "manifest",
    "lists": "are allowed here",
    "list": "is not one of fedtune's",
    "megabyte": "is not one of fedtune's",
    "control": "owned",
    "scaled": "the norm of its update",
}


@pytest.mark.slow
def test_a_hostile_client_is_named_and_the_run_ends(tmp_path: Path) -> None:
    document = {
        "data": THERE,
        "method": {**METHODS["fedavg-lora"], "rounds": len(SAID) + 1},
        "model": {"device": "cpu"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
        "federation": {"deadline_s": 150.0, "quorum": 2},
    }
    write_config(tmp_path / "c.yaml", document)
    with Site(tmp_path, "north,south,hostile", seconds=900) as site:
        site.split({**document, "data": HERE, "federation": {}})
        site.client(0)
        site.client(1)
        program = (sys.executable, str(Path(__file__).with_name("hostile_client.py")), ",".join(SAID))
        site.client(HOSTILE, program=program)
        site.server("c.yaml", "--out", "run")
        assert site.status("server") == 0, site.logs()
        log = site.log("server").read_text()
    rounds = {entry["round"]: entry for entry in lines(tmp_path / "run/rounds.jsonl")}
    for number, (wish, said) in enumerate(SAID.items(), 1):
        entry = rounds[number]
        assert entry["clients"] == [0, 1], wish
        why = entry["left_out"][str(HOSTILE)]
        assert said in why and len(why) <= 400 and why.isprintable(), (wish, why)
    assert rounds[len(SAID) + 1]["clients"] == [
        0,
        1,
        HOSTILE,
    ]  # what is asked is taken again
    assert "\x1b" not in log and "Traceback" not in log
