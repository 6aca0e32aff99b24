"""Records to examples: which of a record's keys is which field, and what a value may be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from fedtune.data.choices import Choices, NoChoice, choices_of, joined, letter_of
from fedtune.data.conversations import Form, conversations, form_of
from fedtune.data.examples import Example
from fedtune.data.keys import likely, names_in, parts_of, reads, template_of, text_of
from fedtune.data.reading import MOST, NONE_THERE, Reading
from fedtune.data.trees import is_node
from fedtune.data.turns import is_turns, kind_of
from fedtune.errors import InputError, nearest

FIELDS = ("instruction", "input", "output", "category")
CHOICES = "choices"  # a list that is joined into the question
LETTERS = "multiple choice: choices stand below their question, and its answer is a letter"
_NAMES = (*FIELDS, CHOICES)
_OPTIONAL = ("input", "category", CHOICES)
_LABELS = ("output", "category")  # true and false are no words to ask something with
_NO_TURNS = (
    "A conversation is read whole, since who speaks at a position differs from row to row: leave instruction "
    "and output out of data.fields, or set data.format to conversation."
)
Row = tuple[str, Any]  # its place, and the record; or the InputError that says why it cannot be read


def check_fields(fields: Mapping[str, str | None], setting: str = "data.fields") -> None:
    """Raises InputError for a field that is none, a null that may not be, or an empty key.

    Args:
        fields: As in `load_examples`.
        setting: What an error calls them.
    """
    for ours, theirs in fields.items():
        if ours not in _NAMES:
            raise InputError(
                f'{setting}: unknown field "{ours}"; the fields are {", ".join(_NAMES)}.'
                f"{nearest(ours, _NAMES)}"
            )
        if theirs is None and ours not in _OPTIONAL:
            raise InputError(f"{setting}: {no_null(ours)}.")
        if theirs == "":
            none = ", or null for none" if ours in _OPTIONAL else ""
            raise InputError(f"{setting}.{ours} is empty; give the key that holds it, or leave it out{none}.")


def check_doubles(fields: Mapping[str, str | None], setting: str) -> None:
    """Raises InputError where one key would be two fields. Arguments are those of `check_fields`."""
    for ours in FIELDS:
        takers = [
            name for name, key in fields.items() if key and _whole(key, ours) and ours != name != "category"
        ]
        if ours not in _OPTIONAL and ours not in fields and takers:
            raise InputError(
                f'{setting}.{takers[0]} takes the key "{ours}", which would be the {ours} too; set '
                f"{setting}.{ours} to the key that holds the {ours}."
            )


def no_null(field: str) -> str:
    """What is wrong with a field that must be there and was mapped to null."""
    return (
        f"{field} is null, but every example needs one; name the key that holds it, or leave it out if that "
        f'is "{field}". Only {", ".join(_OPTIONAL[:-1])} and {_OPTIONAL[-1]} can be null, for none'
    )


def examples_from(
    rows: Iterator[Row],
    fields: Mapping[str, str | None],
    name: str,
    setting: str = "data.fields",
    reading: Reading | None = None,
) -> list[Example]:
    """Examples from records, each with its place.

    Args:
        rows: (place, record); the place stands in front of an error. In place of a record that cannot be read
            stands the InputError that says so.
        fields: Our field names to the records' keys, as in `load_examples`.
        name: Of all of them together.
        setting: What an error calls `fields`.
        reading: Whether they are instructions, conversations or plain texts, of which the first one decides
            where that does not say so, and whether records that do not fit are skipped. Is told of both.
            None: instructions, and none is skipped or missing.

    Raises:
        InputError: There is none, or one does not fit and is not to be skipped.
    """
    check_fields(fields, setting)
    account = Reading("instruction") if reading is None else reading
    begun = list[Row]()
    for row in rows:
        begun.append(row)
        if isinstance(row[1], dict):
            break
    place, first = begun[-1] if begun else ("", None)
    top = first if isinstance(first, dict) else {}
    form = form_of(account.format, top, fields, place, account.pairs, account.judged)
    fields = {**form.fields, **fields}
    if begun and form.said and form.said not in account.said:
        account.said.append(form.said)
    bad = _Bad(name, account.skip)
    if form.name == "instruction":
        check_doubles(fields, setting)
        made = _instructions(chain(begun, rows), fields, setting, bad, account)
    else:
        category = fields.get("category", "category")
        made = _others(chain(begun, rows), form, category, bad, account)
    examples = list(made)
    if bad.rows and not examples:
        shown = "; ".join(f"{place}: {why}" for place, why in bad.rows[:3])
        raise InputError(f"{name}: each of its {len(bad.rows):,} rows is bad, so none is left. {shown}")
    account.skipped += bad.rows
    if account.choices and LETTERS not in account.said:
        account.said.append(LETTERS)
    if reading is None and not examples:
        raise InputError(f"{name}: {NONE_THERE}")
    return examples


class _Bad:
    """Rows of a source that do not fit.

    Args:
        name: Of the source.
        skip: Whether they are skipped.
    """

    def __init__(self, name: str, skip: bool) -> None:
        self._name, self._skip, self.rows = name, skip, list[tuple[str, str]]()

    def add(self, place: str, error: InputError) -> None:
        """One more. Raises its error if bad rows are none to skip, and another if there are too many."""
        if not self._skip:
            raise error
        self.rows.append((place, str(error).removeprefix(place).lstrip(": ")))
        if len(self.rows) > MOST:
            raise InputError(f"{self._name}: more than {MOST:,} of its rows are bad; {self.rows[-1][1]}")


def _instructions(
    rows: Iterable[Row], fields: Mapping[str, str | None], setting: str, bad: _Bad, account: Reading
) -> Iterator[Example]:
    keys = [(field, _plain_key(field, fields)) for field in FIELDS]
    categories = dict[str, str]()
    for place, row in rows:
        try:
            found = _choices(row, fields, place, setting)
            instruction, about, output, category = _texts_of(row, keys, fields, place, setting, found)
        except InputError as error:
            bad.add(place, error)
            continue
        account.choices |= found is not None
        category = categories.setdefault(category, category)  # one text for all that have it
        yield Example(instruction, about, output, category, choices=len(found.texts) if found else 0)


def _others(
    rows: Iterable[Row], form: Form, category: str | None, bad: _Bad, account: Reading
) -> Iterator[Example]:
    """Conversations and plain texts; messages of trees wait for each other, all others come one by one."""
    nodes = list[Row]()
    for place, row in rows:
        made = list[Example]()
        try:
            if isinstance(row, InputError):
                raise row
            if isinstance(row, dict) and form.name == "conversation" and is_node(row):
                nodes.append((place, row))
            else:
                made = list(conversations([(place, row)], form, category, account.trees))
        except InputError as error:
            bad.add(place, error)
        yield from made
    yield from conversations(nodes, form, category, account.trees)


def _texts_of(
    row: Any,
    keys: Sequence[tuple[str, str | None]],
    fields: Mapping[str, str | None],
    place: str,
    setting: str,
    found: Choices | None,
) -> list[str]:
    """The text of each field."""
    values = []
    for field, key in keys:
        value = row.get(key) if key else None
        if field == "output" and found is not None:
            value = _letter(row, fields.get(field, field) or field, found, place, setting)
        elif type(value) is not str or not _is_unicode(value):
            value = _field(row, field, fields, place, setting)
        values.append(value)
    if found is not None:
        try:
            asked = 1 if values[1] else 0  # below the input where there is one, else below the instruction
            values[asked] += f"\n{joined(found.texts)}"
        except NoChoice as error:
            raise InputError(f"{place}: {error}.") from None
    return values


def _choices(row: Any, fields: Mapping[str, str | None], place: str, setting: str) -> Choices | None:
    """The answers that a row lets choose from, if it does. Raises InputError if it is no row."""
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"{place}: a record must be a JSON object, got {kind_of(row)}.")
    key = fields.get(CHOICES, CHOICES)
    if key is None or (CHOICES not in fields and (CHOICES not in row or _claimed(row, CHOICES, fields))):
        return None
    there, value = _lookup(row, key)[:2]
    found = choices_of(value)
    if found is None and CHOICES in fields:
        if not there:
            raise InputError(_missing(row, key, CHOICES, place) + f" Set {setting}.{CHOICES} to it.")
        raise InputError(f'{place}: "{key}" for {CHOICES} must be a list of texts, got {kind_of(value)}.')
    return found


def _letter(row: dict[str, Any], key: str, found: Choices, place: str, setting: str) -> str:
    there, answer, _ = _lookup(row, key)
    if not there:
        raise InputError(_missing(row, key, "output", place) + f" Set {setting}.output to the right one.")
    try:
        return letter_of(answer, found)
    except NoChoice as error:
        raise InputError(
            f'{place}: "{key}" {error}. If "{CHOICES}" is nothing to choose from, set {setting}.{CHOICES} to '
            "null."
        ) from None


def _plain_key(field: str, fields: Mapping[str, str | None]) -> str | None:
    """The key under which a text is the field's, whatever else a record has; None: it has to be looked at."""
    inside = any(key and _inside(key, field) for key in fields.values())
    return None if field in _OPTIONAL and field not in fields and inside else fields.get(field, field)


