"""What every registered method keeps to, whatever it computes; a later one is covered on registration."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import batch, build, save_folder, tokenizer
from torch import Tensor, nn

from fedtune.core.client import ClientRunner
from fedtune.core.ledger import Ledger
from fedtune.core.loop import Arrival, RoundLoop, RoundOutcome, sample_cohort
from fedtune.core.settings import Settings
from fedtune.core.state import from_payload, to_payload
from fedtune.core.types import Cohort, Payload
from fedtune.core.wire import Message, check, decode, encode
from fedtune.data.encode import Encoded
from fedtune.errors import FederationError
from fedtune.measure.clock import Clock
from fedtune.measure.memory import MemoryMeter
from fedtune.methods import registry
from fedtune.models.load import Loaded, load_model
from fedtune.models.save import load_result, save_result
from fedtune.models.tuning import trainable
from fedtune.run import checkpoint
from fedtune.transport.in_process import InProcess, Simulation


@dataclass(frozen=True)
class Form:
    """Settings under which a method is tried, and the tiny model that it is tried on."""

    settings: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    dtype: str = "float32"


STEPS = {"local_epochs": 1, "batch_size": 2, "lr": 0.01}
LORA = {**STEPS, "trainable": "lora", "lora": {"rank": 2, "alpha": 4.0}}
FULL = {**STEPS, "trainable": "full"}
TWO = {"rounds": 2}
# One entry a method, one line a form of it. A registered method that is not here fails the first test below.
FORMS: dict[str, dict[str, Form]] = {
    "fedavg": {
        "full": Form({**FULL, **TWO}),
        "full-bfloat16": Form({**FULL, **TWO}, dtype="bfloat16"),
        "lora": Form({**LORA, **TWO}),
        "lora-dropout": Form({**LORA, **TWO, "lora": {"rank": 2, "dropout": 0.5}}),
        "lora-bfloat16": Form({**LORA, **TWO}, dtype="bfloat16"),
        "lora-classifier": Form({**LORA, **TWO}, family="roberta"),
        "adapter": Form({**STEPS, **TWO, "trainable": "adapter", "adapter": {"size": 3}}),
        "prompt": Form({**STEPS, **TWO, "trainable": "prompt", "prompt": {"tokens": 3}}),
        "p-tuning": Form({**STEPS, **TWO, "trainable": "p-tuning", "p_tuning": {"tokens": 3, "hidden": 6}}),
        "steps-sgd": Form({**LORA, **TWO, "local_epochs": None, "local_steps": 3, "optimizer": "sgd"}),
        "proximal": Form({**LORA, **TWO, "proximal": 0.1}),
        "momentum": Form({**LORA, "rounds": 3, "server_optimizer": {"name": "momentum"}}),
        "adam": Form({**LORA, "rounds": 3, "server_optimizer": {"name": "adam", "lr": 0.01}}),
        "scaffold": Form({**FULL, "rounds": 3, "optimizer": "sgd", "control_variates": True}),
        "freeze-a": Form({**LORA, **TWO, "aggregation": "freeze-a"}),
        "stack": Form({**LORA, "rounds": 3, "aggregation": "stack"}),
        "stack-classifier": Form({**LORA, **TWO, "aggregation": "stack"}, family="roberta"),
        "stack-dense": Form({**LORA, **TWO, "aggregation": "stack", "lora": {"rank": 8}}),
        "unlike-ranks": Form({**LORA, **TWO, "lora": {"rank": 3, "client_ranks": [1, 3]}}),
        "stack-unlike-ranks": Form(
            {**LORA, **TWO, "aggregation": "stack", "lora": {"rank": 3, "client_ranks": [1, 3]}}
        ),
        "asynchronous": Form({**LORA, "rounds": 1, "arrival": "asynchronous"}),
        "asynchronous-full": Form({**FULL, "rounds": 1, "arrival": "asynchronous"}),
    },
    "standalone": {"full": Form(FULL), "lora": Form(LORA)},
    "centralized": {"full": Form(FULL), "lora": Form(LORA)},
    "zero-shot": {"plain": Form()},
}


def cases(*methods: str) -> list[Any]:
    """Each method's forms; methods that are registered but not listed above have none."""
    chosen = methods or tuple(registry.METHODS)
    return [
        pytest.param(name, form, id=f"{name}-{label}")
        for name in chosen
        for label, form in FORMS.get(name, {}).items()
    ]


