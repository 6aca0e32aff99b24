"""An order that Flower's server handed out and that never came, with real processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import fedtune, lines, outcome, write_config
from deployed import Site
from test_deployment import METHODS, THERE, config

from fedtune.transport.lost import SILENT_S

pytestmark = [pytest.mark.network, pytest.mark.slow]

ROUNDS = 4


def test_an_order_that_is_lost_on_its_way_is_sent_again(tmp_path: Path) -> None:
    """The connection breaks under it: Flower counts it as delivered, and there is no deadline."""
    method = {**METHODS["fedavg-lora"], "rounds": ROUNDS, "lora": {"rank": 16}}
    there = {**config("fedavg-lora", THERE), "method": method, "federation": {"quorum": 3}}
    here = {**config("fedavg-lora", {**THERE, "train": "bundled", "max_examples": 24}), "method": method}
    write_config(tmp_path / "c.yaml", there)
    write_config(tmp_path / "here.yaml", here)
    with Site(tmp_path, "near,far,other", seconds=900) as site:
        site.split(here)
        proxy = site.proxy()
        site.client(0)
        site.client(1, port=proxy.port)
        site.client(2)
        site.server("c.yaml", "--out", "run")
        site.wait(lambda: len(site.rounds("run")) > 1, "round 1")
        began = time.monotonic()
        proxy.lose(range(500, 600))  # Flower's word that there is a message; with none its answer is shorter
        assert site.status("server") == 0, site.logs()
        assert proxy.lost == 1 and time.monotonic() - began > SILENT_S
    rounds = lines(tmp_path / "run/rounds.jsonl")
    assert [entry["clients"] for entry in rounds[1:]] == [[0, 1, 2]] * ROUNDS
    assert fedtune("run", "here.yaml", "--out", "whole", "--quiet", cwd=tmp_path).status == 0
    assert outcome(tmp_path / "run")["final"] == outcome(tmp_path / "whole")["final"]
