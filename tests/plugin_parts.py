"""What the tests of parts of one's own share."""

from __future__ import annotations

from typing import Any

from command import Result

from fedtune.config.file import parse_config

DOCUMENT: dict[str, Any] = {
    "data": {"clients": 3, "max_examples": 24, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}


METRIC = '''
from fedtune.evaluation.tasks import register_metric

@register_metric("length")
def length(answer, reference):
    """Letters of the answer."""
    return len(answer)
'''

TEMPLATE = '''
from fedtune import registry
from fedtune.data.templates import register_template

@register_template("like-plain", response=lambda example: " " + example.output)
def like_plain(example):
    """As plain."""
    about = f"{example.input}\\n" if example.input else ""
    return f"{example.instruction}\\n{about}Answer:"

@register_template("loud", response=lambda example: " " + example.output)
def loud(example):
    """In capitals."""
    return f"{example.instruction.upper()}\\nANSWER:"
'''


def config(**data: Any) -> Any:
    return parse_config({**DOCUMENT, "data": {**DOCUMENT["data"], **data}}, "c.yaml")


def refused(result: Result, *parts: str) -> None:
    assert result.status == 2, result.err
    assert result.out == "" and "Traceback" not in result.err
    for part in parts:
        assert part in result.err