def _inside(key: str, name: str) -> bool:
    """Whether a key leads to what stands under `name` or into it; of a damaged template nobody knows."""
    try:
        return reads(key, name)
    except InputError:
        return True


def _whole(key: str, name: str) -> bool:
    """Whether a key is `name`, or a template has it."""
    try:
        return name in names_in(key)
    except InputError:
        return False


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in a text: UTF-8 has no form for one."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _field(
    row: dict[str, Any], field: str, fields: Mapping[str, str | None], place: str, setting: str
) -> str:
    key = fields.get(field, field)
    optional = field in _OPTIONAL
    if key is None or (optional and field not in fields and _claimed(row, field, fields)):
        return ""
    if key not in row and ("{" in key or "}" in key):
        return _filled(row, key, field, place, setting)
    found, value, turns = _lookup(row, key)
    if turns:
        what = "holds" if turns == key else f'leads into "{turns}", which holds'
        raise InputError(f'{place}: "{key}" for {field} {what} a conversation. {_NO_TURNS}')
    if not found:
        if optional and field not in fields:
            return ""
        missing = _missing(row, key, field, place)
        talks = [k for k, held in row.items() if is_turns(held)]
        if talks and not optional:
            raise InputError(f'{missing} "{talks[0]}" holds a conversation. {_NO_TURNS}')
        raise InputError(f"{missing} Set {setting}.{field} to the right one.")
    if value is None and optional:
        return ""  # Arrow writes null for a key that only other rows have
    return _text(value, key, field, place, labels=field in _LABELS)


