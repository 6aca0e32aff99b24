"""The bench on a billion weights, on a shape that a test can pay: its accounts agree."""

from __future__ import annotations

import pytest

from fedtune.bench import billion

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


@pytest.mark.slow
def test_a_row_has_the_plan_the_ledger_and_the_process() -> None:
    cases = ("FedBiOT", "all weights, 8-bit AdamW")
    rows, ratios = billion.measure(SMALL, cases)
    assert [row["case"] for row in rows] == list(cases)
    for row in rows:
        case = row["case"]
        for role in billion.ROLES:
            if row[f"ledger_{role}"]:
                assert ratios[f"{role}'s peak: {case}: ledger / plan"] == pytest.approx(1, abs=0.05), case
        assert row["rss"] > row["rss_beyond"] > 0
        assert row["rss"] == pytest.approx(row["private"] + row["mapped"], rel=0.1)  # read one after another
        assert row["simulation"] >= max(row[f"ledger_{role}"] for role in billion.ROLES)
        assert row["folder"] > 0 and row["training_s"] > 0
