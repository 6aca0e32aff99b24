"""FedKSeed against numbers worked out by hand, and equal bits on all sides."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from client_weights import computed_with
from fedkseed_bench import NOISES, replies, text, tiny, toy, z
from pydantic import ValidationError
from torch.testing import assert_close
from toy import Bench, Toy, items

from fedtune.config.file import parse_config
from fedtune.core.state import from_payload, to_payload
from fedtune.errors import FederationError, InputError
from fedtune.federation import checkpoint
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config, ProConfig
from fedtune.methods.fedkseed.state import State
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models.tuning import trainable
from fedtune.zeroth.pool import SeedPool


@pytest.mark.parametrize("kind", NOISES)
def test_one_step_of_one_client_by_hand(kind: str) -> None:
    b = toy({0: items(3)}, noise=kind)
    kept = replies(b)
    outcome = b.round(1)
    j = int(kept[0].payload.tensors["seeds"][0])
    # ((1 + εz - 3)² - (1 - εz - 3)²) / 4ε = (1 - 3) z
    assert_close(kept[0].payload.tensors["scalars"], torch.tensor([-2 * z(b, j)]), rtol=1e-4, atol=1e-6)
    assert_close(b.state.accumulator[j], torch.tensor(-2 * z(b, j)), rtol=1e-4, atol=1e-6)
    assert b.state.accumulator.count_nonzero() == (z(b, j) != 0)
    # mean of (−2 ± εz)²/2
    assert outcome.mean("train_loss") == pytest.approx((4 + (2.0**-6 * z(b, j)) ** 2) / 2, rel=1e-5)
    for _, model in b.method.export(b.state, b.model):
        assert_close(model.w.detach(), torch.tensor([1 + 0.25 * 2 * z(b, j) ** 2]), rtol=1e-4, atol=1e-6)
    assert b.model.w.tolist() == [1.0]  # the base model is as it was


def test_clients_are_weighted_by_examples() -> None:
    b = toy({0: items(3), 1: items(5, 5, 5)})
    kept = replies(b)
    b.round(1)
    expected = torch.zeros(8)
    for reply, weight in zip(sorted(kept, key=lambda r: r.client), (0.25, 0.75), strict=True):
        expected[int(reply.payload.tensors["seeds"][0])] += weight * float(
            reply.payload.tensors["scalars"][0]
        )
    assert_close(b.state.accumulator, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", NOISES)
def test_the_base_model_keeps_its_bits_and_tied_weights_stay_tied(kind: str) -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    b = Bench(
        FedKSeed(Config(seeds=16, local_steps=3, lr=1e-3, epsilon=1e-3, noise=kind), seed=0), model, text()
    )
    b.round(1)
    for _, exported in b.method.export(b.state, b.model):
        moved = {name: p.detach().clone() for name, p in exported.named_parameters()}
        assert exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()
    assert all(torch.equal(p, before[name]) for name, p in b.model.named_parameters())
    assert all(not torch.equal(moved[name], before[name]) for name in before)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(k, d) for k in NOISES for d in ([torch.float32] if k == "hadamard4" else []) + HALF]
)
def test_after_any_number_of_steps_a_client_computes_with_the_rebuild(kind: str, dtype: torch.dtype) -> None:
    model, lr, draw = tiny(dtype), 2.0**-10, torch.Generator().manual_seed(3)
    method = FedKSeed(Config(seeds=64, lr=lr, noise=kind), seed=0)
    state = method.init(method.client_model(lambda: model))
    total = torch.randint(-8, 9, (64,), generator=draw) / 4.0  # in quarters, so that no sum is rounded
    batch = {name: torch.tensor([[3, 4, 5]]) for name in ("input_ids", "labels")}
    with step_weights(model, SeedPool(method.pool_key, 64, kind), total.clone(), lr) as weights:
        for step, j in enumerate(torch.randint(64, (25,), generator=draw).tolist()):
            for scale in (2.0**-8, -(2.0**-8)):
                weights.loss(batch, j, scale)
            weights.update([(j, (step % 7 - 3) / 4)])
            total[j] += (step % 7 - 3) / 4
        seen = computed_with(model, weights)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _, exported in method.export(replace(state, accumulator=total), model):
        for name, parameter in trainable(exported).items():
            assert parameter.dtype == seen[name].dtype == dtype
            assert torch.equal(seen[name], parameter.data), name
            assert not torch.equal(seen[name], before[name])


def test_probabilities_of_pro() -> None:
    method = FedKSeed(ProConfig(seeds=4), seed=0)
    state = method.init(Toy())
    assert method.probabilities(state).tolist() == [0.25] * 4
    state = replace(
        state,
        magnitude=torch.tensor([2.0, 12.0, 0.0, 4.0], dtype=torch.float64),
        draws=torch.tensor([1, 2, 0, 1]),
    )
    # ψ = 2, 6, mean 4 for the seed never drawn, 4; normalised 0, 1, ½, ½
    weights = [1, math.e, math.exp(0.5), math.exp(0.5)]
    assert_close(method.probabilities(state), torch.tensor([w / sum(weights) for w in weights]))
    assert float(method.probabilities(state).max() / method.probabilities(state).min()) == pytest.approx(
        math.e
    )


def test_pro_counts_magnitudes_unweighted() -> None:
    b = Bench(
        FedKSeed(ProConfig(seeds=4, local_steps=5, lr=0.01), seed=0), Toy(), {0: items(3), 1: items(5, 5)}
    )
    kept = replies(b)
    b.round(1)
    for j in range(4):
        mine = [
            abs(g)
            for r in kept
            for s, g in zip(
                r.payload.tensors["seeds"].tolist(), r.payload.tensors["scalars"].tolist(), strict=True
            )
            if s == j
        ]
        assert int(b.state.draws[j]) == len(mine)
        assert float(b.state.magnitude[j]) == pytest.approx(sum(mine))


def test_clients_draw_seeds_of_their_own() -> None:
    b = toy({c: items(3) for c in range(4)}, seeds=4096, local_steps=50)
    kept = replies(b)
    b.round(1)
    drawn = {tuple(r.payload.tensors["seeds"].tolist()) for r in kept}
    assert len(drawn) == 4


def test_state_survives_a_checkpoint() -> None:
    b = toy({0: items(3), 1: items(5)})
    b.round(1)
    again = from_payload(State, to_payload(b.state))
    one, two = list(b.method.export(b.state, b.model)), list(b.method.export(again, b.model))
    assert len(one) == len(two) == 1
    assert again.holders == b.state.holders == {"0": True, "1": True}
    assert torch.equal(again.accumulator, b.state.accumulator)


def test_a_checkpoint_holds_what_many_clients_keep_once(tmp_path: Path) -> None:
    b = toy({c: items(3 + c) for c in range(20)}, seeds=1024)
    for round in (1, 2):
        b.round(round, per_round=0.5)
        saved = checkpoint.Checkpoint(round, to_payload(b.state), b.runner.states, {}, {})
        checkpoint.save(tmp_path, saved, config_sha256="x", keep=None)
    kept = {state.tensors["accumulator"].numpy().tobytes() for state in b.runner.states.values()}
    assert len(b.runner.states) > 10 and len(kept) == 2
    assert (tmp_path / "round-0002/clients.safetensors").stat().st_size < 2 * 4096 + 500
    loaded = checkpoint.load(tmp_path, 2, config_sha256="x").clients
    assert loaded.keys() == b.runner.states.keys()
    for client, state in loaded.items():
        assert torch.equal(state.tensors["accumulator"], b.runner.states[client].tensors["accumulator"])
    assert len({state.tensors["accumulator"].data_ptr() for state in loaded.values()}) == len(loaded)


def test_a_loss_that_is_no_number_stops_its_client_alone() -> None:
    b = toy({0: items(3), 1: items(5)}, lr=1e22, local_steps=30, noise="rademacher")
    with pytest.raises(FederationError, match=r"the losses became \S+ and \S+ at step \d+; lower method.lr"):
        b.round(1)
    assert b.state.accumulator.count_nonzero() == 0 and b.model.w.tolist() == [1.0]


@pytest.mark.parametrize(
    "values",
    [{"epsilon": 0.0}, {"epsilon": "none"}, {"epsilon": True}, {"lr": -1.0}, {"noise": "white"},
     {"clip": 0.0}, {"groups": 0}, {"aggregation": "trimmed-mean", "trim": 0.5}],
)  # fmt: skip
def test_settings_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**values)


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("seeds", 0, r"method\.seeds: input should be greater than or equal to 1, got 0"),
        ("seeds", 65_537, r"method\.seeds: input should be less than or equal to 65536, got 65537"),
        ("trim", 0.2, "trim has no effect with aggregation: mean; it belongs to trimmed-mean"),
        ("groups", 3, "groups has no effect with aggregation: mean; it belongs to median-of-means"),
    ],
)
def test_settings_are_refused_by_name(name: str, setting: str, value: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({"method": {"name": name, setting: value}}, "test")


CHANGES: dict[str, Any] = {
    "seeds": 32,
    "noise": "gaussian",
    "epsilon": 0.25,
    "lr": 0.125,
    "local_steps": 4,
    "batch_size": 2,
    "perturbations": 2,
    "scalar_limit": 1e-6,
    "clip": 1e-3,
    "aggregation": "median-of-means",
    "trim": 0.4,
    "groups": 2,
    "rounds": 2,
    "graph": "ring",
    "degree": 1,
}


@pytest.mark.parametrize("field", sorted(Config.model_fields.keys() - {"name"}))
def test_every_setting_changes_something(field: str) -> None:
    # clients that draw the same seeds, for those settings that need it
    needs = {
        "trim": {"aggregation": "trimmed-mean"},
        "groups": {"aggregation": "median-of-means"},
        "degree": {"graph": "random"},
    }
    clients = 3 if field in (*needs, "aggregation", "graph") else 1

    def outcome(**change: Any) -> Any:
        values: dict[str, Any] = {
            "seeds": 64 if clients == 1 else 2,
            "local_steps": 3,
            "lr": 0.1,
            "epsilon": 0.01,
            "rounds": 1,
        }
        values |= needs.get(field, {})
        b = Bench(FedKSeed(Config(**{**values, **change}), seed=0), tiny(), text(clients))
        try:
            for round in range(1, b.method.rounds + 1):
                b.round(round)
        except FederationError:
            return "refused"
        return (
            b.state.accumulator.tolist(),
            b.wire,
            [
                p.detach().flatten()[0].item()
                for _, m in b.method.export(b.state, b.model)
                for p in m.parameters()
            ],
        )

    assert outcome() != outcome(**{field: CHANGES[field]})


PEAKS = """
import json, torch
from contract import Federation
from fedtune.core.wire import decode
torch.set_num_threads(1)
peaks = []
for _ in range(2):
    federation = Federation("fedkseed", "hadamard4")
    federation.run()
    peaks.append([decode(reply).meta["peak_bytes"] for reply in federation.transport.replies.values()])
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_a_kernel_that_has_to_be_compiled_first_does_not_change_the_peak(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True
    )
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first == second
