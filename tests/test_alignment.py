"""Alignment of an emulator: the loss by hand, a teacher that is asked once, and who changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_families import DECODERS, build
from torch import Tensor, nn
from torch.testing import assert_close

from fedtune.core.types import ServerEnv
from fedtune.data.batches import collate
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.errors import FederationError
from fedtune.methods.fedbiot.method import FedBiOT
from fedtune.methods.fedbiot.server import ADAPTER, EMULATOR, factors
from fedtune.methods.fedbiot.settings import Config, OffsiteConfig
from fedtune.methods.fedbiot.state import State
from fedtune.models import alignment
from fedtune.models.alignment import alignment_loss, distillation_loss, entering, representation_loss
from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import build as build_from
from fedtune.models.emulator import submodel, take

FORMS = ("mean", "paper", "rms-normalized")


def examples(count: int = 6, seed: int = 1) -> list[Encoded]:
    """Prompts of 2 to 4 tokens that do not count, answers of 2 to 5 that do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    items = []
    for _ in range(count):
        prompt, answer = [[draw(3, 63) for _ in range(draw(*size))] for size in ((2, 4), (2, 5))]
        items.append(Encoded((*prompt, *answer), (*[IGNORED] * len(prompt), *answer)))
    return items


def method(
    family: str = "llama", blocks: int = 6, public: list[Encoded] | None = None, *, both_ends: bool = False,
    **settings: Any,
) -> tuple[FedBiOT, nn.Module]:  # fmt: skip
    kind = OffsiteConfig if both_ends else Config
    known = {"lora": {"rank": 2, "alpha": 4.0}, "adapter_layers": 2, "layer_dropout": 0.5, "lr": 0.01}
    made = FedBiOT(kind.model_validate({**known, **settings}), seed=3)
    made.prepare(ServerEnv(examples() if public is None else public, 0, torch.device("cpu")))
    return made, made.client_model(lambda: build(family, blocks=blocks))


