"""bfloat16 beside float32, every method that takes gradients: norms, masters, sums, what is exported.

Both sides begin with the same weights, which bfloat16 has. What is compared with is worked out here in
float64, or is the same run in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import contract
import pytest
import torch
from contract import FORMS, Federation
from model_families import build
from torch import Tensor

from fedtune.core.state import to_payload
from fedtune.core.wire import decode
from fedtune.methods import registry
from fedtune.methods.fedavg.method import CONTROL
from fedtune.methods.fedavg.own_parts import kept

SGD = {"optimizer": "sgd", "momentum": 0.0, "lr_schedule": "constant", "local_epochs": None}
GRADIENTS = [name for name in registry.METHODS if "max_grad_norm" in registry.config_class(name).model_fields]
CASES = [  # but those whose updates travel in fewer bits: their rounding is another, by far
    pytest.param(name, label, id=f"{name}-{label}")
    for name in GRADIENTS
    for label in FORMS.get(name, {})
    if ("bfloat16" in label or label == next(iter(FORMS[name]))) and not FORMS[name][label].wire
]
every_case = pytest.mark.parametrize(("name", "label"), CASES)


def trained(name: str, label: str, dtype: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Federation:
    """One round, or what a method has of it, from weights that are bfloat16's on both sides."""
    monkeypatch.setattr(
        contract, "build", lambda family, dtype, blocks: build(family, torch.bfloat16, blocks).to(dtype)
    )
    form = FORMS[name][label]
    settings = {n: v for n, v in form.settings.items() if n not in ("betas", "masters", *more)}
    monkeypatch.setitem(FORMS[name], label, replace(form, dtype=dtype, settings=settings))
    if "rounds" in registry.config_class(name).model_fields:
        more["rounds"] = 1
    keeps = {"momentum": 0.5} if "keep_optimizer" in settings else {}  # of plain SGD there is nothing to keep
    changed: dict[str, Any] = {**SGD, **keeps, **more}
    return Federation(name, label, **changed).run()


def updates(federation: Federation) -> dict[int, dict[str, Tensor]]:
    """What each client changed, float64. A reference's clients send their weights, the others the change."""
    found = {}
    orders = {sent.client: decode(sent.frame).payload.tensors for sent in federation.transport.orders}
    for (_, client), frame in federation.transport.replies.items():
        reply = decode(frame).payload.tensors
        from_zero = federation.name not in ("standalone", "centralized", "badam")
        found[client] = {
            n: t.double() - (0.0 if from_zero else orders[client][n].double())
            for n, t in reply.items()
            if not n.startswith(CONTROL)
        }
    return found


def changes(federation: Federation) -> dict[tuple[int, str], dict[str, Tensor]]:
    """What each client changed together, float64: the update, with it parts that stay, or a second model."""
    found = {(client, "update"): update for client, update in updates(federation).items()}
    first = dict[str, Tensor](
        federation.model.named_parameters()
    )  # of parts that stay, as they were at first
    first |= {n.partition("/")[2]: t for n, t in federation.saved[0].state.tensors.items()}
    for client, state in federation.runner.states.items():
        own = {n: t.double() - first[n].detach().double() for n, t in kept(state).items()}
        if own.keys() & found[client, "update"].keys():
            found[client, "second model"] = own
        else:
            found[client, "update"] |= own
    return found


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())]).norm())


