"""`fedtune plan --client-memory` of several: the rank or the method that fits each client."""

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
        "method": {"name": "fedavg", "batch_size": 2, "lora": {"rank": 8}, **method},
    }


def test_each_client_gets_what_fits_and_the_setting_is_what_gives_it() -> None:
    alone = fedtune.plan(settings())
    document = fedtune.plan(settings(), client_memory=["1GB", "1kB"])
    planned = document["client_ranks"]
    peaks = {row["rank"]: row["client_peak_memory_bytes"] for row in planned["ranks"]}
    assert list(peaks) == [8, 4, 2, 1]
    assert peaks[8] == alone["client_peak_memory_bytes"]["total"]
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True) and peaks[8] > peaks[1]
    assert [row["rank"] for row in planned["clients"]] == [8, None] and planned["setting"] is None
    assert any("no rank fits" in line for line in said(document))
    memory = f"{peaks[2]}B"  # exactly what rank 2 takes
    document = fedtune.plan(settings(), client_memory=["1GB", memory])
    assert document["client_ranks"]["setting"] == "method.lora.client_ranks=[8, 2]"
    assert "client_methods" not in document
    assert said(document)[-1] == f"Set {document['client_ranks']['setting']}."
    both = fedtune.plan(settings(lora={"rank": 8, "client_ranks": [8, 2]}))
    assert both["client_peak_memory_bytes"]["total"] == peaks[8]


def test_where_no_rank_fits_another_method_may() -> None:
    """All weights with forward passes alone need less than any rank."""
    document = settings()
    document["method"]["lora"] = {"rank": 1}
    kseed = {**document, "method": {"name": "fedkseed", "batch_size": 2}}
    needs = fedtune.plan(kseed)["client_peak_memory_bytes"]["total"]
    planned = fedtune.plan(document, client_memory=["1GB", f"{needs}B"])
    assert planned["client_ranks"]["setting"] is None
    rows = {row["method"]: row for row in planned["client_methods"][1:]}
    assert rows["fedkseed"]["client_peak_memory_bytes"] == needs and rows["fedkseed"]["clients"] == 2
    assert planned["client_methods"][0]["clients"] == 1
    assert said(planned)[-1].startswith("fedkseed fits more of them: method.name=fedkseed")


def test_a_method_with_nothing_to_lower_fits_or_not() -> None:
    document = settings(trainable="full", lora=None)
    planned = fedtune.plan(document, client_memory=["1GB", "1kB"])
    assert "client_ranks" not in planned
    assert planned["client_methods"][0]["method"] == "fedavg" and planned["client_methods"][0]["clients"] == 1
    planned = fedtune.plan(document, client_memory=["1kB"])
    assert said(planned)[-1].startswith("None fits any: lower method.batch_size")


@pytest.mark.parametrize(
    ("method", "memory", "says"),
    [
        ({"aggregation": "refine"}, ["1GB"], r"with lora\.client_ranks take svd"),
        ({}, ["1"], "needs a unit"),
    ],
)
def test_what_cannot_be_given_is_refused(
    method: dict[str, Any], memory: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        fedtune.plan(settings(**method), client_memory=memory)
