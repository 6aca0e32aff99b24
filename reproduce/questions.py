"""What people ask, most of it after an error: the command, what it says, and what to do.

Each command is run, in a folder with the files that its question names.

Table:   questions with the error that brings them up; docs/questions.md, whole file
Command: python reproduce/questions.py questions
Time:    half a minute
Needs:   nothing
Result:  a section a question; a test holds what is printed to the program
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, Entry, main

INTRO = """\
# Questions

<!-- Made by reproduce/questions.py, which runs each command. Do not edit. -->

Most begin with an error. It says what is wrong, what was got, what is allowed
and what to do; this page says why.
"""
WIDTH = 100


@dataclass(frozen=True)
class Question:
    """One section.

    Attributes:
        asked: Its title.
        answer: What there is to know.
        command: Arguments of `fedtune`, where an error brings the question up.
        files: What lies in the folder of the command, by name.
    """

    asked: str
    answer: str
    command: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


QUESTIONS = (
    Question(
        "A setting is not known",
        "Settings of other tools have other names. The error lists those of this place, and names the one"
        " that is meant where it knows it; [configuration.md](configuration.md) has all of them, with "
        "their defaults. `fedtune validate` reads no weights and no data, so it is the first thing to "
        "try.",
        "validate demo method.learning_rate=1e-3",
    ),
    Question(
        "My data have other keys",
        "`data.fields` says which key is what; several can be joined, as in `instruction: '{question} "
        "{context}'` ([data.md](data.md)). `fedtune data CONFIG` then shows one example as the model sees"
        " it, with what has loss.",
        "run demo data.train=rows.jsonl --quiet",
        {"rows.jsonl": '{"question": "2 + 3?", "answer": "5"}\n{"question": "1 + 1?", "answer": "2"}\n'},
    ),
    Question(
        "There are fewer examples than clients",
        "A client without an example would have nothing to train on, and its weight in the mean "
        "would be zero.",
        "run demo data.clients=5000 --quiet",
    ),
    Question(
        "A block of settings goes with another choice",
        "Nothing that is written is ignored in silence: what cannot have an effect is an error, so that a"
        " run is what its file says.",
        "validate demo method.lora.rank=4",
    ),
    Question(
        "Can I train all weights of a 4-bit model?",
        "No: a step is smaller than the distance between two of sixteen values. What is added to them is "
        "trained instead ([quantized.md](quantized.md)). All weights of a large model in little memory "
        "are FedKSeed's ([fedkseed.md](fedkseed.md)) and FedCyBGD's ([fedcybgd.md](fedcybgd.md)).",
        "validate demo model.quantization=nf4",
    ),
    Question(
        "The model is not on this machine",
        "A model is a folder, a name on the Hugging Face hub, or `bundled`. A path begins with `.` or "
        "`/`, or exists. With `HF_HUB_OFFLINE=1` nothing is asked for on the network; a model that was "
        "downloaded before is found.",
        "run demo model.name=./models/mine --quiet",
    ),
    Question(
        "The loss became NaN, or a round's result is not taken",
        "The rate is too high for this model: halve `method.lr` until it holds, or let `fedtune sweep "
        "CONFIG method.lr=1e-4,3e-4,1e-3 --validation 0.1` find it. A round whose result is worse than "
        "`federation.max_loss_jump` allows is refused and the state before it kept, so nothing is lost.",
        "run demo method.lr=1000 data.clients=3 data.max_examples=400 --quiet",
    ),
    Question(
        "The folder is not a run",
        "`fedtune run` prints the folder that it wrote; by default `runs/NAME`, and with a number "
        "where that is taken.",
        "report runs/demo",
    ),
    Question(
        "Others shall reach a served model",
        "An address that other machines reach needs a key, and belongs behind a proxy that speaks "
        "TLS ([using.md](using.md)).",
        "serve RUN --host 0.0.0.0",
        {"RUN": ""},
    ),
    Question(
        "It needs more memory than there is",
        "`fedtune plan CONFIG` says the peak of client, server and evaluation before anything is loaded, "
        "by part. What makes each smaller, in the order in which to try it: "
        "`method.gradient_checkpointing: full`, a smaller `method.batch_size` with "
        "`method.gradient_accumulation`, `model.dtype: bfloat16`, `model.quantization: nf4` with LoRA, "
        "`method.offload_params: disk`, another method ([choosing.md](choosing.md)). For evaluation, "
        "`evaluation.memory`.",
    ),
    Question(
        "The loss falls and accuracy does not",
        "Accuracy counts an answer only if all of it is right, so it moves late; the interval behind it "
        "in the table says how much of a difference chance makes. A row that says *random head* is a "
        "classifier before its head has learned anything.",
    ),
    Question(
        "Two machines give different numbers",
        "One machine gives the same bits every time, also after `--resume`, with several workers, and "
        "over the network. Another processor, number of threads or version of PyTorch rounds otherwise; "
        "`environment.json` of a run has all of them. `run.deterministic: strict` is for GPUs.",
    ),
    Question(
        "What leaves a client?",
        "What the method sends, and nothing else: `wire.jsonl` has every message with its bytes. "
        "[privacy.md](privacy.md) says how the server is kept from single updates and what differential "
        "privacy adds; [SECURITY.md](../SECURITY.md) what is promised to whom.",
    ),
)


def printed(question: Question) -> str:
    """What the question's command prints, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in question.files.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "fedtune.cli.main", *shlex.split(question.command)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (2, 3) or done.stdout:
        raise RuntimeError(f"{question.command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stderr.strip().replace(f"{folder}/", "")


def section(question: Question, said: str) -> str:
    """A question's section, with what its command has said."""
    parts = [f"## {question.asked}\n"]
    if question.command:
        lines = [f"$ fedtune {question.command}"]
        for line in said.splitlines():
            lines += textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False)
        parts.append("\n".join(["```text", *lines, "```\n"]))
    parts.append("\n".join(textwrap.wrap(question.answer, 120, break_long_words=False)) + "\n")
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    return "\n".join([INTRO, *(section(one, printed(one) if one.command else "") for one in QUESTIONS)])


ENTRIES = {"questions": Entry(page)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
