"""Scores of tasks against hand computation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_models import (
    BEGIN,
    END,
    MODELS,
    VOCABULARY,
    gpt2,
    llama,
    seeded,
    tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.evaluation.generation import generate
from fedtune.evaluation.metrics import exact_match, rouge_l, rouge_scorer
from fedtune.evaluation.registry import OWN, TASKS, classifies
from fedtune.evaluation.tasks import evaluate
from fedtune.evaluation.types import EvalEnv, EvalSettings
from fedtune.models.tuning import attach_prompt


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Paris", "paris", True),
        ("  two   words\n", "two words", True),
        ("done.", "done", True),
        ("done", " Done. ", True),
        ("done..", "done", False),
        ("a.b", "ab", False),
        ("", "x", False),
        ("plane boat", "plane", False),
    ],
)
def test_exact_match(answer: str, reference: str, right: bool) -> None:
    assert exact_match(answer, reference) is right


@given(st.text(), st.text())
def test_exact_match_is_symmetric_and_ignores_blanks_around(a: str, b: str) -> None:
    assert exact_match(a, b) == exact_match(b, a)
    assert exact_match(f" {a}\n", a)


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat the mat": 4 of 5 words of the answer, 4 of 6 of the reference
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("the cat by the mat", "the cat sat on the mat") == pytest.approx(expected)
    assert rouge_l("", "the cat") == 0.0
    assert rouge_l("cats", "cat") == 0.0  # no stemming
    assert rouge_scorer().startswith("rouge-score 0.1")


EXAMPLES = [
    Example("w3 w4 w5", "", "w6 w7", "a"),
    Example("w8 w9", "w10 w11 w12", "w13", "b"),
    Example("w14", "", "w15 w16 w17 w18", "a"),
    Example("w19 w20 w21 w22 w23", "", "w24 w25", ""),
    Example("w26 w27", "", "w28", "b"),
]


def settings(**changes: Any) -> EvalSettings:
    plain: dict[str, Any] = {"template": "plain", "loss_on": "response", "max_length": 64}
    return EvalSettings(**plain | changes)


def plain(scores: dict[str, float]) -> dict[str, float]:
    """The metrics of a task without their errors and counts."""
    return {name: scores[name] for name in metrics_of(scores)}


def hand_loss(model: Any, example: Example) -> list[float]:
    """Log-probabilities of answer and end token, one example without padding, in float64."""
    words = f"{example.instruction} {example.input} Answer:".split()  # "Answer:" is unknown: w3
    prompt = [BEGIN, *(int(w[1:]) if w[0] == "w" else 3 for w in words)]
    answer = [*(int(w[1:]) for w in example.output.split()), END]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    virtual = logits.shape[0] - len(prompt) - len(answer)
    losses = []
    for place, token in enumerate(answer):
        row = logits[virtual + len(prompt) + place - 1]
        losses.append(float(torch.log(torch.exp(row).sum()) - row[token]))
    return losses


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_loss_is_the_mean_over_all_tokens(name: str, batch_size: int) -> None:
    model = MODELS[name]()
    losses = [loss for example in EXAMPLES for loss in hand_loss(model, example)]
    got = evaluate(model, tokenizer(), EXAMPLES, ["loss"], settings(batch_size=batch_size))["loss"]
    assert got["tokens"] == len(losses) == 10 + 5
    assert got["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[:] = 0
    got = evaluate(model, tokenizer(), EXAMPLES, ["loss"], settings(loss_on="all"))["loss"]
    assert got["perplexity"] == pytest.approx(VOCABULARY)
    assert got["loss"] == pytest.approx(math.log(VOCABULARY))
    assert got["tokens"] == 10 + 5 + (3 + 5 + 1 + 5 + 2) + 5  # answers, ends, prompts and "Answer:"


def test_loss_of_a_long_example_fits_the_context() -> None:
    long = Example(" ".join(["w5"] * 300), "", "w6")
    got = evaluate(gpt2(), tokenizer(), [long], ["loss"], settings(max_length=4096))["loss"]
    assert got["tokens"] == 2
    soft = attach_prompt(gpt2(), tokens=4, seed=0)
    assert evaluate(soft, tokenizer(), [long], ["loss"], settings(max_length=4096))["loss"]["tokens"] == 2


def test_accuracy_counts_exact_answers_by_category(monkeypatch: pytest.MonkeyPatch) -> None:
    given_answers = ["w6 W7.", "wrong", "w15 w16 w17", "w24 w25", "w28"]
    calls = []

    def fake(model: Any, tok: Any, prompts: list[list[int]], **rest: Any) -> list[str]:
        calls.append(prompts)
        return given_answers

    monkeypatch.setattr("fedtune.evaluation.types.generate", fake)
    got = evaluate(llama(), tokenizer(), EXAMPLES, ["accuracy", "rouge-l"], settings())
    assert plain(got["accuracy"]) == {"accuracy": 3 / 5, "accuracy/a": 1 / 2, "accuracy/b": 1 / 2}
    third = 2 * 1 * (3 / 4) / (1 + 3 / 4)
    assert plain(got["rouge-l"]) == {"rouge_l": pytest.approx((1 + 0 + third + 1 + 1) / 5)}
    assert got["accuracy"]["examples"] == got["rouge-l"]["examples"] == 5
    assert got["accuracy"]["truncated"] == got["rouge-l"]["truncated"] == 0
    assert len(calls) == 1  # generated once for both tasks
    assert calls[0][4] == [BEGIN, 26, 27, 3]


def test_accuracy_of_a_model_that_knows_one_answer() -> None:
    model = llama()
    prompts = [[BEGIN, 14, 3], [BEGIN, 26, 27, 3]]
    known = generate(model, tokenizer(), prompts, max_new_tokens=6, batch_size=2)
    examples = [Example("w14", "", known[0], "x"), Example("w26 w27", "", known[1] + " w3", "y")]
    got = evaluate(model, tokenizer(), examples, ["accuracy"], settings(max_new_tokens=6))["accuracy"]
    assert plain(got) == {"accuracy": 0.5, "accuracy/x": 1.0, "accuracy/y": 0.0}


def test_a_prompt_cut_to_the_context_keeps_its_begin_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(model: Any, tok: Any, prompts: list[list[int]], **rest: Any) -> list[str]:
        seen.extend(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr("fedtune.evaluation.types.generate", fake)
    long = Example(" ".join(["w5"] * 300), "", "w6")
    short = Example("w5", "", "w6")
    got = evaluate(
        llama(), tokenizer(), [long, short], ["accuracy"], settings(max_length=4096, max_new_tokens=36)
    )
    assert got["accuracy"]["truncated"] == 1
    assert seen.pop() == [BEGIN, 5, 3]
    assert seen == [[BEGIN] + [5] * 58 + [3]]  # 96 - 36 = 60 tokens


def classifier() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    config.num_labels = 3
    return seeded(lambda: BertForSequenceClassification(config))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_classifier_is_scored_by_argmax_and_cross_entropy(batch_size: int) -> None:
    model, labels = classifier(), ("no", "maybe", "yes")
    texts = ["w3 w4", "w5", "w6 w7 w8 w9", "w10 w11 w12"]
    with torch.no_grad():
        ids = [torch.tensor([[int(w[1:]) for w in text.split()]]) for text in texts]
        logits = torch.cat([model(input_ids=one).logits for one in ids]).double()
    best = logits.argmax(1).tolist()
    truth = [best[0], best[1], best[2], (best[3] + 1) % 3]
    examples = [
        Example(text, "", labels[label], category)
        for text, label, category in zip(texts, truth, ["p", "q", "p", "q"], strict=True)
    ]
    losses = [float(-torch.log_softmax(row, 0)[label]) for row, label in zip(logits, truth, strict=True)]
    got = evaluate(
        model, tokenizer(), examples, ["loss", "accuracy"], settings(labels=labels, batch_size=batch_size)
    )
    assert plain(got["accuracy"]) == {"accuracy": 0.75, "accuracy/p": 1.0, "accuracy/q": 0.5}
    assert "truncated" not in got["accuracy"]
    assert got["loss"]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert not {"tokens", "perplexity"} & got["loss"].keys()
    with pytest.raises(InputError, match="rouge-l is for generated text"):
        evaluate(model, tokenizer(), examples, ["rouge-l"], settings(labels=labels))


def test_evaluate_restores_mode_and_gradients() -> None:
    model = llama().train()
    evaluate(model, tokenizer(), EXAMPLES, ["loss", "accuracy", "rouge-l"], settings(max_new_tokens=4))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrong_tasks_and_no_examples() -> None:
    with pytest.raises(InputError, match=r"task 'acuracy' is not known.*Did you mean \"accuracy\"\?"):
        evaluate(llama(), tokenizer(), EXAMPLES, ["loss", "acuracy"], settings())
    with pytest.raises(InputError, match="no examples to evaluate on"):
        evaluate(llama(), tokenizer(), [], ["loss"], settings())


def test_every_task_has_a_one_line_summary() -> None:
    assert {"loss", "accuracy", "rouge-l"} <= set(TASKS)
    assert all(row["summary"] and "\n" not in row["summary"] for row in TASKS.listing())


def test_a_task_draws_samples_for_each_prompt() -> None:
    model, prompts = llama(), ["w5 w6", "w7", " ".join(["w8"] * 200)]
    drawn: dict[int, list[list[str]]] = {}
    for batch_size in (1, 16):
        env = EvalEnv(model, tokenizer(), [], settings(batch_size=batch_size))
        drawn[batch_size] = env.generate(prompts, max_new_tokens=8, samples=4, temperature=1.0)
        assert env.truncated == 1
        env.generate(prompts, max_new_tokens=8)
        assert env.truncated == 2
    assert drawn[1] == drawn[16]
    assert [len(set(texts)) > 1 for texts in drawn[1]] == [True] * 3
    env = EvalEnv(model, tokenizer(), [], settings())
    assert env.generate(prompts, max_new_tokens=8, samples=2, temperature=1.0) == [t[:2] for t in drawn[1]]
    assert env.generate(prompts, max_new_tokens=8, samples=4, temperature=1.0, seed=1) != drawn[1]
    other = EvalEnv(model, tokenizer(), [], settings(seed=1))
    assert other.generate(prompts, max_new_tokens=8, samples=4, temperature=1.0) != drawn[1]
    greedy = env.generate(prompts, max_new_tokens=8, samples=2)
    ids = [[BEGIN, 5, 6], [BEGIN, 7], [BEGIN] + [8] * 87]  # 96 tokens less 8
    assert greedy == [
        [text] * 2 for text in generate(model, tokenizer(), ids, max_new_tokens=8, batch_size=3)
    ]


def test_rows_of_a_tasks_file(tmp_path: Path) -> None:
    def rows(text: str, **changes: Any) -> list[dict[str, Any]]:
        (tmp_path / "f.jsonl").write_text(text, encoding="utf-8")
        files = {"task": str(tmp_path / "f.jsonl")}
        return EvalEnv(llama(), tokenizer(), [], settings(files=files, **changes)).rows(
            "task", {"question": str, "score": (int, float)}
        )

    good = json.dumps({"question": "a\u2028b", "score": 1, "more": None}, ensure_ascii=False)
    assert rows(f"{good}\n\n{good}\n") == [{"question": "a\u2028b", "score": 1, "more": None}] * 2
    assert len(rows(f"{good}\n{good}\n", limit=1)) == 1
    for bad, message in (
        (
            '{"question": "a"}',
            r"f\.jsonl, line 2: task task needs the fields question, score; score is missing",
        ),
        ('{"question": 3, "score": 1}', "line 2: question must be str for task task, got 3"),
        ('{"question": "a", "score": true}', "line 2: score must be int or float for task task, got True"),
        ("[]", "line 2: task task needs an object on each line, got list"),
        ("{", "line 2: not JSON"),
    ):
        with pytest.raises(InputError, match=message):
            rows(f"{good}\n{bad}\n")
    with pytest.raises(InputError, match="has no examples for task task"):
        rows("\n")
    env = EvalEnv(llama(), tokenizer(), [], settings(files={"task": str(tmp_path / "none.jsonl")}))
    with pytest.raises(InputError, match=r"evaluation\.files\.task: no such file: .*none\.jsonl"):
        env.file("task")
    with pytest.raises(InputError, match=r"task other reads a data file: give evaluation\.files\.other=FILE"):
        env.file("other")


def test_what_is_known_of_a_task_before_it_is_imported_is_what_it_says() -> None:
    assert list(TASKS) == list(OWN)
    assert {name: entry.classifier for name, entry in OWN.items()} == {
        name: TASKS[name].classifier for name in TASKS
    }
    assert {name for name in OWN if classifies(name)} == {"loss", "accuracy", "matthews", "pearson"}
