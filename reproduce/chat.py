"""A chat model on conversations: made, tuned by LoRA, FedKSeed and FedBiOT, and judged in its template.

There is no chat model at hand, so one is made: instruct-7m trained on conversations of Alpaca, of one and two
turns, in a template of its own, which goes into the tokenizer of the result. The federations know nothing of
that template but what the tokenizer says (data.template: auto). Each of their eight clients has the Dolly
conversations of one category.

Table:   held-out loss of the assistant's tokens and a judge's marks, before and after; docs/chat.md,
         block chat-methods
Command: python reproduce/chat.py chat-methods
Time:    45 minutes
Needs:   ../shared, extra quant
Result:  LoRA 3.5515 before, 3.5310 after three rounds and 3.5363 after one; on NF4 3.5598, 3.5388 and 3.5443;
         FedKSeed 3.5503 and 3.5514, FedBiOT 3.5420 and 3.5413; marks 3.9551 before, in three rounds 4.6864
         with LoRA, 4.0251 with FedKSeed, 4.3134 with FedBiOT, and on NF4 4.1299 and 4.4402
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import DATA, DOLLY, MODELS, RESULTS, Entry, Prepared, main, spread, table
from similarity_judge import ENCODER, NAME, as_questions, judging, mark

import fedtune

HERE = RESULTS / "chat"
MODEL, TEMPLATE = HERE / "model", HERE / "turns.jinja"
MADE_OF, CLIENTS, HELD_OUT = HERE / "alpaca.jsonl", HERE / "dolly.jsonl", HERE / "held_out.jsonl"
ALPACA = DATA / "alpaca" / "alpaca_subset.jsonl"
SEEDS = (0, 1, 2)
TURNS = """\
{{ bos_token }}{% for message in messages %}### {{ message.role }}
{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}{% if add_generation_prompt %}### assistant
{% endif %}"""
MADE, EACH, KEPT = 1200, 12, 6  # conversations: for the model, of a client, held out of a category
LORA = {"trainable": "lora", "lora": {"rank": 8}}
TRAINING = {"batch_size": 8, "lr": 5e-3}
PUBLIC = {"public": {"source": str(MADE_OF), "max_examples": 200}}  # what the emulator is aligned on
FEDBIOT: dict[str, Any] = {
    "name": "fedbiot",
    "adapter_layers": 2,
    "layer_dropout": 0.2,
    "alignment": {"steps_before": 40, "steps": 5},
    **TRAINING,
}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, three rounds": {"method": {"name": "fedavg", "rounds": 3, "local_epochs": 1, **LORA, **TRAINING}},
    "LoRA, one shot": {"method": {"name": "fedavg", "rounds": 1, "local_epochs": 3, **LORA, **TRAINING}},
    "NF4 and LoRA, three rounds": {
        "model": {"quantization": "nf4"},
        "method": {"name": "fedavg", "rounds": 3, "local_epochs": 1, **LORA, **TRAINING},
    },
    "NF4 and LoRA, one shot": {
        "model": {"quantization": "nf4"},
        "method": {"name": "fedavg", "rounds": 1, "local_epochs": 3, **LORA, **TRAINING},
    },
    "FedKSeed, three rounds": {
        "method": {"name": "fedkseed", "rounds": 3, "local_steps": 16, "batch_size": 8, "lr": 1e-4}
    },
    "FedKSeed, one round": {
        "method": {"name": "fedkseed", "rounds": 1, "local_steps": 48, "batch_size": 8, "lr": 1e-4}
    },
    "FedBiOT, three rounds": {"data": PUBLIC, "method": {**FEDBIOT, "rounds": 3, "local_steps": 5}},
    "FedBiOT, one round": {"data": PUBLIC, "method": {**FEDBIOT, "rounds": 1, "local_steps": 15}},
}


def conversations(path: Path) -> None:
    """Writes the conversations, and the template."""
    TEMPLATE.parent.mkdir(parents=True, exist_ok=True)
    TEMPLATE.write_text(TURNS, encoding="utf-8")
    _write(MADE_OF, _of_alpaca())
    by_category: dict[str, list[Any]] = {}
    for row in _rows(DOLLY):
        if len(row["instruction"]) + len(row["context"]) + len(row["response"]) < 400:
            by_category.setdefault(row["category"], []).append(row)
    train, held_out = list[Any](), list[Any]()
    for category, rows in sorted(by_category.items()):
        random.Random(f"dolly {category}").shuffle(rows)
        said = [_conversation([row], "context", "response") | {"category": category} for row in rows]
        train += said[:EACH]
        held_out += said[EACH : EACH + KEPT]
    _write(HELD_OUT, held_out)
    _write(path, train)  # last: its being there says that all are


def _of_alpaca() -> Iterator[dict[str, Any]]:
    rows = [row for row in _rows(ALPACA) if 20 < len(row["output"]) < 300]
    random.Random("alpaca").shuffle(rows)
    left = iter(rows)
    for number in range(MADE):
        yield _conversation([next(left) for _ in range(1 + number % 2)], "input", "output")


def _conversation(rows: list[Any], about: str, answer: str) -> dict[str, Any]:
    turns = []
    for row in rows:
        question = "\n".join(text for text in (row["instruction"], row.get(about)) if text)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": row[answer]}]
    return {"messages": turns}


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat_model(path: Path) -> None:
    """Trains instruct-7m on the conversations, all weights, in one place."""
    config = {
        "model": {"name": str(MODELS / "instruct-7m"), "dtype": "float32"},
        "data": {"train": str(MADE_OF), "template": str(TEMPLATE), "max_length": 256, "clients": 1},
        "method": {"name": "centralized", "trainable": "full", "batch_size": 8, "lr": 5e-4},
        "evaluation": {"tasks": ["loss"], "max_examples": 100},
    }
    done = fedtune.run(config, out=HERE / "making", resume=True)
    done.export(path, merge=True)


def talks() -> list[list[str]]:
    """Of each held-out conversation the question, and the answer that people wrote."""
    return [[turn["content"] for turn in row["messages"]] for row in _rows(HELD_OUT)]


def marked(target: fedtune.Run | Path, url: str, *overrides: str) -> float:
    """The judge's mean mark of the answers to the held-out questions, through the task mt-bench."""
    files = as_questions(HERE, talks(), DATA / "mt_bench" / "judge_prompts.jsonl")
    own = [
        f"evaluation.judge={{url: {url}, model: {NAME}}}",
        f"evaluation.files={json.dumps(files)}",
        "evaluation.max_new_tokens=24",
        "evaluation.bootstrap=0",
    ]
    found = fedtune.evaluate(target, ["mt-bench"], *own, *overrides)["scores"]
    return float(next(iter(found.values()))["mt-bench"]["score"])


