"""What has loss in the chat formats of public models, against conversations written out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_formats import FORMATS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedtune.data.control import text_of
from fedtune.data.encode import encode_causal, encode_prompts, prompt_text
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.data.examples import Example, Turn
from fedtune.data.prompts import prompts, template_notes
from fedtune.errors import InputError

QUESTIONS = (Turn("user", "Q1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2"))
SYSTEM = Turn("system", "S")


def encoded(made: PreTrainedTokenizerFast, turns: Sequence[Turn], loss_on: str = "response") -> Encoded:
    example = Example("", output=turns[-1].content, turns=tuple(turns))
    return encode_causal([example], made, template="chat", loss_on=loss_on, max_length=4096).items[0]


def shown(made: PreTrainedTokenizerFast, item: Encoded) -> str:
    """The text of all tokens, with what has loss between ⟦ and ⟧."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(item.input_ids, item.labels, strict=True):
        assert label in (IGNORED, token)
        if not pieces or pieces[-1][0] != (label != IGNORED):
            pieces.append((label != IGNORED, []))
        pieces[-1][1].append(token)
    texts = [(loss, str(made.decode(ids, skip_special_tokens=False))) for loss, ids in pieces]
    return "".join(f"⟦{text}⟧" if loss else text for loss, text in texts)


