"""Checkpoints of torchao and compressed-tensors, where these packages are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import edit_json, save_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import QuantizationMethod

import fedtune
from fedtune.errors import InputError
from fedtune.models.load import load_model

WORDS = [f"w{index}" for index in range(4, 64)]
ROWS = [
    {"instruction": " ".join(WORDS[i : i + 6]), "output": " ".join(WORDS[i + 1 : i + 5])} for i in range(12)
]
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "initial": "pretrained", "seed": 0, "base": Path(".")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "tiny")


def document(model: Path, **method: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model), "dtype": "bfloat16"},
        "data": {"clients": 2, "template": "plain", "max_length": 32},
        "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.01, **method},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "bootstrap": 0},
    }


def ran(model: Path, out: Path, **method: Any) -> fedtune.Run:
    return fedtune.run(document(model, **method), data=ROWS, out=out, progress=False)


def test_a_checkpoint_of_torchao_is_tuned_on_and_merged(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        tiny,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    folder = tmp_path / "ao"
    theirs.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    loaded = load_model(str(folder), **SETTINGS)
    assert loaded.quantization == "torchao"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    run = ran(folder, tmp_path / "run", lora={"rank": 2})
    scored = fedtune.evaluate(run, ["loss"])["scores"]["global"]["loss"]["loss"]
    assert scored == pytest.approx(run.scores["loss"]["loss"], abs=1e-6)
    merged = run.export(tmp_path / "merged", merge=True)[0]
    name = "model.layers.0.mlp.up_proj"  # not trained: what the bits stand for
    wide = theirs.get_submodule(name).weight.dequantize()
    assert torch.equal(load_file(Path(merged) / "model.safetensors")[f"{name}.weight"], wide)
    with pytest.raises(InputError, match=r"full|whole"):
        ran(folder, tmp_path / "full", trainable="full")
    ran(folder, tmp_path / "pissa", lora={"rank": 2, "init": "pissa"})
    with pytest.raises(InputError, match=r"came quantised .torchao.*set method.offload_params to none"):
        ran(folder, tmp_path / "offload", lora={"rank": 2}, offload_params="disk")
    with pytest.raises(InputError, match=r"comes quantised by torchao: .* cannot be planned"):
        fedtune.plan(document(folder), data=ROWS)


def test_a_checkpoint_of_compressed_tensors_is_a_plain_model(tiny: Path, tmp_path: Path) -> None:
    """Written by hand: whole numbers and a scale a row, which are multiplied."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder = tmp_path / "ct"
    folder.mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state, wanted = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in load_file(tiny / "model.safetensors").items():
        if "_proj" not in name:
            state[name] = wanted[name] = tensor.to(torch.bfloat16)
            continue
        scale = (tensor.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        bits = (tensor / scale.float()).round().clamp(-128, 127).to(torch.int8)
        state[name], state[f"{name}_scale"] = bits, scale
        wanted[name] = bits.to(torch.bfloat16) * scale
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        },
    )
    loaded = load_model(str(folder), **SETTINGS)
    assert loaded.quantization == "none"
    found = loaded.model.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.01, atol=1e-6)
    run = ran(folder, tmp_path / "run", trainable="full")  # every method takes it
    assert json.loads((run.path / "environment.json").read_text())["model"]["quantization"] == "none"
    assert fedtune.evaluate(run, ["loss"])["scores"]["global"]["loss"]["loss"] == pytest.approx(
        run.scores["loss"]["loss"], abs=1e-6
    )


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_without_the_package_it_is_said_what_else_goes(method: str, tmp_path: Path) -> None:
    from fedtune.models import quantized_checkpoints

    folder = save_folder(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_checkpoints, "find_spec", lambda name: None)
        for call in (
            lambda: load_model(str(folder), **SETTINGS),
            lambda: fedtune.plan(document(folder), data=ROWS),
        ):
            with pytest.raises(InputError, match=r"pip install gptqmodel.*, or take the model that it was"):
                call()


@pytest.mark.parametrize("method", ["", "nobody-knows-it", *(str(one.value) for one in QuantizationMethod)])
def test_whatever_config_json_says_of_plain_weights_it_is_a_plain_model_or_a_sentence(
    method: str, tmp_path: Path
) -> None:
    """The name of every method that transformers knows; some it widens where there is no GPU."""
    folder = save_folder(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": method})
    try:
        loaded = load_model(str(folder), **SETTINGS)
    except InputError as refused:
        assert 0 < len(str(refused)) < 700
    else:
        assert loaded.quantization == "none"
        plain = load_model(str(save_folder(tmp_path / "plain")), **SETTINGS).model.state_dict()
        found = loaded.model.state_dict()
        for name, tensor in plain.items():  # of about 1; one of them goes through bfloat16
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2**-7)
    if method != "compressed-tensors":  # is widened wherever it is loaded, and planned so
        with pytest.raises(InputError) as refused_plan:
            fedtune.plan(document(folder), data=ROWS)
        assert 0 < len(str(refused_plan.value)) < 700


def test_bitsandbytes_without_its_bits_says_which_are_missing(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="says neither load_in_4bit nor load_in_8bit"):
        load_model(str(folder), **SETTINGS)
