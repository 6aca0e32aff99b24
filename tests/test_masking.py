"""The primitives of secure aggregation: packing, masks, shares of a secret, keys and seals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedtune.protection import masking

WIDTHS = st.sampled_from([40, 48, 56, 64])


@given(bits=WIDTHS, data=st.data())
def test_numbers_survive_packing_and_sums_are_modulo_two_to_the_bits(bits: int, data: Any) -> None:
    limit = 2 ** (bits - 3)
    rows = data.draw(
        st.lists(st.lists(st.integers(-limit, limit - 1), min_size=5, max_size=5), min_size=1, max_size=4)
    )
    total = np.zeros(5, dtype=np.uint64)
    for row in rows:
        packed = masking.pack(np.array(row, dtype=np.int64).view(np.uint64), bits)
        assert packed.shape == (5, bits // 8)
        masking.add_packed(total, packed)
    assert masking.signed(total, bits).tolist() == [sum(column) for column in zip(*rows, strict=True)]


@given(bits=WIDTHS)
def test_a_mask_is_the_key_stream_of_aes_and_can_be_taken_off(bits: int) -> None:
    count = masking.CHUNK + 3  # more than one piece
    vector, key = np.arange(count, dtype=np.uint64), bytes(range(32))
    masking.add_mask(vector, key, bits)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(count * bits // 8))
    width = bits // 8
    for at in (0, 1, masking.CHUNK, count - 1):
        mask = int.from_bytes(stream[at * width : (at + 1) * width], "little")
        assert int(vector[at]) == (at + mask) % 2**64
    masking.add_mask(vector, key, bits, subtract=True)
    assert np.array_equal(vector, np.arange(count, dtype=np.uint64))


def test_shares_give_the_secret_from_the_threshold_on() -> None:
    secret = masking.fresh(16)
    shares = dict(enumerate(masking.split_secret(secret, 3, 5)))
    for some in itertools.combinations(shares, 3):
        assert masking.join_shares({place: shares[place] for place in some}) == secret
    assert masking.join_shares({place: shares[place] for place in (0, 4)}) != secret


def test_two_parties_agree_and_labels_separate_keys() -> None:
    mine, theirs = masking.fresh(32), masking.fresh(32)
    shared = masking.agree(mine, masking.public_key(theirs), "mask")
    assert shared == masking.agree(theirs, masking.public_key(mine), "mask")
    assert shared != masking.agree(mine, masking.public_key(theirs), "shares")
    with pytest.raises(ValueError, match=r".+"):
        masking.agree(mine, bytes(32), "mask")


def test_a_seal_holds_text_and_circumstances() -> None:
    key = masking.fresh(32)
    sealed = masking.seal(key, b"share", b"1 2 3")
    assert masking.unseal(key, sealed, b"1 2 3") == b"share"
    assert masking.unseal(key, sealed, b"1 2 4") is None
    assert masking.unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"1 2 3") is None
    assert masking.unseal(masking.fresh(32), sealed, b"1 2 3") is None
