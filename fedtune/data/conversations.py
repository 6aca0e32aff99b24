"""Conversations in the forms in which tools write them, and which form records have.

A conversation is a list of turns that say who speaks and what: `{"role", "content"}`, or `{"from", "value"}`
as ShareGPT has it. The `datasets` library may give such a list as one object of lists. Trees of answers
(OpenAssistant) become conversations by a way from the root to a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedtune.data.examples import ASSISTANT, BAD, DOCUMENT, GOOD, SYSTEM, USER, Example, Turn
from fedtune.data.trees import Trees, is_node, is_tree, of_nodes, ways
from fedtune.data.turns import category_of, example_of, is_turns, kind_of, turns_of, unicode_text
from fedtune.errors import InputError

Format = Literal["auto", "instruction", "conversation", "text", "preference"]

_CONVERSATION_KEYS = ("messages", "conversations", "conversation")  # in this order, where there are several


@dataclass(frozen=True)
class Form:
    """How a source's records are read.

    Attributes:
        name: instruction, conversation, text or preference.
        why: What of the records says so; empty where a setting does.
        fields: Our field names to the records' keys, that follow from it.
        pairs: Of preferences: whether the rejected answers are read too.
        judged: Of preferences: whether answers that were judged alone are read too.
    """

    name: str
    why: str = ""
    fields: Mapping[str, str | None] = field(default_factory=dict)
    pairs: bool = False
    judged: bool = False

    @property
    def said(self) -> str:
        """One line for people; empty where there is nothing to say."""
        if self.judged:
            return (
                "data.format: preference: answers that were judged, or pairs of a chosen and a rejected one"
            )
        if self.pairs:
            return "data.format: preference: pairs of a chosen and a rejected answer"
        if self.name == "preference":
            return (
                "data.format: preference: method.objective is sft, so the chosen answers are trained on as "
                "any others (no loss on the rejected ones, which are not read)"
            )
        return f"data.format: {self.name}, because {self.why}" if self.why else ""


def form_of(
    format: Format,
    row: Mapping[str, Any],
    fields: Mapping[str, str | None],
    place: str,
    pairs: bool = False,
    judged: bool = False,
) -> Form:
    """How records are read, by the first of them.

    Args:
        format: As `data.format`.
        row: The first record.
        fields: As in `load_examples`; one for `instruction` or `output` makes records instructions.
        place: Of the record.
        pairs: Whether pairs of answers are trained on.
        judged: Whether answers that were judged alone are, too.

    Raises:
        InputError: They are pairs of answers of which one is preferred, and no setting says what of them is
            trained on.
    """
    if pairs:
        return Form("preference", pairs=True, judged=judged)
    if format != "auto":
        return Form(format)
    if "instruction" in fields or "output" in fields:
        return Form("instruction")
    if {"chosen", "rejected"} <= row.keys():
        raise InputError(
            f'{place}: "chosen" and "rejected" are answers to one prompt, and method.objective is sft. Set '
            "that to dpo to train on preferences, or data.format to preference to train on the chosen ones "
            "as on any others, or name what is the answer in data.fields (output: chosen)."
        )
    if {"instruction", "output"} <= row.keys() and not is_turns(row["instruction"]):
        return Form("instruction")
    if (key := conversation_key(row)) is not None:
        return Form("conversation", f'the records have turns under "{key}"')
    if is_tree(row):
        return Form("conversation", 'the records are trees of answers ("replies")')
    if is_node(row):
        return Form("conversation", 'the records are the messages of trees ("message_id" and "parent_id")')
    if {"prompt", "completion"} <= row.keys():
        if is_turns(row["prompt"]) or is_turns(row["completion"]):
            return Form("conversation", 'the records have turns under "prompt" and "completion"')
        keys = {"instruction": "prompt", "output": "completion"}
        return Form("instruction", 'the records have "prompt" and "completion"', keys)
    if isinstance(row.get("text"), str) and not {"instruction", "output", "label"} & row.keys():
        return Form("text", 'the records have "text" and neither instruction nor output')
    return Form("instruction")


def conversation_key(row: Mapping[str, Any]) -> str | None:
    """The key under which a record has turns; None where it has none, or several with names of their own."""
    for key in _CONVERSATION_KEYS:
        if is_turns(row.get(key)):
            return key
    found = [key for key, value in row.items() if is_turns(value) and key not in ("prompt", "completion")]
    return found[0] if len(found) == 1 else None


def conversations(
    rows: Iterable[tuple[str, Any]], form: Form, category: str | None, trees: Trees
) -> Iterator[Example]:
    """Examples from records that are conversations, preferences or plain texts.

    Args:
        rows: (place, record); the place stands in front of an error.
        form: As `form_of` gives it.
        category: The key that has the category; None: there is none.
        trees: Of trees: `all` ways from the root to a leaf, or the `best` one by rank.

    Raises:
        InputError: A record does not fit.
    """
    nodes = list[tuple[str, dict[str, Any]]]()
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: a record must be a JSON object, got {kind_of(row)}.")
        about = category_of(row, category, place)
        if form.name == "text":
            yield document(row, place, about)
        elif form.name == "preference":
            if form.judged and "label" in row and not {"chosen", "rejected"} & row.keys():
                yield _judged(row, place, about)
            else:
                yield _preferred(row, place, about, pairs=form.pairs)
        elif is_node(row):
            nodes.append((place, row))
        elif is_tree(row):
            yield from ways(row.get("prompt", row), place, about, trees)
        else:
            yield _conversation(row, place, about, form)
    if nodes:
        yield from of_nodes(nodes, category, trees)


def document(row: Mapping[str, Any], place: str, category: str = "") -> Example:
    """A plain text, from a record with `text`. Raises InputError if that is none."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(f'"{key}"' for key in row) or "none"
        raise InputError(
            f'{place}: data.format is text, so "text" must be a text that is not empty, got {kind_of(text)}; '
            f"the keys here are: {keys}."
        )
    return Example("", "", unicode_text(text, place, "text"), category, (Turn(DOCUMENT, text),))


