"""The words that server, clients, methods and transports share.

`Payload` is the only thing that crosses the wire. A `Method` is built from its configuration alone and
holds no state: the server's state goes in and a new one comes out, and a client sees its order and its
environment, never the server.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, runtime_checkable

from fedtune.core.cohort import Cohort, RoundOutcome
from fedtune.core.laid_frame import LaidFrame
from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.settings import Settings
from fedtune.data.batching import RANDOM, Batching
from fedtune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedtune.data.encoded import Encoded
    from fedtune.measure.memory import MemoryMeter

Scalar = int | float | str | bool
Frame = bytes | bytearray | memoryview | mmap.mmap | LaidFrame  # a message as bytes, see wire.py
MODEL = "model:"  # prefix of tensors that a client is sent to hold, once, and not of a round's own content
SECURE = "secure:"  # prefix of what secure aggregation adds to a message and to what a client keeps
ERROR = "error:"  # prefix of what a client keeps of updates that were compressed; see compression.py
EVALUATION = "evaluation:"  # prefix of what a client keeps between the exchanges of a masked evaluation
SCORES = "scores"  # in an order's bookkeeping: it asks for scores of held-out examples, not for training


def scalar_bytes(value: Scalar) -> int:
    """Bytes of one scalar as the papers count them: 4 for a number, 1 for a flag, UTF-8 for text."""
    if isinstance(value, bool):
        return 1
    return len(value.encode()) if isinstance(value, str) else 4


@dataclass(frozen=True)
class Payload:
    """Named tensors and scalars: the only thing that crosses the wire."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Content in bytes, without names, shapes and framing (`payload_bytes` of the ledger)."""
        return sum(t.nbytes for t in self.tensors.values()) + sum(map(scalar_bytes, self.scalars.values()))

    def let_go(self, names: Iterable[str]) -> None:
        """Takes tensors out that lie elsewhere from now on, so that their memory here is free."""
        held = cast("dict[str, Tensor]", self.tensors)
        for name in names:
            del held[name]


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor on the wire must be. A dimension of None may have any length."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    limit: float = math.inf  # every |value| must be below it
    at_least: float = -math.inf  # no value may be below it


@dataclass(frozen=True)
class Order:
    """What the server asks of one client, and what the reply has to hold."""

    client: int
    payload: Payload
    expects: Mapping[str, TensorSpec]
    phase: str = ""  # of secure aggregation, where a round takes several exchanges
    plain_bytes: int = 0  # of a reply under masks: what it would have without them
    scalars: frozenset[str] = frozenset()  # names of those that the reply may have
    metrics: frozenset[str] = frozenset()  # names of those that the client may report beside the usual ones


@dataclass(frozen=True)
class Reply:
    """A client's answer after it passed every check."""

    client: int
    payload: Payload
    metrics: Mapping[str, float]
    cohort: Cohort

    @property
    def examples(self) -> int:
        """What the client that sent it weighs: by what it registered, not by what the reply claims."""
        return self.cohort.examples[self.client]


class ClientError(Exception):
    """A client cannot do what it was asked; the message says why. The round goes on without it."""


B = TypeVar("B")


class ContentStore(Protocol):
    """What a client was sent to hold, by digest; see store.py."""

    @property
    def on_disk(self) -> bool:
        """Whether what was put is mapped from disk, so that the memory it came in is free for other use."""

    def put(self, payload: Payload) -> str:
        """Keeps `payload` and returns its digest."""

    def get(self, key: str) -> Payload | None:
        """What has this digest, or None if it is not there any more."""

    def read(self, key: str, name: str) -> Tensor:
        """A tensor of what was put under this digest; ClientError if that is gone."""

    def built(self, key: str, build: Callable[[], B]) -> B:
        """What `build` makes, once for each key."""

    def unread(self, key: str) -> None:
        """What was put under this digest is on disk alone until it is used; it must not have been changed."""


def untold(done: int, total: int) -> None:
    """Nobody watches a client's steps."""