def woken(state: State, seed: int = 5) -> State:
    """The state with another adapter than the untrained one."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in state.adapter.items()}
    return State(adapter, state.emulator, state.merged, state.holders, state.round)


class Given:
    """The end of a model that gave its logits whole."""

    def logits(self, rows: Tensor) -> Tensor:
        return rows


def whole(logits: Tensor, chosen: list[tuple[int, int]]) -> Any:
    """Of logits (batch, tokens, vocabulary), the chosen positions, as a teacher gives them."""
    return Given(), torch.stack([logits[row, token] for row, token in chosen])


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in every_tensor(model).items() if not torch.equal(before[name], tensor)}


def test_terms_by_hand() -> None:
    teacher, student = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([[0.0, 2.0], [2.0, 1.0]])
    # squared distances of the two tokens: 1 and 9
    assert float(representation_loss(student, teacher, "paper")) == 5.0
    assert float(representation_loss(student, teacher, "mean")) == 2.5
    # the differences over the root of 25 / 4 are 0.4, 0, 0 and 1.2; their squares 0.16 and 1.44
    assert float(representation_loss(student, teacher, "rms-normalized")) == pytest.approx(0.4, rel=1e-6)
    # KL((¾, ¼) ‖ (½, ½)) and KL of equals, the mean of the two tokens
    logits = torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0]])
    wanted = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert float(distillation_loss(torch.zeros(2, 2), logits)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.0, 3.0, 100.0])
def test_how_the_forms_grow_with_the_hidden_states(scale: float) -> None:
    """The authors' (t − s) / std, std² = mean of t², has no unit; the other two have that of t²."""
    t = [[3.0, -1.0, 2.0], [0.0, 1.0, -3.0]]
    s = [[1.0, -1.0, 3.0], [2.0, 1.0, -2.0]]  # differences 2, 0, −1, −2, 0, −1: squares 4, 0, 1, 4, 0, 1
    teacher, student = scale * torch.tensor(t), scale * torch.tensor(s)
    wanted = {"mean": scale**2 * 10 / 6, "paper": scale**2 * 10 / 2, "rms-normalized": 10 / 24}
    for form, value in wanted.items():  # Σ t² = 24
        assert float(representation_loss(student, teacher, form)) == pytest.approx(value, rel=1e-5)  # type: ignore[arg-type]
    # what the teacher's tokens are divided by is the teacher's alone
    far = representation_loss(10 * student, teacher, "rms-normalized")
    squares = sum((a - 10 * b) ** 2 for x, y in zip(t, s, strict=True) for a, b in zip(x, y, strict=True))
    assert float(far) == pytest.approx(squares / 24, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_which_tokens_count(form: Any) -> None:
    """Answer tokens, in the authors' form all but padding; the tokens are those that predict."""
    _, full = method()
    student, items = (
        full.eval(),
        [Encoded((5, 6, 7, 8), (IGNORED, IGNORED, 7, 8)), Encoded((9, 10), (IGNORED, 10))],
    )
    block, batch = find_blocks(student).modules[4], collate(items, 0)
    with torch.no_grad(), entering(block) as seen:
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    answers = [(0, 1), (0, 2), (1, 0)]  # what predicts tokens 2 and 3 of the first, token 1 of the second
    real = [*((0, k) for k in range(4)), (1, 0), (1, 1)]
    counted = real if form == "rms-normalized" else answers
    for row in range(2):
        for token in range(4):
            hidden = seen[0].clone()
            hidden[row, token] += 1
            loss = alignment_loss(student, block, batch, hidden, whole(logits, answers), 0.0, form)
            assert (float(loss.detach()) > 1e-4) == ((row, token) in counted)
            other = logits.clone()
            other[row, token, 3] += 5
            loss = alignment_loss(student, block, batch, seen[0], whole(other, answers), 1.0, form)
            assert (float(loss.detach()) > 1e-4) == ((row, token) in answers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", DECODERS)
def test_without_anything_left_out_the_loss_is_zero_to_rounding(family: str, form: Any) -> None:
    model = build(family, blocks=3)
    student = build_from(submodel(model, take(model, range(3))))
    batch = collate(examples(), 0)
    with torch.no_grad():
        with entering(find_blocks(model).modules[2]) as seen:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        own = find_blocks(student).modules[2]
        answers = [
            (r, k - 1) for r, row in enumerate(batch["labels"]) for k in range(1, len(row)) if row[k] >= 0
        ]
        loss = alignment_loss(student, own, batch, seen[0], whole(logits, answers), 1.0, form)
        moved = whole(logits + torch.arange(64), answers)
        other = alignment_loss(student, own, batch, seen[0] + 1, moved, 1.0, form)
    assert abs(float(loss)) < 1e-6 < 1e-2 < float(other)


def spied(
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    room: int,
    *,
    both_ends: bool,
    rounds: int,
    form: str = "paper",
) -> tuple[list[float], dict[str, int], State]:
    """Losses of every step, before and between rounds, and forward passes of the teacher's two models."""
    made, full = method(
        both_ends=both_ends,
        adapter_layers=2,
        alignment={"steps_before": steps, "steps": steps, "batch_size": 4, "lr": 0.01, "form": form},
    )
    server = made.at_server()
    server.room = room
    losses, counts = [], {"whole": 0, "tail": 0}
    plain = alignment.alignment_loss

    def noted(*args: Any) -> Tensor:
        loss = plain(*args)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(alignment, "alignment_loss", noted)
    server.base.register_forward_hook(lambda *_: counts.__setitem__("whole", counts["whole"] + 1))
    server.teacher().tail.register_forward_hook(lambda *_: counts.__setitem__("tail", counts["tail"] + 1))
    state = made.init(full)
    for round in range(rounds):
        state = woken(state, seed=round)
        server.emulate(state.merged)
        emulator = made.tune_emulator(state, state.emulator, steps, round + 1)
        state = State(state.adapter, emulator, state.merged)
    monkeypatch.setattr(alignment, "alignment_loss", plain)
    return losses, counts, state


@pytest.mark.parametrize("form", FORMS)
def test_what_the_frozen_blocks_make_is_computed_once(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    steps, rounds = 4, 3
    kept, once, state = spied(monkeypatch, steps, 10**9, both_ends=False, rounds=rounds, form=form)
    again, always, other = spied(monkeypatch, steps, 0, both_ends=False, rounds=rounds, form=form)
    # six public examples, each once and alone
    assert once == {"whole": 6, "tail": (rounds + 1) * steps}
    assert always == {"whole": (rounds + 1) * steps, "tail": 0}
    assert kept == pytest.approx(again, rel=1e-4) and len(kept) == (rounds + 1) * steps
    for name, tensor in state.emulator.items():
        assert_close(tensor, other.emulator[name], rtol=1e-3, atol=1e-4)


def test_with_an_adapter_at_both_ends_it_is_computed_anew_once_the_adapter_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, rounds = 4, 2
    kept, once, _ = spied(monkeypatch, steps, 10**9, both_ends=True, rounds=rounds)
    again, always, _ = spied(monkeypatch, steps, 0, both_ends=True, rounds=rounds)
    assert once == {"whole": 6 * (rounds + 1), "tail": steps * (rounds + 1)}
    assert always == {"whole": steps * (rounds + 1), "tail": 0}
    assert kept == pytest.approx(again, rel=1e-4)


@pytest.mark.parametrize("room", [0, 2, 6])  # examples
def test_no_bit_depends_on_what_was_kept_before(room: int) -> None:
    """A resumed run begins with nothing kept, in the middle of one that has kept all or some."""
    made, _ = method(alignment={"steps_before": 0, "batch_size": 3})
    server = made.at_server()
    public = examples()
    batch = collate([public[i] for i in (5, 0, 3)], 0)
    server.room = room * 9 * 32 * 4
    teacher = server.teacher()
    fresh, (_, end) = teacher.ask((5, 0, 3), batch)
    for indices in ((0, 1), (3, 2, 4), (5,)):
        teacher.ask(indices, collate([public[i] for i in indices], 0))
    again, (_, other) = teacher.ask((5, 0, 3), batch)
    assert torch.equal(fresh, again) and torch.equal(end, other)


def test_what_is_kept_stays_within_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made, full = method(alignment={"steps_before": 4, "batch_size": 2})
    server = made.at_server()
    server.room = room = 2 * 9 * 32 * 4  # two of the longest examples
    made.init(full)
    teacher = server.teacher()
    used = sum(hidden.nbytes for hidden in teacher.kept.values())
    assert 0 < used <= room and teacher.room == room - used
    teacher.forget()
    assert teacher.room == room and not teacher.kept


@pytest.mark.parametrize("both_ends", [False, True])
def test_the_teacher_holds_the_current_adapter_and_only_the_emulators_lora_changes(both_ends: bool) -> None:
    made, full = method(
        both_ends=both_ends, alignment={"steps_before": 0, "steps": 3, "batch_size": 6, "lr": 0.01}
    )
    server = made.at_server()
    start = made.init(full)
    assert set(start.emulator) and all(name.startswith(EMULATOR) for name in start.emulator)
    state = woken(start)
    student, teacher = server.emulate(state.merged), server.teacher()
    seen = {
        "whole": every_tensor(server.full),
        "tail": every_tensor(teacher.tail),
        "student": every_tensor(student),
    }
    emulator = made.tune_emulator(state, state.emulator, 3, 1)
    adapter = {id(p) for p in factors(server.full, server.places.adapter, ADAPTER).values()}
    adapter |= {id(p) for p in server.tail_factors().values()}
    places = made.division(student)
    adapter |= {id(p) for p in factors(student, places.adapter, ADAPTER).values()}
    tuned = {id(p) for p in server.emulator_factors().values()}
    models = {"whole": server.full, "tail": teacher.tail, "student": student}
    for which, model in models.items():
        ids = {name: id(p) for name, p in model.named_parameters()}
        different = changed(seen[which], model)
        # the adapter's were loaded before the first step; of the others only the emulator's LoRA moved
        assert {n for n in different if ids[n] not in adapter} == {n for n, i in ids.items() if i in tuned}
        assert (which == "student") == bool(different & {n for n, i in ids.items() if i in tuned})
        ours = {n: p for n, p in model.named_parameters() if id(p) in adapter}
        where = places.adapter if which == "student" else server.places.adapter
        wanted = server.tail_factors() if which == "tail" else factors(model, where, ADAPTER)
        assert len(ours) == len(wanted) > 0
        for name, parameter in wanted.items():
            assert torch.equal(parameter, state.adapter[name])
    assert emulator.keys() == state.emulator.keys()
    assert all(not torch.equal(emulator[n], t) for n, t in state.emulator.items())


def test_alignment_brings_the_emulator_closer() -> None:
    made, full = method(
        public=(public := examples(8)),
        alignment={"steps_before": 0, "steps": 60, "batch_size": 8, "lr": 3e-3, "form": "paper"},
        distill_weight=1.0,
        lora={"rank": 4, "alpha": 8.0},
    )
    server, state = made.at_server(), woken(made.init(full))
    student = server.emulate(state.merged)
    made.tune_emulator(state, state.emulator, 1, 1)
    batch = collate(public, 0)
    block = find_blocks(student).modules[made.division(student).back[0]]

    def loss() -> float:
        hidden, end = server.teacher().ask(range(8), batch)
        with torch.no_grad():
            return float(alignment_loss(student, block, batch, hidden, end, 1.0, "paper"))

    before = loss()
    made.tune_emulator(state, state.emulator, 60, 1)
    assert loss() < 0.7 * before


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    made, full = method(alignment={"steps_before": 5, "lr": 1e30})
    with pytest.raises(FederationError, match=r"alignment loss became .* lower method\.alignment\.lr"):
        made.init(full)
