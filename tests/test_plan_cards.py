"""Which settings the page of cards names for which card, on plans made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from reproduced import load

plan_cards = load("plan_cards")
SMALLER, LESS = {"method.batch_size": 1}, {"model.quantization": "nf4"}
Sizes = Mapping[tuple[str, ...], tuple[int, int, int]]  # of settings taken: GB of client, server, evaluation


def rows(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    def need(shape: str, own: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Any:
        taken = tuple(sorted(name for change in changes for name in change))
        client, server, evaluation = (size * 10**9 for size in sizes[taken])
        card = {"client": client, "server": server, "evaluation": evaluation}
        return plan_cards.Need(card, 5 * 10**9)

    monkeypatch.setattr(plan_cards, "need", need)
    monkeypatch.setattr(plan_cards, "METHODS", {"toy": ({}, (SMALLER, LESS))})
    found: list[list[str]] = plan_cards.rows_of("7B", "toy")
    return found


BATCH, NF4 = "method.batch_size", "model.quantization"


def test_each_card_has_the_first_settings_that_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {(): (70, 1, 30), (BATCH,): (50, 1, 30), (NF4,): (40, 1, 20), (BATCH, NF4): (22, 1, 20)}
    assert rows(sizes, monkeypatch) == [
        ["7B", "toy", "none", "70.00 GB", "5.00 GB", "client", "80 GB"],
        # with both 22 GB fit; the first of them is not needed for 48 GB
        ["7B", "toy", "`model.quantization: nf4`", "40.00 GB", "5.00 GB", "client", "48 GB"],
        ["7B", "toy", "`batch_size: 1`, `model.quantization: nf4`", "22.00 GB", "5.00 GB", "client", "24 GB"],
    ]


def test_a_client_may_fit_where_scoring_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {(): (30, 1, 60), (BATCH,): (20, 1, 60), (NF4,): (28, 1, 55), (BATCH, NF4): (18, 1, 55)}
    assert rows(sizes, monkeypatch) == [
        ["7B", "toy", "none", "60.00 GB", "5.00 GB", "evaluation", "80 GB"],
        ["7B", "toy", "none", "30.00 GB", "elsewhere", "client alone", "48 GB"],
        ["7B", "toy", "`batch_size: 1`", "20.00 GB", "elsewhere", "client alone", "24 GB"],
    ]


def test_what_fits_no_card_says_what_it_needs_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {(): (200, 90, 95), (BATCH,): (120, 90, 95), (NF4,): (190, 90, 95), (BATCH, NF4): (85, 110, 95)}
    assert rows(sizes, monkeypatch) == [
        ["7B", "toy", "does not fit", "at least 110.00 GB", "", "server", "24 GB, 48 GB, 80 GB"]
    ]