every_form = pytest.mark.parametrize(("name", "form"), cases())
SIZES = {0: 3, 1: 6, 2: 2, 3: 5}  # examples a client


def examples(family: str) -> dict[int, list[Encoded]]:
    """Four clients' random sequences of 3 to 8 tokens; for an encoder with one of three classes."""
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
        self, name: str, form: Form, *, seed: int = 0, simulation: Simulation | None = None, **changes: object
    ) -> None:
        config = registry.config_class(name).model_validate({**form.settings, **changes})
        self.method = registry.build(config, seed)
        base = build(form.family, getattr(torch, form.dtype))
        self.model = self.method.client_model(lambda: base)
        data = examples(form.family)
        if self.method.pools_data:
            data = {0: [item for items in data.values() for item in items]}
        self.sizes = {client: len(items) for client, items in data.items()}
        self.wire: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        clock, device = Clock(), torch.device("cpu")
        self.runner = ClientRunner(self.method, self.model, data, pad_id=0, seed=seed, device=device)
        self.transport = Recorder(
            InProcess(
                self.runner, simulation=simulation or Simulation(), deadline_s=None, seed=seed, clock=clock
            ),
            self.runner,
        )
        ledger = Ledger(self.wire.append, self.memory.append)
        self.loop = RoundLoop(self.method, self.transport, ledger, clock, MemoryMeter(device))
        self.seed = seed
        self.state: Any = self.method.init(self.model)

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
        return outcome

    def run(self, start: int = 1) -> Federation:
        for round in range(start, self.method.rounds + 1):
            self.round(round)
        return self

    def exported(self) -> dict[str, bytes]:
        """All parameters of every model that the state stands for, by the model's name."""
        return {
            name: bits(Payload(dict(model.named_parameters())))
            for name, model in self.method.export(self.state, self.model)
        }

    def state_bits(self) -> bytes:
        return bits(to_payload(self.state))

    def frozen(self) -> dict[str, Tensor]:
        """Copies of what training must leave alone."""
        trained = {id(parameter) for parameter in trainable(self.model).values()}
        named: Sequence[tuple[str, Tensor]] = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named if id(tensor) not in trained}


def bits(payload: Payload) -> bytes:
    """A payload's content as bytes: equal bytes are equal bits, names, shapes and dtypes."""
    return encode(Message(payload))


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_every_registered_method_is_tried_here() -> None:
    missing = [name for name in registry.METHODS if not FORMS.get(name)]
    assert not missing, f"no settings for {missing}: add an entry for each to FORMS in {Path(__file__).name}"
    unknown = [name for name in FORMS if name not in registry.METHODS]
    assert not unknown, f"FORMS names methods that are not registered: {unknown}"


@pytest.mark.parametrize("name", registry.METHODS)
def test_defaults_are_valid_and_the_registry_names_the_right_classes(name: str) -> None:
    config = registry.config_class(name)()
    assert isinstance(config, Settings) and config.name == name  # type: ignore[attr-defined]
    assert type(config).model_validate(config.model_dump()) == config  # the saved form reads back as itself
    method = registry.build(config, 0)
    assert method.arrival in ("plan-order", "any-order", "one-by-one")
    assert method.rounds >= 0
    assert {type(flag) for flag in (method.pools_data, method.uses_wire, method.saves_merged)} == {bool}
    state = registry.state_class(name)
    assert dataclasses.is_dataclass(state) and state.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert registry.METHODS[name].summary and "\n" not in registry.METHODS[name].summary


