"""The loss without whole logits: the numbers of the model's own loss, of every family and way to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from model_families import ATTACH, COMMON, DECODERS, ENCODERS, GROUPED, TOKENS, batch, build, wake
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from fedtune.data.encoded import IGNORED
from fedtune.measure.memory import MemoryMeter
from fedtune.models import alignment, lean_loss
from fedtune.models.blocks import find_blocks
from fedtune.models.lean_loss import batch_loss, ends, in_pieces, is_lean
from fedtune.models.memory_efficient import base_model

KEYS = {"num_key_value_heads": 2}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_experts_per_tok": 2}
# What stands between a body and its loss in families that the project's list does not have.
BEHIND: dict[str, Callable[[], Any]] = {
    "gemma2, capped": lambda: transformers.Gemma2Config(**GROUPED, final_logit_softcapping=3.0),
    "cohere, scaled": lambda: transformers.CohereConfig(**COMMON, **KEYS, logit_scale=0.3),
    "granite, divided": lambda: transformers.GraniteConfig(**COMMON, **KEYS, logits_scaling=2.0),
    "bert, a layer before the head": lambda: transformers.BertConfig(**COMMON, is_decoder=True),
    "phi, a bias": lambda: transformers.PhiConfig(**COMMON),
    "mamba, no attention": lambda: transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, **TOKENS
    ),
    "mixtral, routed": lambda: transformers.MixtralConfig(**GROUPED, **ROUTED, num_local_experts=3),
    "qwen2 moe, routed": lambda: transformers.Qwen2MoeConfig(
        **COMMON,
        **KEYS,
        **ROUTED,
        num_experts=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}
NARROWER = (
    "mixtral, routed",
    "qwen2 moe, routed",
    "mamba, no attention",
)  # have no kernels for, or cast, float64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two positions at a time of tiny models too, with and without a head that trains."""
    monkeypatch.setattr(lean_loss, "FEW", 0)
    monkeypatch.setattr(lean_loss, "ROWS", 2)


def usual(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """`model(**batch).loss`, in float64 where the model is: transformers' own casts logits to float32."""
    base = base_model(model)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        flat = logits[:, :-1].reshape(-1, vocab_size)
        return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)

    if next(base.parameters()).dtype == torch.float64:
        base.loss_function = loss
    try:
        return model(**rows).loss  # type: ignore[no-any-return]
    finally:
        vars(base).pop("_loss_function", None)


