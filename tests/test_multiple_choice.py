"""Questions with choices: the likeliest letter, by hand and by a log-softmax over whole logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_models import llama
from chat_formats import FORMATS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import fedtune
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation.registry import suited
from fedtune.evaluation.tasks import evaluate
from fedtune.evaluation.types import EvalSettings
from fedtune.models.load import load_tokenizer

BUNDLED = load_tokenizer("bundled", Path("."))


def settings(**changes: Any) -> EvalSettings:
    plain: dict[str, Any] = {"template": "plain", "loss_on": "response", "max_length": 64, "bootstrap": 0}
    return EvalSettings(**plain | changes)


def question(letter: str, count: int, category: str = "") -> Example:
    lines = "\n".join(f"{name}. text" for name in "ABCDEFGH"[:count])
    return Example(f"Which?\n{lines}", "", letter, category, choices=count)


def test_by_hand() -> None:
    """A model that says the same everywhere, likeliest w, then C, then B and A alike."""
    words = ["<pad>", "<s>", "</s>", "w", "A", "B", "C"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=7, n_positions=64, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.lm_head.weight[:, 0] = torch.tensor([0.0, 0.0, 9.0, 8.0, 1.0, 1.0, 3.0])
    examples = [
        question("A", 2, "two"),  # A and B alike: the first
        question("B", 2, "two"),
        question("C", 3, "three"),
        question("A", 3, "three"),
        question("C", 3),
    ]
    found = evaluate(model, tokenizer, examples, ["multiple-choice"], settings())["multiple-choice"]
    assert found["accuracy"] == 3 / 5
    assert found["accuracy/two"] == 1 / 2
    assert found["accuracy/three"] == 1 / 2


@pytest.mark.parametrize("template", ["plain", "alpaca", "chat"])
def test_a_log_softmax_over_whole_logits_chooses_the_same(template: str) -> None:
    tokenizer = FORMATS["Qwen 3"].tokenizer() if template == "chat" else BUNDLED
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2).eval()
    examples = [question("ABCDEFGH"[i % n], n) for n in (2, 3, 5, 8) for i in range(n)]
    right = []
    for example in examples:
        letters = "ABCDEFGH"[: example.choices]
        if template == "plain":
            before = f"{example.instruction}\nAnswer:"
        elif template == "alpaca":
            before = (
                "Below is an instruction that describes a task. Write a response that appropriately "
                f"completes the request.\n\n### Instruction:\n{example.instruction}\n\n### Response:"
            )
        else:
            before = f"<|im_start|>user\n{example.instruction}<|im_end|>\n<|im_start|>assistant\n"
        logs = []
        for letter in letters:
            answer = {"plain": " ", "alpaca": "", "chat": "<think>\n\n</think>\n\n"}[template] + letter
            prompt = tokenizer(before, add_special_tokens=False).input_ids
            if template != "chat" and tokenizer.bos_token_id is not None:
                prompt = [tokenizer.bos_token_id, *prompt]
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
            rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
            logs.append(float(sum(rows[at, token] for at, token in enumerate(ids))))
        right.append(letters[max(range(len(letters)), key=logs.__getitem__)] == example.output)
    assert 0 < sum(right) < len(right)
    for batch_size in (1, 64):
        how = settings(template=template, max_length=250, batch_size=batch_size)
        found = evaluate(model, tokenizer, examples, ["multiple-choice"], how)["multiple-choice"]
        assert found["accuracy"] == sum(right) / len(right)


def choosing(folder: Path, **evaluation: Any) -> dict[str, Any]:
    """A run on twelve questions with two or three choices; of them six are held out."""
    rows = [{"question": f"{n}?", "choices": ["x", "y", "z"][: 2 + n % 2], "gold": n % 2} for n in range(12)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {"name": "bundled"},
        "data": {
            "train": str(folder / "a.jsonl"),
            "fields": {"instruction": "question", "output": "gold"},
            "clients": 2,
            "partition": {"name": "iid"},
            "holdout": {"fraction": 0.5},
            "max_length": 64,
        },
        "method": {"name": "fedavg", "trainable": "lora", "rounds": 1, "local_steps": 1},
        "evaluation": evaluation,
        "seed": 1,
    }


def test_a_run_scores_it_and_refuses_examples_without_choices(tmp_path: Path) -> None:
    config = choosing(tmp_path, tasks=["multiple-choice"])
    run = fedtune.run(config, out=tmp_path / "run")
    found = run.scores["multiple-choice"]
    assert found["examples"] == 6
    again = fedtune.evaluate(run, ["multiple-choice"])["scores"]["global"]["multiple-choice"]
    assert again["accuracy"] == found["accuracy"]
    config["data"]["fields"] = {"instruction": "question", "output": "gold", "choices": None}
    with pytest.raises(InputError, match="needs questions with choices, and 6 of the 6 held-out examples"):
        fedtune.run(config, out=tmp_path / "other")


def test_it_is_taken_where_no_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = choosing(tmp_path)
    hint = "none of them scores choices; multiple-choice does"
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    said = capsys.readouterr().err.splitlines()
    letters = "multiple choice: choices stand below their question, and its answer is a letter"
    taken = "evaluation.tasks: loss, multiple-choice, because the held-out examples have choices"
    assert [line for line in said if "choice" in line] == [letters, taken]
    fedtune.run(choosing(tmp_path, tasks=["loss"]), out=tmp_path / "loss", progress=False)
    assert capsys.readouterr().err.count(hint) == 1
    named = fedtune.run(choosing(tmp_path, tasks=["loss", "multiple-choice"]), out=tmp_path / "named")
    assert list(run.scores) == ["loss", "multiple-choice"] and run.scores == named.scores
    assert set(run.summary["scorers"]) == {"loss", "multiple-choice"}
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())["taken"]["evaluation.tasks"]
    assert kept == "loss, multiple-choice, because the held-out examples have choices"
    assert (
        "evaluation.tasks" not in json.loads((tmp_path / "named" / "environment.json").read_text())["taken"]
    )
    again = fedtune.evaluate(run, ["auto"])["scores"]["global"]
    assert {task: found["examples"] for task, found in again.items()} == {"loss": 6, "multiple-choice": 6}
    compared = fedtune.compare({"one": config}, seeds=[0], references=False, out=tmp_path / "compared")
    assert "accuracy" in str(compared)
    config["data"]["fields"]["choices"] = None
    assert list(fedtune.run(config, out=tmp_path / "plain").scores) == ["loss"]


def test_what_auto_stands_for() -> None:
    both, one = [question("A", 2), question("B", 3)], [question("A", 2), Example("What?", "", "This")]
    assert suited(["auto"], both) == ["loss", "multiple-choice"]
    assert suited(["rouge-l", "auto", "loss"], both) == ["rouge-l", "loss", "multiple-choice"]
    assert suited(["multiple-choice", "auto"], both) == ["multiple-choice", "loss"]
    for tasks, examples, classes in ((["auto"], one, False), (["auto"], [], False), (["auto"], both, True)):
        assert suited(tasks, examples, classes=classes) == ["loss"]
    assert suited(["loss"], both) == ["loss"]
