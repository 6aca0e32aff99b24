"""`fedtune plan --client-memory` of several: the highest rank that fits each client, and its setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.errors import InputError
from fedtune.planning.by_memory import assigned, halves, said


def test_ranks_by_hand() -> None:
    assert halves(8) == [8, 4, 2, 1] and halves(6) == [6, 3, 1] and halves(1) == [1]
    peaks = {4: 100, 2: 60, 1: 40}
    assert assigned(peaks, [100, 99, 40, 39, 1000]) == [4, 2, 1, None, 4]


def settings(**method: Any) -> dict[str, Any]:
    return {
        "data": {"train": "bundled", "clients": 4, "max_examples": 40},
        "method": {"name": "fedavg", "batch_size": 2, "lora": {"rank": 64}, **method},
    }


def test_each_client_gets_what_fits_and_the_setting_is_what_gives_it() -> None:
    alone = fedtune.plan(settings())
    planned = fedtune.plan(settings(), client_memory=["1GB", "1kB"])["client_ranks"]
    peaks = {row["rank"]: row["client_peak_memory_bytes"] for row in planned["ranks"]}
    assert list(peaks) == [64, 32, 16, 8, 4, 2, 1]
    assert peaks[64] == alone["client_peak_memory_bytes"]["total"]
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True) and peaks[64] > peaks[1]
    assert [row["rank"] for row in planned["clients"]] == [64, None] and planned["setting"] is None
    assert any("no rank fits" in line for line in said(planned))
    memory = f"{peaks[16]}B"  # exactly what rank 16 takes
    planned = fedtune.plan(settings(), client_memory=["1GB", memory])["client_ranks"]
    assert planned["setting"] == "method.lora.client_ranks=[64, 16]"
    assert said(planned)[-1] == f"Set {planned['setting']}."
    both = fedtune.plan(settings(lora={"rank": 64, "client_ranks": [64, 16]}))
    assert both["client_peak_memory_bytes"]["total"] == peaks[64]


@pytest.mark.parametrize(
    ("method", "memory", "says"),
    [
        ({"trainable": "full", "lora": None}, ["1GB"], "fedavg as it is set trains none"),
        ({"aggregation": "refine"}, ["1GB"], r"with lora\.client_ranks take svd"),
        ({}, ["1"], "needs a unit"),
    ],
)
def test_what_has_no_ranks_to_give_is_refused(
    method: dict[str, Any], memory: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        fedtune.plan(settings(**method), client_memory=memory)
