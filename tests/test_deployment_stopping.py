"""Server and client over TLS, stopped by SIGTERM while Flower's own programs die: one run, real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import write_config
from deployed import Site, descendants
from test_deployment import HERE, METHODS, THERE

pytestmark = pytest.mark.network

ROUNDS = 5


def running(pids: list[int]) -> list[str]:
    """What is left of processes that are to end."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += (
                [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:80]] if state != "Z" else []
            )
        except OSError:
            continue
    return found


def called(name: str, below: int) -> list[int]:
    """Processes with a word in their command, among those that a process started."""
    pids = []
    for pid in descendants(below):
        try:
            pids += [pid] if name in Path(f"/proc/{pid}/cmdline").read_text() else []
        except OSError:
            continue
    return pids


@pytest.mark.slow
def test_a_federation_survives_flowers_programs_and_ends_cleanly_by_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    document = {
        "data": {**THERE, "clients": 2},
        "method": {**METHODS["fedavg-lora"], "rounds": ROUNDS},
        "model": {"device": "cpu"},
        "evaluation": {"tasks": ["loss"], "max_examples": 8, "every": 0},
    }
    write_config(tmp_path / "c.yaml", document)
    (tmp_path / "accept.yaml").write_text(
        "methods: [fedavg]\ntrainable: [lora]\nfields: [instruction, input, output, category]\n"
    )
    before = os.umask(0)
    try:
        with Site(tmp_path, "north,south", seconds=900) as site:
            site.split({**document, "data": {**HERE, "clients": 2, "max_examples": 16}})
            site.client(0, "--accept", "accept.yaml")
            site.client(1)
            site.server("c.yaml", "--out", "run")

            # what starts Flower's server app dies, and the app with it
            site.wait(lambda: len(site.rounds("run")) >= 2, "round 1")
            (superexec,) = called("flower-superexec", site.pid("server"))
            os.kill(superexec, signal.SIGKILL)
            site.wait(lambda: len(site.rounds("run")) >= 4, "round 3")
            assert site.says("server", "SuperExec ended and is started again")
            assert site.says("server", "server app ended and is started again")
            assert all(entry["clients"] == [0, 1] for entry in site.rounds("run")[1:]), site.logs()

            # a service manager stops the server in the middle of a round
            started = descendants(site.pid("server"))
            site.signal("server", signal.SIGTERM)
            assert site.status("server") == 128 + signal.SIGTERM
            assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"
            site.wait(lambda: not running(started), "the end of the server's programs")
            journals = list((tmp_path / "run/checkpoints").glob("*.replies"))
            site.server("c.yaml", "--resume", "run")
            assert site.status("server") == 0, site.logs()
            assert [entry["clients"] for entry in site.rounds("run")] == [[], *[[0, 1]] * ROUNDS]

            # and its clients
            for name in ("north", "south"):
                started = descendants(site.pid(name))
                assert started
                site.signal(name, signal.SIGTERM)
                assert site.status(name) == 128 + signal.SIGTERM
                site.wait(lambda started=started: not running(started), f"the end of {name}'s programs")  # type: ignore[misc]
            assert list(temporary.glob("fedtune-*")) == [], journals

            # nothing of all this is for others, though the umask would let them
            own = [tmp_path / "run", tmp_path / "keys/server/flower"]
            own += [tmp_path / f"keys/clients/{name}/state" for name in ("north", "south")]
            files = [path for folder in own for path in (folder, *folder.rglob("*"))]
            assert [str(path) for path in files if stat.S_IMODE(path.lstat().st_mode) & 0o077] == []

            # what the run asked is on the terminal and in the record, with a line for each update
            assert site.says("north", "it trains bundled by fedavg (lora) on your")
            record = tmp_path / "keys/clients/north/state/record.jsonl"
            entries = [json.loads(line) for line in record.read_text().splitlines()]
            assert {entry["round"] for entry in entries if "round" in entry} == set(range(1, ROUNDS + 1))
            assert entries[0]["asked"]["trainable"] == "lora"
    finally:
        os.umask(before)
