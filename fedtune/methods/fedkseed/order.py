"""What an order says about the accumulator: what it belongs to, and its bits or only what changed in them.

K numbers stand for a model only together with the weights w0 that they start from and the pool of
directions that they count. Both are named in every order and in the server's state, and whoever holds other
weights or makes other noise refuses: it would compute with another model and not notice.
"""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor, nn

from fedtune.core.types import Scalar
from fedtune.core.wire import FrameError
from fedtune.models.quantize import quantized_sha256
from fedtune.models.tuning import trainable

_SHOWN = 16  # hexadecimal digits of a hash in a message


@dataclass(frozen=True)
class Origin:
    """What an accumulator belongs to.

    Attributes:
        w0: SHA-256 of the weights that everything starts from, hexadecimal.
        pool: The pool's key, 4 bytes: the paper's seed of seeds.
        seeds: K.
        noise: Its kind.
        noise_version: Of its definition.
    """

    w0: str
    pool: int
    seeds: int
    noise: str
    noise_version: int

    def as_mapping(self) -> dict[str, Scalar]:
        """For a state."""
        return asdict(self)

    def as_tensor(self) -> Tensor:
        """For an order, uint8: packed, as every scalar of a frame costs its name."""
        head = _PACKED.pack(bytes.fromhex(self.w0), self.pool, self.seeds - 1, self.noise_version)
        return torch.frombuffer(bytearray(head + self.noise.encode()), dtype=torch.uint8)

    @staticmethod
    def of_tensor(tensor: Tensor) -> Origin:
        """The origin that an order names.

        Raises:
            FrameError: It is no such tensor.
        """
        data = tensor.numpy().tobytes()
        try:
            w0, pool, last, version = _PACKED.unpack_from(data)
            return Origin(w0.hex(), pool, last + 1, data[_PACKED.size :].decode("ascii"), version)
        except (struct.error, UnicodeDecodeError) as error:
            raise FrameError(f"the order does not say what it belongs to: {error}") from None

    def against(self, mine: Mapping[str, Scalar]) -> str:
        """Why what is of this origin cannot be used where `mine` is; empty if it can."""
        reasons = []
        for name, what, remedy in _PARTS:
            theirs, own = getattr(self, name), mine[name]
            if theirs != own:
                if name == "w0":
                    theirs, own = str(theirs)[:_SHOWN], str(own)[:_SHOWN]
                reasons.append(f"{what} {theirs}, here it is {own}: {remedy}")
        return "; ".join(reasons)


_PACKED = struct.Struct("<32sIHI")  # w0, the pool's key, K − 1, the version of its noise
_PARTS = (
    ("w0", "weights w0 with SHA-256", "give the model that the run began with"),
    ("seeds", "a pool of as many seeds as", "give all the same method.seeds"),
    ("pool", "a pool with the key", "give all the same seed"),
    ("noise", "noise of the kind", "give all the same method.noise"),
    ("noise_version", "noise of version", "use the fedtune that the run began with"),
)


class Fingerprint:
    """SHA-256 over the trainable weights and what is quantised.

    Computed once a model, for they are never written for long.
    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[nn.Module], str] | None = None

    def of(self, model: nn.Module) -> str:
        """The hash of `model`, hexadecimal: over names, dtypes, shapes and bytes."""
        if self._known is None or self._known[0]() is not model:
            digest = hashlib.sha256()
            for name, parameter in trainable(model).items():
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(data.numpy().data)
            digest.update(quantized_sha256(model).encode())
            self._known = (weakref.ref(model), digest.hexdigest())
        return self._known[1]


def changes(before: Tensor, after: Tensor) -> dict[str, Tensor] | None:
    """What differs in `after`: one bit a seed and the new values; None where the whole is no longer.

    Args:
        before: The accumulator that a client holds, float32 (K).
        after: The accumulator that it is to hold.
    """
    changed = after != before
    bits = torch.from_numpy(np.packbits(changed.numpy()))
    values = after[changed]
    return {"changed": bits, "value": values} if bits.nbytes + values.nbytes < after.nbytes else None


def with_changes(before: Tensor, sent: Mapping[str, Tensor]) -> Tensor:
    """The accumulator after the changes that were `sent`.

    Raises:
        FrameError: They belong to an accumulator of another length.
    """
    bits, size = sent["changed"].numpy(), before.numel()
    if bits.size != -(-size // 8):
        raise FrameError(f"it was sent changes of about {8 * bits.size} seeds, but holds {size}")
    changed = torch.from_numpy(np.unpackbits(bits, count=size).astype(bool))
    after = before.clone()
    after[changed] = sent["value"]
    return after


def checksum(accumulator: Tensor) -> int:
    """CRC-32 of an accumulator's bytes: a client that held another one than the changes are to finds out."""
    return crc32(accumulator.contiguous().numpy().tobytes())
