"""Prompt templates: how an example becomes the text that a model reads and the text that it has to write.

"alpaca" is the prompt published with Stanford Alpaca (tatsu-lab/stanford_alpaca, `train.py`), character for
character: it ends at "### Response:" without a line feed. "plain" suits small models with short contexts.
"""

from __future__ import annotations

from fedtune.data.examples import Example
from fedtune.errors import InputError, nearest

TEMPLATES = ("alpaca", "plain")

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


def prompt(example: Example, template: str) -> str:
    """Returns the text before the answer.

    Args:
        example: Its instruction and input are used; braces in them stay as they are.
        template: One of TEMPLATES.

    Raises:
        InputError: The template is unknown.
    """
    if _checked(template) == "alpaca":
        text = _ALPACA_WITH_INPUT if example.input else _ALPACA_WITHOUT_INPUT
        return text.format(instruction=example.instruction, input=example.input)
    about = f"{example.input}\n" if example.input else ""
    return f"{example.instruction}\n{about}Answer:"


def response(example: Example, template: str) -> str:
    """Returns the answer's text as it follows `prompt`.

    Raises:
        InputError: The template is unknown.
    """
    return example.output if _checked(template) == "alpaca" else " " + example.output


def _checked(template: str) -> str:
    if template not in TEMPLATES:
        raise InputError(
            f'unknown template "{template}"; the templates are {", ".join(TEMPLATES)}.'
            f"{nearest(template, TEMPLATES)}"
        )
    return template
