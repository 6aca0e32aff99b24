"""A pool of seeds: the integers that a perturbation is a function of, and nothing else.

The noise of seed j for element i of the tensor called `name` depends on the pool's key, the tensor's name,
i, j and the kind of noise. It does not depend on the device, the thread count, the order or sharding of the
tensors, on how modules are wrapped, or on any generator's state. `fedtune.zeroth.reference` defines the
values; docs/noise.md states the definition in words.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedtune.errors import InputError, nearest

NOISE_VERSION = 2
"""Belongs into every file and frame that names a pool. It changes whenever any bit of any noise does."""

Noise = Literal["gaussian", "rademacher", "binomial32", "hadamard4", "subzero", "lozo"]
KINDS: tuple[str, ...] = get_args(Noise)[:4]
SHAPED: tuple[str, ...] = get_args(Noise)[4:]  # a matrix's noise depends on its shape too: subspace.py

MAX_SEEDS = 65_536  # a seed index travels as 16 bits
MAX_ELEMENTS = 2**34  # of one tensor: its Philox calls are counted in 32 bits

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class SeedPool:
    """K seeds of one kind of noise.

    Args:
        key: Names the pool; pools of other keys are independent. In [0, 2^64).
        size: K, the number of seeds, in [1, 65536]: a seed's index has 16 bits on the wire.
        noise: `hadamard4` (a rebuild costs one pass whatever K is), `rademacher` (±1), `gaussian` (65,536
            values, kurtosis 3) or `binomial32` (32 coin flips); `subzero` and `lozo` (of low rank). All have
            mean 0 and variance 1.

    Raises:
        InputError: A value is outside its limits.
    """

    key: int
    size: int
    noise: Noise = "hadamard4"

    def __post_init__(self) -> None:
        """Checks the limits."""
        if not _is_integer(self.size) or not 1 <= self.size <= MAX_SEEDS:
            raise InputError(
                f"a seed pool must hold 1 to {MAX_SEEDS:,} seeds (an index has 16 bits), got {self.size!r}; "
                "change the number of seeds"
            )
        if not _is_integer(self.key) or not 0 <= self.key < 2**64:
            raise InputError(f"a seed pool's key must be an integer in [0, 2^64), got {self.key!r}")
        known = KINDS + SHAPED
        if self.noise not in known:
            raise InputError(
                f"noise must be one of {', '.join(known)}, got {self.noise!r}."
                + nearest(str(self.noise), known)
            )

    @property
    def block(self) -> int:
        """B of `hadamard4`: the smallest power of two that is at least K and at least 1024."""
        return max(1024, 1 << (self.size - 1).bit_length())

    def check_seed(self, j: int) -> int:
        """Returns j, or raises `InputError` if the pool has no such seed."""
        if not _is_integer(j) or not 0 <= j < self.size:
            raise InputError(f"the seed index must be in [0, {self.size}), the pool's seeds, got {j!r}")
        return int(j)


def canonical_name(name: str) -> str:
    """A parameter's name without what DataParallel, FSDP, checkpointing and `torch.compile` add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def tensor_id(name: str) -> int:
    """The 64-bit number that stands for a tensor: BLAKE2b of its canonical name, read as little-endian."""
    return int.from_bytes(hashlib.blake2b(canonical_name(name).encode(), digest_size=8).digest(), "little")


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