@dataclass(frozen=True)
class ClientEnv:
    """Everything a client has besides its order: it stays on the client's side."""

    client: int
    round: int
    seed: int  # of this client in this round; derive streams from it by purpose
    model: nn.Module
    items: Sequence[Encoded]
    pad_id: int
    state: Payload | None  # what this client kept from its last round
    memory: MemoryMeter
    device: torch.device
    store: ContentStore  # what it was sent to hold, by digest
    batching: Batching = RANDOM
    stepped: Callable[[int, int], None] = untold  # is told of each step: how many are done, of how many

    @cached_property
    def rows(self) -> Sequence[Encoded]:
        """What its batches are made of: its examples, or with `data.batching: packed` rows of several."""
        return self.batching.rows(self.items, self.generator("rows"))

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each row, where they decide which ones share a batch; else None."""
        return self.batching.lengths(self.rows)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator of this client and round for one purpose."""
        return torch_generator(self.seed, *purpose)

    def derive_seed(self, *purpose: str | int) -> int:
        """A seed of this client and round for one purpose."""
        return derive_seed(self.seed, *purpose)


@dataclass(frozen=True)
class ClientResult:
    """What a client's step gives back: the reply's content, its metrics and what the client keeps."""

    payload: Payload
    metrics: Mapping[str, float]  # "train_loss", "trained_tokens", "steps", ...: reported, not payload
    state: Payload | None = None


@dataclass(frozen=True)
class ServerEnv:
    """What the server has besides its state."""

    public: Sequence[Encoded]  # the public examples of `data.public`; empty without them
    pad_id: int
    device: torch.device
    batching: Batching = RANDOM

    def refuse_public(self, method: str) -> None:
        """Raises InputError if there are public examples, for a method that has no use for them."""
        if self.public:
            raise InputError(f"data.public is set, but {method} trains nothing on the server; remove it")


@dataclass(frozen=True)
class Arrival:
    """What a transport brings from one client: a reply's frame, or why there is none."""

    client: int
    frame: Frame = b""
    fault: str = ""


class Transport(Protocol):
    """Carries frames to clients and theirs back. Knows no method."""

    def exchange(
        self, round: int, frames: Iterable[tuple[int, Frame]], *, in_plan_order: bool
    ) -> Iterator[Arrival]:
        """Sends each (client, frame) and yields one Arrival a client, as they come or in the order sent."""


S = TypeVar("S")

ArrivalOrder = Literal["plan-order", "any-order", "one-by-one", "in-turn"]