def test_a_name_can_be_registered_once_only() -> None:
    before = dict(registry.METHODS)
    with pytest.raises(ValueError, match="fedavg is registered already"):
        registry.register("fedavg", registry.Entry("elsewhere", "A", "B", "C", "another"))
    assert dict(registry.METHODS) == before
    with pytest.raises(TypeError):
        registry.METHODS["other"] = registry.entry("fedavg")  # type: ignore[index]


@every_form
def test_one_seed_gives_the_same_bits_and_another_seed_others(name: str, form: Form) -> None:
    first, second, other = (Federation(name, form, seed=seed).run() for seed in (3, 3, 4))
    assert isinstance(first.state, registry.state_class(name))
    assert first.state_bits() == second.state_bits()
    assert first.exported() == second.exported()
    if first.method.rounds:
        assert first.exported() != other.exported()
        assert first.exported() != {
            "global": bits(Payload(dict(Federation(name, form).model.named_parameters())))
        }


@every_form
def test_the_process_s_own_random_streams_are_left_alone(name: str, form: Form) -> None:
    def streams() -> tuple[object, ...]:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), *rest  # type: ignore[union-attr]

    federation = Federation(name, form)
    before = streams()
    federation.run().exported()
    assert streams() == before


@every_form
def test_frozen_tensors_keep_their_bits(name: str, form: Form) -> None:
    federation = Federation(name, form)
    before = federation.frozen()
    federation.exported()  # also before any round: the first evaluation may come then
    assert_same(before, federation.frozen())
    for round in range(1, federation.method.rounds + 1):
        federation.round(round)
        assert_same(before, federation.frozen())
        federation.exported()
        assert_same(before, federation.frozen())


@every_form
def test_a_restored_run_goes_on_with_the_same_bits(name: str, form: Form, tmp_path: Path) -> None:
    whole = Federation(name, form)
    for done in range(whole.method.rounds + 1):
        if done:
            whole.round(done)
        saved = checkpoint.Checkpoint(done, to_payload(whole.state), dict(whole.runner.states), {}, {})
        checkpoint.save(tmp_path, saved, config_sha256="x", keep=None)
    for done in checkpoint.rounds(tmp_path):
        loaded = checkpoint.load(tmp_path, done, config_sha256="x")
        restored = Federation(name, form)
        restored.state = from_payload(registry.state_class(name), loaded.state)
        restored.runner.states.update(loaded.clients)
        assert bits(to_payload(restored.state)) == bits(loaded.state)
        restored.run(start=done + 1)
        assert restored.state_bits() == whole.state_bits()
        assert restored.exported() == whole.exported()


@every_form
def test_a_client_needs_its_order_and_its_environment_alone(name: str, form: Form) -> None:
    original = Federation(name, form).run()
    assert len(original.transport.orders) == original.method.rounds * len(original.sizes)
    elsewhere = Federation(name, form).runner  # another process's model, method object and runner
    for sent in reversed(original.transport.orders):  # and nothing left behind by the order before
        elsewhere.states = {sent.client: sent.kept} if sent.kept else {}
        reply = decode(elsewhere.handle(sent.client, sent.frame))
        assert bits(reply.payload) == bits(
            decode(original.transport.replies[sent.round, sent.client]).payload
        )


@every_form
def test_replies_hold_what_was_asked_for_and_the_ledger_what_was_sent(name: str, form: Form) -> None:
    federation = Federation(name, form)
    for round in range(1, federation.method.rounds + 1):
        before = len(federation.wire)
        planned = list(federation.method.plan(federation.state, round, federation.cohort(round)))
        assert sorted(order.client for order in planned) == sorted(federation.sizes)
        outcome = federation.round(round)
        assert outcome.left_out == {} and sorted(outcome.clients) == sorted(federation.sizes)
        sent = {s.client: s.frame for s in federation.transport.orders if s.round == round}
        expected = []
        for order in planned:
            down, up = sent[order.client], federation.transport.replies[round, order.client]
            assert bits(decode(down).payload) == bits(order.payload)  # planning twice plans the same
            payload = decode(up).payload
            assert payload.tensors.keys() == order.expects.keys()
            check(payload, order.expects)
            for direction, frame in (("down", down), ("up", up)):
                size = decode(frame).payload.nbytes
                assert size < len(frame)
                expected.append((round, order.client, direction, size, len(frame)))
        entries = [
            (e["round"], e["client"], e["direction"], e["payload_bytes"], e["framed_bytes"])
            for e in federation.wire[before:]
        ]
        assert sorted(entries) == (sorted(expected) if federation.method.uses_wire else [])


