"""Federations on a quantised base model: what they need, what they end with, and what is refused."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import batch, edit_json, save_folder
from safetensors.torch import load_file

import fedtune
from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.federation.client import join
from fedtune.federation.consent import Consent
from fedtune.models.load import load_model, meta_model
from fedtune.models.quantize import plain_state, quantized_layers
from fedtune.planning import rank
from fedtune.planning.plan import plan
from fedtune.transport.acceptance import NotAccepted

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs fedtune[quant]")

WORDS = [f"w{index}" for index in range(4, 64)]
ROWS = [
    {"instruction": " ".join(WORDS[i : i + 6]), "output": " ".join(WORDS[i + 1 : i + 5])} for i in range(24)
]
LORA = {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "pissa": {**LORA, "lora": {"rank": 2, "init": "pissa"}},
    "dora": {**LORA, "lora": {"rank": 2, "use_dora": True}},
    "adapter": {**LORA, "trainable": "adapter", "lora": None},
    "prompt": {**LORA, "trainable": "prompt", "lora": None, "prompt": {"tokens": 3}},
    "scaffold": {**LORA, "optimizer": "sgd", "control_variates": True},
    "fedkseed": {"name": "fedkseed", "rounds": 2, "local_steps": 3, "lr": 1e-3, "seeds": 64},
    "infinite-pool": {"name": "infinite-pool", "rounds": 2, "local_steps": 3, "lr": 1e-3},
    "standalone": {"name": "standalone", "batch_size": 4, "lora": {"rank": 2}},
    "zero-shot": {"name": "zero-shot"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "tiny")


def config(base: Path, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    model_settings = {"name": str(base), "quantization": "nf4", **more.pop("model", {})}
    return {
        "model": model_settings,
        "data": {"clients": 2, "template": "plain", "max_length": 32},
        "method": method,
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "bootstrap": 0},
        **more,
    }


def ran(document: dict[str, Any], out: Path) -> fedtune.Run:
    return fedtune.run(document, data=ROWS, out=out, progress=False)


def final(run: fedtune.Run) -> str:
    digest = hashlib.sha256()
    for file in sorted((run.path / "final").rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


SIDES = ("client", "server", "evaluation")


def peaks(run: fedtune.Run) -> tuple[dict[str, int], dict[str, int]]:
    """Peak memory by side, planned and measured."""
    planned = plan(run.config, objects=run.objects).document
    measured = run.summary["peak_memory_bytes"]
    return (
        {side: planned[f"{side}_peak_memory_bytes"]["total"] for side in SIDES},
        {side: measured[side] for side in SIDES},
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_saves_the_memory_that_is_planned(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    """A plan of so small a model is off by what batches differ; what quantisation takes away is exact."""
    found = {}
    for kind in ("none", "nf4", "int8"):
        method = METHODS[name]
        if kind == "none" and method["name"] in ("fedkseed", "infinite-pool"):
            continue  # there other weights would move
        run = ran(config(tiny, method, model={"quantization": kind}), tmp_path / kind)
        found[kind] = peaks(run)
        planned = plan(run.config, objects=run.objects).document
        assert planned["quantization"] == kind
        assert planned["trainable_parameters"] == run.summary["trainable_parameters"]
        assert planned["total_parameters"] == run.summary["total_parameters"]
        about = json.loads((run.path / "environment.json").read_text())["model"]
        assert about["quantization"] == kind and len(about["quantized_sha256"]) == (
            64 if kind != "none" else 0
        )
        if name != "standalone":
            scored = fedtune.evaluate(run, ["loss"])["scores"]["global"]  # on a base that is quantised again
            assert scored["loss"]["loss"] == pytest.approx(run.scores["loss"]["loss"], abs=1e-6)
    first, *others = found
    for other in others:
        for side in SIDES:
            less = [found[first][way][side] - found[other][way][side] for way in (0, 1)]
            assert less[0] == pytest.approx(less[1], abs=max(found[first][1][side], 1) / 100), (other, side)


@pytest.mark.parametrize(
    "method",
    [
        {"offload_params": "disk"},
        {"gradient_checkpointing": "full", "offload_params": "disk"},
        {"gradient_checkpointing": "full"},
        {"optimizer_in_backward": True},
    ],
    ids=lambda method: " ".join(method),
)
def test_what_saves_memory_changes_no_bit(method: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    plain = ran(config(tiny, {**LORA, "gradient_checkpointing": "none"}), tmp_path / "plain")
    less = ran(config(tiny, {**LORA, "gradient_checkpointing": "none", **method}), tmp_path / "less")
    assert final(plain) == final(less)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_is_what_a_run_on_a_quantised_base_measures(kind: str, dtype: str, tmp_path: Path) -> None:
    document = {
        "model": {"quantization": kind, "dtype": dtype},
        "data": {"max_examples": 8, "max_length": 48, "clients": 2},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 2, "bootstrap": 0},
    }
    planned, measured = peaks(fedtune.run(document, out=tmp_path / "run", progress=False))
    for side in SIDES:
        assert planned[side] == pytest.approx(measured[side], rel=0.05)


def test_methods_are_ranked_on_a_quantised_base(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: rank.CANDIDATES[name] for name in ("fedavg, full", "fedavg, lora", "zero-shot")}
    monkeypatch.setattr(rank, "CANDIDATES", some)
    figures: Any = {"client_memory": "1GB", "uplink": "1Mbps", "downlink": "1Mbps"}
    weights = {}
    for kind in ("none", "nf4", "int8"):
        loaded = load_model(
            str(tiny), dtype="float32", initial="pretrained", seed=0, base=Path("."), quantization=kind
        )
        held = {id(t): t for t in [*loaded.model.parameters(), *loaded.model.buffers()]}
        ranked = fedtune.rank(str(tiny), f"model.quantization={kind}", "data.max_length=16", **figures)
        assert ranked["quantization"] == kind
        rows = {row["method"]: row for row in ranked["methods"]}
        memory = rows["fedavg, lora"]["plan"]["client_peak_memory_bytes"]
        weights[kind] = memory["weights"], sum(t.nbytes for t in held.values())
        (why,) = rows["fedavg, full"]["reasons"] if kind != "none" else ("",)
        if kind != "none":
            assert why.startswith(f"does not apply: model.quantization: {kind} does not go with fedavg")
    for kind in ("nf4", "int8"):  # beside LoRA's own, which are the same on all three
        assert weights["none"][0] - weights[kind][0] == weights["none"][1] - weights[kind][1] > 0


@pytest.mark.parametrize("name", ["lora", "fedkseed", "scaffold"])
def test_bits_are_the_same_from_an_earlier_round_and_with_more_rounds(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    run = ran(config(tiny, METHODS[name]), tmp_path / "run")
    whole = final(run)
    assert final(run.rollback(1, progress=False)) == whole
    short = ran(config(tiny, {**METHODS[name], "rounds": 1}), tmp_path / "short")
    assert final(short.resume(rounds=2, progress=False)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("initial", ["pretrained", "scratch"])
def test_processes_hold_the_same_bits(initial: str, tiny: Path, tmp_path: Path) -> None:
    # The CPU's fused attention has other bits with other numbers of threads where heads are 8 wide.
    alike = {"initial": initial, "attention": "eager"}
    one = ran(config(tiny, LORA, model=alike), tmp_path / "one")
    two = ran(config(tiny, LORA, model=alike, transport={"workers": 2}), tmp_path / "two")
    assert final(one) == final(two)


REFUSED = [
    ({"name": "fedavg", "trainable": "full"}, "take lora or adapter or ia3 or prompt or p-tuning or prefix"),
    *(
        ({"name": "fedavg", "aggregation": how}, f"{how} adds to the model's own weights")
        for how in ("stack", "residual")
    ),
    ({"name": "standalone", "trainable": "full"}, "moves the weights that are kept in few bits"),
    ({"name": "fedbiot"}, "an emulator that is cut from the model's own weights"),
    ({"name": "fedot"}, "an emulator"),
    ({"name": "offsite-tuning"}, "an emulator"),
    ({"name": "fedcybgd"}, "the blocks' own weights, whole"),
    ({"name": "fedcybgd", "trainable": "lora"}, "the blocks' own weights, whole"),
    ({"name": "fedbavg"}, "the blocks' own weights, whole"),
    ({"name": "badam"}, "trains the blocks' own weights"),
]


@pytest.mark.parametrize(("method", "why"), REFUSED)
def test_what_moves_quantised_weights_is_refused_before_anything_is_loaded(
    method: dict[str, Any], why: str
) -> None:
    document = {"model": {"name": "nowhere", "quantization": "nf4"}, "method": method}
    with pytest.raises(InputError, match=f"quantization: nf4 does not go with {method['name']}: .*{why}"):
        parse_config(document, "test")


def came(tiny: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint that transformers and bitsandbytes have quantised."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    for file in tiny.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


COMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4, scales whole": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.mark.parametrize("name", COMES)
def test_a_checkpoint_of_bitsandbytes_has_the_bits_of_one_that_is_quantised_here(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    folder = came(tiny, tmp_path / "q", **COMES[name])
    settings: dict[str, Any] = {"initial": "pretrained", "seed": 0, "base": Path("."), "dtype": "float32"}
    loaded = load_model(str(folder), **settings)
    kind = name.split(",")[0]
    assert loaded.quantization == kind
    if name in ("nf4", "int8"):
        here = load_model(str(tiny), quantization=name, **settings)
        assert loaded.quantized_sha256 == here.quantized_sha256
        assert torch.equal(loaded.model(**batch("llama")).logits, here.model(**batch("llama")).logits)
    planned = meta_model(str(folder), base=Path("."))
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (loaded.model, planned)]
    assert shapes[0] == shapes[1]
    document = config(folder, LORA, model={"quantization": "none"})
    run = ran(document, tmp_path / "run")
    run.export(tmp_path / "whole", merge=True)  # into the widened weights, for no others are there
    whole = load_model(str(tmp_path / "whole"), **settings)
    assert whole.quantization == "none"
    trained = fedtune.open(run.path, data=ROWS).model()
    assert torch.allclose(whole.model(**batch("llama")).logits, trained(**batch("llama")).logits, atol=1e-5)
    with pytest.raises(InputError, match=r"is quantised .* does not go with fedavg: trainable: full"):
        ran(
            config(folder, {"name": "fedavg", "trainable": "full"}, model={"quantization": "none"}),
            tmp_path / "x",
        )
    other = "int8" if kind != "int8" else "nf4"
    with pytest.raises(InputError, match=f"quantization is {other}, but model .* comes quantised .{kind}"):
        load_model(str(folder), quantization=other, **settings)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "gptqmodel"),
        ("awq", "gptqmodel"),
        ("torchao", "torchao"),
        ("compressed-tensors", "compressed-tensors"),
        ("hqq", "hqq"),
    ],
)
def test_a_checkpoint_of_another_package_names_it(
    method: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.models import quantized_checkpoints

    monkeypatch.setattr(quantized_checkpoints, "find_spec", lambda name: None)
    folder = save_folder(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(InputError, match=f"comes quantised by {method} .*pip install .*{package}"):
        load_model(str(folder), dtype="float32", initial="pretrained", seed=0, base=Path("."))


def test_an_adapter_goes_onto_either_base_and_into_the_full_one(tiny: Path, tmp_path: Path) -> None:
    run = ran(config(tiny, LORA), tmp_path / "run")
    about = json.loads((run.path / "final" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tiny)
    run.export(tmp_path / "merged", merge=True)
    merged, full = load_file(tmp_path / "merged" / "model.safetensors"), load_file(tiny / "model.safetensors")
    adapter = load_file(run.path / "final" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = full[name] + (32 / 2) * b @ a
    torch.testing.assert_close(merged[name], expected)
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], full["model.layers.0.mlp.up_proj.weight"])
    whole = fedtune.evaluate(run, ["loss"], "model.quantization=none")["scores"]["global"]
    kept = fedtune.evaluate(run, ["loss"])["scores"]["global"]
    assert (
        whole["loss"]["loss"] != kept["loss"]["loss"] == pytest.approx(run.scores["loss"]["loss"], abs=1e-6)
    )


def test_a_whole_result_is_saved_with_its_widened_weights(tiny: Path, tmp_path: Path) -> None:
    run = ran(config(tiny, METHODS["fedkseed"]), tmp_path / "run")
    saved = load_file(run.path / "final" / "model.safetensors")
    base = load_model(
        str(tiny), dtype="float32", initial="pretrained", seed=0, base=Path("."), quantization="nf4"
    )
    widened = plain_state(base.model)
    for path in quantized_layers(base.model):
        assert torch.equal(saved[f"{path}.weight"], widened[f"{path}.weight"])
    assert not torch.equal(saved["model.embed_tokens.weight"], widened["model.embed_tokens.weight"])


def invitation(model: Path, own: Path, base: Any) -> dict[str, Any]:
    """What a server with that base model tells a client."""
    document = config(model, LORA, transport={"name": "flower"})
    document["data"] |= {"train": "clients", "clients": None, "holdout": {"source": str(own)}}
    return {
        "config": json.dumps(fedtune.load(document).resolved()),
        "client": 0,
        "weights": base.weights_sha256,
        "quantization": base.quantization,
        "quantized": base.quantized_sha256,
    }


def test_a_client_with_other_bits_or_another_quantisation_says_so(tiny: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, ROWS[:3])))
    base = load_model(
        str(tiny), dtype="float32", initial="pretrained", seed=0, base=Path("."), quantization="nf4"
    )
    asked = invitation(tiny, own, base)

    def joined(**changed: Any) -> int:
        more = {"data": own, "fields": {}, "model": None, "device": "cpu", "consent": Consent()}
        return join({**asked, **changed}, **more).examples

    assert joined() == 3
    for field in ("quantization", "quantized"):  # a server of an earlier version says neither
        asked.pop(field)
    assert joined() == 3
    with pytest.raises(NotAccepted, match="is quantised as nf4, and the server's as int8; all sides need"):
        joined(quantization="int8")
    with pytest.raises(
        NotAccepted, match=r"quantised as nf4, has other bits .* than the server's \(aaaaaaaaaaaa\)"
    ):
        joined(quantized="a" * 64)