@every_case
def test_a_clipped_step_has_the_length_that_it_is_clipped_to(
    name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rate · limit by hand. A norm taken in bfloat16 would be off by up to 2⁻⁸, 4e-3."""
    rate, limit, rounded = 0.5, 1e-3, name in ("badam", "centralized")
    if rounded:  # these send bfloat16 weights: the step must be long beside their rounding
        rate, limit = 1e3, 1e-2
    more: dict[str, Any] = {"lr": rate, "max_grad_norm": limit, "local_steps": 1}
    for found in changes(trained(name, label, "bfloat16", monkeypatch, **more)).values():
        assert norm(found) == pytest.approx(rate * limit, rel=2e-3 if rounded else 2e-4)


@every_case
def test_steps_too_short_for_bfloat16_add_up_as_in_float32(
    name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights without masters would stay where they are; what is left is the error of the gradients."""
    if name in ("badam", "centralized"):
        pytest.skip("its result is bfloat16 weights, which do not hold such a change")
    more: dict[str, Any] = {"lr": 2e-4, "local_steps": 8}
    narrow, wide = (changes(trained(name, label, d, monkeypatch, **more)) for d in ("bfloat16", "float32"))
    assert narrow.keys() == wide.keys()
    for which, wanted in wide.items():
        off = {n: narrow[which][n] - wanted[n] for n in wanted}
        assert 0 < norm(off) < 0.2 * norm(wanted)  # 0.02 to 0.17 here
    if (name, label) == ("fedavg", "full"):
        start = build("llama", torch.bfloat16, 2).state_dict()
        step = {n: tensor / 8 for n, tensor in wide[0, "update"].items()}
        lost = sum(int(((start[n].double() + step[n]).bfloat16() == start[n]).sum()) for n in step)
        assert lost > 0.9 * sum(tensor.numel() for tensor in step.values())


@pytest.mark.parametrize(
    ("name", "label"), [case.values for case in CASES if case.values[0] in ("fedavg", "fedbiot", "fedot")]
)
def test_the_servers_mean_is_that_of_float64(name: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ n u / Σ n, whatever dtype the updates came in, onto weights that the server keeps in float32."""
    federation = trained(name, label, "bfloat16", monkeypatch, lr=0.05, local_steps=2)
    before, after = federation.saved[0].state.tensors, to_payload(federation.state).tensors
    found, everyone, seen = updates(federation), sum(federation.sizes.values()), 0
    for key, now in after.items():
        block, _, inner = key.partition("/")
        if block not in ("weights", "adapter") or inner not in found[0]:
            continue
        mean = torch.stack([found[c][inner] * n for c, n in federation.sizes.items()]).sum(0) / everyone
        wanted = before[key].double() + mean
        assert now.dtype == torch.float32
        torch.testing.assert_close(
            now.double(), wanted, rtol=2.0**-22, atol=float(mean.abs().max()) * 2.0**-22
        )
        seen += 1
    assert seen == len(found[0])


def test_control_variates_are_the_updates_by_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Δc_i = (w(t) − w_i) / Σ rates in float32, beside an update in bfloat16; the server's is their mean."""
    more: dict[str, Any] = {"lr": 2e-4, "local_steps": 8}
    label = "own-head-bfloat16-scaffold"
    narrow, wide = (trained("fedavg", label, dtype, monkeypatch, **more) for dtype in ("bfloat16", "float32"))
    found = {}
    for federation in (narrow, wide):
        replies = {c: decode(frame).payload.tensors for (_, c), frame in federation.transport.replies.items()}
        found[federation] = {
            client: {n.removeprefix(CONTROL): t for n, t in reply.items() if n.startswith(CONTROL)}
            for client, reply in replies.items()
        }
    mean: dict[str, Tensor] = {}
    for client, update in updates(narrow).items():
        sent, wanted = found[narrow][client], found[wide][client]
        assert sent.keys() == update.keys() and {t.dtype for t in sent.values()} == {torch.float32}
        off = {n: sent[n].double() * 8 * 2e-4 + update[n] for n in sent}
        assert norm(off) < 2.0**-8 * norm(update)  # the update's rounding alone
        off = {n: sent[n].double() - wanted[n].double() for n in sent}
        assert 0 < norm(off) < 0.2 * norm(wanted)
        mean = {n: mean.get(n, 0.0) + t.double() / 3 for n, t in sent.items()}
    for name, tensor in mean.items():
        torch.testing.assert_close(
            narrow.state.control[name].double(),
            tensor,
            rtol=2.0**-22,
            atol=float(tensor.abs().max()) * 2.0**-22,
        )


def test_what_an_optimiser_keeps_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum's sum after eight steps, of gradients that are bfloat16's."""
    more: dict[str, Any] = {"lr": 2e-4, "local_steps": 8}
    label = "ditto-bfloat16-diloco"
    narrow, wide = (trained("fedavg", label, dtype, monkeypatch, **more) for dtype in ("bfloat16", "float32"))
    for client, state in wide.runner.states.items():
        wanted = {n: t for n, t in state.tensors.items() if n.startswith("momentum_buffer:")}
        found = {n: narrow.runner.states[client].tensors[n] for n in wanted}
        assert wanted and {t.dtype for t in found.values()} == {torch.float32}
        off = {n: found[n].double() - wanted[n].double() for n in wanted}
        assert 0 < norm(off) < 0.2 * norm(wanted)


@every_case
def test_what_is_exported_is_what_the_server_keeps_rounded_once(
    name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bfloat16 where the model's weight is, and not at all where it is float32, as what is added is."""
    federation = trained(name, label, "bfloat16", monkeypatch, lr=0.05, local_steps=2)
    _, model = next(iter(federation.method.export(federation.state, federation.model)))
    exported = {
        re.sub(r"\.default|modules_to_save\.", "", n): p.detach() for n, p in model.named_parameters()
    }
    held = to_payload(federation.state).tensors
    checked = [
        key
        for key in held
        if not key.startswith(("control/", "start/", "emulator/", "merged/", "trained/1", "trained/2"))
    ]
    assert checked
    for key in checked:
        inside = re.sub(r"^[^/]*/(\d+/)?([a-z]+[.:])?(\d+(\.added)?[.:])?", "", key)
        inside = inside.removeprefix("classifier.")  # in a list of parts that train whole: after its name
        there = [p for name, p in exported.items() if f".{name}".endswith(f".{inside}")]
        assert any(torch.equal(p.detach(), held[key].to(p.dtype)) for p in there), (key, inside, len(there))
