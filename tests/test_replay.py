"""`fedtune replay`: an earlier round's model, bit for bit, from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from client_weights import computed_with
from command import fedtune, write_config
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtune import open as open_run
from fedtune.config.file import parse_config
from fedtune.core.cohort import Cohort
from fedtune.core.state import from_payload
from fedtune.core.wire import Content, encode
from fedtune.errors import InputError
from fedtune.federation import checkpoint
from fedtune.federation.assembly import Assembly
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.measure.clock import Clock
from fedtune.methods.fedkseed import method as fedkseed
from fedtune.methods.fedkseed.state import State


def replay(path: Path, round: int, out: Path) -> list[Path]:
    return open_run(path).replay(round, out)


METHODS = {
    "lora": {"name": "fedavg", "local_steps": 1, "lora": {"rank": 2}},
    "full": {"name": "fedavg", "local_steps": 1, "trainable": "full"},
    "stack": {"name": "fedavg", "local_steps": 1, "lora": {"rank": 2}, "aggregation": "stack"},
    "fedkseed": {"name": "fedkseed", "local_steps": 3, "seeds": 16, "lr": 1e-3},
}


def federate(path: Path, method: dict, rounds: int, keep: int | None) -> Path:
    document = {
        "data": {"max_examples": 12, "max_length": 64, "clients": 3},
        "method": {**method, "rounds": rounds},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 4},
        "checkpoints": {"keep": keep},
    }
    run(parse_config(document, "test"), path, Silent())
    return path


@pytest.mark.parametrize("name", METHODS)
def test_each_round_is_what_a_shorter_run_ends_with(name: str, tmp_path: Path) -> None:
    long = federate(tmp_path / "long", METHODS[name], rounds=3, keep=None)
    for rounds in (1, 3):
        short = federate(tmp_path / f"short-{rounds}", METHODS[name], rounds, keep=1)
        [replayed] = replay(long, rounds, tmp_path / f"replayed-{rounds}")
        weights = sorted(path.name for path in (short / "final").glob("*.safetensors"))
        assert weights and all(
            (replayed / file).read_bytes() == (short / "final" / file).read_bytes() for file in weights
        )


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    path = federate(tmp_path / "run", METHODS["lora"], rounds=3, keep=2)
    with pytest.raises(InputError, match=r"checkpoints of rounds 2, 3, not of 1; choose one of these"):
        replay(path, 1, tmp_path / "out")
    with pytest.raises(InputError, match="not a run folder"):
        replay(tmp_path, 1, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        replay(path, 3, path)
    assert not (tmp_path / "out").exists()


def as_bits(weights: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    """Each tensor's dtype and bytes, so that -0.0 is not 0.0."""
    return {
        name: (w.dtype, w.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, w in weights.items()
    }


class Watch:
    """Stands in for `step_weights` and keeps the weights that a client computes with before it starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = fedkseed.step_weights
        self.seen: dict[str, Tensor] = {}
        monkeypatch.setattr(fedkseed, "step_weights", self)

    @contextmanager
    def __call__(self, model: nn.Module, *arguments: Any) -> Iterator[Any]:
        with self._real(model, *arguments) as weights:
            self.seen = computed_with(model, weights)
            yield weights


@pytest.mark.parametrize(
    ("noise", "dtype", "method"),
    [
        ("hadamard4", "float32", "fedkseed"),
        ("hadamard4", "bfloat16", "fedkseed"),
        ("hadamard4", "float32", "fedkseed-pro"),
        ("rademacher", "float32", "fedkseed"),
        ("gaussian", "bfloat16", "fedkseed"),
    ],
)
def test_clients_server_and_a_replay_elsewhere_hold_the_same_bits(
    noise: str, dtype: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {
        "model": {"dtype": dtype},
        "data": {"max_examples": 12, "max_length": 64, "clients": 4},
        "method": {"name": method, "noise": noise, "rounds": 4, "seeds": 64, "local_steps": 4, "lr": 1e-3},
        "federation": {"clients_per_round": 2, "max_loss_jump": None},  # two are absent; the rate is too high
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 4},
        "checkpoints": {"keep": None},
    }
    write_config(tmp_path / "c.yaml", document)
    done = fedtune("run", "c.yaml", "--out", "run", "--quiet", cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.err.count("with epsilon 0.0005 and bfloat16 weights") == (dtype == "bfloat16")  # once a run
    done = fedtune("replay", "run", "--round", "3", "--out", "replayed", cwd=tmp_path)
    assert done.status == 0, done.err
    replayed = as_bits(load_file(tmp_path / "replayed/model.safetensors"))

    config = parse_config(document, "test")
    parts = Assembly.assemble(config, Clock())
    model = parts.method.client_model(lambda: parts.loaded.model)
    parts.runner.use(model)
    w0 = as_bits(dict(model.named_parameters()))
    saved = checkpoint.load(tmp_path / "run/checkpoints", 3, config_sha256=config.sha256())
    state = from_payload(State, saved.state)
    [(_, exported)] = ((n, as_bits(dict(m.named_parameters()))) for n, m in parts.method.export(state, model))
    assert exported == replayed
    assert all(exported[name] != w0[name] for name in w0)
    assert as_bits(dict(model.named_parameters())) == w0

    everyone = Cohort((0, 1, 2, 3), parts.client_examples, 4)
    orders = {order.client: order.payload for order in parts.method.plan(state, 4, everyone)}
    whole = [client for client in orders if "accumulator" in orders[client].tensors]
    part = [client for client in orders if "changed" in orders[client].tensors]
    assert len(whole) == len(part) == 2
    parts.runner.states.update(saved.clients)
    watch = Watch(monkeypatch)
    for client in (whole[0], part[0], whole[1], part[1]):
        parts.runner.handle(client, encode(Content(orders[client], {"round": 4})))
        assert torch.equal(parts.runner.states[client].tensors["accumulator"], state.accumulator)
        assert as_bits(watch.seen) == exported, f"client {client}"
    assert as_bits(dict(model.named_parameters())) == w0
