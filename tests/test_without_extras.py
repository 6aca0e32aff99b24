"""What the base installation alone can do: all but what names the extra that it needs."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = (  # what the extras of pyproject.toml bring, by the names under which it is imported
    *(
        "bitsandbytes",
        "Crypto",
        "cryptography",
        "diffusers",
        "dp_accounting",
        "flwr",
        "lm_eval",
        "matplotlib",
    ),
    *("PIL", "ray", "rouge", "mlflow", "tensorboard", "trackio", "wandb"),
    *("scipy", "sklearn", "IPython", "ipykernel", "nbclient"),  # what those bring along, and notebooks
)
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))  # as if none of them were installed
from fedtune.cli.main import main
for arguments in {{commands!r}}:
    sys.argv = ["fedtune", *arguments.split()]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
SMALL = "method.rounds=1 data.clients=2 data.max_examples=60 evaluation.max_examples=8"
FEW = f"{SMALL} --quiet"
SET = f"--set {SMALL.replace(' ', ' --set ')} --quiet"
COMMANDS = (
    f"run demo {FEW} --out run",
    f"run demo {FEW.replace('rounds=1', 'rounds=2')} --resume run",
    "eval run --tasks loss",
    "generate run hello",
    "export run --out exported",
    "status run",
    "validate demo fedkseed fedbiot fedcybgd",
    "plan demo",
    "data demo",
    "ls methods",
    "init mine --template lora",
    "cp fedkseed",
    "chat run",
    "push run ./pushed",
    f"run fedkseed {FEW.replace('rounds=1', 'rounds=2')} method.local_steps=2 method.seeds=8 --out kseed",
    "replay kseed --round 1 --out round-1",
    f"diagnose demo {FEW.replace('rounds=1', 'rounds=2')} --clients 2 --steps 8",
    f"compare demo --no-references --out compared {SET}",
    f"sweep demo method.lr=1e-3,3e-3 --out swept {SET}",
)
LEFT = (  # what they made
    *("run/summary.json", "run/evaluations.jsonl", "exported/config.json", "mine.yaml", "fedkseed.yaml"),
    *("pushed/README.md", "kseed/summary.json", "round-1/config.json", "compared", "swept"),
)


def ended(commands: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """As `fedtune` with each of the commands; what is asked is "Add 2 and 3."."""
    program = [sys.executable, "-c", PROGRAM.format(commands=commands)]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, input="Add 2 and 3.\n")


def test_the_base_installation_runs_without_any_extra(tmp_path: Path) -> None:
    done = ended(COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [name for name in LEFT if not (tmp_path / name).exists()] == []
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    serves(tmp_path)


def serves(folder: Path) -> None:
    """A request to `fedtune serve`, which a signal then ends."""
    program = [sys.executable, "-c", PROGRAM.format(commands=("serve run --port 0",))]
    with subprocess.Popen(
        program, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        line = next((line for line in server.stdout if "/v1" in line), "")
        try:
            port = int(line.rpartition(":")[2].split("/")[0])
            asking = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = {
                "model": "run",
                "messages": [{"role": "user", "content": "Add 2 and 3."}],
                "max_tokens": 4,
            }
            header = {"Content-Type": "application/json"}
            asking.request("POST", "/v1/chat/completions", json.dumps(body), header)
            answer = json.loads(asking.getresponse().read())
            assert answer["choices"][0]["message"]["role"] == "assistant", answer
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("commands", "extra"),
    [
        ((f"run demo federation.secure_aggregation={{}} {FEW} --out run",), "privacy"),
        ((f"run demo {FEW} --out run", "report run --out page.html"), "report"),
    ],
)
def test_what_needs_an_extra_names_it(commands: tuple[str, ...], extra: str, tmp_path: Path) -> None:
    done = ended(commands, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"fedtune[{extra}]" in done.stderr
