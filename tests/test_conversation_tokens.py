"""Conversations and plain texts as tokens: what fits, what has loss, what a server makes of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from chat_formats import FORMATS
from transformers import PreTrainedTokenizerFast

from fedtune.data.control import piece_tokens, tokens
from fedtune.data.encode import encode_asked, encode_causal, encode_prompts, prompt_text
from fedtune.data.encoded import IGNORED, Counts, Encoded
from fedtune.data.examples import Example, Turn
from fedtune.data.marked import Marked
from fedtune.data.prompts import (
    other_template,
    prompts,
    record_of,
    taken_template,
    template_notes,
    with_template,
)
from fedtune.data.spelled import Spelled
from fedtune.data.templates import register_template
from fedtune.errors import InputError
from fedtune.registry import forgotten_afterwards

ZEPHYR = FORMATS["Zephyr"]


def talk(*pairs: tuple[str, str], system: str = "") -> Example:
    turns = [Turn("system", system)] if system else []
    for asked, answer in pairs:
        turns += [Turn("user", asked), Turn("assistant", answer)]
    return Example(pairs[-1][0], "", pairs[-1][1], "", tuple(turns))


def encoded(*examples: Example, made: Any = None, **how: Any) -> Any:
    settings: dict[str, Any] = {"template": "chat", "loss_on": "response", "max_length": 4096}
    settings |= how
    return encode_causal(examples, made or ZEPHYR.tokenizer(), **settings)


def learned(made: PreTrainedTokenizerFast, item: Encoded) -> str:
    return str(made.decode([i for i in item.labels if i != IGNORED], skip_special_tokens=False))


def text(made: PreTrainedTokenizerFast, item: Encoded) -> str:
    return str(made.decode(item.input_ids, skip_special_tokens=False))


# a byte is a token, and so is </s>: "<|user|>\nQ</s>\n" has 12, "<|assistant|>\nA</s>" 16, a line feed 1
def test_a_conversation_loses_its_first_exchanges_and_keeps_the_system() -> None:
    made, said = ZEPHYR.tokenizer(), talk(("Q", "A"), ("R", "B"), ("T", "C"), system="S")
    whole = encoded(said, made=made)
    assert len(whole.items[0].input_ids) == 14 + 3 * (12 + 17) - 1 == 100
    assert whole.counts == Counts(examples=1)
    for most, first, dropped in ((100, "Q", 0), (99, "R", 2), (71, "R", 2), (70, "T", 4), (42, "T", 4)):
        found = encoded(said, made=made, max_length=most)
        start = f"<|system|>\nS</s>\n<|user|>\n{first}</s>"
        assert text(made, found.items[0]).startswith(start), most
        assert found.counts == Counts(examples=1, cut=int(most < 100), turns=dropped), most
        assert text(made, found.items[0]).endswith("<|assistant|>\nC</s>")


def test_only_a_single_exchange_is_cut_inside() -> None:
    made, said = ZEPHYR.tokenizer(), talk(("Q", "A"), ("R" * 20, "B" * 20))
    found = encoded(said, made=made, max_length=40)
    # the answer and its end have 21 tokens, and of the prompt's 45 the last 19 fit
    assert text(made, found.items[0]) == "RRR</s>\n<|assistant|>\n" + "B" * 20 + "</s>"
    assert found.counts == Counts(examples=1, cut=1, turns=2)
    assert learned(made, found.items[0]) == "B" * 20 + "</s>"
    found = encoded(said, made=made, max_length=20)
    assert text(made, found.items[0]) == "nt|>\n" + "B" * 15  # a quarter is of the prompt
    assert found.counts == Counts(examples=1, cut=1, turns=2, without_eos=1)


def test_a_prompt_loses_the_exchanges_that_training_loses() -> None:
    made, said = ZEPHYR.tokenizer(), talk(("Q", "A"), ("R", "B"), ("T", "C"), system="S")
    plain = Example("Q" * 30, "", "A")
    how: dict[str, Any] = {"template": "chat"}
    for most, first in ((98, "Q"), (97, "R"), (69, "R"), (68, "T"), (40, "T")):
        (ids, other), cut = encode_asked([said, plain], made, max_length=most, **how)
        assert str(made.decode(ids)).startswith(f"<|system|>\nS</s>\n<|user|>\n{first}</s>"), most
        item = encoded(said, made=made, max_length=most + 2).items[0]
        assert item.input_ids[: len(ids)] == tuple(ids)  # behind it "C" and the end token
        assert len(other) == min(most, 55) and cut == (most < 98) + (most < 55)


def test_a_begin_token_is_never_there_twice() -> None:
    made = ZEPHYR.tokenizer()
    with forgotten_afterwards():
        register_template("begins", summary="writes its own")(lambda example: f"<s>{example.instruction}")
        (item,) = encoded(Example("Q", "", "A"), made=made, template="begins").items
        assert text(made, item) == "<s>QA</s>"
        (ids,), _ = encode_prompts([prompt_text(Example("Q"), "begins", made)], made, max_length=None)
        assert made.decode(ids) == "<s>Q"


def test_the_other_ways_with_what_is_too_long() -> None:
    made, said = ZEPHYR.tokenizer(), talk(("Q", "A"), ("R", "B"))
    found = encoded(said, talk(("Q", "A")), made=made, max_length=40, too_long="drop")
    assert found.counts == Counts(examples=1, dropped=1) and len(found.items) == 1
    with pytest.raises(InputError, match=r"example 0 \('R'\) is too long: 57 tokens, and 40 fit"):
        encoded(said, made=made, max_length=40, too_long="error")


def test_what_stands_behind_the_last_answer_is_left_out_and_counted() -> None:
    made = ZEPHYR.tokenizer()
    plain = talk(("Q", "A"))
    more = Example("Q", "", "A", "", (*plain.turns, Turn("user", "R"), Turn("tool", "x")))
    found, wanted = encoded(more, made=made), encoded(plain, made=made)
    assert found.items[0] == wanted.items[0] and found.counts == Counts(examples=1, unanswered=2)


def test_answers_of_weight_nought_are_not_learned() -> None:
    made, said = ZEPHYR.tokenizer(), talk(("Q", "A"), ("R", "B"))
    turns = (said.turns[0], Turn("assistant", "A", '{"weight": 0}'), *said.turns[2:])
    example = Example("R", "", "B", "", turns)
    for template in ("chat", "plain", "alpaca"):
        first, both = (
            encoded(example, made=made, template=template),
            encoded(said, made=made, template=template),
        )
        assert first.items[0].input_ids == both.items[0].input_ids
        assert learned(made, both.items[0]).replace(" ", "") == "A</s>B</s>"
        assert learned(made, first.items[0]).replace(" ", "") == "B</s>"


def test_an_empty_answer_is_its_end_alone() -> None:
    made = ZEPHYR.tokenizer()
    found = encoded(talk(("Q", ""), ("R", " "), ("", "B")), talk(("Q", "")), made=made)
    assert [learned(made, item) for item in found.items] == ["</s></s>B</s>", "</s>"]
    assert found.counts == Counts(examples=2, empty=1)
    # what stands for an empty answer while it is rendered is a letter, which others may write too
    odd = chr(0x20000 + 40_000 + 1)
    found = encoded(talk((odd, ""), (odd, odd)), made=made)
    assert text(made, found.items[0]).count(odd) == 3 and learned(made, found.items[0]) == f"</s>{odd}</s>"


@pytest.mark.parametrize("template", ["chat", "plain", "alpaca"])
def test_ten_thousand_turns_take_their_time_and_no_more(template: str) -> None:
    made = ZEPHYR.tokenizer()
    found = encoded(talk(*[("Q", "A")] * 5000), made=made, template=template, max_length=300)
    assert found.counts.cut == 1 and found.counts.turns > 9900 and len(found.items[0].input_ids) <= 300
    kept = (10_000 - found.counts.turns) // 2
    assert learned(made, found.items[0]).replace(" ", "") == "A</s>" * kept


def test_equal_conversations_are_duplicates_and_others_are_not() -> None:
    first, second = talk(("Q", "A"), ("R", "B")), talk(("Q", "C"), ("R", "B"))
    assert encoded(first, second, first).counts.duplicates == 1


# --- what a server makes of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("name", ["Zephyr", "ChatML", "Llama 3"])
def test_the_exported_program_gives_the_tokens_of_training(template: str, name: str) -> None:
    made = FORMATS[name].tokenizer()
    said = talk(("Q </s>", " A"), ("R\n", "B\n"), system="S")
    served = with_template(made, template)
    assert made.chat_template == FORMATS[name].template  # the run's own tokenizer stays as it is
    messages = [{"role": turn.role, "content": turn.content} for turn in said.turns]
    item = encoded(said, made=made, template=template).items[0]
    rendered = served.apply_chat_template(messages, tokenize=False)
    assert rendered == str(made.decode(item.input_ids, skip_special_tokens=False))
    (ids,), _ = encode_prompts([prompt_text(said, template, made)], made, max_length=None)
    prompt = served.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt == str(made.decode(ids, skip_special_tokens=False))
    # and it is known again by its text
    assert prompts("auto", served).name == template and other_template("auto", served) is None
    other = "plain" if template == "alpaca" else "alpaca"
    assert str(other_template(other, served)).startswith(
        f"data.template is {other}, and the model's own chat"
    )


def test_which_template_auto_is() -> None:
    made = ZEPHYR.tokenizer()
    sha256 = hashlib.sha256(ZEPHYR.template.encode()).hexdigest()
    assert record_of("auto", made) == {"name": "chat", "sha256": sha256, "text": ZEPHYR.template}
    assert taken_template(made) == "chat, because the tokenizer has a chat template"
    assert template_notes("auto", made, [talk(("Q", "A"))]) == []
    made.chat_template = None
    assert record_of("auto", made)["name"] == "alpaca"
    assert taken_template(made) == "alpaca, because the tokenizer has no chat template"
    with pytest.raises(InputError, match=r"data.template is chat, and the tokenizer has no chat template"):
        prompts("chat", made)
    made.chat_template = {"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    with pytest.raises(InputError, match="rag, tool_use and none called default"):
        prompts("auto", made)
    made.chat_template = {"default": ZEPHYR.template, "tool_use": "{{ 2 }}"}
    assert record_of("auto", made)["text"] == ZEPHYR.template


def test_what_a_template_has_no_form_for_is_said() -> None:
    made, turns = FORMATS["Gemma 2"].tokenizer(), talk(("Q", "A"), system="S").turns
    call = Turn("assistant", "", '{"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}')
    example = Example("Q", "", "A", "", (*turns[:2], call, Turn("tool", "r"), turns[2]), '[{"name": "f"}]')
    (line,) = template_notes("chat", made, [example])
    assert line.startswith("the template chat has no form for a system's turn, whose text goes in front of")
    assert "calls of tools, which are written as JSON" in line and "definitions of tools" in line
    assert text(made, encoded(example, made=made).items[0]) == (
        '<bos><start_of_turn>user\nS\n\nTools: [{"name": "f"}]\n\nQ<end_of_turn>\n<start_of_turn>model\n'
        '{"name": "f", "arguments": {}}<end_of_turn>\n<start_of_turn>user\nr<end_of_turn>\n'
        "<start_of_turn>model\nA<end_of_turn>"
    )


# --- pieces -------------------------------------------------------------------------------------------------


def test_no_token_is_of_two_pieces() -> None:
    made = ZEPHYR.tokenizer()
    row = [Marked("ab\n"), Marked("\ncd"), Marked(""), Marked("e")]
    assert [made.decode(ids) for ids in piece_tokens([row], made)[0]] == ["ab\n", "\ncd", "", "e"]
    parted = Marked("ab\n\ncd", whole=True, seams=[3])
    assert tokens([parted], made)[0] == [i for ids in piece_tokens([row[:2]], made)[0] for i in ids]


# --- plain texts --------------------------------------------------------------------------------------------


def documents(*texts: str) -> Sequence[Example]:
    return [Example("", "", one, "", (Turn("document", one),)) for one in texts]


def test_a_plain_text_is_learned_whole_between_begin_and_end() -> None:
    made = ZEPHYR.tokenizer()
    found = encoded(*documents("abc </s>", "d"), made=made, template="alpaca")
    assert [text(made, item) for item in found.items] == ["<s>abc </s></s>", "<s>d</s>"]
    assert [learned(made, item) for item in found.items] == ["abc </s></s>", "d</s>"]
    assert found.items[0].input_ids.count(made.eos_token_id) == 1  # what is written in it is text
    assert found.parts == (1, 1)


def test_a_long_text_becomes_parts_that_lose_no_token() -> None:
    made = ZEPHYR.tokenizer()
    found = encoded(*documents("abcdefghij", "k"), made=made, max_length=5, template="plain")
    # each begins with the last token of the one before, which has no loss there
    assert [text(made, item) for item in found.items] == ["<s>abcd", "defgh", "hij</s>", "<s>k</s>"]
    assert [learned(made, item) for item in found.items] == ["abcd", "efgh", "ij</s>", "k</s>"]
    assert found.parts == (3, 1)
    assert found.counts == Counts(examples=4, parted=1)
    twelve = encoded(*documents("abc"), made=made, max_length=5, template="plain")
    assert [text(made, item) for item in twelve.items] == ["<s>abc</s>"]


def test_a_part_is_what_was_spelled() -> None:
    assert Spelled([1], [[2, 3, 4, 5]]).parts(2) == [[1, 2], [2, 3], [3, 4], [4, 5]]
    assert Spelled([1], [[2]]).parts(9) == [[1, 2]]
    assert Spelled([], [[2]]).parts(2) == [[2]]
