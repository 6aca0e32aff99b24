"""Answers against `transformers.generate` one prompt at a time."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_models import (
    END,
    MODELS,
    PAD,
    VOCABULARY,
    bloom,
    gpt2,
    llama,
    shaken,
    tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from fedtune.bench.generation import measure
from fedtune.errors import InputError
from fedtune.evaluation.generation import Sampling, evaluating, generate, generate_ids
from fedtune.models.context import context_length
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import attach_prompt


def some_prompts(count: int = 13) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def one_at_a_time(model: Any, prompt: list[int], new: int) -> list[int]:
    """transformers' own greedy search on one prompt; a soft prompt is recomputed in full for every token."""
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + new and (len(ids) == len(prompt) or ids[-1] != END):
                one = torch.tensor([ids])
                ids.append(
                    int(model(input_ids=one, attention_mask=torch.ones_like(one)).logits[0, -1].argmax())
                )
        answer = ids[len(prompt) :]
    else:
        one = torch.tensor([prompt])
        out = model.generate(
            input_ids=one,
            attention_mask=torch.ones_like(one),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=PAD,
        )
        answer = out[0, len(prompt) :].tolist()
    return answer[: answer.index(END)] if END in answer else answer


@pytest.mark.parametrize("name", MODELS)
def test_batches_answer_as_one_prompt_at_a_time(name: str) -> None:
    model = MODELS[name]()
    prompts = some_prompts()
    expected = [one_at_a_time(model, prompt, 12) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 3  # the answers depend on the prompts
    for batch_size in (1, 4, 50):
        got = generate_ids(model, tokenizer(), prompts, max_new_tokens=12, batch_size=batch_size)
        assert got == expected


def test_some_answers_end_early_and_are_cut_there() -> None:
    model = llama()
    prompts = some_prompts(40)
    ids = generate_ids(model, tokenizer(), prompts, max_new_tokens=40, batch_size=16)
    lengths = {len(answer) for answer in ids}
    assert min(lengths) < 40  # if not, this model does not test what it should
    assert not any(END in answer for answer in ids)
    texts = generate(model, tokenizer(), prompts, max_new_tokens=40, batch_size=16)
    words = [" ".join(f"w{i}" for i in answer if i > END) for answer in ids]
    assert texts == words


def test_decoding_stops_when_all_have_ended() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[:] = 0  # every logit is 0: argmax is token 0
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.generation_config.eos_token_id = [PAD, 5]  # the model's own end tokens count beside the tokenizer's
    assert generate(model, tokenizer(), [[4, 5], [6]], max_new_tokens=30, batch_size=2) == ["", ""]
    assert len(calls) == 1


def test_a_tokenizer_without_pad_token() -> None:
    model, prompts = llama(), some_prompts(5)
    assert tokenizer(pad=False).pad_token_id is None
    with_pad = generate_ids(model, tokenizer(), prompts, max_new_tokens=8, batch_size=5)
    assert generate_ids(model, tokenizer(pad=False), prompts, max_new_tokens=8, batch_size=5) == with_pad


def test_a_prompt_that_is_too_long_loses_its_start() -> None:
    model = gpt2()  # 96 learnt positions: one more would be an index error
    prompt = [3 + i % 40 for i in range(200)]
    got = generate_ids(model, tokenizer(), [prompt, [5]], max_new_tokens=16, batch_size=2)
    assert got[0] == one_at_a_time(model, prompt[-80:], 16)
    soft = attach_prompt(gpt2(), tokens=6, seed=1)
    assert context_length(soft) == 90
    assert len(generate_ids(soft, tokenizer(), [prompt], max_new_tokens=16, batch_size=2)[0]) <= 16
    assert context_length(bloom()) is None


def test_no_room_and_no_prompt_are_input_errors() -> None:
    with pytest.raises(InputError, match="at most 94, since the model sees 96 tokens of text, got 95"):
        generate(llama(), tokenizer(), [[3]], max_new_tokens=95, batch_size=1)
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        generate(llama(), tokenizer(), [[3], []], max_new_tokens=5, batch_size=1)
    assert generate(llama(), tokenizer(), [], max_new_tokens=5, batch_size=1) == []


def test_generation_leaves_the_model_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    model = shaken(
        attach_lora(llama(attention_dropout=0.5), rank=2, alpha=4, dropout=0.5, targets=None, seed=1)
    )
    quiet_answers = generate(model, tokenizer(), some_prompts(), max_new_tokens=8, batch_size=4)
    model.train()
    model.get_base_model().lm_head.eval()  # mixed modes
    model.get_base_model().generation_config.update(do_sample=True, temperature=0.1, repetition_penalty=3.0)
    modes = [module.training for module in model.modules()]
    configured = model.get_base_model().generation_config.to_dict()
    random_state = torch.random.get_rng_state()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = generate(model, tokenizer(), some_prompts(), max_new_tokens=8, batch_size=4)
    assert answers == quiet_answers  # no dropout, no sampling, no penalty
    assert [module.training for module in model.modules()] == modes
    assert model.get_base_model().generation_config.to_dict() == configured
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "")


def test_mode_is_restored_after_an_error() -> None:
    model = llama().train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert all(module.training for module in model.modules())


