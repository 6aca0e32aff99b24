"""The primitives of secure aggregation, all from `cryptography` and `pycryptodome`; nothing is invented here.

    key agreement      X25519, then HKDF-SHA256 with a label for each use
    masks              the key stream of AES-256 in counter mode, read as integers modulo 2^k
    sealed shares      AES-256-GCM with a random nonce; sender, receiver and round are authenticated
    secret sharing     Shamir's over GF(2^128), for secrets of 16 bytes
    commitments        SHA-256

Secrets come from the operating system. Vectors are NumPy's unsigned 64-bit integers, whose sums wrap around;
a number of k bits is the lowest k of them, so a sum modulo 2^64 is a sum modulo 2^k as well.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

KEY, SECRET, HASH, NONCE, TAG = 32, 16, 32, 12, 16  # bytes
CHUNK = 1 << 18  # numbers at a time: what a mask needs beside the vector

Vector = NDArray[np.uint64]


def fresh(size: int) -> bytes:
    """Random bytes from the operating system."""
    return os.urandom(size)


def derive(secret: bytes, label: str) -> bytes:
    """A key for one purpose, 32 bytes."""
    return HKDF(SHA256(), KEY, salt=None, info=f"fedtune secure aggregation: {label}".encode()).derive(secret)


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one, both 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, label: str) -> bytes:
    """The key that two parties share, 32 bytes.

    Raises:
        ValueError: The public key is one of the few that give everyone the same secret.
    """
    theirs = X25519PublicKey.from_public_bytes(public)
    return derive(X25519PrivateKey.from_private_bytes(private).exchange(theirs), label)


def commit(*parts: bytes) -> bytes:
    """SHA-256, 32 bytes, of parts of fixed lengths."""
    return hashlib.sha256(b"".join(parts)).digest()


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypts and authenticates `text`, and authenticates `about` with it: 28 bytes longer than the text."""
    nonce = fresh(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes | None:
    """What was sealed with this key about this, or None: it was altered, or is another's."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], about)
    except InvalidTag:
        return None


def split_secret(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret, 16 bytes each; any `threshold` of them give it back, fewer tell nothing."""
    return [share for _, share in sorted(Shamir.split(threshold, count, secret, ssss=False))]


def join_shares(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from as many shares as the threshold, by their place in what `split_secret` gave."""
    return Shamir.combine([(place + 1, share) for place, share in shares.items()], ssss=False)


def add_mask(vector: Vector, key: bytes, bits: int, *, subtract: bool = False) -> None:
    """Adds a key's stream of numbers of `bits` bits to a vector, in place."""
    at = 0
    for numbers in _numbers(key, len(vector), bits // 8):
        part = vector[at : at + len(numbers)]
        (np.subtract if subtract else np.add)(part, numbers, out=part)
        at += len(numbers)


def pack(vector: Vector, bits: int) -> Tensor:
    """The lowest `bits` bits of each number, little-endian, uint8 (numbers, bits / 8)."""
    return torch.from_numpy(_bytes(vector)[:, : bits // 8].copy())


def add_packed(vector: Vector, packed: Tensor) -> None:
    """Adds what `pack` gave to a vector, in place."""
    for at in range(0, len(vector), CHUNK):
        part = vector[at : at + CHUNK]
        np.add(part, _widen(packed[at : at + CHUNK].numpy()), out=part)


def signed(vector: Vector, bits: int) -> Tensor:
    """The numbers modulo 2^bits in [−2^(bits−1), 2^(bits−1)), int64. Raises ValueError for foreign bits."""
    if not 1 <= bits <= 64:
        raise ValueError(f"bits must lie in [1, 64], got {bits}")
    raised = (vector << np.uint64(64 - bits)).view(np.int64)
    return torch.from_numpy(raised >> (64 - bits))


def uniform(count: int) -> Iterator[NDArray[np.float64]]:
    """Numbers in (0, 1] with 53 random bits, from a stream whose key the operating system gave."""
    for numbers in _numbers(fresh(KEY), count, 8):
        yield ((numbers >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def _numbers(key: bytes, count: int, width: int) -> Iterator[Vector]:
    """A key's stream of `count` numbers of `width` bytes, in chunks. A key is used for one stream only."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(width * min(count, CHUNK))
    for at in range(0, count, CHUNK):
        size = min(CHUNK, count - at)
        raw = np.frombuffer(stream.update(zeros[: size * width]), dtype=np.uint8)
        yield _widen(raw.reshape(size, width))


def _widen(packed: NDArray[np.uint8]) -> Vector:
    wide = np.zeros((len(packed), 8), dtype=np.uint8)
    wide[:, : packed.shape[1]] = packed
    numbers: Vector = wide.reshape(-1).view("<u8").astype(np.uint64, copy=False)
    return numbers


def _bytes(vector: Vector) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = vector.astype("<u8", copy=False).view(np.uint8).reshape(len(vector), 8)
    return raw
