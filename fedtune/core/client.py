"""The client's side: one model in memory, and each client's own examples and kept state beside it.

A runner turns a frame into a frame, so every transport runs the same code: in process for all simulated
clients in turn, across a network for the one client of a machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedtune.core.seeds import derive_seed
from fedtune.core.store import Store
from fedtune.core.types import ClientEnv, Method, Payload, Scalar
from fedtune.core.wire import Message, decode, encode
from fedtune.measure.memory import MemoryMeter

if TYPE_CHECKING:
    from fedtune.data.encode import Encoded


class ClientError(Exception):
    """A client cannot do what it was asked; the message says why. The round goes on without it."""


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
    ) -> None:
        self.store = store or Store()
        self._method, self._data = method, data
        self.use(model)
        self._pad_id, self._seed, self._device = pad_id, seed, device
        self.states: dict[int, Payload] = {}  # what each client keeps between its rounds

    def use(self, model: nn.Module) -> None:
        """Replaces the model, once what the method trains is attached to it."""
        self._model = nn.Module() if self._method.sends_model else model

    def handle(self, client: int, frame: bytes) -> bytes:
        """Does what the order in `frame` says and returns the reply's frame.

        The reply's meta holds the step's metrics and its measured `peak_bytes`. It holds no wall time:
        the length of a frame must be the same when a run is repeated.
        Random numbers that PyTorch draws by itself (dropout) come from a stream of this client and
        round, and the process's own stream is left as it was.

        Raises:
            FrameError: The order cannot be read.
            ClientError: The client has no examples, or the method cannot go on (a loss that is NaN).
        """
        order = decode(frame)
        round = int(order.meta["round"])
        if not self._data.get(client):
            raise ClientError("it has no examples")
        meter = MemoryMeter(self._device)
        seed = derive_seed(self._seed, "client", client, round)
        env = ClientEnv(
            client=client,
            round=round,
            seed=seed,
            model=self._model,
            items=self._data[client],
            pad_id=self._pad_id,
            state=self.states.get(client),
            memory=meter,
            device=self._device,
            store=self.store,
        )
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(seed, "dropout"))
            result = self._method.client_step(order.payload, env)
        if result.state is not None:
            self.states[client] = result.state
        meta: dict[str, Scalar] = {
            **result.metrics,
            "round": round,
            "client": client,
            "peak_bytes": meter.peak_bytes,
            "how": meter.how,
        }
        return encode(Message(result.payload, meta))