@pytest.mark.parametrize("name", FORMATS)
def test_the_answers_have_loss_and_nothing_else(name: str) -> None:
    form = FORMATS[name]
    made = form.tokenizer()
    turns = [*([SYSTEM] if form.system else []), *QUESTIONS]
    assert shown(made, encoded(made, turns)) == form.said
    assert (prompts("chat", made).traits.system, prompts("chat", made).traits.repeats) == (
        form.system,
        not form.strict,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_the_last_answer_alone_and_everything(name: str) -> None:
    form = FORMATS[name]
    made, turns = form.tokenizer(), [*([SYSTEM] if form.system else []), *QUESTIONS]
    first, last = form.said.find("⟦"), form.said.rfind("⟦")
    alone = form.said[: last + 1].replace("⟧", "").replace("⟦", "", 1) + form.said[last + 1 :]
    assert first < last and shown(made, encoded(made, turns, "last")) == alone
    whole = encoded(made, turns, "all")
    assert made.decode(whole.input_ids, skip_special_tokens=False) == re.sub("[⟦⟧]", "", form.said)
    begin = int(bool(form.begin) and form.said.startswith(form.begin))
    assert whole.labels == (IGNORED,) * begin + whole.input_ids[begin:]


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_to_generate_has_the_tokens_of_training(name: str) -> None:
    form = FORMATS[name]
    made, turns = form.tokenizer(), [*([SYSTEM] if form.system else []), *QUESTIONS]
    item = encoded(made, turns, "last")
    answer = item.labels.count(IGNORED)
    (ids,), cut = encode_prompts(
        [prompt_text(Example("", turns=tuple(turns)), "chat", made)], made, max_length=None
    )
    more = made("<think>\n", add_special_tokens=False)["input_ids"] if name == "DeepSeek R1" else []
    assert ids == [*item.input_ids[:answer], *more] and cut == 0
    if form.begin and form.begin != form.end and form.said.count(form.begin) == 1:
        assert ids.count(made.bos_token_id) == 1
    assert ids[1:2] != [made.bos_token_id]


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize("name", FORMATS)
def test_the_tokens_are_those_that_transformers_gives(name: str) -> None:
    form = FORMATS[name]
    made, turns = form.tokenizer(), [*([SYSTEM] if form.system else []), *QUESTIONS]
    ids = encoded(made, turns).input_ids
    given = made.apply_chat_template(messages(turns))["input_ids"]
    if name == "GLM 4":  # which writes no end behind the last answer
        given = [*given, made.eos_token_id]
    assert list(ids) == given[: len(ids)]


MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}INSIDE{% endgeneration %}{{ 'OUTSIDE' }}{% else %}{{ m.content + '</s>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize(("inside", "outside"), [("</s>\\n", ""), ("</s>", "\\n"), ("", "</s>\\n")])
def test_marks_of_a_template_with_its_end_in_them_or_behind(inside: str, outside: str) -> None:
    made = FORMATS["Zephyr"].tokenizer()
    made.chat_template = MARKED.replace("INSIDE", f"{{{{ '{inside}' }}}}").replace("OUTSIDE", outside)
    item = encoded(made, QUESTIONS)
    assert shown(made, item) == FORMATS["Zephyr"].said.removeprefix("<|system|>\nS</s>\n")
    # beside what transformers takes from the same marks: the end token is the only difference there can be
    given = made.apply_chat_template(messages(QUESTIONS), return_assistant_tokens_mask=True, return_dict=True)
    end = made.eos_token_id
    marked = [t for t, m in zip(given["input_ids"], given["assistant_masks"], strict=True) if m and t != end]
    ours = [t for t in item.labels if t not in (IGNORED, end)]
    assert ours == [t for t in marked if made.decode([t]) != "\n"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_users_write_is_no_control_token(name: str) -> None:
    form = FORMATS[name]
    made = form.tokenizer()
    words = [word for word in (form.begin, form.end, *form.special) if word]
    hostile = f"x {' '.join(words)} y"
    control = set(made.convert_tokens_to_ids(words))
    plain = encoded(made, [Turn("user", "x y"), Turn("assistant", "z")])
    item = encoded(made, [Turn("user", hostile), Turn("assistant", "z")])
    assert [t for t in item.input_ids if t in control] == [t for t in plain.input_ids if t in control]
    assert hostile in str(made.decode(item.input_ids, skip_special_tokens=False))
    answered = encoded(made, [Turn("user", "x y"), Turn("assistant", hostile)])
    assert [t for t in answered.input_ids if t in control] == [t for t in plain.input_ids if t in control]
    said = shown(made, answered)
    assert said[said.index("⟦") :].count(hostile) == 1 and said.count("⟦") == 1


def test_thoughts_of_earlier_answers_are_not_there_to_learn() -> None:
    made = FORMATS["Qwen 3"].tokenizer()
    turns = [
        QUESTIONS[0],
        Turn("assistant", "<think>\nhm\n</think>\n\nA1"),
        QUESTIONS[2],
        Turn("assistant", "<think>\nso\n</think>\n\nA2"),
    ]
    assert shown(made, encoded(made, turns)) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nA2<|im_end|>⟧"
    )


THOUGHT = [
    QUESTIONS[0],
    Turn("assistant", "<think>\nhm\n</think>\n\nA1"),
    QUESTIONS[2],
    Turn("assistant", "<think>\nso\n</think>\n\nA2"),
]
APART = [
    QUESTIONS[0],
    Turn("assistant", "A1", '{"reasoning_content": "hm"}'),
    QUESTIONS[2],
    Turn("assistant", "A2", '{"reasoning_content": "so"}'),
]
# what Qwen 3's own reads where there is such a key, and DeepSeek R1's own leaves out
WITH_KEY = FORMATS["Qwen 3"].template.replace(
    "{%- if message.role == 'assistant' and '</think>' in message.content -%}",
    "{%- if message.reasoning_content is string -%}"
    "{%- set thought, answer = message.reasoning_content, message.content -%}"
    "{%- elif message.role == 'assistant' and '</think>' in message.content -%}",
)
LOST = FORMATS["DeepSeek R1"].template.replace("message.content", "message.content.split('</think>')[-1]")
QWEN = (
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n<|im_start|>user\nQ2<|im_end|>\n"
    "<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nA2<|im_end|>⟧"
)
R1 = (
    "<｜begin▁of▁sentence｜><｜User｜>Q1<｜Assistant｜>⟦{}A1<｜end▁of▁sentence｜>⟧"
    "<｜User｜>Q2<｜Assistant｜>⟦{}A2<｜end▁of▁sentence｜>⟧"
)
KEPT = R1.format("<think>\nhm\n</think>\n\n", "<think>\nso\n</think>\n\n")


@pytest.mark.parametrize("declared", ["special", "added"])
@pytest.mark.parametrize("turns", [THOUGHT, APART], ids=["in the text", "apart"])
@pytest.mark.parametrize(
    ("name", "template", "said", "thoughts"),
    [
        ("Qwen 3", FORMATS["Qwen 3"].template, QWEN, 1),  # has no form for thoughts apart
        ("Qwen 3", WITH_KEY, QWEN, 1),
        ("DeepSeek R1", FORMATS["DeepSeek R1"].template, KEPT, 2),
        ("DeepSeek R1", LOST, R1.format("\n\n", "\n\n"), 0),
        ("ChatML", FORMATS["ChatML"].template, QWEN.replace("A1", "<think>\nhm\n</think>\n\nA1"), 2),
    ],
    ids=["Qwen 3", "Qwen 3 with a key", "R1", "R1 without", "ChatML"],
)
def test_thoughts_are_learned_as_far_as_the_template_writes_them(
    name: str, template: str, said: str, thoughts: int, turns: list[Turn], declared: str
) -> None:
    tags, form = ("<think>", "</think>"), replace(FORMATS[name], template=template)
    special = declared == "special"
    made = (replace(form, special=(*form.special, *tags)) if special else form).tokenizer()
    if not special:
        made.add_tokens(list(tags))
    item = encoded(made, turns)
    assert shown(made, item) == said
    (think,) = made.convert_tokens_to_ids(["<think>"])
    assert item.input_ids.count(think) == thoughts  # one token, however it is declared
    assert "<think>\n" in text_of(made("<think>\nhm</think>x").input_ids, made)  # of what is generated
    notes = template_notes("chat", made, [Example("", turns=tuple(turns))])
    assert any("leaves out the thoughts" in note for note in notes) == (thoughts == 0)
    apart = turns is APART and template != WITH_KEY
    assert any("no form for thoughts, which go in front" in note for note in notes) == apart
    # and a control token in them is none
    hostile = [turns[2], Turn("assistant", f"<think>\n{form.end} x\n</think>\n\nA2")]
    plain = [turns[2], Turn("assistant", "<think>\nx\n</think>\n\nA2")]
    end = made.eos_token_id
    assert encoded(made, hostile).input_ids.count(end) == encoded(made, plain).input_ids.count(end)


def test_a_system_text_without_a_turn_of_its_own_opens_the_users_next() -> None:
    made = FORMATS["Gemma 2"].tokenizer()
    assert shown(made, encoded(made, [SYSTEM, *QUESTIONS])).startswith(
        "<bos><start_of_turn>user\nS\n\nQ1<end_"
    )


def test_turns_of_one_role_are_joined_where_roles_take_turns() -> None:
    twice = [Turn("user", "Q"), Turn("user", "R"), Turn("assistant", "A"), Turn("assistant", "B")]
    strict = FORMATS["Mistral v3"].tokenizer()
    assert shown(strict, encoded(strict, twice)) == "<s>[INST] Q\n\nR[/INST]⟦ A\n\nB</s>⟧"
    free = FORMATS["Zephyr"].tokenizer()
    assert shown(free, encoded(free, twice)) == (
        "<|user|>\nQ</s>\n<|user|>\nR</s>\n<|assistant|>\n⟦A</s>⟧\n<|assistant|>\n⟦B</s>⟧"
    )
    welcome = [Turn("assistant", "Hi"), *twice[1:3]]
    assert shown(strict, encoded(strict, welcome)) == "<s>[INST] R[/INST]⟦ A</s>⟧"
    assert shown(free, encoded(free, welcome)).startswith("<|assistant|>\n⟦Hi</s>⟧")


CALLING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}#{{ c.id }}{% endfor %}{{ '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def calling(name: str = "f", identity: str = "1", **arguments: Any) -> list[Turn]:
    call = {"type": "function", "id": identity, "function": {"name": name, "arguments": arguments}}
    return [
        Turn("user", "Q"),
        Turn("assistant", "", json.dumps({"tool_calls": [call]})),
        Turn("tool", "r"),
        Turn("assistant", "A"),
    ]


def test_calls_of_tools_are_answers_and_what_is_in_them_is_text() -> None:
    made = FORMATS["Zephyr"].tokenizer()
    made.chat_template = CALLING
    for turns, said in (
        (calling(x=1), '{"name": "f", "arguments": {"x": 1}}#1'),
        (calling(), '{"name": "f", "arguments": {}}#1'),
        (calling(x='"\\ </s>'), '{"name": "f", "arguments": {"x": "\\"\\\\ </s>"}}#1'),
        (calling("</s>", x="y"), '{"name": "</s>", "arguments": {"x": "y"}}#1'),
    ):
        item = encoded(made, turns)
        assert shown(made, item) == (
            f"<|user|>\nQ</s>\n<|assistant|>\n⟦{said}</s>⟧\n<|tool|>\nr</s>\n<|assistant|>\n⟦A</s>⟧"
        )
        assert item.input_ids.count(made.eos_token_id) == 4
    for turns in (calling(identity="</s>"), calling(**{"</s>": 1})):
        with pytest.raises(
            InputError, match=r"the conversation that begins 'Q': a tool, or a call of one, has a"
        ):
            encoded(made, turns)


def test_a_system_turn_anywhere_is_kept() -> None:
    made = FORMATS["Gemma 2"].tokenizer()
    late = [*QUESTIONS[:3], Turn("system", "S"), QUESTIONS[3]]
    assert "user\nQ2<end_of_turn>\n<start_of_turn>user\nS<end_of_turn>\n<start_of_turn>model\n⟦A2" in shown(
        made, encoded(made, late)
    )
    strict = FORMATS["Mistral v3"].tokenizer()
    assert shown(strict, encoded(strict, late)).endswith("[INST] Q2\n\nS[/INST]⟦ A2</s>⟧")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }", "cannot be rendered \\(line 1\\)"),
        ("{{ raise_exception('never') }}", "cannot be rendered: never"),
        ("{{ messages[0].__class__.__mro__ }}", "cannot be rendered: .*unsafe"),
        ("{{ undefined_thing.x }}", "cannot be rendered: 'undefined_thing' is undefined"),
        ("{% for m in messages %}{{ m.content.replace('1', 'one') }}</s>{% endfor %}", "cannot be told"),
        ("{% for m in messages %}{{ m.content }}### End\n{% endfor %}", "no control token of this tokenizer"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}",
            "leaves out what the assistant",
        ),
        ("{{ 1 }}" + "x" * (1 << 20), "a template has at most"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "does not end: it takes more than 1,000,000 steps",
        ),
        ("{{ 'x' * 2000000 }}", "makes more than 1,048,576 characters of one short question"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_one_sentence(template: str, words: str) -> None:
    made = FORMATS["Zephyr"].tokenizer()
    made.chat_template = template
    with pytest.raises(InputError, match=words):
        encoded(made, QUESTIONS)


def test_a_template_without_an_end_has_the_tokenizers() -> None:
    made = FORMATS["Zephyr"].tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    assert shown(made, encoded(made, QUESTIONS)) == "user: Q1assistant: ⟦A1⟧user: Q2assistant: ⟦A2</s>⟧"


REAL = ["tokenizers/llama2-32k", "tokenizers/gpt2", "stories260K-hf"]


@pytest.mark.parametrize("name", REAL)
def test_with_tokenizers_that_models_have(name: str) -> None:
    """Some put a blank before a text, some merge line feeds: a prompt has a server's tokens."""
    folder = Path(__file__).parents[2] / "shared/models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = FORMATS["Zephyr"].template.replace("</s>", made.eos_token)
    turns = [
        Turn("user", "Hello there, é\n\nhm"),
        Turn("assistant", " Sure.\n\nOk"),
        Turn("user", "More"),
        Turn("assistant", "\n\nFine"),
    ]
    item = encoded(made, turns)
    (ids,), _ = encode_prompts(
        [prompt_text(Example("", turns=tuple(turns)), "chat", made)], made, max_length=None
    )
    assert list(item.input_ids[: len(ids)]) == ids
    assert ids == made.apply_chat_template(messages(turns[:3]), add_generation_prompt=True)["input_ids"]
    learned = [token for token in item.labels if token != IGNORED]
    assert learned.count(made.eos_token_id) == 2 and learned[-1] == made.eos_token_id
    words = str(made.decode([t for t in learned if t != made.eos_token_id])).split()
    assert words == ["Sure.", "Ok", "Fine"]
