"""A frame of 2 GB through TLS on loopback: what both sides' processes hold beyond its tensors."""

from __future__ import annotations

import pytest
from reproduced import load

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from fedtune.transport.messages import PART_BYTES

pytestmark = [pytest.mark.network, pytest.mark.slow]

SIZE = 2_000_000_000  # bytes; needs 5 GB of memory and 3 GB of disk for Flower's database


def test_two_gigabytes_take_some_parts_beyond_their_tensors() -> None:
    """Joined, a frame would be 2 GB more at the side that sends it."""
    ways = load("network_memory").measured(SIZE)
    assert [way.name for way in ways] == ["down", "up"]
    for way in ways:
        assert max(way.ours.values()) < 4 * PART_BYTES  # in `fedtune server` and `fedtune client`
        assert max(way.beyond.values()) < 12 * PART_BYTES  # with Flower's processes beside them