class Method(Protocol[S]):
    """One published method. Built from its Config and the run's seed; one object serves every transport.

    Attributes:
        rounds: How many rounds a run has; 0 for a method that trains nothing.
        arrival: How replies are folded in. `plan-order`: one server step on the replies in the order
            of the plan. `any-order`: one server step on the replies as they come, with a result that
            does not depend on their order. `one-by-one`: a server step on each reply alone. `in-turn`:
            one client after another; `plan` is asked anew for each turn, with the state after the one
            before, and gives one order; a client that fails makes a server step on no reply.
        pools_data: One client holds the data of all (centralised training).
        uses_wire: False for reference rows whose clients send nothing; then nothing is in the ledger.
        saves_merged: The result lives in the base model's weights and is saved as a whole model.
        sends_model: Clients compute with what their orders brought and never hold the server's model;
            `client_model` is then the server's alone, and `ClientEnv.model` is empty.
    """

    @property
    def config(self) -> Settings:
        """The settings that it was built from."""

    rounds: int
    arrival: ArrivalOrder
    pools_data: bool
    uses_wire: bool
    saves_merged: bool
    sends_model: bool

    def prepare(self, server: ServerEnv) -> None:
        """What the server has besides its state; called once, before `client_model`.

        Raises:
            InputError: The method needs public examples, and there are none.
        """

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """What a client must hold. In process `build` returns the one base model in memory."""

    def init(self, model: nn.Module) -> S:
        """The server's first state, from the server's model."""

    def plan(self, state: S, round: int, cohort: Cohort) -> Iterable[Order]:
        """Who gets what in this round."""

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """One client's work. Frozen tensors of `env.model` are left as they were found."""

    def server_step(self, state: S, replies: Iterable[Reply]) -> S:
        """Folds replies in as they come, without holding a cohort's updates together."""

    def export(self, state: S, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The models that `state` stands for, by name, one at a time, in `model`'s memory.

        `global` is the result; `client-0000` and so on stand for a result that is one model a client. Any
        other name is a second result, evaluated and saved beside the first.

        Each is valid until the next is asked for; after the last, frozen tensors are as they were.
        """


@dataclass(frozen=True)
class Summed:
    """What the server gets of a round whose replies it does not see, or may not use, one by one.

    Attributes:
        sums: Σ of the clients' summands by name, int64, in the method's `unit`.
        weight: Σ of their weights.
        total: What a weight is a share of: `weight` if all clients of the cohort are in it.
        clients: Whose summands are in it.
        population: Clients of the whole federation.
    """

    sums: Mapping[str, Tensor]
    weight: int
    total: int
    clients: tuple[int, ...]
    population: int


@runtime_checkable
class SumMethod(Protocol[S]):
    """A method whose server needs a weighted sum and nothing else of what clients send.

    With it the round can be summed under masks (secure aggregation) or with noise (privacy). Its clients
    report the metrics `train_loss` and `trained_tokens`.
    """

    unit: float
    """What 1 in a summand stands for."""

    def sum_refusal(self, *, privacy: bool) -> str | None:
        """Why a sum, or with `privacy` a noisy one of clipped updates, is not enough with these settings."""

    def sum_shapes(self, state: S) -> Mapping[str, tuple[int, ...]]:
        """The tensors of a summand, by name."""

    def summand(
        self,
        payload: Payload,
        *,
        weight: int,
        total: int,
        population: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """What a reply adds to the server's sum, int64 in units: the client's share is weight / total.

        Raises:
            ValueError: A value is too large for the sum.
        """

    def sum_step(self, state: S, total: Summed) -> S:
        """The server's step, from the sum alone: the same bits as `server_step` makes of the replies."""


class ClientProtection(Protocol):
    """A client's half of secure aggregation, as the client runner needs it."""

    def answer(
        self, phase: str, order: Payload, kept: Payload | None, *, client: int, round: int, examples: int
    ) -> tuple[Payload, Payload | None]:
        """The reply to an order of any phase but `masked`, and what the client keeps after it.

        Raises:
            ClientError: The order does not fit what came before it in this round, or asks for too much.
        """

    def mask(
        self, result: ClientResult, order: Payload, kept: Payload | None, *, client: int, round: int
    ) -> tuple[Payload, Payload]:
        """The reply to an order of phase `masked`, in place of what the method's step gave.

        Raises:
            ClientError: As above, or a number is too large for the sum.
        """


class Gate(Protocol):
    """What holds each order of a run to what a client's operator accepts, as the client runner needs it."""

    def before(self, round: int, phase: str, order: Payload) -> None:
        """Is asked before anything is done for an order; `order` is secure aggregation's part of it.

        Raises:
            ClientError: The order asks for more than the operator accepts.
        """

    def sending(self, round: int, phase: str) -> None:
        """Is told before a reply leaves. Raises ClientError if it may not."""


class ServerProtection(Protocol):
    """How a server that may not see or use replies one by one sums a round, as the loop needs it."""

    @property
    def in_phases(self) -> bool:
        """Whether a round takes several exchanges with its clients (`phased_step`), or one (`step`)."""

    def step(self, state: S, replies: Iterable[Reply], *, cohort: Cohort, outcome: RoundOutcome) -> S:
        """The server's step in place of the method's."""

    def phased_step(
        self,
        state: S,
        orders: Iterable[Order],
        *,
        cohort: Cohort,
        outcome: RoundOutcome,
        quorum: int,
        ask: Callable[[Iterable[Order]], Iterator[Reply]],
        on_arrival: Callable[[S, RoundOutcome], Any],
    ) -> S:
        """The same, from the orders on: `ask` sends some and yields the replies that are as asked.

        Raises:
            QuorumError: Too few clients stayed to the end.
        """
