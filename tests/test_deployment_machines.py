"""Clients whose machines are not as they should be: another day, a full disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import lines, write_config
from deployed import PROGRAM, Site
from test_deployment import HERE, METHODS, THERE

pytestmark = [pytest.mark.network, pytest.mark.slow]

DAY = 86_400


def document(method: str, data: dict[str, Any], **federation: Any) -> dict[str, Any]:
    return {
        "data": data,
        "method": METHODS[method],
        "model": {"device": "cpu"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
        "federation": federation,
    }


@pytest.mark.skipif(not shutil.which("gcc"), reason="a shifted clock needs gcc")
def test_a_clock_that_is_a_day_off_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    """Keys hold from two days before they were made; Flower's own signatures allow 5 s and 5 minutes."""
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("shifted_clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    now = ("env", f"LD_PRELOAD={library}")
    told = subprocess.run([*now, f"CLOCK_SHIFT={-DAY}", "date", "+%s"], capture_output=True, check=True)
    real = subprocess.run(["date", "+%s"], capture_output=True, check=True)
    assert -DAY - 5 < int(told.stdout) - int(real.stdout) < -DAY + 5
    there = document("fedavg-lora", THERE, deadline_s=60.0, quorum=1)
    write_config(tmp_path / "c.yaml", {**there, "transport": {"name": "flower", "wait_s": 45.0}})
    with Site(tmp_path, "now,before,after", seconds=600) as site:
        site.split(document("fedavg-lora", HERE))
        site.client(0)
        for number, shift in ((1, -DAY), (2, DAY)):
            site.client(number, program=(*now, f"CLOCK_SHIFT={shift}", str(PROGRAM), "client"))
        site.server("c.yaml", "--out", "run")
        assert site.status("server") == 0, site.logs()
        assert site.says("before", "behind the server's, and Flower takes nobody whose clock")
        assert site.says("after", "ahead of the server's, and Flower takes nobody whose clock")
    assert [entry["clients"] for entry in lines(tmp_path / "run/rounds.jsonl")[1:]] == [[0]] * 2


def test_a_client_whose_disk_is_full_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    """It may write no file above 8 kB, which has no room for its control variates."""
    write_config(tmp_path / "c.yaml", document("scaffold", THERE, deadline_s=40.0, quorum=1))
    with Site(tmp_path, "wide,narrow,broad", seconds=600) as site:
        site.split(document("scaffold", HERE))
        site.client(0)
        full = ("sh", "-c", 'ulimit -f 16; exec "$@"', "sh", str(PROGRAM), "client")
        site.client(1, program=full)
        site.client(2)
        site.server("c.yaml", "--out", "run")
        assert site.status("server") == 0, site.logs()
        log = site.log("narrow").read_text()
    rounds = lines(tmp_path / "run/rounds.jsonl")[1:]
    assert [entry["clients"] for entry in rounds] == [[0, 2], [0, 2]]
    assert rounds[0]["left_out"]["1"] == "it failed: OSError; its own log says more"
    assert "a fault of this machine, not of a client: File too large" in log and "Traceback" not in log
