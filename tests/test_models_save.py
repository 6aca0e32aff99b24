"""What is saved gives the same logits when it is read back, and damaged results are refused."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from model_families import ATTACH, DTYPES, ENCODERS, FAMILIES, batch, edit_json, save_folder, wake
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedtune.errors import InputError
from fedtune.models.load import load_model
from fedtune.models.lora import attach_lora
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import attach_adapter


def loader(tmp_path, family, dtype):
    return partial(
        load_model,
        dtype=str(dtype).removeprefix("torch."),
        initial="pretrained",
        task="classification" if family in ENCODERS else "causal-lm",
        seed=0,
        base=tmp_path,
    )


def logits(model, family):
    data = batch(family)
    del data["labels"]
    with torch.no_grad():
        return model(**data).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ATTACH)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_gives_the_same_bits(tmp_path, family, how, dtype):
    save_folder(tmp_path / "base", family, dtype)
    load = loader(tmp_path, family, dtype)
    loaded = load("base")
    model = ATTACH[how](loaded.model, 3)
    wake(model)
    model.eval()
    expected = logits(model, family)

    save_result(model, loaded.tokenizer, tmp_path / "result")
    assert torch.equal(logits(model, family), expected)
    again = load_result(tmp_path / "result", load)
    assert torch.equal(logits(again.model, family), expected)
    assert not again.model.training
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert not [file for file in (tmp_path / "result").iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    if how != "full":
        about = json.loads(next((tmp_path / "result").glob("adapter*.json")).read_text())
        assert "base" in (about.get("base_model_name_or_path"), about.get("base_model"))
        assert again.weights_sha256 == loaded.weights_sha256
    for file in (tmp_path / "result").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_a_plain_model_that_gives_the_same_logits(tmp_path, family, dtype):
    save_folder(tmp_path / "base", family, dtype)
    load = loader(tmp_path, family, dtype)
    loaded = load("base")
    model = ATTACH["lora"](loaded.model, 3)
    wake(model)
    model.eval()
    expected = logits(model, family)
    save_result(model, loaded.tokenizer, tmp_path / "merged", merge=True)
    assert torch.equal(logits(model, family), expected)  # saving left the model alone
    merged = load_result(tmp_path / "merged", load).model
    assert not isinstance(merged, PeftModel)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(
        logits(merged, family).float(), expected.float(), rtol=tolerance, atol=tolerance
    )


def test_merging_adds_scaled_ba_to_the_weight(tmp_path):
    save_folder(tmp_path / "base")
    loaded = loader(tmp_path, "llama", torch.float32)("base")
    before = loaded.model.get_submodule("model.layers.1.mlp.up_proj").weight.detach().clone()
    model = attach_lora(loaded.model, rank=2, alpha=6, dropout=0.0, targets=["up_proj"], seed=0)
    with torch.no_grad():
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
        layer.lora_A["default"].weight.fill_(0.5)
        layer.lora_B["default"].weight.fill_(0.25)
    save_result(model, loaded.tokenizer, tmp_path / "merged", merge=True)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    # every entry: 6/2 * (0.25 * 0.5 + 0.25 * 0.5) = 0.75
    torch.testing.assert_close(after["model.layers.1.mlp.up_proj.weight"], before + 0.75)
    torch.testing.assert_close(
        after["model.layers.1.mlp.down_proj.weight"],
        loaded.model.get_submodule("model.layers.1.mlp.down_proj").weight,
    )


def test_an_adapter_of_a_base_that_moved_names_the_new_place(tmp_path):
    folder = save_folder(tmp_path / "base")
    load = loader(tmp_path, "llama", torch.float32)
    loaded = load("base")
    save_result(
        attach_lora(loaded.model, rank=2, alpha=6, dropout=0.0, targets=["up_proj"], seed=0),
        loaded.tokenizer,
        tmp_path / "first",
    )
    folder.rename(tmp_path / "moved")
    again = load_result(tmp_path / "first", lambda name: load("moved"))
    save_result(again.model, again.tokenizer, tmp_path / "second")
    named = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        for name in ("first", "second")
    ]
    assert named == ["base", "moved"]


@pytest.mark.parametrize("how", ["prompt", "p-tuning"])
def test_a_prompt_read_back_and_a_copy_generate_as_the_model_does(tmp_path, how):
    """As it does by whole forward passes: see test_models_tuning."""

    def answers(model):
        ids, mask = torch.tensor([[1, 9, 33, 50], [0, 1, 41, 12]]), torch.tensor([[1] * 4, [0, 1, 1, 1]])
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
            )
        return made[:, 4:].tolist()

    save_folder(tmp_path / "base")
    load = loader(tmp_path, "llama", torch.float32)
    loaded = load("base")
    without = answers(loaded.model)
    model = ATTACH[how](loaded.model, 3)
    wake(model)
    expected = answers(model.eval())
    assert expected != without
    save_result(model, loaded.tokenizer, tmp_path / "result")
    assert answers(load_result(tmp_path / "result", load).model) == expected
    assert answers(copy.deepcopy(model)) == expected
    assert answers(loaded.model) == without  # the model inside is as it was


@pytest.mark.parametrize("how", ["full", "adapter", "prompt", "p-tuning"])
def test_only_lora_merges(tmp_path, how):
    save_folder(tmp_path / "base")
    loaded = loader(tmp_path, "llama", torch.float32)("base")
    model = ATTACH[how](loaded.model, 0)
    with pytest.raises(InputError, match="--merge is for LoRA and IA3"):
        save_result(model, loaded.tokenizer, tmp_path / "result", merge=True)
    assert not (tmp_path / "result").exists()


@pytest.fixture(params=["lora", "adapter"])
def result(request, tmp_path):
    """A saved result, the names of its two files, and the loader of its base."""
    save_folder(tmp_path / "base")
    load = loader(tmp_path, "llama", torch.float32)
    loaded = load("base")
    model = ATTACH[request.param](loaded.model, 0)
    save_result(model, loaded.tokenizer, tmp_path / "result")
    names = {
        "lora": ("adapter_config.json", "adapter_model.safetensors"),
        "adapter": ("adapter.json", "adapter.safetensors"),
    }[request.param]
    return tmp_path / "result", *names, load


def test_damaged_results_are_refused(result):
    folder, config, weights, load = result
    whole, text = (folder / weights).read_bytes(), (folder / config).read_text()
    (folder / weights).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{weights} is missing or damaged"):
        load_result(folder, load)
    (folder / weights).unlink()
    with pytest.raises(InputError, match=f"{weights} is missing or damaged"):
        load_result(folder, load)
    (folder / weights).write_bytes(whole)
    for wrong, message in (
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "base model|not a"),
    ):
        (folder / config).write_text(wrong)
        with pytest.raises(InputError, match=message):
            load_result(folder, load)
    (folder / config).write_text(text)
    tensors = load_file(folder / weights)
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / weights)
    with pytest.raises(InputError, match="does not fit its base model: 1 tensors"):
        load_result(folder, load)


def test_a_result_on_another_base_is_refused(result):
    folder, _, _, load = result
    base = folder.parent / "base"
    for file in base.iterdir():
        file.unlink()
    save_folder(base, "gpt2")
    with pytest.raises(InputError, match="does not fit its base model"):
        load_result(folder, load)


def test_a_folder_without_result_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no result"):
        load_result(tmp_path / "nowhere", loader(tmp_path, "llama", torch.float32))


def test_an_adapter_of_a_later_format_is_refused(tmp_path):
    save_folder(tmp_path / "base")
    load = loader(tmp_path, "llama", torch.float32)
    loaded = load("base")
    save_result(attach_adapter(loaded.model, size=2, seed=0), loaded.tokenizer, tmp_path / "result")
    edit_json(tmp_path / "result" / "adapter.json", version=2)
    with pytest.raises(InputError, match="version 1"):
        load_result(tmp_path / "result", load)
