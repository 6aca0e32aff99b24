"""DoRA, rsLoRA, PiSSA, OLoRA, biases and whole modules: against their formulas, and read by plain PEFT."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_families import ENCODERS, batch, build, save_folder, tokenizer, wake
from peft import PeftModel
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.models.load import load_model
from fedtune.models.lora import LoraForm, attach_lora
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import count_parameters, trainable

FORMS = {
    "dora": LoraForm(dora=True),
    "rslora": LoraForm(rslora=True),
    "pissa": LoraForm(start="pissa"),
    "olora-rslora": LoraForm(start="olora", rslora=True),
    "biases": LoraForm(bias="all"),
    "its biases": LoraForm(bias="lora_only", dora=True),
    "whole modules": LoraForm(whole=("norm", "lm_head")),
}
WHOLE = {"gpt2": ("ln_f",), "roberta": ("word_embeddings",)}


def attached(family: str, label: str, **changed: Any) -> Any:
    form = FORMS[label]
    if form.whole:
        form = LoraForm(whole=WHOLE.get(family, form.whole))
    settings: dict[str, Any] = {"rank": 2, "alpha": 6.0, "dropout": 0.0, "targets": None, "seed": 1}
    return attach_lora(build(family), **{**settings, **changed}, form=form)


def layer_of(model: Any, path: str = "model.layers.0.self_attn.q_proj") -> Any:
    return model.get_base_model().get_submodule(path)


@pytest.mark.parametrize("label", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_what_is_saved_is_read_by_plain_peft_with_the_same_bits(
    family: str, label: str, tmp_path: Path
) -> None:
    if family == "llama" and FORMS[label].bias != "none":
        with pytest.raises(InputError, match=r"method.lora.bias .*: LlamaForCausalLM has no"):
            attached(family, label)
        return
    base = save_folder(tmp_path / "base", family)
    plain = build(family)(**batch(family)).logits
    model = attached(family, label)
    model.get_base_model().name_or_path = str(base)
    torch.testing.assert_close(model.eval()(**batch(family)).logits, plain, rtol=0, atol=1e-5)
    wake(model)
    expected = model(**batch(family)).logits
    assert (expected - plain).abs().max() > 0.1
    save_result(model, tokenizer(), tmp_path / "out")
    save_result(model, tokenizer(), tmp_path / "merged", merge=True)
    auto: Any = transformers.AutoModelForCausalLM
    task: dict[str, Any] = {"task": "causal-lm", "num_labels": None}
    if family in ENCODERS:
        auto, task = (
            transformers.AutoModelForSequenceClassification,
            {"task": "classification", "num_labels": 3},
        )
    read = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "out").eval()
    assert torch.equal(read(**batch(family)).logits, expected)
    load = partial(load_model, dtype="float32", initial="pretrained", seed=0, base=tmp_path, **task)
    again = load_result(tmp_path / "out", load)
    assert torch.equal(again.model(**batch(family)).logits, expected)
    save_result(again.model, tokenizer(), tmp_path / "again")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    merged = auto.from_pretrained(tmp_path / "merged")(**batch(family)).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=3e-5)


def test_what_trains_and_how_much() -> None:
    plain = count_parameters(attach_lora(build("gpt2"), rank=2, alpha=6, dropout=0, targets=None, seed=1))
    # c_attn of each of two blocks: 32 in, 96 out; the biases of norms, attention, MLP and last norm
    assert plain.trainable == 2 * 2 * (32 + 96)
    assert count_parameters(attached("gpt2", "dora")).trainable == plain.trainable + 2 * 96
    assert count_parameters(attached("gpt2", "pissa")) == plain
    biases = 2 * (32 + 96 + 32 + 32 + 128 + 32) + 32
    assert count_parameters(attached("gpt2", "biases")).trainable == plain.trainable + biases
    assert count_parameters(attached("gpt2", "its biases")).trainable == plain.trainable + 2 * (96 + 96)
    assert count_parameters(attached("gpt2", "whole modules")).trainable == plain.trainable + 2 * 32


def test_dora_gives_each_row_its_length() -> None:
    """m (W + s B A) / ‖·‖ row by row, in numbers: a row (3, 4) and B A = (0, 8), s = 1: 10 (3, 12) / √153."""
    model = attached("llama", "dora", targets=["q_proj"], alpha=2.0)
    layer = layer_of(model)
    with torch.no_grad():
        layer.base_layer.weight.zero_()[0, :2] = torch.tensor([3.0, 4.0])
        layer.lora_A["default"].weight.zero_()[0, 1] = 2.0
        layer.lora_B["default"].weight.zero_()[0, 0] = 4.0
        layer.lora_magnitude_vector["default"].weight.fill_(10.0)
        layer.base_layer.weight[1:, 0] = 1.0  # no row of length 0
    x = torch.eye(32)[:2]
    root = 153**0.5
    torch.testing.assert_close(layer(x)[:, 0], torch.tensor([30 / root, 120 / root]))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_pissa_trains_the_largest_singular_parts_on_top_of_the_rest(rslora: bool, scale: float) -> None:
    form = LoraForm(start="pissa", rslora=rslora)
    model = attach_lora(build("llama"), rank=2, alpha=6, dropout=0, targets=["q_proj"], seed=0, form=form)
    layer = layer_of(model)
    weight = layer.base_layer.weight.detach()
    u, s, v = torch.linalg.svd(weight.double())
    largest = (u[:, :2] * s[:2]) @ v[:2]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    began = (b @ a).detach().double() * scale
    assert (began - largest).norm() < 0.01 * largest.norm()  # eight bits
    with torch.no_grad():
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=2e-5)
        b.zero_()
        rest = (weight.double() - began).float()
        torch.testing.assert_close(layer(x), x @ rest.T, rtol=0, atol=2e-5)


def test_olora_begins_at_the_first_columns_of_the_qr_decomposition() -> None:
    model = attached("gpt2", "olora-rslora")
    layer = layer_of(model, "transformer.h.0.attn.c_attn")
    weight = layer.base_layer.weight.detach().T.double()  # GPT-2 keeps it (in x out)
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    torch.testing.assert_close(b.T @ b, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(b @ a[:, :2], weight[:, :2], rtol=0.02, atol=0.05)  # Q R of those columns
    torch.testing.assert_close(a, b.T @ weight, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(40, 30), (1100, 1040)])
def test_both_ways_of_finding_singular_parts_do(shape: tuple[int, int]) -> None:
    """The second is found by applying the weight again and again."""
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=generator)).Q for n in shape)
    weight = (left * torch.tensor([9.0, 6.0, 4.0])) @ right.T
    weight += 1e-3 * torch.randn(shape, generator=generator)
    model = build("llama")
    block = model.model.layers[0].self_attn
    block.q_proj = nn.Linear(shape[1], shape[0], bias=False)
    block.q_proj.weight.data.copy_(weight)
    form = LoraForm(start="pissa")
    attach_lora(model, rank=2, alpha=2, dropout=0, targets=["q_proj"], seed=0, layers=[0], form=form)
    layer = block.q_proj
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    expected = (left[:, :2] * torch.tensor([9.0, 6.0])) @ right[:, :2].T
    assert (product - expected).norm() < 0.02 * expected.norm()


def test_what_rounds_elsewhere_begins_with_the_same_bits() -> None:
    """Another machine's linear algebra differs in the last places of float64."""
    found: list[list[Tensor]] = []
    svd, threads = torch.linalg.svd, torch.get_num_threads()
    for disturb in (0.0, 1e-13):

        def other(weight: Tensor, *, full_matrices: bool, by: float = disturb) -> Any:
            flipped = 1.0 if by == 0 else -1.0
            u, s, v = svd(weight * (1 + by), full_matrices=full_matrices)
            return u * flipped * (1 + by), s * (1 - by), v * flipped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "svd", other)
            torch.set_num_threads(1 if disturb else 2)
            try:
                found.append([p.detach().clone() for p in trainable(attached("llama", "pissa")).values()])
            finally:
                torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_cannot_be_is_refused_with_what_can() -> None:
    def tried(family: str, rank: int = 2, **form: Any) -> None:
        whole = LoraForm(**form)
        attach_lora(build(family), rank=rank, alpha=4, dropout=0, targets=None, seed=0, form=whole)

    with pytest.raises(InputError, match=r'named "nrm"; there are model.embed_tokens, model.norm, lm_head'):
        tried("llama", whole=("nrm",))
    with pytest.raises(InputError, match=r"transformer.wte shares its weight with the other end of GPT2"):
        tried("gpt2", whole=("wte",))
    with pytest.raises(InputError, match=r"method.lora.rank: with init olora at most 16, .*v_proj, got 17"):
        tried("llama", rank=17, start="olora")
    with pytest.raises(InputError, match=r"method.lora.bias lora_only: LlamaForCausalLM has no such biases"):
        tried("llama", bias="lora_only")
