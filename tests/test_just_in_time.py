"""Weights formed just in time: every module computes with them, no part of the model is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import threads_of
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fedtune.models import just_in_time, lean_loss, openmp
from fedtune.models.just_in_time import JustInTimeWeights
from fedtune.models.lora import attach_lora
from fedtune.models.openmp import team
from fedtune.models.tuning import train_all, trainable


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of these tests are larger than a chunk of 256 bytes; two threads pay for any of them."""
    monkeypatch.setattr(just_in_time, "CHUNK", {"cpu": 256})
    monkeypatch.setattr(just_in_time, "GAP", {"cpu": 100})
    monkeypatch.setattr(just_in_time, "SHARE", 1)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    with threads_of.threads(request.param):
        yield request.param


def shifted(name: str, own: Tensor, out: Tensor, first: int) -> None:
    """A form whose every element is another: w + 0.01 sin(index)."""
    at = torch.arange(first, first + own.numel(), dtype=torch.float64)
    out.copy_(own.double() + 0.01 * torch.sin(at + len(name)))


def written(model: nn.Module) -> nn.Module:
    """The same, written into the model."""
    for name, parameter in trainable(model).items():
        flat = parameter.data.reshape(-1)
        shifted(name, flat.clone(), flat, 0)
    return model


def llama(**settings: Any) -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, **settings))


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, **settings)
    )


def opt() -> OPTForCausalLM:  # its positions are a subclass of nn.Embedding that adds to the ids
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            word_embed_proj_dim=16,
        )
    )


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def lora() -> nn.Module:
    torch.manual_seed(3)
    wrapped = attach_lora(llama(), rank=2, alpha=4.0, dropout=0.0, targets=None, seed=0)  # type: ignore[arg-type]
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return wrapped


MODELS: dict[str, Any] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "opt": opt,
    "bert": bert,
    "lora": lora,
}


