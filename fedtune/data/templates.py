"""Prompt templates: how an example becomes the text that a model reads and the text that it has to write.

"alpaca" is the prompt published with Stanford Alpaca (tatsu-lab/stanford_alpaca, `train.py`), character for
character: it ends at "### Response:" without a line feed. "plain" suits small models with short contexts.
Training, evaluation and generation all come here for their texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.registry import Registry

Text = Callable[[Example], str]


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

    def decorate(prompt: Text) -> Text:
        TEMPLATES.register(name, prompt, Template(prompt, response or _output), summary)
        return prompt

    return decorate


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
