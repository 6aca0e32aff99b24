"""(IA)³: which layers have factors, what they do, and what is saved, read and merged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_families import ENCODERS, batch, build, save_folder, tokenizer, wake
from peft import PeftModel
from per_layer_models import BASE, LATENT, MOE, made

from fedtune.errors import InputError
from fedtune.models.ia3 import attach_ia3
from fedtune.models.load import load_model
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import count_parameters, trainable

TWO = {"num_hidden_layers": 2}
# Kind, settings; layers with factors on what they give, and on what they get.
FOUND: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("phi3", BASE | TWO, ["self_attn.qkv_proj"], ["mlp.down_proj"]),
    ("qwen3_moe", MOE | TWO, ["self_attn.k_proj", "self_attn.v_proj"], []),
    ("cohere", BASE | TWO, ["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]),
    (
        "deepseek_v3",
        LATENT | TWO | {"first_k_dense_replace": 2},
        ["self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"],
        ["mlp.down_proj"],
    ),
]


@pytest.mark.parametrize(("kind", "settings", "gives", "gets"), FOUND, ids=[each[0] for each in FOUND])
def test_keys_values_and_what_goes_into_the_last_layer(
    kind: str, settings: dict[str, Any], gives: list[str], gets: list[str]
) -> None:
    wrapped = attach_ia3(made(kind, settings), targets=None, seed=0)
    config: Any = wrapped.peft_config["default"]
    assert set(config.target_modules) == {*gives, *gets}
    assert set(config.feedforward_modules) == set(gets)


def test_factors_in_numbers() -> None:
    wrapped = attach_ia3(build("llama"), targets=["k_proj", "down_proj"], seed=0)
    layer = wrapped.get_base_model().get_submodule("model.layers.0.self_attn.k_proj")
    last = wrapped.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        layer.ia3_l["default"][3] = 2.0  # of the third output
        last.ia3_l["default"][0, 5] = 0.0  # of the fifth input
    x, y = torch.ones(1, 1, 32), torch.ones(1, 1, 48)
    plain = x @ layer.base_layer.weight.T
    plain[..., 3] *= 2
    torch.testing.assert_close(layer(x), plain)
    y[..., 5] = 0
    torch.testing.assert_close(last(torch.ones(1, 1, 48)), y @ last.base_layer.weight.T)
    # two blocks, keys of two heads of width 8, an MLP of 48 channels
    assert count_parameters(wrapped).trainable == 2 * (16 + 48)
    assert next(iter(trainable(wrapped))) == "model.layers.0.mlp.down_proj.ia3_l"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "bloom"])
def test_saved_read_and_merged(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", family, dtype)
    wrapped = attach_ia3(build(family, dtype), targets=None, seed=1).eval()
    wrapped.get_base_model().name_or_path = str(base)
    if family != "roberta":
        assert torch.equal(wrapped(**batch(family)).logits, build(family, dtype)(**batch(family)).logits)
    wake(wrapped)
    expected = wrapped(**batch(family)).logits
    save_result(wrapped, tokenizer(), tmp_path / "out")
    save_result(wrapped, tokenizer(), tmp_path / "merged", merge=True)
    auto: Any = transformers.AutoModelForCausalLM
    task: dict[str, Any] = {"task": "causal-lm", "num_labels": None}
    if family in ENCODERS:
        auto = transformers.AutoModelForSequenceClassification
        task = {"task": "classification", "num_labels": 3}
    load = partial(
        load_model,
        dtype=str(dtype).removeprefix("torch."),
        initial="pretrained",
        seed=0,
        base=tmp_path,
        **task,
    )
    assert torch.equal(load_result(tmp_path / "out", load).model(**batch(family)).logits, expected)
    if dtype == torch.float32:
        read = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "out").eval()
        assert torch.equal(read(**batch(family)).logits, expected)
    merged = auto.from_pretrained(tmp_path / "merged", dtype=dtype)(**batch(family)).logits
    within = 2e-5 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(merged.float(), expected.float(), rtol=0, atol=within)


def test_unknown_layers_are_named() -> None:
    with pytest.raises(InputError, match=r'method.ia3.targets: no linear layer .* "kproj".*self_attn.k_proj'):
        attach_ia3(build("llama"), targets=["kproj"], seed=0)
