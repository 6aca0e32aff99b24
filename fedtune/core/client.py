"""The client's side: one model in memory, and each client's own examples and kept state beside it.

A runner turns a frame into a frame, so every transport runs the same code: in process for all simulated
clients in turn, across a network for the one client of a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fedtune.core.compression import Compression
from fedtune.core.faults import LEFT_OUT, faults
from fedtune.core.seeds import derive_seed
from fedtune.core.store import Store
from fedtune.core.types import (
    ERROR,
    EVALUATION,
    SCORES,
    SECURE,
    ClientEnv,
    ClientError,
    ClientProtection,
    ClientResult,
    Frame,
    Gate,
    Method,
    Payload,
    Scalar,
    untold,
)
from fedtune.core.wire import Content, FrameError, decode, encode, lay_out
from fedtune.data.batching import RANDOM, Batching
from fedtune.data.encoded import lengths_of
from fedtune.measure.memory import MemoryMeter
from fedtune.models.memory_efficient import can_compute_again, resolved

if TYPE_CHECKING:
    from fedtune.data.encoded import Encoded


V = TypeVar("V")
LOWER = "Lower evaluation.memory, evaluation.batch_size or data.max_length."  # for too little memory


@dataclass(frozen=True)
class Evaluator:
    """How a client scores the global model on examples of its own.

    Attributes:
        method: Its `client_step` scores instead of training.
        protection: With it the server learns the sums over all clients alone.
    """

    method: Method[Any]
    protection: ClientProtection | None = None


class ClientRunner:
    """Runs client steps on one model.

    Args:
        method: The method, built from its configuration.
        model: What `method.client_model` gave; every simulated client uses it in turn.
        data: Each client's encoded examples.
        pad_id: The padding token.
        seed: The run's seed.
        device: Where the model lies.
        store: What clients were sent to hold; in memory by default.
        protection: With it a client answers to secure aggregation and never sends a plain update.
        gate: What its operator accepts of single orders; None: anything.
        batching: How examples become batches.
        compression: How updates travel; None: as they are.
        laid_out: Replies are not joined: what sends them does so before the model is used again.
        evaluator: Answers orders for scores; None: they are refused.
    """

    def __init__(
        self,
        method: Method[Any],
        model: nn.Module,
        data: Mapping[int, Sequence[Encoded]],
        *,
        pad_id: int,
        seed: int,
        device: torch.device,
        store: Store | None = None,
        protection: ClientProtection | None = None,
        gate: Gate | None = None,
        batching: Batching = RANDOM,
        compression: Compression | None = None,
        laid_out: bool = False,
        evaluator: Evaluator | None = None,
    ) -> None:
        self._evaluator = evaluator
        self.store = store or Store()
        self._protection, self._gate, self._compression = protection, gate, compression
        self._encode = lay_out if laid_out else encode
        self._method, self._data, self._batching = method, data, batching
        self.use(model)
        self._pad_id, self._seed, self._device = pad_id, seed, device
        self._peaks: dict[int, Sequence[int]] = {}  # of steps that were followed, for those like them
        self.states: dict[int, Payload] = {}  # what each client keeps between its rounds
        self.on_step: Callable[[int, int, int], None] | None = None  # client, steps done, of how many

    def use(self, model: nn.Module) -> None:
        """Replaces the model, once what the method trains is attached to it."""
        self._model = nn.Module() if self._method.sends_model else model

    def handle(self, client: int, frame: Frame) -> Frame:
        """Does what the order in `frame` says and returns the reply's frame.

        The reply's meta holds the step's metrics and its measured `peak_bytes`. It holds no wall time:
        the length of a frame must be the same when a run is repeated.
        Random numbers that PyTorch draws by itself (dropout) come from a stream of this client and
        round, and the process's own stream is left as it was.

        Raises:
            FrameError: The order cannot be read.
            ClientError: The client has no examples or none with a token to train, or the method cannot go on
                (a loss that is NaN).
            ProgramError: Something broke that would break for every client.
        """
        order = decode(frame)
        meta, parts = order.meta, _split(order.payload, SECURE)
        del frame, order  # what came is the method's alone, which may let go of it
        scores = bool(meta.get(SCORES))
        doing = "evaluation by" if scores else "training of"
        part = f"{doing} client {client} in round {meta.get('round')}"
        lower = (lambda: LOWER) if scores else (lambda: self._memory(client))
        with faults(part, lower, passing=LEFT_OUT):
            reply = (self._score if scores else self._handle)(client, meta, *parts)
            if self._gate is not None:
                self._gate.sending(int(meta["round"]), str(meta.get("phase", "")))
            return reply

    def _handle(
        self, client: int, about: Mapping[str, Scalar], job: Payload | None, added: Payload | None
    ) -> Frame:
        round = int(about["round"])
        if not self._data.get(client):
            raise ClientError("it has no examples")
        if not any(item.trained for item in self._data[client]):
            raise ClientError(
                f"none of its {len(self._data[client])} examples has a token to train: no answer is left of "
                "them; look at data.max_length and at the answers in its data"
            )
        phase = str(about.get("phase", ""))
        if bool(phase) != (self._protection is not None):
            raise ClientError(
                "it was asked for a plain update, and its configuration has federation.secure_aggregation"
                if self._protection
                else "it was asked to take part in secure aggregation, which its configuration does not have"
            )
        if self._gate is not None:
            self._gate.before(round, phase, added or Payload())
        state, secrets = _split(self.states.get(client), SECURE)
        state, errors = _split(state, ERROR)
        protection = self._protection
        if protection is not None and phase != "masked":
            reply, secrets = protection.answer(
                phase,
                added or Payload(),
                secrets,
                client=client,
                round=round,
                examples=len(self._data[client]),
            )
            self.states[client] = _joined(state, secrets, SECURE)
            return self._encode(Content(_joined(None, reply, SECURE), {"round": round, "client": client}))
        meter = MemoryMeter(
            self._device,
            [errors.tensors] if errors else [],
            known=self._peaks,
            about=(_form(job), _form(state)),
        )
        env = self._env(client, round, self._data[client], state, meter)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(env.seed, "dropout"))
            result = self._method.client_step(job or Payload(), env)
        if protection is not None:  # the reply reports nothing of its own: the loss is in the sum
            reply, secrets = protection.mask(result, added or Payload(), secrets, client=client, round=round)
            self.states[client] = _joined(result.state or state, secrets, SECURE)
            return self._encode(Content(_joined(None, reply, SECURE), {"round": round, "client": client}))
        payload, kept = result.payload, dict[str, Tensor]()
        if self._compression is not None:
            with meter.whole([self._model, dict(payload.tensors)], like="compression"):
                tensors, kept = self._compression.compress(
                    payload.tensors, errors.tensors if errors else {}, partial(env.generator, "compression")
                )
            payload = Payload(tensors, payload.scalars)
        if kept:
            self.states[client] = _joined(result.state or state, Payload(kept), ERROR)
        elif result.state is not None:
            self.states[client] = result.state
        return self._encode(Content(payload, _about(result, client, round, meter)))

    def _score(
        self, client: int, about: Mapping[str, Scalar], job: Payload | None, added: Payload | None
    ) -> Frame:
        """The reply to an order for scores. What the method keeps is as before, whatever comes of it."""
        round, phase, evaluator = int(about["round"]), str(about.get("phase", "")), self._evaluator
        if evaluator is None:
            raise ClientError("it was asked for scores, and its configuration has evaluation.where: server")
        protection = evaluator.protection
        if bool(phase) != (protection is not None):
            raise ClientError(
                f"it was asked for {'masked' if phase else 'plain'} scores, and its configuration has "
                f"{'no ' if phase else ''}federation.secure_aggregation"
            )
        if self._gate is not None:
            self._gate.before(round, phase, added or Payload())
        kept, secrets = _split(self.states.get(client), EVALUATION)
        if protection is not None and phase != "masked":
            examples = len(self._data[client])
            reply, secrets = protection.answer(
                phase, added or Payload(), secrets, client=client, round=round, examples=examples
            )
            self.states[client] = _joined(kept, secrets, EVALUATION)
            return self._encode(Content(_joined(None, reply, SECURE), {"round": round, "client": client}))
        meter = MemoryMeter(self._device)
        result = evaluator.method.client_step(job or Payload(), self._env(client, round, (), None, meter))
        if protection is None:
            return self._encode(Content(result.payload, _about(result, client, round, meter)))
        reply, secrets = protection.mask(result, added or Payload(), secrets, client=client, round=round)
        self.states[client] = _joined(kept, secrets, EVALUATION)
        return self._encode(Content(_joined(None, reply, SECURE), {"round": round, "client": client}))

    def _env(
        self, client: int, round: int, items: Sequence[Encoded], state: Payload | None, meter: MemoryMeter
    ) -> ClientEnv:
        return ClientEnv(
            client=client,
            round=round,
            seed=derive_seed(self._seed, "client", client, round),
            model=self._model,
            items=items,
            pad_id=self._pad_id,
            state=state,
            memory=meter,
            device=self._device,
            store=self.store,
            batching=self._batching,
            stepped=partial(self.on_step, client) if self.on_step else untold,
        )

    def _memory(self, client: int) -> str:
        """The batch that memory was not enough for, and what makes it smaller."""
        config, rows = self._method.config, self._batching.rows(self._data[client], torch.Generator())
        batch, what = getattr(config, "batch_size", 1), "examples" if rows is self._data[client] else "rows"
        longest = max(lengths_of(rows))
        lower = ["method.batch_size"] if batch > 1 else []
        lower += ["data.max_length"]
        again, other = getattr(config, "gradient_checkpointing", None), list[str]()
        if (
            again is not None
            and can_compute_again(self._model)
            and resolved(self._model, again) not in ("full", 1)
        ):
            other.append("method.gradient_checkpointing=full")
        frozen = any(not parameter.requires_grad for parameter in self._model.parameters())
        if getattr(config, "offload_params", None) == "none" and frozen and self._device.type == "cpu":
            other.append("method.offload_params=disk")
        if any(parameter.dtype == torch.float32 for parameter in self._model.parameters()):
            other.append("model.dtype=bfloat16")
        return (
            f"Its batches have up to {min(batch, len(rows))} {what} x {longest} tokens: lower "
            f"{' or '.join(lower)}{', or set ' + ' or '.join(other) if other else ''}."
        )


def _about(result: ClientResult, client: int, round: int, meter: MemoryMeter) -> dict[str, Scalar]:
    """What a reply says beside its content."""
    memory: dict[str, Scalar] = {"peak_bytes": meter.peak_bytes, **meter.by_device, "how": meter.how}
    return {**result.metrics, "round": round, "client": client, **memory}


def _split(payload: Payload | None, prefix: str) -> tuple[Payload | None, Payload | None]:
    """What has no prefix, and what has it, without; None for nothing."""
    if payload is None:
        return None, None
    parts = [
        Payload(_named(payload.tensors, prefix, has), _named(payload.scalars, prefix, has))
        for has in (False, True)
    ]
    plain, prefixed = (part if part.tensors or part.scalars else None for part in parts)
    return plain, prefixed


def _form(payload: Payload | None) -> Hashable:
    """What memory can depend on of a payload: everything but numbers."""
    if payload is None:
        return None
    tensors = tuple((name, tensor.shape, tensor.dtype) for name, tensor in payload.tensors.items())
    return tensors, tuple(value for value in payload.scalars.values() if isinstance(value, str))


class _Sent(dict[str, V]):
    """What came, by name; asked for something else, it is the order that does not fit."""

    def __missing__(self, name: str) -> V:
        raise FrameError(f"its order has nothing named {name}")


def _named(values: Mapping[str, V], prefix: str, has: bool) -> dict[str, V]:
    return _Sent(
        {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix) == has}
    )


def _joined(plain: Payload | None, prefixed: Payload | None, prefix: str) -> Payload:
    """What `_split` takes apart."""
    plain, prefixed = plain or Payload(), prefixed or Payload()
    return Payload(
        {**plain.tensors, **{prefix + name: tensor for name, tensor in prefixed.tensors.items()}},
        {**plain.scalars, **{prefix + name: scalar for name, scalar in prefixed.scalars.items()}},
    )
