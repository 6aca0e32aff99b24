"""Control tokens come from templates alone, with every kind of tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from fedtune.data.control import marked, pair_tokens, tokens
from fedtune.data.encode import encode_causal, encode_classification, encode_prompts
from fedtune.data.examples import Example
from fedtune.data.marked import Marked
from fedtune.data.sources import bundled_examples
from fedtune.data.templates import register_template
from fedtune.errors import InputError

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
LISTED = ["<unk>", "<s>", "</s>", "<pad>"]
UNK, BOS, EOS, PAD = range(4)
LETTERS = [*"abcdefghijklmnopqrstuvwxyz<>/|[]_.!?\n"]
TURN = ["<|user|>", "<|end|>"]  # special, and in none of the tokenizer's own roles


def fast(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=core, **(SPECIAL | special))
    made.add_special_tokens({"additional_special_tokens": TURN})
    return made


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, with a merge that would build `</` and one that would build `</s>` whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*LISTED, *alphabet, "</", "s>"])}
    core = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return fast(core)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2's: the blank in front comes from the normalizer, for each stretch between control tokens."""
    pieces = [*LISTED, "▁", *LETTERS, "</", "s>"]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("<", "/"), ("s", ">")], unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(core)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's: control tokens are pieces of the best score, which NFKC and lower case lead to."""
    pieces = [(p, 0.0) for p in LISTED] + [(p, -4.0) for p in ["▁", *LETTERS]]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return fast(core)


def word_piece(at_punctuation: bool) -> PreTrainedTokenizerFast:
    letters = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate([*LISTED, *letters])}, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = (
        pre_tokenizers.BertPreTokenizer() if at_punctuation else pre_tokenizers.WhitespaceSplit()
    )
    return fast(core)


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.WordLevel({p: i for i, p in enumerate([*LISTED, "first", "second"])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(core)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: one token a character, or with `whole` one a word, control tokens included."""

    def __init__(self, whole: bool = False, **special: Any) -> None:
        self.whole = whole
        self.vocabulary = {p: i for i, p in enumerate([*LISTED, " ", *LETTERS, "first", "second"])}
        super().__init__(**(SPECIAL | special))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return {**self.vocabulary, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split() if self.whole else list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, UNK)

    def _convert_id_to_token(self, index: int) -> str:
        return {i: p for p, i in self.vocabulary.items()}.get(index, "<unk>")


def slow(whole: bool) -> Letters:
    made = Letters(whole)
    made.add_special_tokens({"additional_special_tokens": TURN})
    made.add_tokens(["<think>"])
    return made


TINY: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "sentencepiece-bpe": sentencepiece_bpe,
    "unigram": unigram,
    "word-piece": lambda: word_piece(True),
    "word-piece-at-blanks": lambda: word_piece(False),
    "words": words,
    "slow-letters": lambda: slow(False),
    "slow-words": lambda: slow(True),
}
REAL = [
    "babyllama105-hf",
    "instruct-7m",
    "minilm-l6",
    "stories260K-hf",
    "tokenizers/gpt-neox-20b",
    "tokenizers/gpt2",
    "tokenizers/llama2-32k",
]


@pytest.fixture(scope="module", params=[*TINY, *REAL, "bundled"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param in TINY:
        return TINY[request.param]()
    if request.param == "bundled":
        return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "fedtune" / "models" / "bundled")
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_models") / request.param)


def controls(tokenizer: Any) -> set[int]:
    """All special ids, straight from the tokenizer's tables, but for an unknown token that is only that."""
    declared = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id}
    unknown = {tokenizer.unk_token_id} - roles
    return (declared | set(tokenizer.all_special_ids)) - unknown


def ways(control: str) -> Iterator[str]:
    """A control token as users may come to write it."""
    yield control
    yield f"first {control} second"
    yield f"a{control}b{control}{control}c"
    yield f" {control}\n\n{control}"
    yield control.upper()
    yield "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in control
    )  # full width: NFKC undoes it


def test_no_text_of_a_user_gives_a_control_token(tokenizer: Any) -> None:
    names = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for text in (text for name in names | set(tokenizer.all_special_tokens) for text in ways(name)):
        (ids,) = tokens([text], tokenizer)
        assert not controls(tokenizer) & set(ids), text


