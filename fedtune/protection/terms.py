"""What the clients of a round under masks agree on before they share a secret.

The server tells each client whose keys there are, what each client weighs, and how many must stay. It could
tell each another thing: with the weight of one client and 0 for the others the sum *is* that client's update,
and with too small a part of the noise it is hardly hidden. A client therefore checks its own part, and the
digest of all terms goes into what it seals for the others: of two clients that were told different things,
neither can open what the other sealed, and no sum is unmasked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.core.types import ClientError, Payload
from fedtune.protection import masking
from fedtune.protection.identity import SIGNATURE
from fedtune.protection.masking import KEY
from fedtune.protection.settings import Privacy
from fedtune.protection.share import CohortShare, Shapes

_NUMBERS = ("threshold", "noise_shares", "total", "population")


@dataclass(frozen=True)
class Terms:
    """The terms of one round.

    Attributes:
        clients: Whose keys there are, ascending.
        keys: uint8 (clients, 2, KEY): of each its two public keys, for sealing shares and for masks.
        signatures: uint8 (clients, SIGNATURE): each client's of its keys; zeros where clients have no keys to
            sign with, all in one process.
        weights: Of each client in the mean: its examples; with privacy 1.
        threshold: Clients that must stay to the end.
        noise_shares: Clients that together make the whole noise.
        total: What the weights are divided by: at least their sum.
        population: Clients of the federation.
        shapes: Of the tensors that are summed.
    """

    clients: tuple[int, ...]
    keys: Tensor
    signatures: Tensor
    weights: tuple[int, ...]
    threshold: int
    noise_shares: int
    total: int
    population: int
    shapes: Shapes

    def payload(self) -> Payload:
        """For an order, and for what a client keeps."""
        return Payload(
            {
                "clients": torch.tensor(self.clients),
                "keys": self.keys,
                "signatures": self.signatures,
                "weights": torch.tensor(self.weights),
                "terms": torch.tensor([getattr(self, name) for name in _NUMBERS]),
            },
            {"shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()})},
        )

    @staticmethod
    def of(payload: Payload) -> Terms:
        """What `payload` gave, of whoever sent it.

        Raises:
            ClientError: Something is missing, or is not what it has to be.
        """
        try:
            numbers = {name: payload.tensors[name].tolist() for name in ("clients", "weights", "terms")}
            keys, signatures = payload.tensors["keys"], payload.tensors["signatures"]
            count = len(numbers["clients"])
            shapes = json.loads(str(payload.scalars["shapes"]))
            whole = [value for values in numbers.values() for value in values]
            if (
                any(type(value) is not int for value in whole)
                or (keys.dtype, signatures.dtype) != (torch.uint8, torch.uint8)
                or (keys.shape, signatures.shape) != ((count, 2, KEY), (count, SIGNATURE))
                or len(numbers["weights"]) != count
            ):
                raise ValueError(f"of {count} clients with keys of shape {tuple(keys.shape)}")
            terms = dict(zip(_NUMBERS, numbers["terms"], strict=True))
            return Terms(
                tuple(numbers["clients"]),
                keys,
                signatures,
                tuple(numbers["weights"]),
                shapes={str(name): tuple(map(int, shape)) for name, shape in shapes.items()},
                **terms,
            )
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ClientError(f"the terms of the round are not as they must be: {error}") from None

    def check(self, client: int, examples: int, *, privacy: bool) -> None:
        """What a client holds the terms to before it shares a secret.

        Args:
            client: Who checks.
            examples: How many of its examples count.
            privacy: Whether all clients weigh the same, so that noise hides each of them alike.

        Raises:
            ClientError: It is not among the clients, weighs something else than it should, or the terms are
                not safe.
        """
        clients, count = list(self.clients), len(self.clients)
        if clients != sorted(set(clients)) or client not in clients:
            raise ClientError(f"the keys it was sent are said to be of clients {clients}; it is {client}")
        own, mine = self.weights[clients.index(client)], 1 if privacy else examples
        if own != mine:
            raise ClientError(
                f"it is said to weigh {own} in the mean, and it weighs {mine}: with other weights the sum "
                "would show single updates"
            )
        if privacy and set(self.weights) != {1}:
            raise ClientError(f"with privacy all clients weigh 1, and they are said to weigh {self.weights}")
        if min(self.weights) < 1 or self.total < (max(self.weights) if privacy else sum(self.weights)):
            raise ClientError(
                f"the clients are said to weigh {self.weights} of {self.total}; each must weigh at least 1, "
                "and all together no more than the whole"
            )
        if not 2 <= self.threshold <= count < 2 * self.threshold:
            raise ClientError(
                f"a threshold of {self.threshold} of {count} clients is not safe: it must be at least two "
                "and above one half"
            )
        if not 1 <= self.noise_shares <= count:
            raise ClientError(f"{self.noise_shares} of {count} clients are said to make the whole noise")

    def share(self, client: int) -> CohortShare:
        """What a client weighs."""
        return CohortShare(self.weights[self.clients.index(client)], self.total, self.population)

    def digest(self, round: int, bits: int, privacy: Privacy | None, max_norm: float | None = None) -> bytes:
        """SHA-256 of the terms, of the round, and of the settings that a client goes by."""
        noise = [privacy.clip, privacy.noise_multiplier] if privacy else None
        others = [
            round,
            bits,
            noise,
            max_norm,
            self.clients,
            self.weights,
            [getattr(self, name) for name in _NUMBERS],
        ]
        shapes = sorted((name, list(shape)) for name, shape in self.shapes.items())
        return masking.commit(json.dumps([others, shapes]).encode(), self.keys.contiguous().numpy().tobytes())
