"""From an installed package to a served model and one for others, as a terminal shows it.

Table:   the commands and what they print; docs/using.md, block transcript
Command: python reproduce/transcript.py transcript
Time:    two minutes
Needs:   curl
Result:  the held-out loss goes from 2.5737 to 2.3651; the answer over HTTP is that of the conversation
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, Entry, main

PORT = 8000  # as the page shows it; the port that is taken here is one that was free
SHOWN = re.compile(r"127\.0\.0\.1:\d+")
QUESTION = "Name the last word of the list. Words: light, sheep, cold, cat"
ASKED = {"model": "mine", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
CURL = "curl -s localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{asked}'"
RUN = "fedtune run mine.yaml data.clients=4 data.max_examples=400 method.rounds=2 --out runs/mine --quiet"
LIMIT_S = 300


def installed(folder: Path) -> dict[str, str]:
    """Builds the wheel and unpacks it into `folder`; an environment whose `fedtune` is that one alone."""
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w")
    subprocess.run((*command, folder, ROOT), check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    program = folder / "bin" / "fedtune"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(folder / 'site')!r})\n"
        "from fedtune.cli.main import main\nmain()\n"
    )
    program.chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }


def said(folder: Path) -> Iterator[tuple[str, str]]:
    """Each command of the page, run in a new folder inside `folder`, and what it prints."""
    environment, home = installed(folder), folder / "work"
    home.mkdir()

    def ran(command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command], cwd=home, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        if done.returncode or done.stderr:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    for command in (
        "fedtune init mine --template lora",
        RUN,
        "fedtune report runs/mine",
        f"echo '{QUESTION}' | fedtune chat runs/mine",
    ):
        yield command, ran(command)
    served = ["fedtune", "serve", "runs/mine", "--port", "0", "--quiet"]
    with subprocess.Popen(served, cwd=home, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = SHOWN.search(line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line}")
            yield f"fedtune serve runs/mine --port {PORT} &", SHOWN.sub(f"127.0.0.1:{PORT}", line)
            asked = json.dumps(ASKED)
            answer = ran(CURL.format(port=found[0].rpartition(":")[2], asked=asked))
            yield CURL.format(port=PORT, asked=asked), f"{answer}\n"
        finally:
            server.send_signal(signal.SIGTERM)
    if server.returncode:
        raise RuntimeError(f"the server ended with {server.returncode}")
    yield "kill %1", ""
    yield "fedtune push runs/mine ./mine-model", ran("fedtune push runs/mine ./mine-model")
    yield "ls mine-model", ran("ls mine-model")


def transcript() -> str:
    """All of it, as a terminal shows it."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [f"$ {command}\n{printed}" for command, printed in said(Path(folder))]
    lines = [line.rstrip() for line in "".join(parts).splitlines()]
    return "\n".join(["```text", *lines, "```"])


ENTRIES = {"transcript": Entry(transcript)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
