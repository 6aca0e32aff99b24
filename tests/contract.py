"""Every registered method in every form of it, as a federation of three clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from model_families import build
from torch import Tensor, nn

from fedtune.config.wire import Wire
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import Cohort, RoundOutcome, sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.personal import result_models
from fedtune.core.state import from_payload, to_payload
from fedtune.core.store import Store
from fedtune.core.types import Arrival, Payload, ServerEnv
from fedtune.core.wire import Content, encode
from fedtune.data.encoded import Encoded
from fedtune.federation import checkpoint
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.models.tuning import trainable
from fedtune.transport.in_process import InProcess, Simulation


@dataclass(frozen=True)
class Form:
    """Settings under which a method is tried, and the tiny model that it is tried on."""

    settings: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    dtype: str = "float32"
    blocks: int = 2
    public: bool = False
    wire: dict[str, Any] = field(default_factory=dict)


STEPS = {"local_epochs": 1, "batch_size": 2, "lr": 0.01}

LORA = {**STEPS, "trainable": "lora", "lora": {"rank": 2, "alpha": 4.0}}

FULL = {**STEPS, "trainable": "full"}

TWO = {"rounds": 2}

SEEDS = {"seeds": 16, "local_steps": 3, "lr": 1e-2, "epsilon": 1e-3}

UNLIMITED = {name: value for name, value in SEEDS.items() if name != "seeds"}

ALIGNMENT = {"steps_before": 3, "steps": 2, "batch_size": 2, "lr": 1e-2}

EMULATED = {
    "local_steps": 2,
    "batch_size": 2,
    "lr": 1e-2,
    "adapter_layers": 1,
    "layer_dropout": 0.3,
    "lora": {"rank": 2, "alpha": 4.0},
    "alignment": ALIGNMENT,
}

CYCLE = {**STEPS, "local_epochs": 2}
# One entry a method, one line a form of it. A registered method that is not here fails the first test below.
FORMS: dict[str, dict[str, Form]] = {
    "fedavg": {
        "full": Form({**FULL, **TWO}),
        "full-bfloat16": Form({**FULL, **TWO}, dtype="bfloat16"),
        "lora": Form({**LORA, **TWO}),
        "lora-dropout": Form({**LORA, **TWO, "lora": {"rank": 2, "dropout": 0.5}}),
        "lora-bfloat16": Form({**LORA, **TWO}, dtype="bfloat16"),
        "lora-classifier": Form({**LORA, **TWO}, family="roberta"),
        "lora-dora-rslora": Form({**LORA, **TWO, "lora": {"rank": 2, "use_dora": True, "use_rslora": True}}),
        "lora-pissa": Form({**LORA, **TWO, "lora": {"rank": 2, "init": "pissa"}}),
        "freeze-a-olora-bfloat16": Form(
            {**LORA, **TWO, "aggregation": "freeze-a", "lora": {"rank": 2, "init": "olora"}}, dtype="bfloat16"
        ),
        "lora-biases-whole": Form(
            {**LORA, **TWO, "lora": {"rank": 2, "bias": "all", "modules_to_save": ["ln_f"]}}, family="gpt2"
        ),
        "lora-its-biases-classifier": Form(
            {**LORA, **TWO, "lora": {"rank": 2, "bias": "lora_only", "use_dora": True}}, family="roberta"
        ),
        "lora-all-linear": Form(
            {**LORA, **TWO, "lora": {"rank": 2, "targets": "all-linear"}}, family="bloom"
        ),
        "ia3": Form({**STEPS, **TWO, "trainable": "ia3"}),
        "ia3-classifier-bfloat16": Form(
            {**STEPS, **TWO, "trainable": "ia3"}, family="roberta", dtype="bfloat16"
        ),
        "prefix": Form({**STEPS, **TWO, "trainable": "prefix", "prefix": {"tokens": 3}}),
        "prefix-bfloat16": Form(
            {**STEPS, **TWO, "trainable": "prefix", "prefix": {"tokens": 2}},
            family="gemma3",
            dtype="bfloat16",
        ),
        "adapter": Form({**STEPS, **TWO, "trainable": "adapter", "adapter": {"size": 3}}),
        "prompt": Form({**STEPS, **TWO, "trainable": "prompt", "prompt": {"tokens": 3}}),
        "p-tuning": Form({**STEPS, **TWO, "trainable": "p-tuning", "p_tuning": {"tokens": 3, "hidden": 6}}),
        "proximal-momentum": Form({**LORA, **TWO, "proximal": 0.1, "server_optimizer": {"name": "momentum"}}),
        "sgd-steps-adam": Form(
            {
                **{**LORA, **TWO, "local_epochs": None, "local_steps": 3, "optimizer": "sgd"},
                "server_optimizer": {"name": "adam", "lr": 0.01},
            }
        ),
        "scaffold": Form({**FULL, **TWO, "optimizer": "sgd", "control_variates": True}),
        "diloco-int8": Form(
            {**FULL, **TWO, "keep_optimizer": True, "server_optimizer": {"name": "nesterov", "lr": 0.7}},
            wire={"dtype": "int8", "error_feedback": True},
        ),
        "own-b": Form({**LORA, "rounds": 3, "own": ["lora_B"]}),
        "own-head-bfloat16-scaffold": Form(
            {**FULL, **TWO, "optimizer": "sgd", "control_variates": True, "own": ["classifier"]},
            family="roberta",
            dtype="bfloat16",
        ),
        "ditto": Form({**LORA, **TWO, "ditto": 0.5}),
        "ditto-bfloat16-diloco": Form(
            {**FULL, **TWO, "ditto": 0.1, "keep_optimizer": True}, dtype="bfloat16"
        ),
        "fine-tune": Form({**LORA, **TWO, "fine_tune": {"local_steps": 2}}),
        "own-b-fine-tune-classifier": Form(
            {**LORA, **TWO, "own": ["lora_B"], "fine_tune": {"local_epochs": 1}},
            family="roberta",
            wire={"dtype": "int4", "error_feedback": True},
        ),
        "freeze-a": Form({**LORA, **TWO, "aggregation": "freeze-a"}),
        "stack": Form({**LORA, "rounds": 3, "aggregation": "stack"}),
        "stack-classifier": Form({**LORA, **TWO, "aggregation": "stack"}, family="roberta"),
        "stack-biases-rslora": Form(
            {**LORA, **TWO, "aggregation": "stack", "lora": {"rank": 2, "bias": "all", "use_rslora": True}},
            family="gpt2",
        ),
        "stack-dense": Form({**LORA, **TWO, "aggregation": "stack", "lora": {"rank": 8}}),
        "unlike-ranks": Form({**LORA, **TWO, "lora": {"rank": 3, "client_ranks": [1, 3]}}),
        "stack-unlike-ranks": Form(
            {**LORA, **TWO, "aggregation": "stack", "lora": {"rank": 3, "client_ranks": [1, 3]}}
        ),
        "asynchronous": Form({**LORA, "rounds": 1, "arrival": "asynchronous"}),
        "svd": Form({**LORA, **TWO, "aggregation": "svd"}),
        "svd-unlike-ranks": Form(
            {**LORA, **TWO, "aggregation": "svd", "lora": {"rank": 3, "client_ranks": [1, 3]}}
        ),
        "residual": Form({**LORA, "rounds": 3, "aggregation": "residual"}),
        "refine": Form({**LORA, **TWO, "aggregation": "refine"}, family="roberta"),
        "alternate": Form({**LORA, "rounds": 3, "aggregation": "alternate"}),
        "sparsity-unlike-ranks": Form(
            {**LORA, **TWO, "aggregation": "sparsity", "lora": {"rank": 3, "client_ranks": [1, 3]}}
        ),
        "prune": Form(
            {
                **{
                    **LORA,
                    "rounds": 4,
                    "aggregation": "sparsity",
                    "lora": {"rank": 4, "client_ranks": [2, 4]},
                },
                "prune": {"decay": 0.5, "penalty": 100.0},
            },
            family="roberta",
        ),
        "int4-top-k-errors": Form(
            {**LORA, "rounds": 3}, wire={"dtype": "int4", "top_k": 0.3, "error_feedback": True}
        ),
        "full-bfloat16-int8-errors": Form(
            {**FULL, **TWO}, dtype="bfloat16", wire={"dtype": "int8", "error_feedback": True}
        ),
        "scaffold-bfloat16-errors": Form(
            {**FULL, **TWO, "optimizer": "sgd", "control_variates": True},
            wire={"dtype": "bfloat16", "error_feedback": True},
        ),
        "stack-int8": Form({**LORA, "rounds": 2, "aggregation": "stack"}, wire={"dtype": "int8"}),
    },
    "fedkseed": {
        "hadamard4": Form({**SEEDS, **TWO}),
        "hadamard4-bfloat16": Form({**SEEDS, **TWO, "lr": 1.0}, dtype="bfloat16"),
        "hadamard4-classifier": Form({**SEEDS, **TWO}, family="roberta"),
        "rademacher": Form({**SEEDS, **TWO, "noise": "rademacher"}),
        "gaussian-twice-a-step": Form({**SEEDS, **TWO, "noise": "gaussian", "perturbations": 2}),
        "binomial32-dense": Form({**SEEDS, **TWO, "noise": "binomial32", "seeds": 4}),
        "rademacher-bfloat16": Form({**SEEDS, **TWO, "noise": "rademacher", "lr": 1.0}, dtype="bfloat16"),
        "auto-float16": Form({**SEEDS, **TWO, "epsilon": "auto"}, dtype="float16"),
        "many-seeds": Form({**SEEDS, **TWO, "seeds": 40_000}),
        "subzero": Form({**SEEDS, **TWO, "noise": "subzero"}),
        "lozo-classifier": Form({**SEEDS, **TWO, "noise": "lozo", "perturbations": 2}, family="roberta"),
        "ring": Form({**SEEDS, "rounds": 3, "graph": "ring"}),
        "random-dense-classifier": Form(
            {**SEEDS, "rounds": 3, "seeds": 4, "graph": "random", "degree": 1}, family="roberta"
        ),
        "clipped-trimmed": Form(
            {**SEEDS, **TWO, "seeds": 4, "clip": 0.5, "aggregation": "trimmed-mean", "trim": 0.4}
        ),
        "median-of-means": Form({**SEEDS, **TWO, "seeds": 4, "aggregation": "median-of-means", "groups": 2}),
    },
    "fedkseed-pro": {
        "hadamard4": Form({**SEEDS, **TWO}),
        "auto-classifier": Form({**SEEDS, **TWO, "epsilon": "auto"}, family="roberta"),
    },
    "infinite-pool": {
        "steps": Form({**UNLIMITED, **TWO}),
        "steps-auto": Form({**UNLIMITED, **TWO, "epsilon": "auto", "noise": "gaussian"}),
        "model-rademacher": Form({**UNLIMITED, **TWO, "download": "model", "noise": "rademacher"}),
        "steps-classifier": Form({**UNLIMITED, **TWO}, family="roberta"),
        "means": Form({**UNLIMITED, "rounds": 3, "download": "means", "perturbations": 2}),
        "means-auto-classifier": Form(
            {**UNLIMITED, **TWO, "download": "means", "epsilon": "auto", "noise": "rademacher"},
            family="roberta",
        ),
        "steps-twice-a-step": Form({**UNLIMITED, **TWO, "perturbations": 2}),
    },
    "fedbiot": {
        "last-block": Form({**EMULATED, **TWO}, blocks=4, public=True),
        "bfloat16-rms": Form(
            {**EMULATED, **TWO, "alignment": {**ALIGNMENT, "form": "rms-normalized"}},
            dtype="bfloat16",
            blocks=4,
            public=True,
        ),
        "gpt2-proximal": Form({**EMULATED, **TWO, "proximal": 0.1}, family="gpt2", blocks=4, public=True),
        "channel-pruning": Form({**EMULATED, **TWO, "emulator": "channel-pruning"}, blocks=3, public=True),
        "nothing-left-out": Form({**EMULATED, **TWO, "layer_dropout": 0.0}, blocks=3),
    },
    "fedot": {
        "both-ends": Form(
            {**EMULATED, **TWO, "adapter_layers": 2, "alignment": {**ALIGNMENT, "steps": 0}},
            blocks=6,
            public=True,
        )
    },
    "offsite-tuning": {
        "both-ends": Form(
            {**EMULATED, **TWO, "adapter_layers": 2, "alignment": {**ALIGNMENT, "steps": 0}},
            blocks=6,
            public=True,
        )
    },
    "fedcybgd": {
        "none": Form({**CYCLE, **TWO}, blocks=3),
        "bfloat16": Form({**CYCLE, **TWO}, dtype="bfloat16", blocks=3),
        "classifier-two-blocks": Form({**CYCLE, **TWO, "blocks_per_client": 2}, family="roberta", blocks=3),
        "extra-random": Form(
            {**CYCLE, **TWO, "block_order": "random", "extra_blocks": ["embeddings", "norm", "head"]}
        ),
        "layer-drop": Form({**CYCLE, **TWO, "compression": "layer-drop"}, family="gpt2", blocks=4),
        "lora": Form({**CYCLE, **TWO, "trainable": "lora", "lora": {"rank": 2, "alpha": 4.0}}, blocks=3),
        "lora-gpt2-layer-drop": Form(
            {**CYCLE, **TWO, "trainable": "lora", "lora": {"rank": 2}, "compression": "layer-drop"},
            family="gpt2",
            blocks=4,
        ),
        "lora-dropout-classifier-bfloat16": Form(
            {**CYCLE, **TWO, "trainable": "lora", "lora": {"rank": 2, "dropout": 0.5}},
            family="roberta",
            dtype="bfloat16",
        ),
        "adapter": Form({**CYCLE, **TWO, "trainable": "adapter", "adapter": {"size": 3}}, blocks=3),
        "adapter-classifier-two-blocks": Form(
            {**CYCLE, **TWO, "trainable": "adapter", "adapter": {"size": 3}, "blocks_per_client": 2},
            family="roberta",
            dtype="bfloat16",
            blocks=3,
        ),
        "hybrid": Form({**CYCLE, **TWO, "compression": "hybrid"}, blocks=3),
        "hybrid-gpt2": Form({**CYCLE, **TWO, "compression": "hybrid"}, family="gpt2", blocks=3),
        "powersgd-no-checkpointing": Form(
            {
                **CYCLE,
                **TWO,
                "optimizer": "sgd",
                "powersgd": {"start_step": 1},
                "gradient_checkpointing": False,
            }
        ),
    },
    "fedbavg": {
        "none": Form({**CYCLE, **TWO}),
        "layer-drop": Form({**CYCLE, **TWO, "compression": "layer-drop"}, blocks=3),
    },
    "badam": {
        "random": Form({**CYCLE, "switch_interval": 2}, blocks=3),
        "classifier-bfloat16": Form({**CYCLE, "switch_interval": 4}, family="roberta", dtype="bfloat16"),
    },
    "standalone": {"lora": Form(LORA)},
    "centralized": {"full": Form(FULL)},
    "zero-shot": {"plain": Form()},
}


every_form = pytest.mark.parametrize(  # a method that is not listed above has none
    ("name", "label"),
    [
        pytest.param(name, label, id=f"{name}-{label}")
        for name in registry.METHODS
        for label in FORMS.get(name, {})
    ],
)

SIZES = {0: 2, 1: 3, 2: 1}  # examples a client

HELD = Store()  # what clients of finished runs were sent to hold, by its digest


def examples(family: str) -> dict[int, list[Encoded]]:
    """The clients' random sequences of 3 to 8 tokens; for an encoder with one of three classes."""
    rng = np.random.default_rng(5)

    def one() -> Encoded:
        ids = tuple(int(token) for token in rng.integers(3, 64, size=rng.integers(3, 9)))
        return Encoded(ids, (int(rng.integers(3)),) if family == "roberta" else ids)

    return {client: [one() for _ in range(size)] for client, size in SIZES.items()}


