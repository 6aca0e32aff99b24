"""Machines that are not as they should be: another day, a full disk, other noise, a server started twice."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import lines, write_config
from deployed import PROGRAM, Site, free_port
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


def test_noise_of_another_version_is_named_and_a_run_has_one_server(tmp_path: Path) -> None:
    """The second server of a folder is refused at once, and the first does not notice it."""
    (tmp_path / "other").mkdir()
    other = "import fedtune.zeroth\nfedtune.zeroth.NOISE_VERSION = 99\n"
    (tmp_path / "other" / "sitecustomize.py").write_text(other)
    path = os.pathsep.join(filter(None, (str(tmp_path / "other"), os.environ.get("PYTHONPATH"))))
    write_config(tmp_path / "c.yaml", document("fedkseed", THERE, deadline_s=60.0, quorum=1))
    with Site(tmp_path, "now,later,too", seconds=600) as site:
        site.split(document("fedkseed", HERE))
        site.server("c.yaml", "--out", "run")
        site.wait(lambda: site.says("server", "waiting for 3 clients"), "the server's start")
        second = site.run(
            "server", "c.yaml", "--keys", "keys/server", "--port", str(free_port()), "--out", "run"
        )
        site.client(0)
        site.client(1, program=("env", f"PYTHONPATH={path}", str(PROGRAM), "client"))
        site.client(2)
        assert site.status("server") == 0, site.logs()
    assert second.returncode == 2 and "is being written by process" in second.stderr, second.stderr
    rounds = lines(tmp_path / "run/rounds.jsonl")[1:]
    assert [entry["clients"] for entry in rounds] == [[0, 2]] * len(rounds) and rounds
    assert "noise of version" in rounds[0]["left_out"]["1"]
