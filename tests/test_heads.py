"""What loading a classifier had to draw is trained, sent and saved, whatever it is called."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import ATTACH, COMMON, tokenizer, wake
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from toy import Bench
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import fedtune
from fedtune.config.file import parse_config
from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods.fedcybgd.badam import BAdam
from fedtune.methods.fedcybgd.method import FedCyBGD
from fedtune.methods.fedcybgd.settings import BAdamConfig, Config
from fedtune.models.heads import drawn_modules, head_modules
from fedtune.models.load import load_model, meta_model
from fedtune.models.lora import attach_lora
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import trainable
from fedtune.planning.plan import plan

HIDDEN = {**COMMON, "num_hidden_layers": 4}
# Settings, the head's modules that are always there, and LoRA's targets where PEFT has no default.
FAMILIES: dict[str, tuple[dict[str, Any], set[str], list[str] | None]] = {
    "bert": (HIDDEN, {"classifier"}, None),
    "albert": (HIDDEN | {"embedding_size": 16}, {"classifier"}, ["attention.query"]),
    "distilbert": (
        {"vocab_size": 64, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0},
        {"classifier", "pre_classifier"},
        ["q_lin"],
    ),
    "deberta-v2": (HIDDEN | {"relative_attention": True}, {"classifier", "pooler"}, None),
    "modernbert": (HIDDEN, {"classifier", "head"}, ["attn.Wqkv"]),
    "electra": (HIDDEN | {"embedding_size": 16}, {"classifier"}, None),
    "gpt2": (
        {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "pad_token_id": 0},
        {"score"},
        None,
    ),
    "qwen2": (HIDDEN | {"num_key_value_heads": 2}, {"score"}, None),
}
WITH_POOLER = {"bert": "bert.pooler", "albert": "albert.pooler"}
IDS = torch.tensor([[1, 9, 33, 50, 17], [1, 41, 12, 3, 9]])


def folder(path: Path, family: str, source: str) -> Path:
    """A model folder: "whole" for two classes, "no head", or "no pooler" and no head."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        config = AutoConfig.for_model(family, **FAMILIES[family][0], num_labels=2)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    body = f"{model.base_model_prefix}."
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if source == "whole" or (name.startswith(body) and (source == "no head" or ".pooler." not in name))
    }
    model.save_pretrained(path, state_dict=state)
    tokenizer().save_pretrained(path)
    return path


def load(path: Path, seed: int = 5) -> Any:
    return load_model(
        str(path), dtype="float32", initial="pretrained", task="classification", num_labels=3, seed=seed,
        base=Path(),
    )  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


