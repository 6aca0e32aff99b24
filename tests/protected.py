"""Toy federations whose rounds are summed under masks, with noise, or both; a transport that can be bent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from toy import Bench, Toy, items

from fedtune.core.client import ClientRunner
from fedtune.core.loop import RoundLoop
from fedtune.core.types import SECURE, Arrival, Gate, Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.measure.clock import Clock
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config as KSeedConfig
from fedtune.protection.identity import Identity
from fedtune.protection.robust import Robust
from fedtune.protection.robust_mean import robust_mean
from fedtune.protection.secure_client import SecureClient
from fedtune.protection.settings import Privacy, SecureAggregation
from fedtune.protection.summing import Summing
from fedtune.transport.in_process import InProcess, Simulation

DATA = {client: items(client, client + 1, *[client] * client) for client in range(4)}
Change = Callable[[str, int, dict[str, Tensor]], dict[str, Tensor] | str | None]


class Wide(Toy):
    """A second tensor, whose gradient depends on the first."""

    def __init__(self, rows: int = 7) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.linspace(-1, 1, 11 * rows).reshape(rows, 11))

    def forward(self, **inputs: Tensor) -> Any:
        output = super().forward(**inputs)
        output.loss = output.loss + (self.more - self.w).square().mean()
        return output


class Bent:
    """Passes orders and replies on, written down by phase, after `order` and `reply` may have changed them.

    A change gets the phase, the client and the tensors, and returns others, a fault, or None to leave them.
    """

    def __init__(self, inner: InProcess) -> None:
        self.inner, self.seen = inner, list[tuple[str, int, dict[str, Tensor]]]()
        self.orders = list[tuple[str, int, bytes]]()
        self.order: Change = lambda phase, client, tensors: None
        self.reply: Change = lambda phase, client, tensors: None

    def exchange(
        self, round: int, frames: Iterable[tuple[int, bytes]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        phase = ""

        def sent() -> Iterator[tuple[int, bytes]]:
            nonlocal phase
            for client, frame in frames:
                phase = str(decode(frame).meta.get("phase", ""))
                self.orders.append((phase, client, frame))
                yield client, self._changed(self.order, phase, client, frame) or frame

        for arrival in self.inner.exchange(round, sent(), in_plan_order=in_plan_order):
            if arrival.fault:
                yield arrival
                continue
            self.seen.append((phase, arrival.client, own(decode(arrival.frame).payload)))
            changed = self._changed(self.reply, phase, arrival.client, arrival.frame)
            if isinstance(changed, str):
                yield Arrival(arrival.client, fault=changed)
            else:
                yield Arrival(arrival.client, changed or arrival.frame)

    def _changed(self, change: Change, phase: str, client: int, frame: bytes) -> Any:
        message = decode(frame)
        new = change(phase, client, own(message.payload))
        if new is None or isinstance(new, str):
            return new
        others = {n: t for n, t in message.payload.tensors.items() if not n.startswith(SECURE)}
        tensors = others | {SECURE + name: tensor for name, tensor in new.items()}
        return encode(Content(Payload(tensors, message.payload.scalars), message.meta))

    def of(self, phase: str) -> dict[int, dict[str, Tensor]]:
        """What clients replied in a phase, by client; of several rounds the last."""
        return {client: tensors for at, client, tensors in self.seen if at == phase}


def own(payload: Payload) -> dict[str, Tensor]:
    return {n.removeprefix(SECURE): t for n, t in payload.tensors.items() if n.startswith(SECURE)}


class Each:
    """Clients that each have an identity of their own, in one runner."""

    def __init__(self, guards: Sequence[SecureClient]) -> None:
        self._guards = guards

    def answer(self, *values: Any, client: int, **named: Any) -> Any:
        return self._guards[client].answer(*values, client=client, **named)

    def mask(self, *values: Any, client: int, **named: Any) -> Any:
        return self._guards[client].mask(*values, client=client, **named)


def federation(
    secure: SecureAggregation | None = None,
    privacy: Privacy | None = None,
    *,
    method: Any = None,
    simulation: Simulation = Simulation(),  # noqa: B008
    data: Any = None,
    model: nn.Module | None = None,
    rows: int = 7,
    identities: Sequence[Identity] = (),
    guards: list[SecureClient] | None = None,
    gate: Gate | None = None,
    robust: Robust | None = None,
    **settings: Any,
) -> tuple[Bench, Bent]:
    """Four clients of FedAvg, or of another method."""
    defaults = {"trainable": "full", "rounds": 9, "optimizer": "sgd", "lr": 0.03, "batch_size": 1}
    method = method or FedAvg(Config(**{**defaults, **settings}), seed=0)
    data = data or DATA
    bench, device = Bench(method, model or Wide(rows), data), torch.device("cpu")
    bound = robust_mean(robust, method, None) if robust else None
    guard: Any = SecureClient(method, secure.bits, privacy, robust=bound) if secure else None
    if identities:
        guard = Each([replace(guard, identity=identity) for identity in identities])
    if guards is not None:  # to be filled with one a client, and changed in mid-round
        guards += [guard for _ in data]
        guard = Each(guards)
    bench.runner = ClientRunner(
        method, bench.model, data, pad_id=0, seed=0, device=device, protection=guard, gate=gate
    )
    clock = Clock()
    inner = InProcess(bench.runner, simulation=simulation, deadline_s=None, seed=0, clock=clock)
    transport = Bent(inner)
    summing = Summing(method, secure, privacy) if secure or privacy else None
    bench.loop = RoundLoop(method, transport, bench.ledger, clock, device, protection=summing, robust=bound)
    return bench, transport


def kseed(**settings: Any) -> FedKSeed:
    """A FedKSeed for the toy model."""
    defaults = {"seeds": 8, "local_steps": 3, "lr": 0.25, "epsilon": 2.0**-6}
    return FedKSeed(KSeedConfig(**{**defaults, **settings}), seed=0)
