"""The bench of clients' steps: every case runs, and the memory that it finds at a small scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from fedtune.bench import client_steps
from fedtune.bench.client_steps import (
    BARE,
    CASES,
    TINY,
    Shape,
    backward_seconds,
    measure_case,
    write_order,
)
from fedtune.models.tuning import count_parameters

NARROW = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 22,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def peak(shape: str, case: str, folder: Path) -> int:
    if case.startswith("FedCyBGD"):
        for each in {TINY, shape}:
            assert write_order(each, case, folder)["written"] > 0
    return int(measure_case(shape, case, folder)["peak_bytes"])


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_measured(case: str, tmp_path: Path) -> None:
    weights = 4 * count_parameters(client_steps.SHAPES[TINY].model()).total
    found = peak(TINY, case, tmp_path)
    dropped = any(less in case for less in ("layer-drop", "hybrid", "offloaded"))
    # with a gradient and two moments for each weight, four times the weights
    assert found > (4 if case.startswith("Fed-full") else 0.5 if dropped else 1) * weights


def test_a_block_of_22_beside_all_and_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(client_steps.SHAPES, "narrow", Shape(LlamaForCausalLM, NARROW))
    monkeypatch.setattr(client_steps, "TOKENS", 64)
    # the paper's own comparison, of unlike settings: a block with checkpointing, all weights without
    full, lora = (peak("narrow", f"{name}{BARE}", tmp_path) for name in ("Fed-full", "FedLoRA"))
    same = peak("narrow", "Fed-full", tmp_path)  # and the like one
    for place in client_steps.BLOCKS:
        found = peak("narrow", f"FedCyBGD, {place}", tmp_path)
        assert found <= 0.3 * full and found < lora
        assert found <= 0.4 * same
        for compression in ("layer-drop", "hybrid"):
            assert peak("narrow", f"FedCyBGD, {compression}, {place}", tmp_path) < found
        assert peak("narrow", f"BAdam, {place}", tmp_path) <= 0.3 * full


def test_backward_time_has_a_row_for_each_way(tmp_path: Path) -> None:
    seconds = backward_seconds(TINY, "", tmp_path)["backward_seconds"]
    assert list(seconds) == [
        "Fed-full",
        "Fed-full, no checkpointing",
        "FedCyBGD",
        "FedCyBGD, no checkpointing",
    ]
    assert min(seconds.values()) > 0