@pytest.mark.parametrize("how", ATTACH)
@pytest.mark.parametrize(
    ("family", "source"),
    [(f, s) for f in FAMILIES for s in ("whole", "no head")] + [(f, "no pooler") for f in WITH_POOLER],
)
def test_plain_libraries_read_back_what_was_trained(
    tmp_path: Path, family: str, source: str, how: str
) -> None:
    base = folder(tmp_path / "base", family, source)
    loaded = load(base)
    wanted = FAMILIES[family][1] | ({WITH_POOLER[family]} if source == "no pooler" else set())
    assert set(head_modules(loaded.model)) == wanted
    targets = FAMILIES[family][2]
    if how == "lora":
        model: Any = attach_lora(loaded.model, rank=2, alpha=4, dropout=0.0, targets=targets, seed=1)
    else:
        model = ATTACH[how](loaded.model, 1)
    parameters = trainable(model)
    added = ("lora_", "bottleneck", "prompt_encoder")
    heads = {name for name in parameters if not any(part in name for part in added)}
    if how != "full":
        assert {next(h for h in wanted if name.startswith(f"{h}.")) for name in heads} == wanted
    wake(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    labels = torch.tensor([2, 0])
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss.backward()
    torch.optim.SGD(parameters.values(), lr=0.5).step()
    assert all(
        not torch.equal(parameters[n], before[n]) for n in heads if n.endswith("weight") and how != "full"
    )
    expected = logits(model)

    result = tmp_path / "result"
    save_result(model, loaded.tokenizer, result)
    if how == "full":
        again: nn.Module = AutoModelForSequenceClassification.from_pretrained(result)
    elif how == "adapter":  # its format is our own
        again = load_result(result, lambda name: load(base, seed=5)).model
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, ignore_mismatched_sizes=True
        )
        again = PeftModel.from_pretrained(plain, str(result))
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=2e-6)
    if how == "lora":
        save_result(model, loaded.tokenizer, tmp_path / "merged", merge=True)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=2e-6)
    if how in ("prompt", "p-tuning"):
        own = load_result(result, lambda name: load(base, seed=6)).model
        torch.testing.assert_close(logits(own), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", WITH_POOLER)
def test_what_is_drawn_is_the_seeds(tmp_path: Path, family: str) -> None:
    base = folder(tmp_path / "base", family, "no pooler")
    first, again, other = (load(base, seed).model.state_dict() for seed in (1, 1, 2))
    drawn = [n for n in first if ".pooler." in n or n.startswith("classifier.")]
    assert len(drawn) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    same = {name for name in first if torch.equal(first[name], other[name])}
    assert same == {n for n in first if n not in drawn or n.endswith("bias")}  # biases begin at 0


@pytest.mark.parametrize("family", WITH_POOLER)
@pytest.mark.parametrize("source", ["whole", "no head", "no pooler"])
def test_a_plan_knows_from_the_weights_names_what_loading_draws(
    tmp_path: Path, family: str, source: str
) -> None:
    base = folder(tmp_path / "base", family, source)
    bare = AutoModelForSequenceClassification.from_pretrained(base).base_model
    bare.save_pretrained(tmp_path / "bare", state_dict={
        n: t for n, t in bare.state_dict().items() if source != "no pooler" or "pooler." not in n
    })  # fmt: skip  # a body alone has names without its prefix
    tokenizer().save_pretrained(tmp_path / "bare")
    for where in (base, tmp_path / "bare"):
        planned = meta_model(str(where), base=Path(), task="classification", num_labels=3)
        loaded = load(where).model
        assert drawn_modules(planned) == drawn_modules(loaded)
        assert drawn_modules(loaded) == ([WITH_POOLER[family]] if source == "no pooler" else [])
    (base / "model.safetensors").unlink()
    assert drawn_modules(meta_model(str(base), base=Path(), task="classification")) == []


def test_a_body_that_lacks_anything_else_is_refused(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", "bert", "no pooler")
    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if "layer.2.output.dense.weight" in n)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.save_pretrained(base, state_dict={n: t for n, t in tensors.items() if n != name})
    with pytest.raises(InputError, match=r"lack 1 tensors.*layer\.2\.output\.dense\.weight"):
        load(base)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_head_is_tied_or_there(tmp_path: Path, tied: bool) -> None:
    config = AutoConfig.for_model("qwen2", **HIDDEN | {"num_key_value_heads": 2}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("lm_head")}
    model.save_pretrained(tmp_path / "base", state_dict=state)
    tokenizer().save_pretrained(tmp_path / "base")
    options: Any = {"dtype": "float32", "initial": "pretrained", "seed": 0, "base": tmp_path}
    if not tied:
        with pytest.raises(InputError, match=r"lack 1 tensors.*lm_head\.weight"):
            load_model("base", **options)
        return
    loaded = load_model("base", **options).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert drawn_modules(loaded) == [] and head_modules(loaded) == {}


def test_classes_come_as_one_number_a_text(tmp_path: Path) -> None:
    """DeBERTa counts (batch, 1) as labels that may be missing, and fails; BERT takes both."""
    items = [Encoded((1, 9, 33), (2,)), Encoded((1, 41), (0,))]
    batch = collate(items, 0)
    assert batch["labels"].shape == (2,)
    model = load(folder(tmp_path / "base", "deberta-v2", "no head")).model
    scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([2, 0]))
    assert torch.allclose(model(**batch).loss, expected)


def test_what_the_weights_were_trained_for_before_does_not_change_the_loss(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", "bert", "no head")
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"problem_type": "multi_label_classification"}))
    model = load(base).model
    batch = collate([Encoded((1, 9, 33), (2,)), Encoded((1, 41), (0,))], 0)
    scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([2, 0]))
    assert torch.allclose(model(**batch).loss, expected)


def texts(client: int) -> list[Encoded]:
    return [Encoded((1, 4 + client, 9 + k, 30 - k), (k % 3,)) for k in range(4)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compression": "layer-drop"},
        {"trainable": "lora", "lora": {"rank": 2}, "compression": "layer-drop"},
        {"trainable": "adapter", "adapter": {"size": 3}},
    ],
    ids=str,
)
def test_a_drawn_pooler_trains_with_every_block(tmp_path: Path, settings: dict[str, Any]) -> None:
    """It is a part of the head, which each turn trains and sends, and which ends up in the result."""
    model = load(folder(tmp_path / "base", "bert", "no pooler")).model
    config = Config.model_validate({"local_steps": 2, "lr": 0.05, "batch_size": 2, **settings})
    federation = Bench(FedCyBGD(config, 0), model, {client: texts(client) for client in range(3)})
    start = federation.state
    federation.round(1)
    names = {"classifier:bert.pooler.dense.weight", "classifier:classifier.weight"}
    states = [start, *federation.states_on_the_way]
    assert len(states) == 4
    for before, after in itertools.pairwise(states):
        assert all(not torch.equal(before.weights[n], after.weights[n]) for n in names)
    (_, result) = next(iter(federation.method.export(federation.state, federation.model)))
    plain: Any = result.get_base_model() if hasattr(result, "get_base_model") else result
    pooler = dict(plain.named_parameters())
    key = next(
        n for n in pooler if n.startswith("bert.pooler") and n.endswith("weight") and "original" not in n
    )
    assert torch.equal(pooler[key], federation.state.weights["classifier:bert.pooler.dense.weight"])


