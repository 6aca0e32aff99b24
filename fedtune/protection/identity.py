"""Who a client's keys of a round come from: a signature that a server cannot make.

Without it a server that is not honest could put keys of its own in everyone's place and read what clients
seal for each other. Each client signs its two public keys with the key that it proves itself to the server
with, and holds the others' signatures to the list of public keys (clients.json) that came with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

SIGNATURE = 96  # bytes: r and s of ECDSA on P-384


@dataclass(frozen=True)
class Identity:
    """A client's own key and what it knows of all.

    Attributes:
        private: The client's own.
        known: Public keys of all clients of the federation, by number.
    """

    private: ec.EllipticCurvePrivateKey
    known: Sequence[ec.EllipticCurvePublicKey]

    def number(self) -> int | None:
        """This client's number; None if its own key is not among those that are known."""
        own = self.private.public_key()
        return next((number for number, key in enumerate(self.known) if key == own), None)

    def sign(self, round: int, client: int, keys: bytes) -> bytes:
        """A signature of a client's public keys of a round, SIGNATURE bytes."""
        r, s = decode_dss_signature(self.private.sign(_about(round, client, keys), ec.ECDSA(SHA384())))
        return r.to_bytes(SIGNATURE // 2, "big") + s.to_bytes(SIGNATURE // 2, "big")

    def vouches(self, round: int, client: int, keys: bytes, signature: bytes) -> bool:
        """Whether `client` signed its public keys of this round."""
        if not 0 <= client < len(self.known):
            return False
        r, s = (int.from_bytes(half, "big") for half in (signature[:48], signature[48:]))
        try:
            about = _about(round, client, keys)
            self.known[client].verify(encode_dss_signature(r, s), about, ec.ECDSA(SHA384()))
        except InvalidSignature:
            return False
        return True


def _about(round: int, client: int, keys: bytes) -> bytes:
    return f"fedtune secure aggregation: keys of client {client} in round {round}: ".encode() + keys