@dataclass(frozen=True)
class Sent:
    """One order as it went out, and what the client kept from before it."""

    round: int
    client: int
    frame: bytes
    kept: Payload | None


class Recorder:
    """The transport within one process, which also writes down every frame."""

    def __init__(self, inner: InProcess, runner: ClientRunner) -> None:
        self._inner, self._runner = inner, runner
        self.orders: list[Sent] = []
        self.replies: dict[tuple[int, int], bytes] = {}

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        def noted() -> Iterator[tuple[int, bytes]]:
            for client, frame in frames:
                self.orders.append(Sent(round, client, frame, self._runner.states.get(client)))
                yield client, frame

        for arrival in self._inner.exchange(round, noted(), in_plan_order=in_plan_order):
            if not arrival.fault:
                self.replies[round, arrival.client] = arrival.frame
            yield arrival


class Federation:
    """A method with everything around it but the command line: model, clients, transport, ledger."""

    def __init__(
        self,
        name: str,
        label: str,
        *,
        seed: int = 0,
        simulation: Simulation | None = None,
        device: str = "cpu",
        laid_out: bool = False,
        **changes: object,
    ) -> None:
        form = FORMS[name][label]
        config = registry.config_class(name).model_validate({**form.settings, **changes})
        self.name, self.method = name, registry.build(config, seed)
        where = torch.device(device)
        self.compression = Wire.model_validate(form.wire).compression(self.method)
        base = build(form.family, getattr(torch, form.dtype), form.blocks)
        if not self.method.sends_model:
            base.to(where)
        self.method.prepare(ServerEnv(examples(form.family)[1] if form.public else (), 0, where))
        self.model = self.method.client_model(lambda: base)
        data = examples(form.family)
        if self.method.pools_data:
            data = {0: [item for items in data.values() for item in items]}
        self.sizes = {client: len(items) for client, items in data.items()}
        self.wire: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        clock = Clock()
        self.runner = ClientRunner(
            self.method,
            self.model,
            data,
            pad_id=0,
            seed=seed,
            device=where,
            store=Store(),
            compression=self.compression,
            laid_out=laid_out,
        )
        self.transport = Recorder(
            InProcess(
                self.runner, simulation=simulation or Simulation(), deadline_s=None, seed=seed, clock=clock
            ),
            self.runner,
        )
        ledger = Ledger(self.wire.append, self.memory.append)
        self.loop = RoundLoop(self.method, self.transport, ledger, clock, where, compression=self.compression)
        self.seed = seed
        self.state: Any = self.method.init(self.model)
        self.saved = [self._checkpoint(0)]  # after each round, the first before any

    def cohort(self, round: int) -> Cohort:
        return sample_cohort(self.sizes, None, seed=self.seed, round=round)

    def round(self, round: int, quorum: int | None = None) -> RoundOutcome:
        cohort = self.cohort(round)
        self.state, outcome = self.loop.run(
            self.state,
            cohort,
            round,
            quorum=len(cohort.clients) if quorum is None else quorum,
            on_arrival=lambda state, outcome: None,
        )
        self.saved.append(self._checkpoint(round))
        return outcome

    def _checkpoint(self, round: int) -> checkpoint.Checkpoint:
        state = to_payload(self.state)
        copied = Payload({name: tensor.clone() for name, tensor in state.tensors.items()}, state.scalars)
        return checkpoint.Checkpoint(round, copied, dict(self.runner.states), {}, {})

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Takes up a finished run's checkpoint; what clients were sent to hold is still there."""
        self.state = from_payload(registry.state_class(self.name), saved.state)
        self.runner.states = dict(saved.clients)
        self.runner.store = HELD

    def run(self, start: int = 1) -> Federation:
        for round in range(start, self.method.rounds + 1):
            self.round(round)
        return self

    def exported(self) -> dict[str, bytes]:
        """All parameters of every model that the state stands for, by the model's name."""
        return {name: bits(Payload(dict(model.named_parameters()))) for name, model in self.models()}

    def models(self) -> Iterator[tuple[str, nn.Module]]:
        """The models that it has come to, clients' own among them."""
        return result_models(self.method, self.state, self.runner.states, self.model)

    def state_bits(self) -> bytes:
        return bits(to_payload(self.state))

    def frozen(self) -> dict[str, Tensor]:
        """Copies of what training must leave alone."""
        trained = {id(parameter) for parameter in trainable(self.model).values()}
        named: Sequence[tuple[str, Tensor]] = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named if id(tensor) not in trained}


def bits(payload: Payload) -> bytes:
    """A payload's content as bytes: equal bytes are equal bits, names, shapes and dtypes."""
    return encode(Content(payload))


@cache
def whole(name: str, label: str) -> Federation:
    """A finished run that tests look at and do not change."""
    federation = Federation(name, label)
    federation.runner.store = HELD
    return federation.run()