def test_a_model_that_was_evaluated_can_still_be_trained() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).train()
    generate(model, tokenizer(), [[3] * 60], max_new_tokens=20, batch_size=1)
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.lm_head.weight.grad.abs().sum()) > 0


def test_a_real_model_answers_as_one_prompt_at_a_time(shared_models: Path) -> None:
    folder = shared_models / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("stories260K-hf is not on this machine")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    texts = [
        "Once upon a time",
        "Lily saw a big red ball. She",
        "Tom",
        "The dog and the cat were friends. One day,",
    ]
    prompts = [tok(text)["input_ids"] for text in texts]
    expected = []
    for prompt in prompts:
        one = torch.tensor([prompt])
        out = model.generate(one, attention_mask=torch.ones_like(one), do_sample=False, max_new_tokens=32)
        expected.append(tok.decode(out[0, len(prompt) :], skip_special_tokens=True))
    assert generate(model, tok, prompts, max_new_tokens=32, batch_size=3) == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("name", ["llama", "bloom", "prompt on gpt2"])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_draws_are_those_of_one_prompt_at_a_time(name: str, top_p: float) -> None:
    model, prompts, new = MODELS[name](), some_prompts(), 12
    sampling = Sampling(temperature=1.5, top_p=top_p, seeds=[100 + place for place in range(len(prompts))])
    expected = []
    for place, prompt in enumerate(prompts):
        uniform = torch.rand(new, generator=torch.Generator().manual_seed(100 + place), dtype=torch.float64)
        answer: list[int] = []
        while len(answer) < new:
            one = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=one, attention_mask=torch.ones_like(one)).logits[0, -1].double()
            chances = (logits / 1.5).softmax(-1).tolist()
            kept, total = set(), 0.0
            for token in sorted(range(VOCABULARY), key=lambda t: -chances[t]):
                if total >= top_p:
                    break
                kept.add(token)
                total += chances[token]
            rest = float(uniform[len(answer)]) * total
            for token in range(VOCABULARY):  # the first whose chances so far exceed the draw
                rest -= chances[token] if token in kept else 0.0
                if rest < 0:
                    break
            if token == END:
                break
            answer.append(token)
        expected.append(answer)
    assert expected != [one_at_a_time(model, prompt, new) for prompt in prompts]  # not greedy
    for batch_size in (1, 5, 50):
        got = generate_ids(
            model, tokenizer(), prompts, max_new_tokens=new, batch_size=batch_size, sampling=sampling
        )
        assert got == expected


def test_draws_follow_the_models_probabilities() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[:] = 0  # uniform over 48 tokens
    sampling = Sampling(temperature=0.7, top_p=1.0, seeds=list(range(4800)))
    ids = generate_ids(model, tokenizer(), [[3]] * 4800, max_new_tokens=1, batch_size=4800, sampling=sampling)
    counts = Counter(tuple(answer) for answer in ids)
    assert len(counts) == VOCABULARY  # the end token gives ()
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_squared < 95  # 47 degrees of freedom: above with a chance of 5 in 100,000


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_answers_end_before_the_first_stopping_text(batch_size: int) -> None:
    model, prompts = llama(), some_prompts(20)
    whole = generate(model, tokenizer(), prompts, max_new_tokens=30, batch_size=20)
    words = Counter(word for text in whole for word in text.split())
    stop = [f"{words.most_common(3)[2][0]} ", whole[3][4:12]]
    expected = [min((text.partition(s)[0] for s in stop), key=len) for text in whole]
    assert expected != whole
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    got = generate(model, tokenizer(), prompts, max_new_tokens=30, batch_size=batch_size, stop=stop)
    assert got == expected
    if batch_size == 1:
        assert len(calls) < sum(len(text.split()) + 1 for text in whole)  # it does not go on to the end


def test_rows_that_have_ended_leave_the_batch() -> None:
    model, prompts = llama(), some_prompts(40)
    lengths = [len(a) for a in generate_ids(model, tokenizer(), prompts, max_new_tokens=40, batch_size=40)]
    sizes = []
    model.register_forward_hook(lambda *call: sizes.append(call[-1].logits.shape[0]))
    generate_ids(model, tokenizer(), prompts, max_new_tokens=40, batch_size=40)
    assert sizes[0] == 40
    for step, size in enumerate(sizes):
        going = sum(length >= step for length in lengths)
        assert going <= size <= max(2 * going, 1)  # at most half of the rows have ended
    assert sizes[-1] < 40


def test_the_benchmark_counts_the_same_tokens_both_ways() -> None:
    rows, ratios = measure(short=5, long=2)  # raises where the two ways answer differently
    assert [row["case"] for row in rows] == [
        "answers to the end, transformers.generate one at a time",
        "answers to the end, batches of 5",
        "32 tokens each, transformers.generate one at a time",
        "32 tokens each, batches of 2",
    ]
    assert rows[0]["tokens"] == rows[1]["tokens"] < rows[2]["tokens"] == rows[3]["tokens"] == 64
    assert all(row["tokens_per_second"] == row["tokens"] / row["seconds"] for row in rows)
    assert len(ratios) == 2
