"""Whole runs on conversations and on plain texts, and their results in other hands."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_formats import FORMATS, Format
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fedtune
from fedtune.data.encode import encode_causal
from fedtune.data.examples import Example, Turn
from fedtune.errors import InputError
from fedtune.federation.assembly import Assembly
from fedtune.measure.clock import Clock

ZEPHYR = FORMATS["Zephyr"]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": f"Q{number}"},
            {"role": "assistant", "content": f"A{number}"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"B{number} </s>"},
        ]
    }
    for number in range(10)
]
TEXTS = [{"text": f"once upon a time {number} " * (1 + 6 * (number % 3))} for number in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), ZEPHYR.template)


def saved(path: Path, template: str | None, form: Format = ZEPHYR) -> Path:
    made = form.tokenizer()
    made.chat_template = template
    torch.manual_seed(0)
    about = LlamaConfig(
        vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=256, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(about).save_pretrained(path)
    made.save_pretrained(path)
    return path


def document(model: Path, data: dict[str, Any], **method: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "data": {"max_length": 128, "clients": 2, "holdout": {"fraction": 0.2}, **data},
        "method": {"name": "fedavg", "rounds": 1, "trainable": "lora", "local_epochs": 1, "lr": 0.01}
        | method,
        "evaluation": {"tasks": ["loss"], "bootstrap": 0},
    }


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_run_on_conversations_and_who_uses_its_result(folder: Path, tmp_path: Path) -> None:
    given = document(folder, {"train": written(tmp_path / "d.jsonl", TALKS)})
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    about = json.loads((run.path / "environment.json").read_text())
    assert about["template"] == {
        "name": "chat",
        "sha256": about["template"]["sha256"],
        "text": ZEPHYR.template,
    }
    assert about["taken"] == {
        "data.format": 'conversation, because the records have turns under "messages"',
        "data.template": "chat, because the tokenizer has a chat template",
        "method.lora.targets": "self_attn.q_proj, self_attn.v_proj (4 of each)",
        "model.attention": "sdpa",
    }
    served = AutoTokenizer.from_pretrained(run.path / "final")
    assert served.chat_template == ZEPHYR.template
    # the loss is that of all answers' tokens, as a plain encoder has them and transformers takes it
    model, sums = LlamaForCausalLM.from_pretrained(folder), []
    for talk in TALKS:
        turns = tuple(Turn(turn["role"], turn["content"]) for turn in talk["messages"])
        how: dict[str, Any] = {"template": "chat", "loss_on": "response", "max_length": 128}
        item = encode_causal([Example("", turns=turns)], served, **how).items[0]
        text = "".join(f"<|{turn.role}|>\n{turn.content}</s>\n" for turn in turns)
        ids = torch.tensor([item.input_ids])
        assert served.decode(item.input_ids) == text.removesuffix("\n")
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=torch.tensor([item.labels])).loss)
        sums.append((loss * item.trained, item.trained))
    scored = run.rounds[0]["eval"]["loss"]
    assert scored["tokens"] == 2 * sums[0][1]
    assert any(
        scored["loss"] == pytest.approx((one[0] + other[0]) / (one[1] + other[1]), rel=1e-5)
        for one, other in combinations(sums, 2)
    )
    # only another template is spoken of
    scores = fedtune.evaluate(run, ["loss"])
    assert "template" not in scores
    assert scores["scores"]["global"]["loss"]["loss"] == run.rounds[-1]["eval"]["loss"]["loss"]
    other = fedtune.evaluate(run, ["loss"], "data.template=alpaca")
    assert other["template"].startswith(
        "data.template is alpaca, and the model's own chat template is another"
    )
    talk = TALKS[0]["messages"]
    asked = run.generate(["Q1", {"messages": talk[1:2]}, {"messages": talk[:4]}], max_new_tokens=2)
    assert (
        len(asked) == 3
        and talk[1]["content"] == "Q0"
        and asked[1] == run.generate(["Q0"], max_new_tokens=2)[0]
    )
    with pytest.raises(InputError, match=r'prompt 0: "messages", turn 1: "role" must say who speaks'):
        run.generate([{"messages": [{"role": "me", "content": "Q"}]}])
    assert fedtune.open(run.path).resume(progress=False).status == "done"
    # as whole models both say in which template they were tuned
    merged = run.export(tmp_path / "merged", merge=True)[0]
    own = [f"data.train={given['data']['train']}", "data.max_length=128", "data.clients=2"]
    again = fedtune.evaluate(merged, ["loss"], *own)
    assert "template" not in again


def test_another_template_than_the_models_is_said_and_exported(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(FORMATS["Zephyr"].template.replace("<|assistant|>", "<|bot|>"))
    given = document(folder, {"train": written(tmp_path / "d.jsonl", TALKS), "template": str(file)})
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    file.unlink()  # the run has what it needs
    assert run.config.data.template == AutoTokenizer.from_pretrained(run.path / "final").chat_template
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.path / "final")
    assert fedtune.open(run.path).resume(progress=False).status == "done"
    assert json.loads((run.path / "environment.json").read_text())["template"]["name"] == "jinja"
    plain = fedtune.run(
        document(folder, {**given["data"], "template": "plain"}), out=tmp_path / "plain", progress=False
    )
    exported = AutoTokenizer.from_pretrained(plain.path / "final")
    asked = exported.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert asked == "<s>Q\nAnswer:"


def test_without_a_chat_template_alpaca_is_taken_and_exported(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", None)
    rows = [{"instruction": f"say {number}", "input": "now", "output": "it"} for number in range(8)]
    given = document(model, {"train": written(tmp_path / "d.jsonl", rows), "max_length": 256})
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    about = json.loads((run.path / "environment.json").read_text())
    assert about["template"]["name"] == "alpaca"
    assert about["taken"]["data.format"] == "instruction"
    assert about["taken"]["data.template"] == "alpaca, because the tokenizer has no chat template"
    assert "template" not in fedtune.evaluate(run, ["loss"])
    named = {**given, "data": {**given["data"], "template": "alpaca"}}
    same = fedtune.run(named, out=tmp_path / "named", progress=False)
    tensors = "final/adapter_model.safetensors"
    assert (same.path / tensors).read_bytes() == (run.path / tensors).read_bytes()


def test_clients_elsewhere_are_told_the_templates_text(folder: Path, tmp_path: Path) -> None:
    train = written(tmp_path / "d.jsonl", TALKS)
    for template, told in (("auto", ZEPHYR.template), ("chat", ZEPHYR.template), ("plain", "plain")):
        config = fedtune.load(document(folder, {"train": train, "template": template}))
        assert Assembly.assemble(config, Clock()).template_told == told
        assert fedtune.load(document(folder, {"train": train, "template": told})).data.template == told


def test_an_end_at_which_no_server_stops_is_said(tmp_path: Path) -> None:
    gemma = FORMATS["Gemma 2"]
    model = saved(tmp_path / "model", gemma.template, gemma)
    train = written(tmp_path / "d.jsonl", TALKS)
    notes = Assembly.assemble(fedtune.load(document(model, {"train": train})), Clock()).notes
    assert [
        note
        for note in notes
        if note.startswith("answers end with <end_of_turn>, and the model's own end is <eos>: a")
    ]


def test_names_of_templates() -> None:
    assert [row["name"] for row in fedtune.available("templates")][:4] == ["auto", "chat", "alpaca", "plain"]
    with pytest.raises(
        InputError, match=r"'chatt' is not known.*auto, chat and files that end in \.jinja are"
    ):
        fedtune.load({"data": {"template": "chatt"}, "method": {"name": "fedavg"}})
    with pytest.raises(InputError, match="the template name 'auto' is taken"):
        fedtune.register_template("auto", summary="mine")
    assert (
        fedtune.load({"data": {"loss_on": "assistant"}, "method": {"name": "fedavg"}}).data.loss_on
        == "response"
    )


def test_a_damaged_file_of_a_template_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.template: .*none\.jinja cannot be read: No such file"):
        fedtune.load(document(folder, {"template": str(tmp_path / "none.jinja")}))
    (tmp_path / "text.jinja").write_text("Question:")
    with pytest.raises(InputError, match=r"text\.jinja is no jinja program"):
        fedtune.load(document(folder, {"template": str(tmp_path / "text.jinja")}))
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}")
    given = document(
        folder, {"train": written(tmp_path / "d.jsonl", TALKS), "template": str(tmp_path / "bad.jinja")}
    )
    with pytest.raises(InputError, match=r"the template data\.template cannot be rendered \(line 1\)"):
        fedtune.run(given, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batching", ["random", "packed"])
def test_plain_texts_are_trained_on_and_scored(folder: Path, tmp_path: Path, batching: str) -> None:
    given = document(
        folder, {"train": written(tmp_path / "d.jsonl", TEXTS), "batching": batching, "max_length": 64}
    )
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    made = ZEPHYR.tokenizer()
    texts = [row["text"] for row in TEXTS]
    # each token is learned once, in whichever part it is, and the end token of each text
    tokens = {text: len(made(text)["input_ids"]) + 1 for text in texts}
    scored = run.rounds[0]["eval"]["loss"]["tokens"]
    assert any(scored == tokens[a] + tokens[b] for a in texts for b in texts if a != b)
    counts = json.loads((run.path / "partition.json").read_text())["encoded"]["train"]
    assert counts["parted"] > 0 and counts["examples"] > 10
    first = fedtune.evaluate(run, ["loss"])["scores"]["global"]["loss"]
    assert first["tokens"] == scored and first["loss"] == run.rounds[-1]["eval"]["loss"]["loss"]
    with pytest.raises(
        InputError, match="task accuracy compares answers, and the held-out examples are plain"
    ):
        fedtune.run(
            {**given, "evaluation": {"tasks": ["loss", "accuracy"]}}, out=tmp_path / "other", progress=False
        )


@pytest.mark.parametrize("template", [ZEPHYR.template, None], ids=["chat", "none"])
def test_what_was_tuned_on_plain_texts_is_in_no_template(tmp_path: Path, template: str | None) -> None:
    folder = saved(tmp_path / "model", template)
    given = document(folder, {"train": written(tmp_path / "d.jsonl", TEXTS)})
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    about = json.loads((run.path / "environment.json").read_text())
    assert "template" not in about and about["data"]["forms"] == ["text"]
    assert "data.template" not in about["taken"]
    # the exported tokenizer keeps what the model brought
    assert AutoTokenizer.from_pretrained(run.path / "final").chat_template == template
    # a prompt is continued: by hand, the likeliest token behind its own ones
    tokenizer, model = run.tokenizer(), run.model()
    ids = [tokenizer.bos_token_id, *tokenizer("once upon", add_special_tokens=False)["input_ids"]]
    made = []
    for _ in range(3):
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    assert run.generate(["once upon"], max_new_tokens=3) == [tokenizer.decode(made, skip_special_tokens=True)]
    # what asks questions of its own says in which template they are
    given["evaluation"]["tasks"] = ["loss", "gsm8k-0shot"]
    said = fedtune.data_report(given)["checks"]
    asked = "chat" if template else "alpaca"
    assert [one["text"] for one in said if "template" in one["text"]] == [
        f"the examples are plain texts, in no template; gsm8k-0shot is asked in {asked} (data.template)"
    ]


METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"name": "fedkseed", "rounds": 1, "local_steps": 2, "lr": 1e-4, "seeds": 8},
    "fedbiot": {
        "name": "fedbiot",
        "rounds": 1,
        "adapter_layers": 1,
        "local_steps": 1,
        "batch_size": 2,
        "layer_dropout": 0.3,
        "alignment": {"steps_before": 1, "steps": 1, "batch_size": 2},
    },
}


@pytest.mark.parametrize("rows", [TALKS, TEXTS], ids=["conversations", "texts"])
@pytest.mark.parametrize("name", METHODS)
def test_other_methods(folder: Path, tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    train = written(tmp_path / "d.jsonl", rows)
    given = {**document(folder, {"train": train}), "method": METHODS[name]}
    if name == "fedbiot":
        given["data"]["public"] = {"source": train}
    run = fedtune.run(given, out=tmp_path / "run", progress=False)
    assert run.status == "done" and run.rounds[-1]["eval"]["loss"]["loss"] > 0
