"""The forms in which a result is written out: PEFT's adapter, a whole model, GGUF."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune.core.temporary import temporary_folder
from fedtune.errors import InputError, short
from fedtune.federation.files import atomic_folder, disk_errors
from fedtune.federation.folder import refuse_existing
from fedtune.federation.results import result_folders
from fedtune.models.save import PEFT_CONFIG

PEFT, MERGED, GGUF = FORMATS = ("peft", "merged", "gguf")
CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp


def check_format(format: str | None, *, task: str, merge: bool = False) -> bool:
    """Whether a result becomes a whole model.

    Raises:
        InputError: The form is none, not `merge`'s, or not for models of this task.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if merge and format not in (None, MERGED):
        raise InputError(f"merge writes a whole model, and format is {format}; give one of them")
    if format == GGUF and task == "text-to-image":
        raise InputError(
            f"format {GGUF} is for language models, and this one makes pictures; take {MERGED}, a pipeline "
            "of diffusers, or leave it out"
        )
    return merge or format == MERGED


def require_adapter(run: Path) -> None:
    """Raises InputError if a run's result is no adapter of PEFT."""
    for folder in result_folders(run).values():
        if not (folder / PEFT_CONFIG).is_file() and not folder.name.startswith("adapemu"):
            raise InputError(
                f"{run} made a whole model, or an adapter that PEFT does not know; leave --format out for "
                "what it is"
            )


def write_gguf(run: Path, out: Path, export: Callable[[Path], Sequence[Path]]) -> list[Path]:
    """Writes a run's results as GGUF files into the folder `out`, with the converter of llama.cpp.

    Args:
        run: Its folder, for what is said.
        out: The folder, which must not hold anything.
        export: Writes the results into a folder as whole models; returns their folders.

    Returns:
        The files: model.gguf, and one by each other result's name.

    Raises:
        InputError: The converter is not installed, or does not know such a model; `out` is taken.
    """
    refuse_existing(out)
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise InputError(
            f"there is no {CONVERTER} among the programs (PATH); it comes with llama.cpp "
            "(https://github.com/ggml-org/llama.cpp). With its place put in, these commands do the same:\n"
            f"  fedtune export {run} --out {out}-merged --format merged\n"
            f"  python LLAMA.CPP/{CONVERTER} {out}-merged --outfile {out}/model.gguf"
        )
    written = []
    with temporary_folder() as home, disk_errors(f"export {out}"), atomic_folder(out) as new:
        whole = home / "whole"
        for folder in export(whole):
            name = "model.gguf" if folder == whole else f"{folder.name}.gguf"
            command = [sys.executable, converter, str(folder), "--outfile", str(new / name)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode or not (new / name).is_file():
                said = " ".join((done.stderr or done.stdout).split())
                raise InputError(
                    f"{CONVERTER} ended with status {done.returncode}: {short(said[-600:], 500)}"
                )
            written.append(out / name)
    return written
