"""What is tested on a pretended GPU, in processes of their own.

PyTorch makes the threads of its backward passes with the first of them, one for each kind of device that is
known then. Another test of this process may have had that before there is the pretended one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretended_mistakes.py", "pretended_runs.py"])
def test_on_a_pretended_gpu(name: str, tmp_path: Path) -> None:
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "of"]
    done = subprocess.run([*command, file], capture_output=True, text=True, cwd=file.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