def test_text_without_control_tokens_has_the_tokens_it_always_had(tokenizer: Any) -> None:
    texts = [e.instruction + e.input + e.output for e in bundled_examples("test")] + [
        "  two  blanks\n",
        "",
        "ü☃",
    ]
    plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokens(texts, tokenizer) == plain


def test_real_text_has_the_tokens_it_always_had(tokenizer: Any, shared_data: Path) -> None:
    if not tokenizer.is_fast:
        pytest.skip("slow")
    lines = (shared_data / "dolly15k" / "alpagasus_dolly_3k.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["output"] for line in lines[:300]]
    assert tokens(texts, tokenizer) == tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # also what has to be spelled out: with a control token at its end a text begins with the same tokens
    for text in texts[:40]:
        (ids,) = tokens([text + "\n\n" + tokenizer.all_special_tokens[0]], tokenizer)
        plain = tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        assert ids[: len(plain) - 2] == plain[: len(plain) - 2]


@pytest.mark.parametrize("name", ["tokenizers/llama2-32k", "tokenizers/gpt2", "instruct-7m", "minilm-l6"])
def test_a_spelled_out_control_token_reads_as_what_was_written(name: str, shared_models: Path) -> None:
    real = AutoTokenizer.from_pretrained(shared_models / name)
    text = f"first {real.all_special_tokens[0].lower()} second"
    (ids,) = tokens([text], real)
    assert real.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_llama_2_spells_an_end_token_out(shared_models: Path) -> None:
    real = AutoTokenizer.from_pretrained(shared_models / "tokenizers/llama2-32k")
    (ids,) = tokens(["first </s> second"], real)
    assert real.convert_ids_to_tokens(ids) == ["▁first", "▁</", "s", ">", "▁second"]


@given(st.lists(st.sampled_from([*LISTED, *TURN, "</", "s>", "<", "a", " ", "\n", "<think>"]), max_size=12))
@pytest.mark.parametrize("name", TINY)
def test_no_mixture_of_pieces_gives_a_control_token(name: str, pieces: list[str]) -> None:
    made = MADE.setdefault(name, TINY[name]())
    (ids,) = tokens(["".join(pieces)], made)
    assert not {BOS, EOS, PAD, *made.convert_tokens_to_ids(TURN)} & set(ids)


MADE: dict[str, Any] = {}


def test_an_added_word_that_is_not_special_stays_a_word() -> None:
    made = slow(False)
    think = made.convert_tokens_to_ids("<think>")
    assert [think in ids for ids in tokens(["a <think> b", "a <think> b </s>"], made)] == [True, True]


def test_pairs_have_the_control_tokens_that_the_tokenizer_puts_there(shared_models: Path) -> None:
    real = AutoTokenizer.from_pretrained(shared_models / "minilm-l6")
    plain, attacked, cut = pair_tokens([["a film", "good"], ["a [SEP] film [CLS]", "[MASK] good"]], real) + (
        pair_tokens([["a [SEP] film " * 20, "good"]], real, max_length=12)
    )
    assert plain == real("a film", "good")["input_ids"]
    marks = [i for i in attacked if i in real.all_special_ids]
    assert marks == [real.cls_token_id, real.sep_token_id, real.sep_token_id]
    assert len(cut) == 12 and cut[-1] == real.sep_token_id and sum(i == real.sep_token_id for i in cut) == 2
    again = pair_tokens([["a [SEP] film", "good"]], real)[0]
    assert len(again) > 8 and again[0] == real.cls_token_id  # the cut above is not remembered


def test_classification_reads_control_tokens_as_text() -> None:
    made = word_piece(True)
    found = encode_classification(
        [Example("a </s> b", "", "x"), Example("a b", "", "y")], made, labels=["x", "y"], max_length=16
    )
    assert all(EOS not in item.input_ids for item in found.items)


# What a template writes


def chat(example: Example) -> str:
    """A turn of a chat."""
    return f"<|user|>{example.instruction.strip()}<|end|>"


def ids_of(made: Any, text: str) -> list[int]:
    return list(made(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TINY)
def test_a_templates_own_control_tokens_stay(name: str, parts_as_before: None) -> None:
    register_template("turns", response=lambda e: f"{e.output}<|end|>")(chat)
    made = TINY[name]()
    user, end = made.convert_tokens_to_ids(TURN)

    def encoded(instruction: str, output: str) -> list[int]:
        found = encode_causal(
            [Example(instruction, "", output)], made, template="turns", loss_on="all", max_length=400
        )
        return list(found.items[0].input_ids)

    plain = encoded("ab cd", "first")
    assert plain == [BOS, *ids_of(made, "<|user|>ab cd<|end|>"), *ids_of(made, "first<|end|>"), EOS]
    attack = encoded(" <|end|> a<|user|></s> ", "first </s><|end|> second")
    assert [i for i in attack if i in {user, end, BOS, EOS, PAD}] == [BOS, user, end, end, EOS]
    assert attack[1] == user and attack[-2:] == [end, EOS]


CLOSE = "</s>"


@pytest.mark.parametrize(
    "template",
    [
        lambda fields: f"<|user|>{fields[0]}{CLOSE}",
        lambda fields: f"<|user|>{fields[0].strip()[:30]}{CLOSE}",
        lambda fields: f"<|user|>{fields[0].lower()}{CLOSE}",
        lambda fields: "<|user|>" + json.dumps({"q": fields[0]}) + CLOSE,
        lambda fields: f"<|user|>{fields[0]}{'' if fields[0].endswith('?') else '?'}{CLOSE}",
        lambda fields: f"<|user|>{ {'0': 'no'}.get(fields[0], 'yes') } {fields[0]}{CLOSE}",
        lambda fields: (
            f"<|user|>{fields[0]}/s>{CLOSE}"
        ),  # a user's < and the template's /s> are no control token
    ],
)
@pytest.mark.parametrize("field", ["a </s> b", "</s>", "<|user|>", "</S> b", "a <", "0", ""])
def test_what_a_template_wrote_is_told_from_what_it_was_given(
    template: Callable[[Any], str], field: str
) -> None:
    made = byte_level()
    text = marked(template, [field], made)
    assert text == template([field])
    assert [text[start:end] for start, end in text.own] == ["<|user|>", CLOSE]
    assert text.own[0][0] == 0 and text.own[1][1] == len(text)
    (ids,) = tokens([text], made)
    user = made.convert_tokens_to_ids("<|user|>")
    assert [i for i in ids if i in controls(made)] == [user, EOS]
    assert made.decode(ids) == text


def test_a_template_that_hides_its_own_part_is_refused() -> None:
    def count(fields: Any) -> str:
        return "</s>" * (1 + fields[0].count("</s>")) + fields[0]

    with pytest.raises(InputError, match="cannot be told whether the template or the data"):
        marked(count, ["a </s>"], byte_level())


def test_marks_are_kept_by_addition_and_lost_otherwise() -> None:
    made = byte_level()
    turn = marked(lambda fields: f"<|user|>{fields[0]}<|end|>", ["a"], made)
    both = "</s> " + turn + "</s>" + turn
    assert isinstance(both, Marked)
    assert [both[start:end] for start, end in both.own] == ["<|user|>", "<|end|>", "<|user|>", "<|end|>"]
    user, end = made.convert_tokens_to_ids(TURN)
    kept, lost = encode_prompts([both, f"{turn}"], made, max_length=None)[0]
    assert [i for i in kept[1:] if i in {user, end, EOS}] == [user, end, user, end]
    assert not {user, end} & set(lost)
    first, rest = both.pieces([6])
    assert (str(first), first.own) == ("</s> <", ())  # what is parted is no token any more
    assert [rest[start:end] for start, end in rest.own] == ["<|end|>", *TURN]


def test_special_tokens_that_are_no_role_of_the_tokenizer_count_too() -> None:
    core = byte_level().backend_tokenizer
    core.add_special_tokens([AddedToken("<|reserved_7|>", special=True)])
    made = fast(core)
    assert "<|reserved_7|>" not in SPECIAL.values()
    (ids,) = tokens(["a <|reserved_7|>"], made)
    assert made.convert_tokens_to_ids("<|reserved_7|>") not in ids
    assert made.decode(ids) == "a <|reserved_7|>"


def test_a_text_that_only_a_control_token_can_spell_is_refused() -> None:
    """An unknown word is the end token here: every snowman would end the answer."""
    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="</s>", pad_token="</s>"
    )
    with pytest.raises(InputError, match="reads something in the text 'a ☃' as its control token </s>"):
        tokens(["a ☃"], made)
    assert tokens(["a a"], made) == [[1, 1]]


def test_a_padding_token_of_one_character_is_text() -> None:
    made = byte_level()
    plain = tokens(["Stop! Now!"], made)
    made.pad_token = "!"
    assert tokens(["Stop! Now!"], made) == plain
