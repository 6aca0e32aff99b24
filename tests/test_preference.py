"""`method.objective` dpo and orpo: losses by hand, pairs as they are encoded, whole runs, TRL's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import build
from safetensors.torch import load_file
from torch.testing import assert_close
from trl_oracle import loss_of_trl

from fedtune.config.file import parse_config
from fedtune.data.encode import encode_causal, encode_pairs
from fedtune.data.encoded import IGNORED, Encoded, split_pair
from fedtune.data.examples import Example
from fedtune.data.objects import ObjectData
from fedtune.data.reading import Reading
from fedtune.data.sources import load_examples
from fedtune.errors import InputError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods.objective import Objective
from fedtune.methods.preference import (
    Likelihoods,
    add_pair_gradient,
    answer_likelihoods,
    dpo,
    orpo,
)
from fedtune.methods.step_loss import StepBatches
from fedtune.models.adapter_off import adapter_off
from fedtune.models.load import load_tokenizer
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import trainable
from fedtune.planning.plan import plan

WORDS = ("apple", "bread", "cloud", "door", "eagle", "fire", "grass", "house")
ROWS: list[dict[str, Any]] = [
    {"prompt": f"Say {word} {n}.", "chosen": f"{word} {n}", "rejected": f"No, not {word}."}
    for word in WORDS
    for n in range(4)
]


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "data": {"train": "pairs.jsonl", "clients": 2, "max_length": 64, "holdout": {"fraction": 0.25}},
        "method": {
            "name": "fedavg",
            "rounds": 2,
            "batch_size": 4,
            "lr": 1e-2,
            "lora": {"rank": 4},
            "objective": {"name": "dpo", "beta": 0.1},
        },
        "evaluation": {"tasks": ["loss", "preference"], "bootstrap": 0},
        **changes,
    }


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(rows: list[dict[str, Any]], tmp_path: Path, *, read: bool = True) -> list[Example]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reading = Reading("preference", pairs=read)
    return load_examples(str(file), fields={}, split="train", base=Path("."), reading=reading)


def test_losses_by_hand() -> None:
    policy = Likelihoods(torch.tensor([-2.0, -4.0, -3.0, -1.0]), torch.tensor([2, 4, 1, 1]))
    reference = Likelihoods(torch.tensor([-3.0, -4.0, -2.0, -2.0]), policy.tokens)
    # rewards 1 and 0 of the chosen, −1 and 1 of the rejected ones: differences 2 and −1
    wanted = (math.log1p(math.exp(-0.5 * 2)) + math.log1p(math.exp(0.5 * 1))) / 2
    assert float(dpo(policy, reference, 0.5)) == pytest.approx(wanted, rel=1e-6)
    # means −1, −1 and −3, −1: log odds are m − log(1 − e^m)
    odds = [m - math.log(1 - math.exp(m)) for m in (-1.0, -1.0, -3.0, -1.0)]
    ratio = [odds[0] - odds[2], odds[1] - odds[3]]
    wanted = (2.0 + 4.0) / 6 + 0.3 * sum(math.log1p(math.exp(-r)) for r in ratio) / 2
    assert float(orpo(policy, 0.3)) == pytest.approx(wanted, rel=1e-6)


def pair_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0], [5, 6, 12, 13], [9, 14, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor(
        [
            [IGNORED, IGNORED, 7, 8],
            [IGNORED, 10, 11, IGNORED],
            [IGNORED, IGNORED, 12, 13],
            [IGNORED, 14, IGNORED, IGNORED],
        ]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_model() -> Any:
    model = attach_lora(
        build("llama", torch.float32, 2), rank=2, alpha=4.0, dropout=0.5, targets="auto", seed=0
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def test_likelihoods_are_sums_over_the_answers_tokens() -> None:
    model, batch = lora_model(), pair_batch()
    found = answer_likelihoods(model, batch)
    assert found.tokens.tolist() == [2, 2, 2, 1]
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        logs = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0].log_softmax(-1)
        labels = batch["labels"][row].tolist()
        wanted = sum(logs[at - 1, label] for at, label in enumerate(labels[:length]) if label != IGNORED)
        assert_close(found.logs[row], wanted, rtol=1e-5, atol=1e-5)


def test_the_adapter_switched_off_is_the_base_and_nothing_of_it_stays() -> None:
    model, batch = lora_model(), pair_batch()
    base = build("llama", torch.float32, 2).eval()
    name = next(iter(trainable(model)))
    trainable(model)[name].requires_grad_(False)  # as with freeze-a
    model.train()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with adapter_off(model), torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).logits, base(batch["input_ids"]).logits)
    assert before == {n: p.requires_grad for n, p in model.named_parameters()} and model.training
    with torch.no_grad():
        assert not torch.equal(model.eval()(batch["input_ids"]).logits, base(batch["input_ids"]).logits)


def test_a_step_in_several_batches_has_the_gradient_of_one() -> None:
    model, batch = lora_model(), pair_batch()
    objective = Objective(name="dpo", beta=0.5)

    def gradient(parts: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        cut = [{n: t[[*rows, *(r + 2 for r in rows)]] for n, t in batch.items()} for rows in parts]
        step = StepBatches(cut, [len(rows) for rows in parts])
        loss = add_pair_gradient(model, step, torch.device("cpu"), objective)
        return loss.total, {n: p.grad.clone() for n, p in trainable(model).items()}

    _, together = gradient([[0, 1]])
    _, apart = gradient([[0], [1]])
    for name, grad in together.items():
        assert_close(apart[name], grad, rtol=1e-4, atol=1e-7)
        assert grad.any()


def test_a_pair_that_is_cut_on_both_sides_counts_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bundled", Path("."))
    long = "apple " * 40
    rows = [
        {"prompt": "Say it.", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in (("a", "b"), (long, "b"), ("a", long), (long, f"no {long}"))
    ]
    counts = encode_pairs(examples(rows, tmp_path), tokenizer, template="plain", max_length=24).counts
    assert (counts.examples, counts.cut, counts.without_eos, counts.duplicates) == (4, 3, 3, 0)


def test_a_pair_is_one_example_with_both_answers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bundled", Path("."))
    found = examples(ROWS[:5], tmp_path)
    assert found[0].output == "apple 0" and found[0].rejected == "No, not apple."
    kept = examples(ROWS[:5], tmp_path, read=False)
    assert kept[0].rejected == "" and kept[0].document() == {
        key: value for key, value in found[0].document().items() if key != "rejected"
    }
    assert Example.of(found[0].document()) == found[0]
    items = encode_pairs(found, tokenizer, template="plain", max_length=64)
    assert len(items.items) == items.counts.examples == 5
    chosen = encode_causal(kept, tokenizer, template="plain", loss_on="last", max_length=64)
    for item, alone, row in zip(items.items, chosen.items, ROWS, strict=False):
        one, other = split_pair(item)
        assert one == alone and item.input_ids == one.input_ids + other.input_ids
        answers = [
            tokenizer.decode([i for i, label in zip(e.input_ids, e.labels, strict=True) if label != IGNORED])
            for e in (one, other)
        ]
        assert [a.replace(tokenizer.eos_token, "").strip() for a in answers] == [
            row["chosen"],
            row["rejected"],
        ]
        same = next(at for at, label in enumerate(one.labels) if label != IGNORED)
        assert one.input_ids[:same] == other.input_ids[:same] and other.labels[:same] == (IGNORED,) * same


def test_a_pair_is_split_where_the_second_prompt_begins() -> None:
    item = Encoded((1, 2, 3, 1, 4), (IGNORED, 2, 3, IGNORED, 4))
    assert split_pair(item) == (
        Encoded((1, 2, 3), (IGNORED, 2, 3)),
        Encoded((1, 4), (IGNORED, 4)),
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, 'there is no key "rejected"'),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" must be or end with an answer'),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, '"rejected" must be text or a list of turns'),
        ({"chosen": "b", "rejected": "c"}, "there is no question to it"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]},
            '"rejected" must be or end with an answer',
        ),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        examples([row], tmp_path)


def test_data_without_pairs_say_who_wants_them(tmp_path: Path) -> None:
    document = settings(data={"train": "bundled", "clients": 2})
    with pytest.raises(
        InputError, match=r'method\.objective takes pairs .* no key "chosen"; the keys here are: "'
    ):
        run(parse_config(document, "c.yaml"), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_real_pairs_are_read(shared_data: Path) -> None:
    reading = Reading("auto", pairs=True)
    found = load_examples(
        str(shared_data / "preference/dpo_en_300.json"),
        fields={},
        split="train",
        base=Path("."),
        reading=reading,
    )
    assert len(found) == 300 and all(e.rejected and e.output and e.rejected != e.output for e in found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainable": "full", "lora": None}, "take trainable: lora, got full"),
        ({"lora": {"bias": "all"}}, "leave lora.bias"),
        ({"aggregation": "stack"}, "aggregation: stack changes that"),
        ({"objective": {"name": "sft", "beta": 0.5}}, "beta has no effect with name: sft"),
    ],
)
def test_what_has_no_reference_is_refused(changes: dict[str, Any], says: str) -> None:
    whole = settings()
    whole["method"] |= changes
    with pytest.raises(InputError, match=says):
        parse_config(whole, "c.yaml")


@pytest.mark.parametrize(
    ("block", "change", "says"),
    [
        ("data", {"format": "text"}, "set data.format: preference, got text"),
        ("data", {"batching": "packed"}, "a pair of answers is a row of its own"),
        ("data", {"too_long": "drop"}, "take cut or error"),
        ("model", {"adapter": "somewhere"}, "merge it"),
    ],
)
def test_data_that_do_not_go_with_it_are_refused(block: str, change: dict[str, Any], says: str) -> None:
    whole = settings()
    whole[block] = {**whole.get(block, {}), **change}
    with pytest.raises(InputError, match=says):
        parse_config(whole, "c.yaml")


def test_a_run_begins_at_log_two_and_learns_which_answer_is_preferred(pairs: Path) -> None:
    config = parse_config(settings(), "c.yaml")
    planned, summary = plan(config).document, run(config, pairs / "run", Silent())
    scores, before = summary["evaluation"]["preference"], summary["zero_shot"]["preference"]
    assert (before["reward_accuracy"], before["reward_margin"]) == (0.0, 0.0)
    assert scores["reward_accuracy"] > 0.8 and scores["reward_margin"] > 1.0
    rounds = [json.loads(line) for line in (pairs / "run/rounds.jsonl").read_text().splitlines()]
    assert rounds[1]["train_loss"] < math.log(2) + 1e-3 and rounds[2]["train_loss"] < rounds[1]["train_loss"]
    for direction in ("down", "up"):
        assert planned["payload_bytes"][direction] == summary["payload_bytes"][direction]
    measured = summary["peak_memory_bytes"]["client"]
    assert planned["client_peak_memory_bytes"]["total"] == pytest.approx(measured, rel=0.05)
    # one step from the start: both answers as likely as under the reference, so −log σ(0)
    first = settings()
    first["method"] |= {"rounds": 1, "local_steps": 1, "batch_size": 32}
    run(parse_config(first, "c.yaml"), pairs / "first", Silent())
    lines = (pairs / "first/rounds.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["train_loss"] == pytest.approx(math.log(2), abs=1e-6)


WITH: dict[str, dict[str, Any]] = {
    "fewer bytes": {"federation": {"wire": {"dtype": "int8", "error_feedback": True}}},
    "privacy": {"federation": {"privacy": {"clip": 0.5, "noise_multiplier": 0.1, "delta": 1e-3}}},
    "secure": {"federation": {"secure_aggregation": {"threshold": 2}}},
    **{how: {"aggregation": how} for how in ("freeze-a", "svd", "refine", "alternate")},
    "proximal": {"proximal": 0.1},
    "asynchronous": {"arrival": "asynchronous", "rounds": 1},
}


@pytest.mark.parametrize("name", WITH)
def test_preferences_go_with_what_any_other_loss_goes_with(name: str, pairs: Path) -> None:
    """Each run changes which answer is likelier; under masks the result is that of a plain sum."""
    more = dict(WITH[name])
    federation = more.pop("federation", {})
    document = settings(federation=federation)
    document["method"] |= more
    run(parse_config(document, "c.yaml"), pairs / "run", Silent())
    first, *_, last = map(json.loads, (pairs / "run" / "rounds.jsonl").read_text().splitlines())
    assert first["eval"]["preference"]["reward_margin"] == 0
    assert abs(last["eval"]["preference"]["reward_margin"]) > 1e-4
    if name == "secure":
        run(parse_config(settings(), "c.yaml"), pairs / "plain", Silent())
        one, other = (
            load_file(pairs / name / "final/adapter_model.safetensors") for name in ("run", "plain")
        )
        for key in other:
            assert_close(one[key], other[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_clients_in_processes_of_their_own_have_the_same_bits(objective: str, pairs: Path) -> None:
    found = []
    for workers in (1, 2):
        whole = settings(transport={"workers": workers})
        whole["method"]["objective"] = {"name": objective}
        whole["evaluation"] = {"tasks": ["loss"], "every": 0, "bootstrap": 0}
        run(parse_config(whole, "c.yaml"), pairs / f"run{workers}", Silent())
        found.append((pairs / f"run{workers}/final/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_the_loss_of_a_batch_is_that_of_trl(tmp_path: Path) -> None:
    model, batch, wanted = loss_of_trl("DPO", ROWS, tmp_path, beta=0.3)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    ours = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    with torch.no_grad():
        with adapter_off(model):
            reference = answer_likelihoods(model, ours)
        found = dpo(answer_likelihoods(model, ours), reference, 0.3)
    assert abs(float(found) - math.log(2)) > 1e-3
    assert float(found) == pytest.approx(wanted, abs=1e-5)


def test_rows_as_objects_are_pairs_too() -> None:
    reading = Reading("auto", pairs=True)
    data = ObjectData.read(ROWS, {}, reading)
    assert data.examples[3].rejected == "No, not apple." and "pairs of a chosen" in data.said[0]
