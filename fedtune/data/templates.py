"""Prompt templates: how an example becomes the text that a model reads and the text that it has to write.

"alpaca" is the prompt published with Stanford Alpaca (tatsu-lab/stanford_alpaca, `train.py`), character for
character: it ends at "### Response:" without a line feed. "plain" suits small models with short contexts.
Training, evaluation and generation all come here for their texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.registry import FEDTUNE, Registry

Text = Callable[[Example], str]

AUTO, CHAT = "auto", "chat"  # the tokenizer's chat template: where it has one, and in any case
SUFFIX = ".jinja"


def _output(example: Example) -> str:
    return example.output


@dataclass(frozen=True)
class Template:
    """A template: an example's prompt, and its answer as it follows the prompt."""

    prompt: Text
    response: Text = _output


TEMPLATES: Registry[Template] = Registry("template", "data.template", "fedtune.templates")


def register_template(
    name: str, *, response: Text | None = None, summary: str | None = None
) -> Callable[[Text], Text]:
    """Makes `data.template: NAME` stand for a function from an example to its prompt.

    Args:
        name: What a configuration calls it.
        response: From an example to its answer's text as it follows the prompt, with the blank before it if
            there is one; None: the example's output.
        summary: One line for `fedtune ls templates`; None: the docstring's first.

    Raises:
        InputError: The name is taken.
    """
    if name in (AUTO, CHAT):
        raise InputError(f"the template name {name!r} is taken: it stands for the tokenizer's own")

    def decorate(prompt: Text) -> Text:
        TEMPLATES.register(name, prompt, Template(prompt, response or _output), summary)
        return prompt

    return decorate


def template_setting(name: str) -> str:
    """What `data.template` stands for: a name, or in place of a file what it holds.

    Args:
        name: `auto`, `chat`, a template's name, a file's that ends in .jinja, or a jinja program itself.

    Raises:
        InputError: The file cannot be read, or nothing has that name.
    """
    if name in (AUTO, CHAT) or is_program(name):
        return name
    if name.endswith(SUFFIX):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"data.template: {name} cannot be read: {why}") from None
        if not is_program(text):
            raise InputError(f"data.template: {name} is no jinja program: there is no {{{{ or {{% in it")
        return text
    try:
        TEMPLATES.part(name)
    except InputError as error:
        if name in TEMPLATES:
            raise
        raise InputError(
            f"{error} {AUTO}, {CHAT} and files that end in {SUFFIX} are templates too."
        ) from None
    return name


def listing() -> list[dict[str, str]]:
    """What `data.template` can be, each with `name`, `summary` and `origin`."""
    ways = {
        AUTO: "the tokenizer's chat template; alpaca where it has none, plain for the bundled model",
        CHAT: "the tokenizer's chat template",
    }
    own = [{"name": name, "summary": summary, "origin": FEDTUNE} for name, summary in ways.items()]
    return [*own, *TEMPLATES.listing()]


def is_program(name: str) -> bool:
    """Whether a template is given as a jinja program, and not by name."""
    return "{{" in name or "{%" in name


def prompt(example: Example, template: str) -> str:
    """Returns the text before the answer.

    Args:
        example: Its instruction and input are used; braces in them stay as they are.
        template: One of TEMPLATES.

    Raises:
        InputError: The template is unknown, or makes something else than text.
    """
    return _text(TEMPLATES[template].prompt(example), template)


def response(example: Example, template: str) -> str:
    """Returns the answer's text as it follows `prompt`.

    Raises:
        InputError: As `prompt`.
    """
    return _text(TEMPLATES[template].response(example), template)


def _text(made: object, template: str) -> str:
    if not isinstance(made, str):
        raise InputError(f"template {template} must make text of an example, got {type(made).__name__}")
    return made


_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def _alpaca(example: Example) -> str:
    text = _ALPACA_WITH_INPUT if example.input else _ALPACA_WITHOUT_INPUT
    return text.format(instruction=example.instruction, input=example.input)


def _plain(example: Example) -> str:
    about = f"{example.input}\n" if example.input else ""
    return f"{example.instruction}\n{about}Answer:"


TEMPLATES.built_in("alpaca", "the prompt published with Stanford Alpaca", lambda: Template(_alpaca))
TEMPLATES.built_in(
    "plain",
    "instruction, input and `Answer:`, for small models with short contexts",
    lambda: Template(_plain, lambda example: f" {example.output}"),
)

# What the two are for a server, which knows jinja programs alone: the same tokens for the same conversation.
_PROGRAM = """\
{{- bos_token if bos_token is defined and bos_token else '' -}}
{%- set state = namespace(system='', answered=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set state.system = state.system + message['content'] + '\\n\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '\\n\\n' if state.answered else '' -}}
    {{- BEFORE + state.system + message['content'] + BEHIND -}}
    {%- set state.system = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- LEAD + message['content'] + (eos_token if eos_token is defined and eos_token else '') -}}
    {%- set state.answered = true -%}
  {%- else -%}
    {{- raise_exception('this template has no turns of ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
"""


@cache
def programs() -> Mapping[str, str]:
    """By name the jinja program that does the same as a template, with a conversation in turns."""
    made = {}
    for name in ("alpaca", "plain"):
        asked = prompt(Example("\0"), name)
        lead = response(Example("", output="\0"), name).partition("\0")[0]
        before, _, behind = asked.partition("\0")
        parts = {"BEFORE": before, "BEHIND": behind, "LEAD": lead}
        text = _PROGRAM
        for word, part in parts.items():
            text = text.replace(word, json.dumps(part))
        made[name] = text
    return made
