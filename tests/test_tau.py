"""reproduce/tau.py: what is counted, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from reproduced import load

tau = load("tau")


def test_norms_are_of_all_tensors_together() -> None:
    assert tau.norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0], [12.0]])}) == 13.0


def test_relative_to_what_changes_and_to_the_whole_model() -> None:
    before = {"q": torch.tensor([3.0, 4.0]), "head": torch.tensor([12.0])}
    after = {"q": torch.tensor([3.0, 5.3]), "head": torch.tensor([12.0])}
    found = tau.relative(before, tau.moved(after, before))
    assert found["touched"] == pytest.approx(1.3 / 5.0) and found["model"] == pytest.approx(1.3 / 13.0)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(KeyError, match=r"not in both: \['b'\]"):
        tau.moved({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_factors_are_paired_whatever_their_names_are_wrapped_in() -> None:
    first = {
        "layers.0.q.lora_A.default.weight": torch.tensor([3.0, 4.0]),
        "layers.0.q.lora_B.default.weight": torch.zeros(2),
    }
    last = {
        "base_model.model.layers.0.q.lora_A.weight": torch.tensor([3.0, 4.0]),
        "base_model.model.layers.0.q.lora_B.weight": torch.tensor([1.0, 1.0]),
    }
    assert tau.factors(last, first) == pytest.approx(math.sqrt(2) / 5)


def test_steps_of_a_client_and_of_all_data() -> None:
    # 40 examples a client in batches of 8: 5 steps; 400 of all clients: 50; three rounds
    assert tau.steps(10, 400) == (15, 150)
    # the paper's: 30,000 examples in batches of 8, three epochs
    assert 3 * math.ceil(30_000 / 8) == 11_250