@every_form
def test_a_round_under_its_quorum_changes_nothing(name: str, form: Form) -> None:
    federation = Federation(name, form)
    frozen = federation.frozen()
    for round in range(1, federation.method.rounds + 1):
        state, before, kept = federation.state, federation.state_bits(), dict(federation.runner.states)
        with pytest.raises(FederationError, match=f"round {round}: .* the quorum is 9"):
            federation.round(round, quorum=9)  # all replied and were folded in when it turns out too few
        assert federation.state is state and federation.state_bits() == before
        assert_same(frozen, federation.frozen())
        federation.runner.states = kept  # a resumed run has them from the checkpoint too
        federation.round(round)
    assert federation.state_bits() == Federation(name, form).run().state_bits()


@every_form
def test_what_is_exported_is_what_is_saved(name: str, form: Form, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", form.family, getattr(torch, form.dtype))

    def loader(model: str) -> Loaded:
        return load_model(
            str(base) if model == "tiny" else model,
            dtype=form.dtype,
            initial="pretrained",
            task="classification" if form.family == "roberta" else "causal-lm",
            num_labels=3 if form.family == "roberta" else None,
            seed=0,
            base=Path("."),
        )

    federation = Federation(name, form).run()
    names = []
    for label, model in federation.method.export(federation.state, federation.model):
        names.append(label)
        model.eval()
        wanted = logits(model, form.family)
        save_result(model, tokenizer(), tmp_path / label, merge=federation.method.saves_merged)  # type: ignore[arg-type]
        read = load_result(tmp_path / label, loader)
        assert torch.equal(logits(read.model, form.family), wanted)
    assert names and len(set(names)) == len(names)
    assert len(names) == 1 or "global" not in names


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch(family)).logits
    return result


@pytest.mark.parametrize(("name", "form"), cases("fedavg"))
def test_one_shot_is_the_first_round_of_many(name: str, form: Form) -> None:
    if form.settings.get("arrival") == "asynchronous":
        form = dataclasses.replace(form, settings={**form.settings, "arrival": "synchronous"})
    one_shot, of_many = Federation(name, form, rounds=1), Federation(name, form, rounds=5)
    assert (one_shot.method.rounds, of_many.method.rounds) == (1, 5)
    one_shot.round(1), of_many.round(1)
    assert one_shot.state_bits() == of_many.state_bits()
    assert one_shot.exported() == of_many.exported()
    assert one_shot.wire == of_many.wire or [entry | {"framed_bytes": 0} for entry in one_shot.wire] == [
        entry | {"framed_bytes": 0} for entry in of_many.wire
    ]


@pytest.mark.parametrize(
    "label",
    ["full", "full-bfloat16", "lora", "lora-classifier", "adapter", "prompt", "freeze-a", "unlike-ranks"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_asynchronous_ends_with_the_synchronous_bits(label: str, dropout: float) -> None:
    form, simulation = FORMS["fedavg"][label], Simulation(dropout=dropout, delay_s=10.0)
    both = {
        arrival: Federation("fedavg", form, seed=2, simulation=simulation, rounds=1, arrival=arrival)
        for arrival in ("synchronous", "asynchronous")
    }
    outcomes = {arrival: federation.round(1, quorum=1) for arrival, federation in both.items()}
    assert outcomes["synchronous"].clients == outcomes["asynchronous"].clients != [0, 1, 2, 3]
    assert both["synchronous"].exported() == both["asynchronous"].exported()
    in_order = Federation("fedavg", form, seed=2, rounds=1)
    in_order.round(1)
    assert (in_order.exported() == both["asynchronous"].exported()) == (dropout == 0)
