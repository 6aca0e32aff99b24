"""Prefix tuning: a fresh prefix is what the model itself makes of words before the text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import BLOCKS, DECODERS, build, save_folder, tokenizer, wake
from peft import PeftModel
from per_layer_models import BASE, LATENT, made
from transformers import AutoModelForCausalLM

from fedtune.errors import InputError
from fedtune.evaluation.generation import generate
from fedtune.methods.step_loss import trained_tokens
from fedtune.models.context import context_length
from fedtune.models.load import load_model
from fedtune.models.prefix import attach_prefix
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import count_parameters, trainable

TEXTS = [[1, 9, 33, 50, 17], [1, 41, 12]]
P = 3


def drawn(seed: int) -> list[int]:
    """The words that a prefix begins as."""
    return torch.randint(64, (1, P), generator=torch.Generator().manual_seed(seed))[0].tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_a_fresh_prefix_is_words_before_the_text(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([drawn(4) + text])).logits[0, P:] for text in TEXTS]
        wrapped = attach_prefix(model, tokens=P, seed=4).eval()
        ids = torch.tensor([TEXTS[0], [*TEXTS[1], 0, 0]])
        logits = wrapped(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False).logits
    assert logits.shape == (2, 5, 64)
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, :3], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
def test_answers_of_a_batch_are_those_of_plain_decoding(family: str) -> None:
    wrapped = attach_prefix(build(family), tokens=P, seed=4)
    wake(wrapped)
    wrapped.eval()

    def greedy(ids: list[int], new: int) -> list[int]:
        for _ in range(new):
            tensor = torch.tensor([ids])
            logits = wrapped(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits
            ids = [*ids, int(logits[0, -1].argmax())]
        return ids[-new:]

    with torch.no_grad():
        expected = [greedy(text, 5) for text in TEXTS]
    words = tokenizer()
    words.eos_token = None
    wrapped.get_base_model().generation_config.eos_token_id = None
    answers = generate(wrapped, words, TEXTS, max_new_tokens=5, batch_size=2)
    assert answers == [words.decode(ids, skip_special_tokens=True) for ids in expected]


def test_what_trains_and_how_much() -> None:
    model = build("qwen2")  # four heads of width 8, two of keys and values
    whole = count_parameters(model).total
    wrapped = attach_prefix(model, tokens=P, seed=0)
    prefix = P * BLOCKS * 2 * 2 * 8
    assert count_parameters(wrapped) == (whole + prefix, prefix)
    assert list(trainable(wrapped)) == ["prompt_encoder.embedding.weight"]
    assert context_length(wrapped) == 64 - P
    labels = torch.tensor([[5, 6, 7]])  # the first has nothing before it that gives logits
    assert trained_tokens(wrapped, {"labels": labels}) == 2
    before = torch.random.get_rng_state()
    again = attach_prefix(build("qwen2"), tokens=P, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, other = (next(iter(trainable(each).values())) for each in (wrapped, again))
    assert torch.equal(one, other)


def test_what_is_saved_is_read_by_plain_peft_with_the_same_bits(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", "llama")
    wrapped = attach_prefix(build("llama"), tokens=P, seed=4).eval()
    wrapped.get_base_model().name_or_path = str(base)
    wake(wrapped)
    batch: dict[str, Any] = {"input_ids": torch.tensor([TEXTS[0]]), "attention_mask": torch.ones(1, 5)}
    expected = wrapped(**batch).logits
    save_result(wrapped, tokenizer(), tmp_path / "out")
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    assert torch.equal(read(**batch).logits, expected)
    load = partial(load_model, dtype="float32", initial="pretrained", seed=0, base=tmp_path)
    assert torch.equal(load_result(tmp_path / "out", load).model(**batch).logits, expected)
    with pytest.raises(InputError, match="--merge is for LoRA and IA3"):
        save_result(wrapped, tokenizer(), tmp_path / "merged", merge=True)


def test_a_model_without_keys_and_values_is_refused() -> None:
    state = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    with pytest.raises(InputError, match="MambaForCausalLM keeps such in 0 of 2; use prompt or lora"):
        attach_prefix(made("mamba", state), tokens=2, seed=0)
    turns = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    with pytest.raises(InputError, match="Lfm2ForCausalLM keeps such in 1 of 2"):
        attach_prefix(made("lfm2", BASE | turns), tokens=2, seed=0)
    with pytest.raises(InputError, match="DeepseekV3ForCausalLM keeps such in 0 of 6"):
        attach_prefix(made("deepseek_v3", LATENT), tokens=2, seed=0)
    with pytest.raises(InputError, match="RobertaForSequenceClassification classifies"):
        attach_prefix(build("roberta"), tokens=2, seed=0)


def test_a_model_that_does_not_look_at_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = model.forward

    def blind(input_ids: Any, past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return forward(input_ids, use_cache=kwargs.get("use_cache", False))

    monkeypatch.setattr(model, "forward", blind)
    with pytest.raises(InputError, match="does not look at a prefix in every block"):
        attach_prefix(model, tokens=2, seed=0)
