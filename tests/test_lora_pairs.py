"""DoRA, PiSSA, biases, IA3, prefixes under masks, robust means, server optimizers, FedProx and SCAFFOLD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fedkseed_bench import replies
from model_families import build
from protected import federation
from secure_rounds import SECURE, bits_of
from torch import Tensor
from torch.testing import assert_close

from fedtune.data.encoded import Encoded
from fedtune.methods.fedavg.method import CONTROL, FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.protection.robust import Robust

SIZES = {0: 2, 1: 3, 2: 1, 3: 4}
FORMS: dict[str, dict[str, Any]] = {
    "dora": {"lora": {"rank": 2, "use_dora": True, "use_rslora": True}},
    "pissa": {"lora": {"rank": 2, "init": "pissa"}},
    "biases": {"lora": {"rank": 2, "bias": "lora_only", "modules_to_save": ["ln_f"]}},
    "ia3": {"trainable": "ia3"},
    "prefix": {"trainable": "prefix", "prefix": {"tokens": 2}},
}
SGD = {"optimizer": "sgd"}
BESIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "proximal, adam at the server": {"proximal": 0.5, "server_optimizer": {"name": "adam", "lr": 0.01}},
    "scaffold": {**SGD, "control_variates": True},
}


def texts() -> dict[int, list[Encoded]]:
    """Each client's, of lengths of its own."""
    rows = {
        c: [tuple(3 + (7 * c + 5 * k + j) % 60 for j in range(4 + k)) for k in range(n)]
        for c, n in SIZES.items()
    }
    return {c: [Encoded(ids, ids) for ids in each] for c, each in rows.items()}


def run(form: str, beside: str = "plain", *, rounds: int = 2, **around: Any) -> Any:
    settings = {"rounds": rounds, "local_epochs": 1, "batch_size": 2, "lr": 0.05}
    method = FedAvg(Config(**{**settings, **FORMS[form], **BESIDE[beside]}), seed=0)
    bench, _ = federation(
        around.pop("secure", None), method=method, data=texts(), model=build("gpt2"), **around
    )
    return bench


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beside", [name for name in BESIDE if name != "plain"])
def test_masks_change_no_bit_and_something_is_learnt(form: str, beside: str) -> None:
    plain, masked = run(form, beside), run(form, beside, secure=SECURE)
    start = {name: tensor.clone() for name, tensor in bits_of(plain).items()}
    for round in (1, 2):
        plain.round(round)
        masked.round(round)
    mine, theirs = bits_of(plain), bits_of(masked)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    weights = [name for name in start if name.startswith("weights/")]
    assert weights and not any(torch.equal(start[name], mine[name]) for name in weights)


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_is_that_of_the_replies_and_the_median_too(form: str) -> None:
    for robust in (None, Robust(mean="median")):
        bench = run(form, rounds=1, robust=robust)
        before = {name: w.double() for name, w in bench.state.weights.items()}
        kept = replies(bench)
        bench.round(1)
        total = sum(reply.examples for reply in kept)
        assert total == (10 if robust is None else total)
        for name, weight in bench.state.weights.items():
            updates = [reply.payload.tensors[name].double() for reply in kept]
            if robust is None:
                expected: Tensor = sum(u * r.examples / 10 for u, r in zip(updates, kept, strict=True))  # type: ignore[assignment]
            else:
                ordered = torch.stack(updates).sort(0).values  # of four the two in the middle
                expected = (ordered[1] + ordered[2]) / 2
            if robust is None or len(updates) == 4:
                assert_close(weight.double(), before[name] + expected, rtol=0, atol=1e-6)


def test_of_scaffold_only_its_own_names_are_sent_beside() -> None:
    bench = run("dora", "scaffold", rounds=1)
    bench.round(1)
    assert bench.state.control.keys() == bench.state.weights.keys()
    assert not any(name.startswith(CONTROL) for name in bench.state.weights)
    assert any(name.endswith("lora_magnitude_vector.weight") for name in bench.state.weights)
