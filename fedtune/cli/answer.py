"""`fedtune generate` and `fedtune chat`: a run's result answers in the template it was tuned in, or draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import fedtune
from fedtune.cli.display import Json, Plugin, print_json
from fedtune.errors import InputError

TUNED, BEGAN = "global", "zero-shot"  # names of a run's models

Finished = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Moved = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Where inputs were moved to, as model.name=/data/base; or a setting.",
    ),
]
Tokens = Annotated[
    int | None, typer.Option(min=1, help="The most tokens of an answer; default: the run's, or 64.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token each time; else drawn.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens with this probability in sum.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draws.")]
Name = Annotated[
    str, typer.Option(help="Which of the run's models; client-0000 where each client has its own.")
]
Beside = Annotated[bool, typer.Option("--zero-shot", help="Also what the model said before it was tuned.")]


def generate(
    run: Finished,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Instructions; without any, the lines of standard input."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file to write, of a text-to-image model; must not exist.")
    ] = None,
    zero_shot: Beside = False,
    max_new_tokens: Tokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    name: Name = TUNED,
    moved: Moved = None,
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """Answer prompts with what a run made, in the template that it was tuned in.

    A model that was tuned on plain texts continues them; a classifier names the class; a text-to-image model
    draws one prompt into --out.

    Example: fedtune generate runs/demo "Add 2 and 3." --zero-shot

    Example: fedtune generate runs/mine "a photo of sks dog in the snow" --out picture.png
    """
    asked = list(prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()])
    if not asked:
        raise InputError(f'there is no prompt; give one, as in fedtune generate {run} "Add 2 and 3."')
    opened = fedtune.open(run, *moved or [])
    if opened.config.model.task == "text-to-image":
        if zero_shot or max_new_tokens is not None or temperature or top_p != 1.0:
            raise InputError(
                f"{run} makes pictures: --zero-shot (there is --name {BEGAN}), --max-new-tokens, "
                "--temperature and --top-p are for models that answer in words"
            )
        if out is None or len(asked) > 1:
            raise InputError(f"{run} makes pictures: give one prompt, and --out, the PNG file to write")
        written = opened.draw_to(asked[0], out, seed=seed, name=name)
        if as_json:
            print_json([{"prompt": asked[0], name: str(written)}])
        else:
            print(written)
        return
    if out is not None:
        raise InputError(f"--out is for text-to-image models, and {run} answers in words")
    drawn = _draws(max_new_tokens, temperature, top_p, seed)
    names = [BEGAN, name] if zero_shot else [name]
    found = {each: opened.generate(asked, name=each, **drawn) for each in names}
    rows = [
        {"prompt": prompt} | {each: answers[place] for each, answers in found.items()}
        for place, prompt in enumerate(asked)
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        if len(rows) > 1:
            print(f"> {row['prompt']}")
        for each in names:
            print(f"{each}: {row[each]}" if zero_shot else row[each])


def chat(
    run: Finished,
    max_new_tokens: Tokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    name: Name = TUNED,
    moved: Moved = None,
    plugin: Plugin = None,
) -> None:
    """Talk with what a run made, a line a turn; an empty line begins anew, Ctrl-D ends.

    Each answer sees the turns before it, in the template that the model was tuned in.

    Example: fedtune chat runs/demo
    """
    opened = fedtune.open(run, *moved or [])
    if (task := opened.config.model.task) != "causal-lm":
        raise InputError(f"{run} is of task {task} and holds no conversation; use fedtune generate {run}")
    turns: list[dict[str, str]] = []
    drawn = _draws(max_new_tokens, temperature, top_p, seed)
    opened.model(name)  # loaded, and what is wrong with it said, before anybody types
    while (line := _line()) is not None:
        if not line:
            turns = []
            continue
        turns.append({"role": "user", "content": line})
        try:
            (said,) = opened.generate([{"messages": turns}], name=name, **drawn)
        except InputError as error:  # a conversation that the model cannot see whole
            turns.pop()
            print(f"fedtune: {error}; an empty line begins anew", file=sys.stderr)
            continue
        turns.append({"role": "assistant", "content": said})
        print(said, flush=True)


def _draws(max_new_tokens: int | None, temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """The options of an answer as `Run.generate` takes them."""
    return {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}


def _line() -> str | None:
    """What the user typed, without spaces around it; None at the end. A prompt only where someone types."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
