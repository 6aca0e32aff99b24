"""What has loss in the chat formats of public models: a conversation encoded, and decoded again.

The formats are those of tests/chat_formats.py, each with a tokenizer of bytes that has its special tokens.

Table:   chat-formats, two questions and answers in each format; docs/chat.md, block chat-formats
Command: python reproduce/chat_table.py chat-formats
Time:    seconds
Needs:   nothing
Result:  in 23 formats the answers with their end tokens have loss, and nothing else has
"""

from __future__ import annotations

import sys

from common import ROOT, Entry, main, table

from fedtune.data.encode import encode_causal
from fedtune.data.encoded import IGNORED
from fedtune.data.examples import Example, Turn
from fedtune.data.prompts import prompts

sys.path.insert(0, str(ROOT / "tests"))

TURNS = (
    Turn("system", "S"),
    Turn("user", "Q1"),
    Turn("assistant", "A1"),
    Turn("user", "Q2"),
    Turn("assistant", "A2"),
)


def chat_formats() -> str:
    """A row for each format."""
    from chat_formats import FORMATS  # type: ignore[import-not-found]

    rows = []
    for name, form in FORMATS.items():
        made, example = form.tokenizer(), Example("Q2", "", "A2", "", TURNS)
        traits = prompts("chat", made).traits
        item = encode_causal([example], made, template="chat", loss_on="response", max_length=4096).items[0]
        text, before = "", False
        for token, label in zip(item.input_ids, item.labels, strict=True):
            loss = label != IGNORED
            text += ("⟦" if loss and not before else "⟧" if before and not loss else "") + made.decode(
                [token]
            )
            before = loss
        shown = (text + "⟧").replace("\n", "⏎").replace("|", "\\|")
        system = "yes" if traits.system else "before the next question"
        rows.append([name, system, "yes" if traits.repeats else "joined", f"`{shown}`"])
    header = ["format", "a system's turn", "two turns of one role", "S, Q1, A1, Q2, A2"]
    return f"{len(rows)} formats:\n\n{table(header, rows, numbers=False)}"


ENTRIES = {"chat-formats": Entry(chat_formats)}


if __name__ == "__main__":
    main(__doc__, ENTRIES)