def ends_of_the_scale() -> tuple[float, float]:
    """What the judge gives the answer that people wrote to the next question, and to the question itself."""
    answers = [answer for _, answer in talks()]
    others = [*answers[1:], answers[0]]
    pairs = (zip(others, answers, strict=True), zip(answers, answers, strict=True))
    other, own = (statistics.fmean(mark(*pair) for pair in each) for each in pairs)
    return other, own


def scores(way: str, seed: int) -> tuple[fedtune.Run, float, float, float]:
    """A run; its loss of the assistant's held-out tokens before and after, and Rouge-L after."""
    more = WAYS[way]
    config = {
        "seed": seed,
        "model": {"name": str(MODEL), "dtype": "float32", **more.get("model", {})},
        "data": {
            "train": str(CLIENTS),
            "clients": None,
            "partition": {"name": "by-field"},
            "holdout": {"source": str(HELD_OUT)},
            "max_length": 128,
            **more.get("data", {}),
        },
        "method": more["method"],
        "evaluation": {"tasks": ["loss", "rouge-l"], "every": 0, "max_new_tokens": 24, "bootstrap": 0},
    }
    name = way.lower().replace(",", "").replace(" ", "-")
    done = fedtune.run(config, out=HERE / f"{name}-{seed}", resume=True)
    before = done.summary["zero_shot"]["loss"]["loss"]
    return done, before, done.scores["loss"]["loss"], done.scores["rouge-l"]["rouge_l"]


def methods() -> str:
    """A row a way."""
    rows = []
    with judging() as url:
        for way, settings in WAYS.items():
            held = settings.get("model", {}).get("quantization", "none")
            before = marked(MODEL, url, f"model.quantization={held}", "model.dtype=float32")
            found = list[tuple[float, ...]]()
            for seed in SEEDS:
                done, *numbers = scores(way, seed)
                found.append((*numbers, before, marked(done, url)))
            rows.append([way, *(spread(column) for column in zip(*found, strict=True))])
    other, own = ends_of_the_scale()
    scale = (
        f"The judge's scale: the answer that people wrote to the next question has {other:.2f}, the one to "
        f"the question itself {own:.2f}."
    )
    heads = ["", "loss before", "loss after", "Rouge-L after", "mark before", "mark after"]
    return f"{table(heads, rows)}\n\n{scale}"


READY = [
    Prepared("conversations of Alpaca and Dolly, and a template", CLIENTS, conversations),
    Prepared("a chat model, made of instruct-7m", MODEL, chat_model),
]
NEEDS: list[Path | str] = [ALPACA, DOLLY, MODELS / "instruct-7m", ENCODER, "bitsandbytes"]
ENTRIES = {"chat-methods": Entry(methods, READY, needs=NEEDS)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