def test_badam_trains_a_drawn_pooler(tmp_path: Path) -> None:
    model = load(folder(tmp_path / "base", "albert", "no pooler")).model
    before = copy.deepcopy(model.albert.pooler.weight)
    config = BAdamConfig(
        local_steps=1, switch_interval=1, lr=0.05, batch_size=2, gradient_checkpointing=False
    )
    federation = Bench(BAdam(config, 0), model, {0: texts(0)})
    assert "classifier:albert.pooler.weight" in federation.state.start
    federation.round(1)
    assert not torch.equal(federation.state.trained["classifier:albert.pooler.weight"], before)


def document(tmp_path: Path, method: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "instruction": " ".join(f"w{4 + (i * 7 + j * (3 + i % 3)) % 60}" for j in range(3 + i % 4)),
            "output": "abc"[i % 3],
            "category": "held" if i > 19 else "train",
        }
        for i in range(24)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "seed": 3,
        "model": {"name": str(tmp_path / "base"), "task": "classification"},
        "data": {"train": str(tmp_path / "data.jsonl"), "clients": 2, "holdout": {"category": "held"}},
        "method": {"rounds": 2, "local_epochs": 1, "batch_size": 4, "lr": 0.05, **method},
        "evaluation": {"tasks": ["loss"]},
    }


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg", "lora": {"rank": 2}},
        {"name": "fedavg", "trainable": "prompt", "prompt": {"tokens": 3}},
        {"name": "fedcybgd", "trainable": "lora", "lora": {"rank": 2}, "compression": "layer-drop"},
    ],
    ids=str,
)
def test_a_runs_own_score_is_that_of_its_result_and_its_bytes_are_the_plans(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    base = folder(tmp_path / "base", "bert", "no pooler")
    asked = document(tmp_path, method)
    planned = plan(parse_config(asked, "test"), steps=False).document["payload_bytes"]
    run = fedtune.run(asked, out=tmp_path / "run", progress=False)
    wire = [json.loads(line) for line in (tmp_path / "run" / "wire.jsonl").read_text().splitlines()]
    for way in ("up", "down"):
        assert planned[way] == sum(e["payload_bytes"] for e in wire if e["direction"] == way)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["model"]["drawn"] == [
        "bert.pooler"
    ]
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "final")).eval()
    losses = []
    for line in (tmp_path / "data.jsonl").read_text().splitlines()[20:]:
        row = json.loads(line)
        with torch.no_grad():
            ids = tokenizer()(row["instruction"], return_tensors="pt")["input_ids"]
            scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        losses.append(float(nn.functional.cross_entropy(scores, torch.tensor(["abc".index(row["output"])]))))
    assert run.rounds[-1]["eval"]["loss"]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)


class Stop:
    """Ends a run after its first round, as a lost machine would."""

    def on_round(self, *_: Any, **__: Any) -> None:
        self.rounds = getattr(self, "rounds", -1) + 1
        if self.rounds == 1:
            raise KeyboardInterrupt


def test_a_run_of_before_goes_on_with_its_pooler_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions up to 0.1.0 left it frozen, and said nothing of it in environment.json."""
    folder(tmp_path / "base", "bert", "no pooler")
    asked = document(tmp_path, {"name": "fedavg", "lora": {"rank": 2}})
    with monkeypatch.context() as before:
        before.setattr("fedtune.models.load.mark_drawn", lambda model, names: None)
        whole = fedtune.run(asked, out=tmp_path / "whole", progress=False)
        with pytest.raises(KeyboardInterrupt):
            fedtune.run(asked, out=tmp_path / "cut", progress=False, callbacks=[Stop()])
    about = json.loads((tmp_path / "cut" / "environment.json").read_text())
    del about["model"]["drawn"]
    (tmp_path / "cut" / "environment.json").write_text(json.dumps(about))
    run = fedtune.open(tmp_path / "cut").resume(progress=False)
    assert run.status == "done" and run.rounds[-1]["eval"] == whole.rounds[-1]["eval"]
    results = [load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("whole", "cut")]
    assert results[0].keys() == results[1].keys() and not any("pooler" in name for name in results[0])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
