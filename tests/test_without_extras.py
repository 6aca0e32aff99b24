"""What the base installation alone can do: all but what names the extra that it needs."""

from __future__ import annotations

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
FEW = "method.rounds=1 data.clients=2 data.max_examples=60 evaluation.max_examples=8 --quiet"
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
)


def ended(commands: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(commands=commands)
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


def test_the_base_installation_runs_without_any_extra(tmp_path: Path) -> None:
    done = ended(COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exported" / "config.json").is_file()


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
