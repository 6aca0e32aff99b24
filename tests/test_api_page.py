"""docs/api.md: made from signatures and docstrings, current, and complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from reproduced import load

import fedtune

api_page = load("api_page")
PROJECT = Path(__file__).resolve().parents[1]


def test_the_page_is_current_and_has_every_name() -> None:
    page = api_page.page()
    assert (PROJECT / "docs/api.md").read_text(encoding="utf-8") == page, "run reproduce/api_page.py api"
    for name in fedtune.__all__:
        assert (f"### `fedtune.{name}`\n" in page) == (name != "__version__")
    for name in ("Run.rounds", "Run.generate", "Comparison.to_pandas", "Callback.on_round", "Rows.to_pandas"):
        assert f"#### `{name}`\n" in page


def described(values: Sequence[int], *more: str, name: str = "x", **rest: Any) -> dict[str, int]:
    """Does something.

    In two paragraphs.

    Args:
        values: The first, over
            two lines: with a colon.
        more: Others.
        name: Its name.
        rest: What is left.

    Returns:
        A dictionary,
        by name.

    Raises:
        InputError: Never.
    """
    return {}


def test_a_docstring_is_read_by_its_sections() -> None:
    read = api_page.doc("described", described)
    assert read.text == "Does something.\n\nIn two paragraphs."
    assert read.sections == {
        "Args": {
            "values": "The first, over two lines: with a colon.",
            "more": "Others.",
            "name": "Its name.",
            "rest": "What is left.",
        },
        "Returns": {"": "A dictionary, by name."},
        "Raises": {"InputError": "Never."},
    }


def test_a_signature_is_as_in_the_source() -> None:
    assert api_page.signature("f", described) == (
        "f(values: Sequence[int], *more: str, name: str = 'x', **rest: Any) -> dict[str, int]"
    )

    def long(
        one: dict[str, dict[str, int]], *, call: Callable[[], None] = print, other: int | None = 3
    ) -> None:
        """Long."""

    assert api_page.signature("long", long) == (
        "long(\n    one: dict[str, dict[str, int]],\n    *,\n    call: Callable[[], None] = ...,\n"
        "    other: int | None = 3,\n) -> None"
    )


def test_what_is_not_described_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(path: str) -> None: ...

    def partly(path: str, other: int) -> None:
        """Described.

        Args:
            path: This one.
        """

    for function, words in ((bare, "load has no docstring"), (partly, "Args and arguments differ in other")):
        monkeypatch.setattr(fedtune, "load", function)
        with pytest.raises(ValueError, match=rf"fedtune\.{'load: ' if 'Args' in words else ''}{words}"):
            api_page.page()
    monkeypatch.undo()
    monkeypatch.setattr(fedtune, "__all__", [*fedtune.__all__, "new"])
    with pytest.raises(ValueError, match="differ in new"):
        api_page.page()
