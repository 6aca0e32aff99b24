from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedtune.data import templates
from fedtune.data.encode import encode_causal, encode_classification, encode_prompts
from fedtune.data.encoded import IGNORED
from fedtune.data.examples import Example
from fedtune.data.sources import load_examples
from fedtune.errors import InputError

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "Answer:", "a", "b", "c", "d", "e", "f"]
BOS, EOS, ANSWER = 1, 2, 4
A, B, C, D, E, F = range(5, 11)
EXAMPLE = Example("a b", "c", "d e f")  # plain: "a b\nc\nAnswer:" and " d e f"


def toy(**special: str | None) -> PreTrainedTokenizerFast:
    """Splits at blanks; of itself it adds <s> first and </s> after each text, as classifiers want."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names | special))


def causal(max_length: int, loss_on: str = "response", *examples: Example, **special: str | None) -> Any:
    return encode_causal(
        examples or [EXAMPLE], toy(**special), template="plain", loss_on=loss_on, max_length=max_length
    )


def test_loss_on_the_response_alone() -> None:
    found = causal(10)
    assert found.items[0].input_ids == (BOS, A, B, C, ANSWER, D, E, F, EOS)
    assert found.items[0].labels == (IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, D, E, F, EOS)
    assert found.counts.cut == 0


def test_loss_on_all() -> None:
    found = causal(10, "all").items[0]
    assert found.input_ids == (BOS, A, B, C, ANSWER, D, E, F, EOS)
    assert found.labels == (IGNORED, A, B, C, ANSWER, D, E, F, EOS)


def test_tokenizer_without_begin_token() -> None:
    found = causal(10, "response", bos_token=None).items[0]
    assert found.input_ids == (A, B, C, ANSWER, D, E, F, EOS)
    assert found.labels == (IGNORED,) * 4 + (D, E, F, EOS)


@pytest.mark.parametrize(
    ("max_length", "ids", "masked"),
    [
        (9, (BOS, A, B, C, ANSWER, D, E, F, EOS), 5),  # just fits
        (8, (BOS, B, C, ANSWER, D, E, F, EOS), 4),  # the prompt is cut from the left
        (6, (BOS, ANSWER, D, E, F, EOS), 2),
        (5, (BOS, D, E, F, EOS), 1),  # the end token alone would be cut: a whole response ends
        (4, (BOS, ANSWER, D, E), 2),  # then the response loses its end, and with it the end token
        (3, (BOS, ANSWER, D), 2),
        (2, (BOS, D), 1),
    ],
)
def test_truncation(max_length: int, ids: tuple[int, ...], masked: int) -> None:
    found = causal(max_length)
    assert found.items[0].input_ids == ids
    assert found.items[0].labels == (IGNORED,) * masked + ids[masked:]
    assert found.counts.cut == (max_length < 9)


def test_truncated_examples_are_counted() -> None:
    short, long = Example("a", "", "b"), Example("a b c d", "", "b")  # 5 and 8 tokens
    assert causal(7, "response", short, long, EXAMPLE, short).counts.cut == 2
    assert causal(9, "response", short, long, EXAMPLE, short).counts.cut == 0


def test_empty_response_still_teaches_the_end() -> None:
    found = causal(10, "response", Example("a", "", "")).items[0]
    assert found.input_ids == (BOS, A, ANSWER, EOS)
    assert found.labels == (IGNORED, IGNORED, IGNORED, EOS)


words = st.lists(st.sampled_from("abcdef"), max_size=6).map(" ".join)


@given(
    st.lists(st.builds(Example, words, words, words), min_size=1, max_size=4),
    st.integers(2, 16),
    st.sampled_from(["response", "all"]),
    st.booleans(),
)
def test_causal_properties(examples: list[Example], max_length: int, loss_on: str, begin: bool) -> None:
    tokenizer = toy() if begin else toy(bos_token=None)
    found = encode_causal(examples, tokenizer, template="plain", loss_on=loss_on, max_length=max_length)
    prompts, cut = encode_prompts(
        [templates.prompt(e, "plain") for e in examples], tokenizer, max_length=1000
    )
    assert cut == 0
    for example, item, prompt in zip(examples, found.items, prompts, strict=True):
        assert len(item.input_ids) == len(item.labels) <= max_length
        pairs = zip(item.input_ids, item.labels, strict=True)
        assert all(label in (IGNORED, token) for token, label in pairs)
        whole = [*prompt, *(WORDS.index(word) for word in example.output.split()), EOS]
        if len(whole) <= max_length:
            assert list(item.input_ids) == whole  # training sees exactly the prompt that generation uses
            assert sum(label != IGNORED for label in item.labels) == len(whole) - (
                len(prompt) if loss_on == "response" else begin
            )
        else:
            assert len(item.input_ids) == max_length
        if whole[0] != BOS:
            assert item.input_ids[0] != BOS
    assert found.counts.cut == sum(
        len(prompt) + len(example.output.split()) + 1 > max_length
        for example, prompt in zip(examples, prompts, strict=True)
    )


def test_prompts_for_generation() -> None:
    texts = [templates.prompt(example, "plain") for example in (EXAMPLE, Example("f"))]

    def prompts(length: int | None, **special: str | None) -> tuple[list[list[int]], int]:
        return encode_prompts(texts, toy(**special), max_length=length)

    assert prompts(9) == prompts(None) == ([[BOS, A, B, C, ANSWER], [BOS, F, ANSWER]], 0)
    assert prompts(3) == ([[BOS, C, ANSWER], [BOS, F, ANSWER]], 1)
    assert prompts(2, bos_token=None) == ([[C, ANSWER], [F, ANSWER]], 1)
    assert encode_prompts([], toy(), max_length=9) == ([], 0)


def test_classification() -> None:
    examples = [Example("a b", "c d", "no"), Example("e", "", "yes"), Example("a b c d e f", "f", "no")]
    found = encode_classification(examples, toy(), labels=["yes", "no"], max_length=7)
    assert [item.input_ids for item in found.items] == [
        (BOS, A, B, EOS, C, D, EOS),
        (BOS, E, EOS),
        (BOS, A, B, C, EOS, F, EOS),  # the longer text is cut
    ]
    assert [item.labels for item in found.items] == [(1,), (0,), (1,)]
    assert found.counts.cut == 1


def test_classification_refuses() -> None:
    def encode(example: Example, labels: list[str], max_length: int = 9) -> None:
        encode_classification([Example("a", "", "yes"), example], toy(), labels=labels, max_length=max_length)

    with pytest.raises(InputError, match=r'example 1 has the label "yess".*yes, no.*Did you mean "yes"'):
        encode(Example("a", "", "yess"), ["yes", "no"])
    with pytest.raises(InputError, match="two or more and differ"):
        encode(Example("a", "", "yes"), ["yes", "yes"])
    with pytest.raises(InputError, match="two or more and differ"):
        encode(Example("a", "", "yes"), ["yes"])
    with pytest.raises(InputError, match="max_length must be at least 5, got 4"):  # 3 are special
        encode(Example("a", "b", "yes"), ["yes", "no"], max_length=4)


def test_causal_refuses() -> None:
    with pytest.raises(
        InputError, match=r'loss_on must be one of response, last, all, got "respons".*Did you mean'
    ):
        causal(9, "respons")
    with pytest.raises(InputError, match="max_length must be at least 2, got 1"):
        causal(1)
    with pytest.raises(InputError, match="max_length must be at least 2, got 0"):
        encode_prompts(["a"], toy(), max_length=0)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        causal(9, "response", eos_token=None)
    with pytest.raises(InputError, match=r"the tokenizer has no chat template"):
        encode_causal([EXAMPLE], toy(), template="chat", loss_on="all", max_length=9)


@pytest.mark.parametrize("name", ["gpt-neox-20b", "llama2-32k"])
def test_real_tokenizers_on_real_text(shared_data: Path, shared_models: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "tokenizers" / name)
    examples = load_examples("alpaca/user_oriented_instructions_252.jsonl", base=shared_data, fields={
        "input": "instances.0.input", "output": "instances.0.output"
    })  # fmt: skip
    found = encode_causal(examples, tokenizer, template="alpaca", loss_on="response", max_length=256)
    prompts, _ = encode_prompts([templates.prompt(e, "alpaca") for e in examples], tokenizer, max_length=None)
    lengths = []
    for example, item, prompt in zip(examples, found.items, prompts, strict=True):
        answer = [token for token in item.labels if token != IGNORED]
        response = tokenizer(example.output, add_special_tokens=False)["input_ids"]
        lengths.append(len(prompt) + len(response) + 1)
        if lengths[-1] <= 256:
            assert list(item.input_ids) == prompt + answer
            text = str(tokenizer.decode(answer[:-1], clean_up_tokenization_spaces=False))
            assert text.strip() == example.output.strip() and answer[-1] == tokenizer.eos_token_id
    assert found.counts.cut == sum(length > 256 for length in lengths)
    assert 0 < found.counts.cut < len(examples)