def _conversation(row: dict[str, Any], place: str, category: str, form: Form) -> Example:
    key = conversation_key(row)
    if key is not None:
        turns = list(turns_of(row[key], place, key))
    elif {"prompt", "completion"} <= row.keys():
        turns = [*_part(row, "prompt", USER, place), *_part(row, "completion", ASSISTANT, place)]
    else:
        keys = ", ".join(f'"{key}"' for key in row) or "none"
        because = f", because {form.why}" if form.why else ""
        raise InputError(
            f"{place}: no conversation here, and data.format is conversation{because}; the keys are: {keys}. "
            'Give each record "messages", or put records of another form into a file of their own and set '
            "data.format."
        )
    return example_of(_with_system(row, turns, place), row.get("tools"), place, category)


def _judged(row: dict[str, Any], place: str, category: str) -> Example:
    """A conversation whose last answer was judged: "prompt", "completion" and "label"."""
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing:
        keys = ", ".join(f'"{key}"' for key in row)
        raise InputError(
            f'{place}: an answer that was judged has "prompt", "completion" and "label", and there is no key '
            f'"{missing[0]}"; the keys here are: {keys}.'
        )
    if not isinstance(row["label"], bool):
        raise InputError(
            f'{place}: "label" says whether the answer is a good one, true or false, got {row["label"]!r}.'
        )
    turns = [*_part(row, "prompt", USER, place), *_part(row, "completion", ASSISTANT, place)]
    if not turns or turns[-1].role != ASSISTANT:
        raise InputError(f'{place}: "completion" must be or end with an answer.')
    example = example_of(_with_system(row, turns, place), row.get("tools"), place, category)
    return replace(example, judged=GOOD if row["label"] else BAD)


def _preferred(row: dict[str, Any], place: str, category: str, *, pairs: bool) -> Example:
    """The conversation that ends in the chosen answer; with `pairs` the rejected one too."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        why = "method.objective takes pairs of answers" if pairs else "data.format is preference"
        keys = ", ".join(f'"{key}"' for key in row) or "none"
        raise InputError(
            f'{place}: {why}, and there is no key "{missing[0]}"; the keys here are: {keys}. A record has '
            '"prompt", "chosen" and "rejected".'
        )
    chosen = row["chosen"]
    answer = [chosen] if isinstance(chosen, dict) and not is_turns(chosen) else chosen
    said = (
        list(turns_of(answer, place, "chosen"))
        if is_turns(answer)
        else _part(row, "chosen", ASSISTANT, place)
    )
    before = list[Turn]()
    key = conversation_key({k: v for k, v in row.items() if k not in ("chosen", "rejected")})
    if key is not None:
        before = list(turns_of(row[key], place, key))
    elif "prompt" in row:
        before = _part(row, "prompt", USER, place)
    elif isinstance(row.get("instruction"), str):
        about = row.get("input")
        text = row["instruction"] + (f"\n\n{about}" if about else "")
        before = [Turn(USER, unicode_text(text, place, "instruction"))]
    whole = said if said[: len(before)] == before else [*before, *said]
    if all(turn.role == ASSISTANT for turn in whole):
        raise InputError(
            f'{place}: "chosen" is an answer, and there is no question to it: no "prompt", no "instruction" '
            'and no turns. Give it as turns, or the question as "prompt".'
        )
    example = example_of(_with_system(row, whole, place), row.get("tools"), place, category)
    if not pairs:
        return example
    if whole[-1].role != ASSISTANT:
        raise InputError(
            f'{place}: "chosen" must end with an answer, and ends with a turn of {whole[-1].role}.'
        )
    return replace(example, rejected=_rejected(row, place))


def _rejected(row: dict[str, Any], place: str) -> str:
    value = row["rejected"]
    turns = _part({"rejected": [value] if isinstance(value, dict) else value}, "rejected", ASSISTANT, place)
    if turns[-1].role != ASSISTANT or not turns[-1].content.strip():
        raise InputError(f'{place}: "rejected" must be or end with an answer that is not empty.')
    return turns[-1].content


def _part(row: dict[str, Any], key: str, role: str, place: str) -> list[Turn]:
    """A prompt or a completion, which is a text or turns."""
    value = row[key]
    if isinstance(value, str):
        return [Turn(role, unicode_text(value, place, key))]
    if is_turns(value):
        return list(turns_of(value, place, key))
    raise InputError(f'{place}: "{key}" must be text or a list of turns, got {kind_of(value)}.')


def _with_system(row: dict[str, Any], turns: list[Turn], place: str) -> list[Turn]:
    system = row.get("system", row.get("system_prompt"))
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise InputError(f'{place}: "system" must be text, got {kind_of(system)}.')
    if turns and turns[0].role == SYSTEM:
        if turns[0].content == system:
            return turns
        raise InputError(f'{place}: there is a key "system" and a system turn that says something else.')
    return [Turn(SYSTEM, unicode_text(system, place, "system")), *turns]