def gradients(
    model: nn.Module, take: Callable[[nn.Module, dict[str, Tensor]], Tensor], rows: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of every parameter that has one, and the loss."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = take(model, rows)
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(model: nn.Module, rows: dict[str, Tensor], within: float) -> None:
    """Apart by no more than `within` of the largest gradient."""
    wanted, got = gradients(model, usual, rows), gradients(model, batch_loss, rows)
    assert got.keys() == wanted.keys() and len(got) > 1
    assert float(got.pop("loss")) == pytest.approx(float(wanted.pop("loss")), rel=within)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert got[name].dtype == gradient.dtype
        assert float((got[name] - gradient).abs().max()) <= within * largest, name


def attached(family: str, how: str, dtype: torch.dtype) -> nn.Module:
    model = ATTACH[how](build(family, dtype), 0).to(dtype)
    wake(model)
    return model.train()


# float64: 5e-15 here; float32 and bfloat16: some units in the last place
@pytest.mark.parametrize(("dtype", "within"), [("float64", 1e-13), ("float32", 2e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("how", ATTACH)
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradients_of_every_family(family: str, how: str, dtype: str, within: float) -> None:
    model = attached(family, how, getattr(torch, dtype))
    assert is_lean(base_model(model))
    assert_same(model, batch(family), within)


@pytest.mark.parametrize("family", BEHIND)
def test_what_a_family_does_behind_its_body(family: str) -> None:
    narrow = family in NARROWER
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        dtype = torch.float32 if narrow else torch.float64
        model = transformers.AutoModelForCausalLM.from_config(BEHIND[family](), dtype=dtype).train()
    assert is_lean(model)
    assert_same(model, batch("llama"), 3e-6 if narrow else 1e-13)


@pytest.mark.parametrize("modules", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_with_lora_or_copied_by_peft(modules: dict[str, list[str]]) -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **modules})  # type: ignore[arg-type]
    model = get_peft_model(build("llama", torch.float64), config).double().train()
    wake(model)
    assert_same(model, batch("llama"), 1e-13)


def test_few_labels_and_a_loss_that_is_scaled() -> None:
    model, rows = attached("gpt2", "full", torch.float64), batch("gpt2")
    rows["labels"] = torch.full_like(rows["labels"], IGNORED)
    rows["labels"][0, 3], rows["labels"][1, 1] = 7, 9
    assert_same(model, rows, 1e-13)
    third = gradients(model, lambda m, b: batch_loss(m, b) / 3, rows)
    whole = gradients(model, usual, rows)
    for name, gradient in third.items():
        assert_close(gradient, whole[name] / 3, rtol=1e-10, atol=1e-15)


def test_no_labels_at_all_give_what_the_model_gives() -> None:
    model, rows = attached("llama", "lora", torch.float32), batch("llama")
    rows["labels"] = torch.full_like(rows["labels"], IGNORED)
    assert torch.isnan(usual(model, rows)) and torch.isnan(batch_loss(model, rows))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_without_gradients(family: str, whole: bool) -> None:
    model = build(family, torch.float64)
    with torch.no_grad():
        got = batch_loss(model, batch(family), whole=whole)
        assert float(got) == pytest.approx(float(usual(model, batch(family))), rel=1e-13)
    assert not got.requires_grad


@pytest.mark.parametrize("family", ENCODERS)
def test_a_classifiers_loss_is_its_own(family: str) -> None:
    model = build(family)
    assert not is_lean(model)
    assert torch.equal(batch_loss(model, batch(family)), model(**batch(family)).loss)


def test_a_family_that_takes_its_loss_itself_keeps_it() -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = transformers.XLNetLMHeadModel(config).eval()
    assert not is_lean(model)
    assert torch.equal(batch_loss(model, batch("llama")), model(**batch("llama")).loss)


def test_a_body_that_is_not_asked_leaves_the_usual_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float64)
    monkeypatch.setattr(model, "get_decoder", lambda: nn.Linear(2, 2))
    assert torch.equal(batch_loss(model, batch("llama")), model(**batch("llama")).loss)
    chosen = batch("llama")["attention_mask"].bool()
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    head, rows = ends(model, inputs, chosen)
    assert torch.equal(head.logits(rows), model(**inputs).logits[chosen])


def test_a_model_that_names_itself_as_its_body_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 4 does."""
    model = build("llama", torch.float64)
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    assert torch.equal(batch_loss(model, batch("llama")), model(**batch("llama")).loss)
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    chosen = inputs["attention_mask"].bool()
    head, rows = ends(model, inputs, chosen)
    assert torch.equal(head.logits(rows), model(**inputs).logits[chosen])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_divergence_in_pieces_is_that_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "ROWS", 2)
    student, teacher = build(family, torch.float64), build(family, torch.float64)
    with torch.no_grad():
        for place, parameter in enumerate(teacher.parameters()):
            parameter.add_(0.01 * (place + 1))
    data = batch(family)
    answer = alignment.predicting(data["labels"])
    inputs = {key: value for key, value in data.items() if key != "labels"}
    block = find_blocks(student).modules[-1]
    hidden = torch.zeros(*data["input_ids"].shape, 32, dtype=torch.float64)
    with torch.no_grad():
        end = ends(teacher, inputs, answer)
    found = alignment.alignment_loss(student, block, data, hidden, end, 1.0, "mean")
    found = found - alignment.alignment_loss(student, block, data, hidden, end, 0.0, "mean")
    found.backward()
    slopes = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    own, wanted = (model(**inputs).logits[answer].log_softmax(-1) for model in (student, teacher))
    whole = (wanted.detach().exp() * (wanted.detach() - own)).sum() / answer.sum()
    whole.backward()
    assert_close(found, whole, rtol=1e-5, atol=1e-7, check_dtype=False)
    for name, parameter in student.named_parameters():
        assert_close(slopes[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_the_model_is_left_as_it_was_also_after_an_error(family: str) -> None:
    model = build(family)
    before, state = model(**batch(family)), dict(vars(model))
    states = {name: set(vars(module)) for name, module in model.named_modules()}
    batch_loss(model, batch(family))
    with pytest.raises(IndexError):
        batch_loss(model, {**batch(family), "input_ids": torch.full((2, 5), 64)})
    assert vars(model) == state
    assert states == {name: set(vars(module)) for name, module in model.named_modules()}
    after = model(**batch(family))
    assert torch.equal(after.loss, before.loss) and torch.equal(after.logits, before.logits)


def test_a_small_batch_is_left_to_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_loss, "FEW", 10 * 64)  # the batch's
    monkeypatch.setattr(lean_loss, "in_pieces", None)
    model = build("llama")
    assert torch.equal(batch_loss(model, batch("llama")), model(**batch("llama")).loss)


def test_pieces_by_hand() -> None:
    """Σ w x² of rows 1, 2, 3 with w = 2: 28; slopes 4x = 4, 8, 12 and Σ x² = 14, all times 10."""
    x, w = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    sizes = []

    def summed(rows: Tensor, at: slice) -> Tensor:
        sizes.append(len(rows))
        return (w * rows.square()).sum()

    total = in_pieces(summed, x, [w, torch.ones(1, requires_grad=True)], 2)
    (10 * total).backward()
    assert float(total.detach()) == 28 and sizes == [2, 1]
    assert (
        x.grad is not None and x.grad.flatten().tolist() == [40.0, 80.0, 120.0] and float(w.grad or 0) == 140
    )


def test_the_heads_gradient_is_summed_wider_than_bfloat16() -> None:
    """256 and three times 1: in bfloat16, which has no 257, each 1 would be lost."""
    w = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([[256.0], [1.0], [1.0], [2.0]], dtype=torch.bfloat16)
    in_pieces(lambda some, at: (some * w).sum(), rows, [w], 1).backward()
    assert w.grad is not None and w.grad.dtype == torch.bfloat16 and float(w.grad) == 260


@pytest.mark.parametrize("how", ["lora", "full"])
def test_no_whole_logits_exist(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 positions of 8192 words: 2.1 MB of logits, of which the usual loss holds three."""
    monkeypatch.setattr(lean_loss, "ROWS", 8)
    config = transformers.LlamaConfig(**{**GROUPED, "vocab_size": 8192, "hidden_size": 8, "head_dim": 2})
    model = ATTACH[how](transformers.LlamaForCausalLM(config), 0).train()
    ids = torch.arange(64).view(2, 32)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    peaks = {}
    for name, take in {"usual": usual, "lean": batch_loss}.items():
        model.zero_grad(set_to_none=True)
        meter = MemoryMeter("cpu")
        with meter.whole([model]):
            take(model, rows).backward()
        peaks[name] = meter.peak_bytes
    logits = 64 * 8192 * 4
    assert peaks["usual"] - peaks["lean"] > 2 * logits
    lengths = []
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(lean_loss.Head, "logits", _noting(lean_loss.Head.logits, lengths))
        batch_loss(model, rows)
    assert max(lengths) == 8 and sum(lengths) == 62


def _noting(own: Callable[[Any, Tensor], Tensor], lengths: list[int]) -> Callable[[Any, Tensor], Tensor]:
    def logits(self: Any, rows: Tensor) -> Tensor:
        lengths.append(len(rows))
        return own(self, rows)

    return logits
