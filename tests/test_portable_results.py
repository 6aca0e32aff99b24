"""What is saved is read by transformers and PEFT alone, by earlier versions too, and names its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import ATTACH, BLOCKS, ENCODERS, TOKENS, batch, build, edit_json, save_folder, wake
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaConfig,
)

from fedtune.errors import InputError
from fedtune.models.load import Loaded, load_model, load_tokenizer
from fedtune.models.portable import classes_of, mend_config, name_classes
from fedtune.models.save import classes_in, load_result, save_result

CLASSES = ("d", "a", "c", "b")


def loaded(folder: Path, task: str = "classification", dtype: str = "float32") -> Loaded:
    found = load_model(
        str(folder),
        dtype=dtype,
        initial="pretrained",
        task=task,
        num_labels=len(CLASSES) if task == "classification" else None,
        seed=0,
        base=Path("."),
    )
    if task == "classification":
        name_classes(found.model.config, CLASSES)
    return found


def logits(model: nn.Module) -> Tensor:
    inputs = {key: value for key, value in batch("bert").items() if key != "labels"}
    with torch.no_grad():
        out: Tensor = model.eval()(**inputs).logits
    return out


def alone(model: nn.Module) -> Tensor:
    """Of each text without padding, which a decoder with a soft prompt reads in plain PEFT."""
    inputs, rows = batch("bert"), []
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        text = {key: value[row : row + 1, :length] for key, value in inputs.items() if key != "labels"}
        with torch.no_grad():
            rows.append(model.eval()(**text).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("how", ATTACH)
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_classifier_of_four_classes_is_read_by_the_libraries_alone(
    tmp_path: Path, family: str, how: str
) -> None:
    """The base has a head for three classes (BERT, RoBERTa) or none (Llama)."""
    save_folder(tmp_path / "base", family)
    base = loaded(tmp_path / "base")
    model = ATTACH[how](base.model, 3)
    wake(model)
    expected, out = logits(model), tmp_path / "result"
    save_result(model, base.tokenizer, out)
    assert classes_in(out) == CLASSES
    if how != "adapter":  # which has no reader but ours
        auto = AutoModelForSequenceClassification if how == "full" else AutoPeftModelForSequenceClassification
        again = auto.from_pretrained(str(out))
        if family == "llama" and how in ("prompt", "p-tuning"):
            torch.testing.assert_close(alone(again), alone(model))
        else:
            assert torch.equal(logits(again), expected)
        config = again.config if how == "full" else again.get_base_model().config
        assert config.id2label == dict(enumerate(CLASSES))
        assert config.label2id == {"d": 0, "a": 1, "c": 2, "b": 3}
    ours = load_result(out, lambda name: loaded(Path(name)))
    assert torch.equal(logits(ours.model), expected)


def test_a_base_of_several_files_and_one_without_a_head(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base", "bert")
    (folder / "model.safetensors").unlink()
    build("bert").save_pretrained(folder, max_shard_size="20KB")
    base = loaded(folder)
    model = ATTACH["lora"](base.model, 3)
    wake(model)
    expected = logits(model)
    save_result(model, base.tokenizer, tmp_path / "several")
    again = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "several"))
    assert torch.equal(logits(again), expected)
    encoder = ENCODERS["bert"]
    with torch.random.fork_rng(devices=[]):
        BertForMaskedLM(encoder).save_pretrained(tmp_path / "masked")
    base.tokenizer.save_pretrained(tmp_path / "masked")
    masked = loaded(tmp_path / "masked")
    save_result(ATTACH["lora"](masked.model, 3), masked.tokenizer, tmp_path / "headless")
    links = {file.name: file.is_symlink() for file in (tmp_path / "headless" / "base").iterdir()}
    assert links == {"config.json": False, "model.safetensors": True}


def test_a_base_that_names_these_classes_needs_no_other_configuration(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base", "bert")
    base = loaded(folder)
    save_result(base.model, base.tokenizer, tmp_path / "named")
    named = loaded(tmp_path / "named")
    save_result(ATTACH["lora"](named.model, 0), named.tokenizer, tmp_path / "result")
    about = json.loads((tmp_path / "result" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "named")
    assert not (tmp_path / "result" / "base").exists()
    assert classes_in(tmp_path / "result") == CLASSES


def test_weights_that_no_file_has_leave_the_adapter_as_it_is(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base", "bert")
    (folder / "model.safetensors").unlink()
    found = load_model(
        str(folder),
        dtype="float32",
        initial="scratch",
        task="classification",
        num_labels=4,
        seed=0,
        base=Path(),
    )
    save_result(ATTACH["lora"](found.model, 0), found.tokenizer, tmp_path / "result")
    assert not (tmp_path / "result" / "base").exists()


@pytest.mark.parametrize(
    ("about", "classes"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, ("no", "yes")),
        ({"id2label": {"10": "k", "2": "c", "1": "b"}}, ("b", "c", "k")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ()),
        ({"id2label": {"first": "no"}}, ()),
        ({"id2label": None}, ()),
        ({}, ()),
    ],
)
def test_classes_are_read_in_the_order_of_the_outputs(
    about: dict[str, Any], classes: tuple[str, ...]
) -> None:
    assert classes_of(about) == classes


def test_a_target_has_its_place_in_the_list_whatever_the_run(tmp_path: Path) -> None:
    save_folder(tmp_path / "base")
    base = loaded(tmp_path / "base", "causal-lm")
    from fedtune.models.lora import attach_lora

    targets = ["v_proj", "up_proj", "q_proj", "down_proj", "k_proj", "o_proj", "gate_proj"]
    model = attach_lora(base.model, rank=2, alpha=4, dropout=0.0, targets=targets, seed=0)
    save_result(model, base.tokenizer, tmp_path / "result")
    about = json.loads((tmp_path / "result" / "adapter_config.json").read_text())
    assert about["target_modules"] == sorted(targets)
    assert AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "result")) is not None


@pytest.mark.parametrize(
    ("source", "saved"),
    [
        ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "PreTrainedTokenizerFast"),
        ("GPT2Tokenizer", "GPT2Tokenizer"),
        (None, "PreTrainedTokenizerFast"),
    ],
)
def test_a_tokenizer_keeps_the_class_of_its_source(tmp_path: Path, source: str | None, saved: str) -> None:
    folder = save_folder(tmp_path / "base")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=source, extra_special_tokens=["w9", "w10"])
    before = load_tokenizer(str(folder), Path())
    save_result(build("llama"), before, tmp_path / "result")
    about = json.loads((tmp_path / "result" / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == saved
    # transformers 4 knows the list under this name, and fails on the other
    assert (about["additional_special_tokens"], about.get("extra_special_tokens")) == (["w9", "w10"], None)
    assert not about.keys() & {"is_local", "local_files_only"}
    again = AutoTokenizer.from_pretrained(tmp_path / "result")
    assert again.get_vocab() == before.get_vocab()
    assert again("w5 w9 w10").input_ids == before("w5 w9 w10").input_ids
    assert again.decode([9, 12], skip_special_tokens=True) == before.decode([9, 12], skip_special_tokens=True)


ROPE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": 500.0},
    ),
    (
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 9.0, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 3.0, "rope_type": "default"},
            }
        },
        {"rope_theta": 9.0, "rope_local_base_freq": 3.0},
    ),
    (
        {
            "model_type": "gpt_neox",
            "rope_parameters": {"rope_theta": 7.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
        {"rotary_emb_base": 7.0, "rotary_pct": 0.5},
    ),
    ({"hidden_size": 3}, {}),
]


@pytest.mark.parametrize(("about", "added"), ROPE)
def test_rotary_positions_are_written_under_both_names(
    tmp_path: Path, about: dict[str, Any], added: dict[str, Any]
) -> None:
    """transformers 4 knows no rope_parameters, and would take its default of 10000 without a word."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(about))
    mend_config(file)
    assert json.loads(file.read_text()) == {**about, **added}


def test_both_names_are_read_as_one_model(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "base")
    scaled = {
        "rope_theta": 50.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    edit_json(folder / "config.json", rope_parameters=scaled)
    base = loaded(folder, "causal-lm")
    save_result(base.model, base.tokenizer, tmp_path / "result")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert torch.equal(logits(again), logits(base.model))
    assert again.config.rope_parameters == base.model.config.rope_parameters
    plain = LlamaConfig(**{**TOKENS, "num_hidden_layers": BLOCKS})
    assert plain.rope_parameters["rope_theta"] != again.config.rope_parameters["rope_theta"]


def test_a_result_whose_classes_are_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        classes_in(tmp_path)
