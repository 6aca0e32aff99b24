"""Plans of LoRA's forms, (IA)³ and prefixes beside what small runs measure."""

from __future__ import annotations

from typing import Any

import pytest
from reproduced import load

plan_measured = load("plan_measured")
TWO = {"name": "fedavg", "rounds": 2, "batch_size": 4}
FORMS: dict[str, dict[str, Any]] = {
    "dora, all layers": {"lora": {"rank": 8, "use_dora": True, "targets": "all-linear"}},
    "pissa": {"lora": {"rank": 8, "init": "pissa", "use_rslora": True}},
    "a whole module": {"lora": {"rank": 8, "modules_to_save": ["norm"]}},
    "ia3": {"trainable": "ia3"},
    "prefix": {"trainable": "prefix"},
    "hetlora": {"aggregation": "sparsity", "lora": {"rank": 8, "client_ranks": [2, 8]}, "prune": {}},
    "own part": {"lora": {"rank": 8}, "own": ["lora_B"]},
    "ditto": {"lora": {"rank": 8}, "ditto": 0.1},
    "ditto, all weights": {"trainable": "full", "ditto": 0.1},
    "fine-tuned": {"lora": {"rank": 8}, "fine_tune": {"local_epochs": 1}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_is_what_a_run_measures(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan_measured.FORMS, form, {**TWO, **FORMS[form]})
    row = plan_measured.compare("bundled", form)
    assert (row["planned_down"], row["planned_up"]) == (row["down"], row["up"])
    assert row["planned_trainable"] == row["trainable"]
    assert row["planned_memory"] == pytest.approx(row["memory"], rel=0.02)
    assert row["planned_server_memory"] == pytest.approx(row["server_memory"], rel=0.02)
    assert row["planned_evaluation_memory"] == pytest.approx(row["evaluation_memory"], rel=0.03)
    assert row["planned_flops"] == pytest.approx(row["flops"], rel=0.05) and row["flops"] > 0
