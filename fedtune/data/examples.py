"""The one record that every data source is turned into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction and its answer.

    Attributes:
        instruction: What is asked. For classification the first text.
        input: What the instruction is about; empty when there is none. For classification the second text.
        output: The answer. For classification the label's name.
        category: What partitions and hold-outs group by (category, language, task); empty when there is none.
    """

    instruction: str
    input: str = ""
    output: str = ""
    category: str = ""