def batch(kind: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 1]) if kind == "bert" else tokens
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("small_pieces")
def test_a_model_computes_with_formed_weights_and_keeps_its_own(kind: str, threads: int) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    if kind != "lora":
        train_all(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    formed = JustInTimeWeights(trainable(model), shifted)
    with torch.no_grad():
        plain = model(**batch(kind)).logits
        with formed:
            found = model(**batch(kind)).logits
        with formed:  # again, and with the same bits
            assert torch.equal(model(**batch(kind)).logits, found)
        assert torch.equal(model(**batch(kind)).logits, plain)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        expected = written(model)(**batch(kind)).logits
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small_pieces")
def test_half_precision(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    for model in (llama(attention_bias=True, tie_word_embeddings=True), gpt2()):
        model = train_all(model).to(dtype).eval()
        with torch.no_grad(), JustInTimeWeights(trainable(model), shifted):
            found = model(**batch("llama")).logits
        expected = written(model)(**batch("llama")).logits
        assert found.dtype == dtype
        assert_close(found, expected, rtol=0.05, atol=0.02)


@given(
    outputs=st.integers(1, 40), inputs=st.integers(1, 40), shape=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(), chunk=st.integers(1, 2000), share=st.integers(1, 2000), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_linear_layer_and_every_element_formed_once_or_never_for_no_position(
    outputs: int, inputs: int, shape: list[int], bias: bool, chunk: int, share: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*shape, inputs, generator=generator)
    counts = {name: torch.zeros(p.numel()) for name, p in layer.named_parameters()}

    def form(name: str, own: Tensor, out: Tensor, first: int) -> None:
        counts[name][first : first + own.numel()] += 1
        shifted(name, own, out, first)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(just_in_time, "CHUNK", {"cpu": chunk})
        patch.setattr(just_in_time, "SHARE", share)
        with JustInTimeWeights(dict(layer.named_parameters()), form):
            found = layer(x)
        assert all(bool((count == (0 not in shape)).all()) for count in counts.values())
        assert_close(found, written(layer)(x), rtol=1e-4, atol=1e-5)


def test_the_loss_forms_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its family's code calls the head with no position, the loss then with those that are labelled."""
    monkeypatch.setattr(lean_loss, "FEW", 0)
    model, read = train_all(llama()), batch("llama")
    counts = {name: torch.zeros(p.numel()) for name, p in trainable(model).items()}

    def form(name: str, own: Tensor, out: Tensor, first: int) -> None:
        counts[name][first : first + own.numel()] += 1
        shifted(name, own, out, first)

    read = read | {"labels": read["input_ids"]}
    with torch.no_grad():
        with JustInTimeWeights(trainable(model), form):
            found = lean_loss.batch_loss(model, read, whole=True)
        assert all(bool((count == 1).all()) for name, count in counts.items() if "embed" not in name)
        assert_close(found, written(model)(**read).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("named", [("bias",), ("weight", "bias")])
def test_a_linear_layer_may_be_called_with_names(named: tuple[str, ...]) -> None:
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    own = {name: getattr(layer, name) for name in ("weight", "bias")}
    rest = [own[name] for name in own if name not in named]
    with torch.no_grad(), JustInTimeWeights(own, shifted):
        found = functional.linear(x, *rest, **{name: own[name] for name in named})
    assert_close(found, written(layer)(x))


@given(
    ids=st.lists(st.integers(0, 29), max_size=12), width=st.integers(1, 9),
    gap=st.integers(0, 500), chunk=st.integers(1, 2000),
)  # fmt: skip
def test_any_look_up_has_the_bits_of_the_whole_table(
    ids: list[int], width: int, gap: int, chunk: int
) -> None:
    table = nn.Embedding(30, width)
    formed: list[int] = []

    def form(name: str, own: Tensor, out: Tensor, first: int) -> None:
        formed.extend(range(first // width, (first + own.numel()) // width))
        shifted(name, own, out, first)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(just_in_time, "CHUNK", {"cpu": chunk})
        patch.setattr(just_in_time, "GAP", {"cpu": gap})
        with JustInTimeWeights(dict(table.named_parameters()), form):
            found = table(torch.tensor(ids, dtype=torch.int64).view(1, -1))
        assert set(ids) <= set(formed) and (len(formed) == len(set(formed)))
        if gap == 0 and ids:
            assert set(formed) == set(ids)
        assert torch.equal(found, written(table)(torch.tensor(ids, dtype=torch.int64).view(1, -1)))


def test_ids_out_of_range_are_pytorchs_error() -> None:
    table = nn.Embedding(5, 2)
    for bad in (-1, 5):
        with (
            torch.no_grad(),
            JustInTimeWeights(dict(table.named_parameters()), shifted),
            pytest.raises(IndexError),
        ):
            table(torch.tensor([1, bad]))


def test_a_weight_that_another_module_reads_is_formed_too() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.rows = nn.ParameterList([nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.zeros(1, 4))])

        def forward(self, ids: Tensor) -> Tensor:
            assert self.table.weight.shape == (7, 4) and self.table.weight.size(0) == 7
            read = torch.cat(list(self.rows)).sum(0) + self.scale * self.table(ids)
            return functional.linear(read, self.table.weight) + read @ self.table.weight.T

    model = Sharing()
    with torch.no_grad():
        with JustInTimeWeights(trainable(model), shifted):
            found = model(torch.tensor([2, 5]))
        assert_close(found, written(model)(torch.tensor([2, 5])))


@pytest.mark.usefixtures("small_pieces")
def test_no_more_of_a_matrix_exists_than_a_chunk_a_thread(threads: int) -> None:
    layer, sizes, lock = nn.Linear(8, 80), [], threading.Lock()

    def form(name: str, own: Tensor, out: Tensor, first: int) -> None:
        with lock:
            sizes.append(out.untyped_storage().nbytes())
        shifted(name, own, out, first)

    with torch.no_grad(), JustInTimeWeights({"w": layer.weight}, form):
        layer(torch.ones(2, 8))
    assert len(sizes) >= 80 * 8 * 4 // 256 and max(sizes) <= 256


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("asked", [None, 1, 3])
def test_as_many_threads_as_asked_for(
    asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, teams = nn.Linear(8, 80), []

    def alone(work: Callable[[], None], threads: int) -> None:
        teams.append(threads)
        work()

    monkeypatch.setattr(just_in_time, "team", alone)
    with torch.no_grad(), JustInTimeWeights(dict(layer.named_parameters()), shifted, threads=asked):
        layer(torch.ones(2, 8))
    assert teams == [asked or threads] * 2  # the bias and the matrix


@pytest.mark.usefixtures("small_pieces")
def test_an_error_while_forming_comes_out_and_the_mode_ends(threads: int) -> None:
    layer = nn.Linear(8, 80)

    def form(name: str, own: Tensor, out: Tensor, first: int) -> None:
        if first:
            raise ValueError("half way")
        shifted(name, own, out, first)

    x = torch.ones(2, 8)
    with torch.no_grad():
        before = layer(x)
        with pytest.raises(ValueError, match="half way"), JustInTimeWeights({"w": layer.weight}, form):
            layer(x)
        assert torch.equal(layer(x), before)


def test_inference_mode(small_pieces: None, threads: int) -> None:
    layer = nn.Linear(8, 80)
    with torch.inference_mode(), JustInTimeWeights(trainable(layer), shifted):
        found = layer(torch.ones(2, 8))
    with torch.no_grad():
        assert_close(found.clone(), written(layer)(torch.ones(2, 8)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_team_shares_work_and_hands_on_what_is_raised(threads: int) -> None:
    todo, done = iter(range(100)), []
    team(lambda: done.extend(todo), threads)
    assert sorted(done) == list(range(100))

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        team(fail, threads)


@pytest.mark.skipif(
    openmp.parallel_region() is None, reason="PyTorch has no OpenMP library that can be called here"
)
def test_a_team_is_two_threads_at_once_and_pytorch_works_alone_in_each() -> None:
    here = threading.Barrier(2, timeout=60)
    seen = []

    def work() -> None:
        here.wait()  # passes once both are inside
        seen.append((threading.get_ident(), torch.is_grad_enabled(), float(torch.ones(3) @ torch.ones(3))))

    team(work, 2)
    assert len({ident for ident, *_ in seen}) == 2
    assert [rest for _, *rest in seen] == [[False, 3.0]] * 2


def test_on_a_gpu_a_matrix_of_7b_is_formed_by_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 blocks of seven matrices and two norms, a norm and a head: a launch each, a matrix a product."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config = LlamaConfig(vocab_size=32000, num_attention_heads=32, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        inputs = {"inputs_embeds": torch.empty(1, 8, 4096), "attention_mask": torch.zeros(1, 1, 8, 8)}
    formed, products, multiply = list[str](), list[int](), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **rest: (products.append(1), multiply(*args, **rest))[1])

    def form(name: str, own: Tensor, out: Tensor, first: int) -> None:
        formed.append(name)

    with torch.no_grad(), JustInTimeWeights(dict(model.named_parameters()), form, as_on="cuda"):
        model(**inputs, use_cache=False)
    assert len(formed) == len(set(formed)) == 32 * 9 + 2
    assert len(products) == 32 * 7 + 1
