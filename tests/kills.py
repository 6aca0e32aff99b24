"""Kills a run, a simulation's processes, a server or its clients at random moments, and compares bits.

    python tests/kills.py run 100
    python tests/kills.py worker 100
    python tests/kills.py server 100
    python tests/kills.py client 100

Each is a table by hand: `run` kills a federation in one process, five methods in turn; `worker` a process of
Flower's simulation; `server` and `client` one side of a federation of three over TLS on loopback, one run of
many rounds, where who was killed is started again at once. Every run must end with the bits of one that
nobody touched. The moments are drawn from a seed (--seed); what was killed and how it ended is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import command as commands
from command import Command, fedtune, outcome, write_config
from deployed import Site, descendants
from test_deployment import HERE, METHODS, THERE, config

TURNS = ("fedavg-lora", "fedkseed", "fedbiot", "fedcybgd", "scaffold")
CLIENTS = ("north", "south", "east")


def same(found: Path, wanted: Path) -> bool:
    """Whether two run folders hold the same weights, rounds and scores."""
    keys = ("final", "rounds")
    left, right = outcome(found), outcome(wanted)
    return all(left[key] == right[key] for key in keys)


def kill_runs(folder: Path, count: int, draw: random.Random) -> Counter[str]:
    """Each run is killed once, at any moment of its life, and resumed."""
    seen: Counter[str] = Counter()
    whole: dict[str, tuple[Path, float]] = {}
    for number in range(count):
        name = TURNS[number % len(TURNS)]
        here = folder / f"{name}-{number}"
        here.mkdir()
        write_config(here / "c.yaml", config(name, HERE))
        if name not in whole:
            started = time.monotonic()
            assert fedtune("run", "c.yaml", "--out", "whole", "--quiet", cwd=here).status == 0
            whole[name] = here / "whole", time.monotonic() - started
        reference, seconds = whole[name]
        moment = time.monotonic() + draw.uniform(0, seconds)
        command = Command("run", "c.yaml", "--out", "run", "--quiet", cwd=here)
        command.when(lambda moment=moment: time.monotonic() > moment, signal.SIGKILL)  # type: ignore[misc]
        seen[where(here / "run")] += 1
        done = fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=here)
        seen["same bits" if done.status == 0 and same(here / "run", reference) else f"OTHER {name}"] += 1
        print(f"{number + 1}: {dict(seen)}", flush=True)
        shutil.rmtree(here / "run", ignore_errors=True)
    return seen


def where(run: Path) -> str:
    """What a run had done when it was killed."""
    if not run.exists():
        return "killed before its folder was there"
    if (run / "summary.json").exists():
        return "killed after its end"
    journals = [path for path in run.glob("checkpoints/*.replies") if path.stat().st_size]
    return "killed in a round, with replies" if journals else "killed between replies"


def kill_workers(folder: Path, count: int, draw: random.Random) -> Counter[str]:
    """A process of the simulation is killed; the run ends, or says how it goes on, and is resumed."""
    seen: Counter[str] = Counter()
    document = config("fedavg-lora", HERE)
    write_config(folder / "c.yaml", document)
    flower = ("transport={name: flower-simulation, workers: 2}", "--quiet")
    started = time.monotonic()
    assert fedtune("run", "c.yaml", *flower, "--out", "whole", cwd=folder).status == 0
    seconds = time.monotonic() - started
    for number in range(count):
        shutil.rmtree(folder / "run", ignore_errors=True)
        moment = time.monotonic() + draw.uniform(0, seconds)
        command = Command("run", "c.yaml", *flower, "--out", "run", cwd=folder)

        def struck(command: Command = command, moment: float = moment) -> bool:
            if time.monotonic() < moment:
                return False
            names = [(pid, name) for pid in descendants(command.pid) if "ray::" in (name := called(pid))]
            if not names:  # none was started yet, or they are gone: then the run ends by itself
                return False
            pid, name = draw.choice(names)
            seen[f"killed {name.split('(')[0].split('.')[0]}"] += 1
            kill(pid)
            return True

        while command.alive and not struck():
            time.sleep(0.01)
        ended = command.wait()
        seen[f"status {ended.status}"] += 1
        if ended.status not in (0, 3):  # neither done nor ended as a fault ends it
            print(ended.err[-3000:], flush=True)
        if ended.status:
            ended = fedtune("run", "c.yaml", *flower, "--resume", "run", cwd=folder)
        seen["same bits" if ended.status == 0 and same(folder / "run", folder / "whole") else "OTHER"] += 1
        print(f"{number + 1}: {dict(seen)}", flush=True)
    return seen


def called(pid: int) -> str:
    """What a process calls itself; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_sites(folder: Path, count: int, draw: random.Random, side: str) -> Counter[str]:
    """One run over TLS of as many rounds as it takes for that many kills of one side."""
    seen: Counter[str] = Counter()
    rounds = 2 * count
    there = config("fedavg-lora", THERE)
    method: dict[str, Any] = {**METHODS["fedavg-lora"], "rounds": rounds}
    there |= {"method": method, "federation": {"deadline_s": 600.0, "quorum": 3}}
    write_config(folder / "c.yaml", there)
    here = {**config("fedavg-lora", HERE), "method": method}
    write_config(folder / "here.yaml", here)
    with Site(folder, ",".join(CLIENTS), seconds=6 * 3600) as site:
        site.split(here)
        for number in range(len(CLIENTS)):
            site.client(number)
        site.server("c.yaml", "--out", "run")
        for done in range(count):
            before = len(site.rounds("run"))
            site.wait(lambda before=before: len(site.rounds("run")) > before, "a round")  # type: ignore[misc]
            if len(site.rounds("run")) > rounds:
                break
            time.sleep(draw.uniform(0, 4))
            if side == "server":
                site.kill("server")
                seen[where(folder / "run")] += 1
                site.server("c.yaml", "--resume", "run")
            else:
                number = draw.randrange(len(CLIENTS))
                site.kill(CLIENTS[number])
                seen[f"killed {CLIENTS[number]}"] += 1
                site.client(number)
            print(f"{done + 1}: round {before}", flush=True)
        seen[f"server's status {site.status('server')}"] += 1
    assert fedtune("run", "here.yaml", "--out", "whole", "--quiet", cwd=folder).status == 0
    found, wanted = outcome(folder / "run"), outcome(folder / "whole")
    seen["same bits" if found["final"] == wanted["final"] else "OTHER BITS"] += 1
    clients = [[entry["clients"] for entry in run["rounds"]] for run in (found, wanted)]
    seen["nobody left out" if clients[0] == clients[1] else "SOMEBODY LEFT OUT"] += 1
    return seen


def main() -> None:
    """Reads the command line, kills, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "worker", "server", "client"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    commands.LIMIT_S = 900  # it may run beside other things
    draw = random.Random(f"{given.what} {given.seed}")
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        if given.what == "run":
            seen = kill_runs(folder, given.count, draw)
        elif given.what == "worker":
            seen = kill_workers(folder, given.count, draw)
        else:
            seen = kill_sites(folder, given.count, draw, given.what)
    print(json.dumps(dict(sorted(seen.items())), indent=1))


if __name__ == "__main__":
    main()
