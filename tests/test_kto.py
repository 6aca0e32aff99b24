"""`method.objective: kto`: the loss by hand, judged answers as they are read and encoded, runs, TRL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import build
from torch.testing import assert_close
from trl_oracle import loss_of_trl

from fedtune.config.file import parse_config
from fedtune.data.batches import collate
from fedtune.data.encode import encode_causal, encode_pairs
from fedtune.data.encoded import IGNORED, Encoded, split_judged
from fedtune.data.examples import Example
from fedtune.data.reading import Reading
from fedtune.data.sources import load_examples
from fedtune.errors import InputError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods.kto import GOOD, add_judged_gradient, kto, mismatched
from fedtune.methods.objective import Objective
from fedtune.methods.preference import answer_likelihoods
from fedtune.methods.step_loss import StepBatches
from fedtune.models.adapter_off import adapter_off
from fedtune.models.load import load_tokenizer
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import trainable
from fedtune.planning.plan import plan

WORDS = ("apple", "bread", "cloud", "door", "eagle", "fire", "grass", "house")
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"Say {word} {n}.",
        "completion": f"{word} {n}" if n % 2 else f"No, not {word}.",
        "label": n % 2 == 1,
    }
    for word in WORDS
    for n in range(4)
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": f"Say {word} {n}.", "chosen": f"{word} {n}", "rejected": f"No, not {word}."}
    for word in WORDS
    for n in (4, 5)
]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def examples(rows: list[dict[str, Any]], folder: Path) -> list[Example]:
    reading = Reading("preference", pairs=True, judged=True)
    return load_examples(
        str(written(folder, "rows.jsonl", rows)), fields={}, split="train", base=Path("."), reading=reading
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_by_hand() -> None:
    ratios, good = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([True, False, False])
    objective = Objective(name="kto", beta=0.5, desirable=2.0, undesirable=3.0)
    wanted = (
        2 * (1 - sigmoid(0.5 * (1.0 - 0.25)))
        + 3 * (1 - sigmoid(0.5 * (0.25 + 2.0)))
        + 3 * (1 - sigmoid(0.5 * (0.25 - 0.5)))
    ) / 3
    assert float(kto(ratios, good, torch.tensor(0.25), objective)) == pytest.approx(wanted, rel=1e-6)


def answer(prompt: list[int], said: list[int]) -> Encoded:
    return Encoded((*prompt, *said), (*[IGNORED] * len(prompt), *said))


def test_each_prompt_gets_the_answer_before_its_own_and_no_more_than_the_longest() -> None:
    three = [answer([1], [2, 3]), answer([4, 5, 6, 7], [8]), answer([9], [10, 11, 12, 13])]
    assert mismatched(three) == [answer([1], [10, 11, 12, 13]), answer([4, 5, 6, 7], [2]), answer([9], [8])]
    assert mismatched(three[:1]) == []


def test_answers_are_read_from_one_example() -> None:
    good = answer([1, 2], [3, 4])
    assert split_judged(good) == [(good, True)]
    bad = Encoded((*good.input_ids, 4), (*good.labels, IGNORED))
    assert split_judged(bad) == [(good, False)]
    pair = Encoded((1, 2, 3, 4, 1, 2, 5), (IGNORED, IGNORED, 3, 4, IGNORED, IGNORED, 5))
    assert split_judged(pair) == [(good, True), (answer([1, 2], [5]), False)]


def test_judged_answers_and_pairs_are_encoded_as_any_other(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bundled", Path("."))
    found = examples([ROWS[0], PAIRS[0], ROWS[1]], tmp_path)
    assert [(e.judged, e.output, e.rejected) for e in found] == [
        ("bad", "No, not apple.", ""),
        ("", "apple 4", "No, not apple."),
        ("good", "apple 1", ""),
    ]
    assert all(Example.of(e.document()) == e for e in found)
    made = encode_pairs(found, tokenizer, template="plain", max_length=64)
    plain = encode_causal(found, tokenizer, template="plain", loss_on="last", max_length=64)
    judged = [split_judged(item) for item in made.items]
    assert [[good for _, good in each] for each in judged] == [[False], [True, False], [True]]
    for each, alone in zip(judged, plain.items, strict=True):
        assert each[0][0] == alone
    assert made.counts == plain.counts
    twice = [{**ROWS[1], "label": label} for label in (True, False, True)]  # of these two are equal
    assert (
        encode_pairs(examples(twice, tmp_path), tokenizer, template="plain", max_length=64).counts.duplicates
        == 1
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": "a", "label": True},
            'there is no key "completion"; the keys here are: "prompt", "label"',
        ),
        ({"prompt": "a", "completion": "b", "label": 1}, "true or false, got 1"),
        ({"prompt": "a", "completion": "b"}, 'there is no key "chosen"'),
        ({"prompt": "a", "completion": 3, "label": True}, '"completion" must be text'),
    ],
)
def test_rows_that_are_neither_are_refused(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        examples([row], tmp_path)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": "judged.jsonl",
            "clients": 2,
            "max_length": 64,
            "holdout": {"source": "pairs.jsonl"},
        },
        "method": {
            "name": "fedavg",
            "rounds": 2,
            "batch_size": 4,
            "lr": 1e-2,
            "lora": {"rank": 4},
            "objective": {"name": "kto", "beta": 0.1},
        },
        "evaluation": {"tasks": ["loss", "preference"], "bootstrap": 0},
        **changes,
    }


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    written(tmp_path, "judged.jsonl", ROWS)
    written(tmp_path, "pairs.jsonl", PAIRS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_on_judged_answers_learns_which_of_two_is_preferred(judged: Path) -> None:
    config = parse_config(settings(), "c.yaml")
    planned, summary = plan(config).document, run(config, judged / "run", Silent())
    assert summary["zero_shot"]["preference"]["reward_margin"] == 0
    assert summary["evaluation"]["preference"]["reward_accuracy"] > 0.8
    rounds = [json.loads(line) for line in (judged / "run/rounds.jsonl").read_text().splitlines()]
    assert rounds[2]["train_loss"] < rounds[1]["train_loss"] < 0.5 + 1e-3
    for direction in ("down", "up"):
        assert planned["payload_bytes"][direction] == summary["payload_bytes"][direction]
    measured = summary["peak_memory_bytes"]["client"]
    assert planned["client_peak_memory_bytes"]["total"] == pytest.approx(measured, rel=0.1)


def test_clients_in_processes_of_their_own_have_the_same_bits_and_pairs_train_too(judged: Path) -> None:
    found = []
    for workers in (1, 2):
        whole = settings(transport={"workers": workers})
        whole["data"] |= {"train": "pairs.jsonl", "holdout": {"fraction": 0.25}}
        whole["evaluation"] = {"tasks": ["loss"], "every": 0, "bootstrap": 0}
        run(parse_config(whole, "c.yaml"), judged / f"run{workers}", Silent())
        found.append((judged / f"run{workers}/final/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 1}, "set batch_size to 2 or more"),
        ({"trainable": "full", "lora": None}, "objective: kto has as its reference .* take trainable: lora"),
        ({"aggregation": "stack"}, "aggregation: stack changes that"),
        ({"objective": {"name": "dpo", "desirable": 2.0}}, "desirable has no effect with name: dpo"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    whole = settings()
    whole["method"] |= changes
    with pytest.raises(InputError, match=says):
        parse_config(whole, "c.yaml")


def lora_model(spread: float) -> Any:
    model = attach_lora(
        build("llama", torch.float32, 2), rank=2, alpha=4.0, dropout=0.0, targets="auto", seed=0
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return model.eval()


def test_a_steps_gradient_is_that_of_its_batches_and_weights_change_it() -> None:
    model = lora_model(0.3)
    answers = [answer([5, 6], [7, 8]), answer([9], [10, 11]), answer([5, 6], [12]), answer([3], [14, 15])]
    good = [True, False, False, True]

    def gradient(**weights: float) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        batches = [
            collate([*part, *mismatched(part)], 0) | {GOOD: torch.tensor(good[at : at + 2])}
            for at in (0, 2)
            for part in [answers[at : at + 2]]
        ]
        objective = Objective(name="kto", beta=0.5, **weights)
        loss = add_judged_gradient(model, StepBatches(batches, [2, 2]), torch.device("cpu"), objective)
        assert loss.tokens == 7 and loss.value is not None
        return loss.value, torch.cat([p.grad.flatten() for p in trainable(model).values()])

    found = gradient()[1]
    with torch.enable_grad():
        model.zero_grad()
        losses = []
        for at in (0, 2):
            part = answers[at : at + 2]
            with torch.no_grad():
                others = collate(mismatched(part), 0)
                kl = answer_likelihoods(model, others).logs
                with adapter_off(model):
                    kl = (kl - answer_likelihoods(model, others).logs).mean().clamp(min=0)
                    reference = answer_likelihoods(model, collate(part, 0)).logs
            ratios = answer_likelihoods(model, collate(part, 0)).logs - reference
            losses.append(kto(ratios, torch.tensor(good[at : at + 2]), kl, Objective(name="kto", beta=0.5)))
        ((losses[0] + losses[1]) / 2).backward()
    wanted = torch.cat([p.grad.flatten() for p in trainable(model).values()])
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert found.any() and not torch.equal(gradient(desirable=2.0)[1], found)


def test_the_loss_of_a_batch_is_that_of_trl(tmp_path: Path) -> None:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    model, batch, wanted = loss_of_trl("KTO", ROWS, tmp_path, beta=0.3, **weights)
    answers = [
        Encoded(
            tuple(ids[mask == 1].tolist()),
            tuple(ids.masked_fill(told == 0, IGNORED)[mask == 1].tolist()),
        )
        for ids, mask, told in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        )
    ]
    others = mismatched(answers)
    theirs = [
        tuple(ids[mask == 1].tolist())
        for ids, mask in zip(batch["KL_input_ids"], batch["KL_attention_mask"], strict=True)
    ]
    assert [other.input_ids for other in others] == theirs  # the same prompts with the same answers
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    ours = collate([*answers, *others], 0) | {GOOD: good}
    objective = Objective(name="kto", beta=0.3, desirable=1.5, undesirable=0.75)
    loss = add_judged_gradient(model, StepBatches([ours], [len(answers)]), torch.device("cpu"), objective)
    assert loss.value is not None and abs(loss.value - 0.5 * (1.5 + 0.75) / 2) > 1e-3
    assert loss.value == pytest.approx(wanted, abs=1e-5)
