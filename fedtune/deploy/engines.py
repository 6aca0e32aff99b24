"""Other programs that serve a run's result: the server of transformers, and vLLM.

Each is given a whole model's folder, whose tokenizer has the run's template as its chat template, and is run
as it is: what it does with requests (their bounds, other fields, several at a time) is its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fedtune.core.temporary import temporary_folder
from fedtune.deploy.http_json import HERE
from fedtune.errors import InputError, ProgramError

ENDING_S = 20.0
TRANSFORMERS, VLLM = "transformers", "vllm"


def engine_command(engine: str, name: str, host: str, port: int) -> list[str]:
    """The command line of a program that serves a model's folder.

    Args:
        engine: TRANSFORMERS or VLLM.
        name: Of the folder, seen from where the program runs: transformers' requests have to call it so.
        host: Address to bind.
        port: Its port.

    Raises:
        InputError: The program is not installed.
    """
    where = ["--host", host, "--port", str(port)]
    if engine == VLLM:
        if (program := shutil.which("vllm")) is None:
            raise InputError("there is no program vllm; pip install vllm, or leave --engine out")
        return [program, "serve", name, *where]
    if missing := [package for package in ("fastapi", "uvicorn", "openai") if find_spec(package) is None]:
        raise InputError(
            f"transformers' server needs {', '.join(missing)}; pip install 'transformers[serving]', or leave "
            "--engine out"
        )
    return [sys.executable, "-c", _TRANSFORMERS, "serve", name, *where]


def serve_with(
    engine: str,
    export: Callable[[Path], Sequence[Path]],
    name: str,
    *,
    result: str,
    host: str,
    port: int,
    key: str | None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Writes a result as a whole model into a folder for the time being and serves it until a signal comes.

    Args:
        engine: As of `engine_command`.
        export: Writes a run's results into a folder, as whole models.
        name: What requests call the model.
        result: Which of the results: `global`, or the name of a folder inside.
        host: Address to bind; one that other machines reach needs a key.
        port: Its port.
        key: What callers must say; vLLM is told in its environment.
        environment: The program's; None: this process's.

    Raises:
        InputError: The program is not installed or knows no key, or the result is no whole model.
        ProgramError: It ended by itself.
    """
    if engine == TRANSFORMERS and (key is not None or host not in HERE):
        raise InputError(
            f"transformers' server knows no key, so it is for {HERE[0]} and without one; leave --engine out "
            "for fedtune's own, or take vllm"
        )
    if host not in HERE and key is None:
        raise InputError(f"{host} can be reached from other machines, and there is no key; give --key-file")
    called = name if result == "global" else f"{name}/{result}"
    command = engine_command(engine, called, host, port)  # before a large folder is written
    with temporary_folder() as home:
        export(home / name)
        told = dict(os.environ if environment is None else environment)
        told |= {"VLLM_API_KEY": key} if key is not None else {}
        print(f"{engine} serves {called} at http://{host}:{port}/v1", flush=True)
        with subprocess.Popen(command, env=told, cwd=home) as program:
            try:
                status = program.wait()
            except KeyboardInterrupt:
                program.terminate()
                with suppress(subprocess.TimeoutExpired):
                    program.wait(ENDING_S)
                program.kill()
                return
    raise ProgramError(f"{engine} ended with status {status}; what it said stands above")


_TRANSFORMERS = "from transformers.cli.transformers import main; main()"
