"""Greedy answers against `transformers.generate` one prompt at a time, scores against hand computation."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from fedtune.bench.generation import measure
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.evaluation.generation import Sampling, context_length, evaluating, generate, generate_ids
from fedtune.evaluation.metrics import exact_match, rouge_l, rouge_scorer
from fedtune.evaluation.subject import EvalSettings, Subject
from fedtune.evaluation.tasks import TASKS, evaluate
from fedtune.models.tuning import attach_adapter, attach_lora, attach_p_tuning, attach_prompt

VOCABULARY = 48
PAD, BEGIN, END = 0, 1, 2


def tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """Words w3 ... w47, split at blanks."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **special, **({"pad_token": "<pad>"} if pad else {})
    )


def llama(**changes: Any) -> LlamaForCausalLM:
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.4,  # large, so that argmax has no near ties and answers vary
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**config | changes)))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        initializer_range=0.4,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return seeded(lambda: GPT2LMHeadModel(config))


def bloom() -> BloomForCausalLM:
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=END
    )
    return seeded(lambda: BloomForCausalLM(config))


def opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=32,
        init_std=0.4,
        eos_token_id=END,
        bos_token_id=BEGIN,
        pad_token_id=PAD,
    )
    return seeded(lambda: OPTForCausalLM(config))


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def shaken(model: nn.Module) -> Any:
    """Moves trained parameters away from where they start (LoRA's B and adapters start at zero)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bloom": bloom,
    "opt": opt,
    "lora": lambda: shaken(attach_lora(llama(), rank=2, alpha=4, dropout=0.5, targets=None, seed=1)),
    "adapter": lambda: shaken(attach_adapter(llama(), size=4, seed=1)),
    "prompt on llama": lambda: shaken(attach_prompt(llama(), tokens=5, seed=1)),
    "prompt on gpt2": lambda: shaken(attach_prompt(gpt2(), tokens=5, seed=1)),
    "p-tuning": lambda: shaken(attach_p_tuning(llama(), tokens=5, hidden=16, seed=1)),
}


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
    assert model.lm_head.weight.grad is not None
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


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Paris", "paris", True),
        ("  two   words\n", "two words", True),
        ("done.", "done", True),
        ("done", " Done. ", True),
        ("done..", "done", False),
        ("a.b", "ab", False),
        ("", "x", False),
        ("plane boat", "plane", False),
    ],
)
def test_exact_match(answer: str, reference: str, right: bool) -> None:
    assert exact_match(answer, reference) is right


@given(st.text(), st.text())
def test_exact_match_is_symmetric_and_ignores_blanks_around(a: str, b: str) -> None:
    assert exact_match(a, b) == exact_match(b, a)
    assert exact_match(f" {a}\n", a)


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat the mat": 4 of 5 words of the answer, 4 of 6 of the reference
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("the cat by the mat", "the cat sat on the mat") == pytest.approx(expected)
    assert rouge_l("", "the cat") == 0.0
    assert rouge_l("cats", "cat") == 0.0  # no stemming
    assert rouge_scorer().startswith("rouge-score 0.1")


EXAMPLES = [
    Example("w3 w4 w5", "", "w6 w7", "a"),
    Example("w8 w9", "w10 w11 w12", "w13", "b"),
    Example("w14", "", "w15 w16 w17 w18", "a"),
    Example("w19 w20 w21 w22 w23", "", "w24 w25", ""),
    Example("w26 w27", "", "w28", "b"),
]


def settings(**changes: Any) -> EvalSettings:
    plain: dict[str, Any] = {"template": "plain", "loss_on": "response", "max_length": 64}
    return EvalSettings(**plain | changes)


def plain(scores: dict[str, float]) -> dict[str, float]:
    """The metrics of a task without their errors and counts."""
    return {name: scores[name] for name in metrics_of(scores)}


def hand_loss(model: Any, example: Example) -> list[float]:
    """Log-probabilities of answer and end token, one example without padding, in float64."""
    words = f"{example.instruction} {example.input} Answer:".split()  # "Answer:" is unknown: w3
    prompt = [BEGIN, *(int(w[1:]) if w[0] == "w" else 3 for w in words)]
    answer = [*(int(w[1:]) for w in example.output.split()), END]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    virtual = logits.shape[0] - len(prompt) - len(answer)
    losses = []
    for place, token in enumerate(answer):
        row = logits[virtual + len(prompt) + place - 1]
        losses.append(float(torch.log(torch.exp(row).sum()) - row[token]))
    return losses


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_loss_is_the_mean_over_all_tokens(name: str, batch_size: int) -> None:
    model = MODELS[name]()
    losses = [loss for example in EXAMPLES for loss in hand_loss(model, example)]
    got = evaluate(model, tokenizer(), EXAMPLES, ["loss"], settings(batch_size=batch_size))["loss"]
    assert got["tokens"] == len(losses) == 10 + 5
    assert got["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[:] = 0
    got = evaluate(model, tokenizer(), EXAMPLES, ["loss"], settings(loss_on="all"))["loss"]
    assert got["perplexity"] == pytest.approx(VOCABULARY)
    assert got["loss"] == pytest.approx(math.log(VOCABULARY))
    assert got["tokens"] == 10 + 5 + (3 + 5 + 1 + 5 + 2) + 5  # answers, ends, prompts and "Answer:"


def test_loss_of_a_long_example_fits_the_context() -> None:
    long = Example(" ".join(["w5"] * 300), "", "w6")
    got = evaluate(gpt2(), tokenizer(), [long], ["loss"], settings(max_length=4096))["loss"]
    assert got["tokens"] == 2
    soft = attach_prompt(gpt2(), tokens=4, seed=0)
    assert evaluate(soft, tokenizer(), [long], ["loss"], settings(max_length=4096))["loss"]["tokens"] == 2


def test_accuracy_counts_exact_answers_by_category(monkeypatch: pytest.MonkeyPatch) -> None:
    given_answers = ["w6 W7.", "wrong", "w15 w16 w17", "w24 w25", "w28"]
    calls = []

    def fake(model: Any, tok: Any, prompts: list[list[int]], **rest: Any) -> list[str]:
        calls.append(prompts)
        return given_answers

    monkeypatch.setattr("fedtune.evaluation.subject.generate", fake)
    got = evaluate(llama(), tokenizer(), EXAMPLES, ["accuracy", "rouge-l"], settings())
    assert plain(got["accuracy"]) == {"accuracy": 3 / 5, "accuracy/a": 1 / 2, "accuracy/b": 1 / 2}
    third = 2 * 1 * (3 / 4) / (1 + 3 / 4)
    assert plain(got["rouge-l"]) == {"rouge_l": pytest.approx((1 + 0 + third + 1 + 1) / 5)}
    assert got["accuracy"]["examples"] == got["rouge-l"]["examples"] == 5
    assert got["accuracy"]["truncated"] == got["rouge-l"]["truncated"] == 0
    assert len(calls) == 1  # generated once for both tasks
    assert calls[0][4] == [BEGIN, 26, 27, 3]


def test_accuracy_of_a_model_that_knows_one_answer() -> None:
    model = llama()
    prompts = [[BEGIN, 14, 3], [BEGIN, 26, 27, 3]]
    known = generate(model, tokenizer(), prompts, max_new_tokens=6, batch_size=2)
    examples = [Example("w14", "", known[0], "x"), Example("w26 w27", "", known[1] + " w3", "y")]
    got = evaluate(model, tokenizer(), examples, ["accuracy"], settings(max_new_tokens=6))["accuracy"]
    assert plain(got) == {"accuracy": 0.5, "accuracy/x": 1.0, "accuracy/y": 0.0}


def test_a_prompt_cut_to_the_context_keeps_its_begin_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(model: Any, tok: Any, prompts: list[list[int]], **rest: Any) -> list[str]:
        seen.extend(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr("fedtune.evaluation.subject.generate", fake)
    long = Example(" ".join(["w5"] * 300), "", "w6")
    short = Example("w5", "", "w6")
    got = evaluate(
        llama(), tokenizer(), [long, short], ["accuracy"], settings(max_length=4096, max_new_tokens=36)
    )
    assert got["accuracy"]["truncated"] == 1
    assert seen.pop() == [BEGIN, 5, 3]
    assert seen == [[BEGIN] + [5] * 58 + [3]]  # 96 - 36 = 60 tokens


def classifier() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    config.num_labels = 3
    return seeded(lambda: BertForSequenceClassification(config))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_classifier_is_scored_by_argmax_and_cross_entropy(batch_size: int) -> None:
    model, labels = classifier(), ("no", "maybe", "yes")
    texts = ["w3 w4", "w5", "w6 w7 w8 w9", "w10 w11 w12"]
    with torch.no_grad():
        ids = [torch.tensor([[int(w[1:]) for w in text.split()]]) for text in texts]
        logits = torch.cat([model(input_ids=one).logits for one in ids]).double()
    best = logits.argmax(1).tolist()
    truth = [best[0], best[1], best[2], (best[3] + 1) % 3]
    examples = [
        Example(text, "", labels[label], category)
        for text, label, category in zip(texts, truth, ["p", "q", "p", "q"], strict=True)
    ]
    losses = [float(-torch.log_softmax(row, 0)[label]) for row, label in zip(logits, truth, strict=True)]
    got = evaluate(
        model, tokenizer(), examples, ["loss", "accuracy"], settings(labels=labels, batch_size=batch_size)
    )
    assert plain(got["accuracy"]) == {"accuracy": 0.75, "accuracy/p": 1.0, "accuracy/q": 0.5}
    assert "truncated" not in got["accuracy"]
    assert got["loss"]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert got["loss"]["tokens"] == 4
    with pytest.raises(InputError, match="rouge-l is for generated text"):
        evaluate(model, tokenizer(), examples, ["rouge-l"], settings(labels=labels))


def test_evaluate_restores_mode_and_gradients() -> None:
    model = llama().train()
    evaluate(model, tokenizer(), EXAMPLES, ["loss", "accuracy", "rouge-l"], settings(max_new_tokens=4))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrong_tasks_and_no_examples() -> None:
    with pytest.raises(InputError, match=r"task 'acuracy' is not known.*Did you mean \"accuracy\"\?"):
        evaluate(llama(), tokenizer(), EXAMPLES, ["loss", "acuracy"], settings())
    with pytest.raises(InputError, match="no examples to evaluate on"):
        evaluate(llama(), tokenizer(), [], ["loss"], settings())


def test_every_task_has_a_one_line_summary() -> None:
    assert {"loss", "accuracy", "rouge-l"} <= set(TASKS)
    assert all(row["summary"] and "\n" not in row["summary"] for row in TASKS.listing())


def test_a_task_draws_samples_for_each_prompt() -> None:
    model, prompts = llama(), ["w5 w6", "w7", " ".join(["w8"] * 200)]
    drawn: dict[int, list[list[str]]] = {}
    for batch_size in (1, 16):
        subject = Subject(model, tokenizer(), [], settings(batch_size=batch_size))
        drawn[batch_size] = subject.generate(prompts, max_new_tokens=8, samples=4, temperature=1.0)
        assert subject.truncated == 1
        subject.generate(prompts, max_new_tokens=8)
        assert subject.truncated == 2
    assert drawn[1] == drawn[16]
    assert [len(set(texts)) > 1 for texts in drawn[1]] == [True] * 3
    subject = Subject(model, tokenizer(), [], settings())
    assert subject.generate(prompts, max_new_tokens=8, samples=2, temperature=1.0) == [
        t[:2] for t in drawn[1]
    ]
    assert subject.generate(prompts, max_new_tokens=8, samples=4, temperature=1.0, seed=1) != drawn[1]
    other = Subject(model, tokenizer(), [], settings(seed=1))
    assert other.generate(prompts, max_new_tokens=8, samples=4, temperature=1.0) != drawn[1]
    greedy = subject.generate(prompts, max_new_tokens=8, samples=2)
    ids = [[BEGIN, 5, 6], [BEGIN, 7], [BEGIN] + [8] * 87]  # 96 tokens less 8
    assert greedy == [
        [text] * 2 for text in generate(model, tokenizer(), ids, max_new_tokens=8, batch_size=3)
    ]


def test_rows_of_a_tasks_file(tmp_path: Path) -> None:
    def rows(text: str, **changes: Any) -> list[dict[str, Any]]:
        (tmp_path / "f.jsonl").write_text(text, encoding="utf-8")
        files = {"task": str(tmp_path / "f.jsonl")}
        return Subject(llama(), tokenizer(), [], settings(files=files, **changes)).rows(
            "task", {"question": str, "score": (int, float)}
        )

    good = json.dumps({"question": "a\u2028b", "score": 1, "more": None}, ensure_ascii=False)
    assert rows(f"{good}\n\n{good}\n") == [{"question": "a\u2028b", "score": 1, "more": None}] * 2
    assert len(rows(f"{good}\n{good}\n", limit=1)) == 1
    for bad, message in (
        (
            '{"question": "a"}',
            r"f\.jsonl, line 2: task task needs the fields question, score; score is missing",
        ),
        ('{"question": 3, "score": 1}', "line 2: question must be str for task task, got 3"),
        ('{"question": "a", "score": true}', "line 2: score must be int or float for task task, got True"),
        ("[]", "line 2: task task needs an object on each line, got list"),
        ("{", "line 2: not JSON"),
    ):
        with pytest.raises(InputError, match=message):
            rows(f"{good}\n{bad}\n")
    with pytest.raises(InputError, match="has no examples for task task"):
        rows("\n")
    subject = Subject(llama(), tokenizer(), [], settings(files={"task": str(tmp_path / "none.jsonl")}))
    with pytest.raises(InputError, match=r"evaluation\.files\.task: no such file: .*none\.jsonl"):
        subject.file("task")
    with pytest.raises(InputError, match=r"task other reads a data file: give evaluation\.files\.other=FILE"):
        subject.file("other")


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