def _missing(row: dict[str, Any], key: str, field: str, place: str) -> str:
    keys = ", ".join(f'"{k}"' for k in row) or "none"
    return f'{place}: no key "{key}" for {field}; the keys here are: {keys}.{likely(key, field, row)}'


def _text(value: Any, key: str, field: str, place: str, *, labels: bool) -> str:
    """A value as text, if it is one, a number, a time, or (as a label) true or false."""
    text = text_of(value) if labels or not isinstance(value, bool) else None
    if text is None:
        hint = f' Name one of its values, such as "{key}.0".' if isinstance(value, list) else ""
        raise InputError(
            f'{place}: "{key}" for {field} must be text or a number, got {kind_of(value)}.{hint}'
        )
    if not _is_unicode(text):
        raise InputError(f'{place}: "{key}" holds half of a surrogate pair, which is not Unicode text.')
    return text


def _filled(row: dict[str, Any], key: str, field: str, place: str, setting: str) -> str:
    """A template with the texts of a row in place of its keys; a null is no text, but not all may be."""
    try:
        pieces = template_of(key)
    except InputError as error:
        raise InputError(f"{setting}.{field}: {error}.") from None
    texts, known = list[str](), False
    for text, name in pieces:
        if name:
            found, value, turns = _lookup(row, name)
            if not found or turns:
                why = f' "{turns}" holds a conversation.' if turns else ""
                raise InputError(
                    f"{_missing(row, name, field, place)}{why} It stands in the template {setting}.{field}."
                )
            known |= value is not None
            text = "" if value is None else _text(value, name, field, place, labels=True)
        texts.append(text)
    if not known and field not in _OPTIONAL:
        raise InputError(f'{place}: every key of "{key}" for {field} is null; there is no text.')
    return "".join(texts) if known else ""


def _claimed(row: dict[str, Any], name: str, fields: Mapping[str, str | None]) -> bool:
    """Whether another field was given the key `name` of this row, or something inside it."""
    return any(_of_row(key, name, row) for key in fields.values() if key)


def _of_row(key: str, name: str, row: dict[str, Any]) -> bool:
    try:
        return reads(key, name, row)
    except InputError:
        return False


def _lookup(row: dict[str, Any], key: str) -> tuple[bool, Any, str]:
    """Finds a key, or a dotted path of keys and list positions.

    Returns:
        (found, value, turns): the last is the part of the path at which a conversation starts, and then there
        is no value; "" where there is none.
    """
    if key in row:
        return True, row[key], key if is_turns(row[key]) else ""
    value: Any = row
    parts = parts_of(key)
    for number, part in enumerate(parts, start=1):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None, ""
        if is_turns(value):
            return True, None, ".".join(parts[:number])
    return True, value, ""
