"""What clients were sent to hold: by digest, on disk, lost when it is not what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtune.core.store import Store, digest, digests_in
from fedtune.core.types import Payload

HELD = Payload({"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "v": torch.ones(2)}, {"layers": 2})


def test_what_was_put_is_found_again_also_by_another_process(tmp_path: Path) -> None:
    key = Store(tmp_path / "held").put(HELD)
    found = Store(tmp_path / "held").get(key)
    assert found is not None and digest(found) == key == digest(HELD)
    assert found.tensors["w"].dtype == torch.bfloat16 and torch.equal(found.tensors["w"], HELD.tensors["w"])
    assert dict(found.scalars) == {"layers": 2}


@pytest.mark.parametrize(
    "other",
    [
        Payload({"w": HELD.tensors["w"].reshape(3, 2), "v": torch.ones(2)}, {"layers": 2}),
        Payload({"w": HELD.tensors["w"].float(), "v": torch.ones(2)}, {"layers": 2}),
        Payload({"u": HELD.tensors["w"], "v": torch.ones(2)}, {"layers": 2}),
        Payload(HELD.tensors, {"layers": 3}),
    ],
)
def test_another_content_has_another_digest(other: Payload) -> None:
    assert digest(other) != digest(HELD)


@pytest.mark.parametrize("damage", ["cut", "altered", "another", "gone"])
def test_what_is_damaged_is_as_good_as_lost(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    key, other = store.put(HELD), store.put(Payload({"w": torch.zeros(3)}))
    file = tmp_path / f"{key}.safetensors"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-5])
    elif damage == "altered":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "another":
        file.write_bytes((tmp_path / f"{other}.safetensors").read_bytes())
    else:
        file.unlink()
    assert Store(tmp_path).get(key) is None
    assert Store(tmp_path).get(other) is not None


def test_a_thing_is_built_once_for_its_key_until_the_store_is_cleared(tmp_path: Path) -> None:
    store, built = Store(tmp_path / "held"), []
    key = store.put(HELD)
    for _ in range(2):
        assert store.built("a", lambda: built.append(1) or len(built)) == 1  # type: ignore[func-returns-value]
    store.clear()
    assert store.get(key) is None and not (tmp_path / "held").exists()
    assert store.built("a", lambda: built.append(1) or len(built)) == 2  # type: ignore[func-returns-value]


def test_what_no_client_names_is_thrown_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = store.put(HELD), store.put(Payload({"w": torch.zeros(3)}))
    store.built(old, lambda: "a model")
    store.retain(digests_in([{"0": f"12p {new}", "model": "none", "round": 3}]))
    assert store.get(old) is None and store.get(new) is not None
    assert [path.stem for path in tmp_path.iterdir()] == [new]
    assert store.built(old, lambda: "another") == "another"
    in_memory = Store()
    key = in_memory.put(HELD)
    in_memory.retain([])
    assert in_memory.get(key) is None and not in_memory.on_disk


def test_what_is_on_disk_is_mapped_and_does_not_follow_the_memory_it_came_in(tmp_path: Path) -> None:
    came = torch.arange(6.0)
    store = Store(tmp_path)
    key = store.put(Payload({"w": came}))
    came.zero_()  # trained in place
    found = store.get(key)
    assert store.on_disk and found is not None
    assert found.tensors["w"].tolist() == [0, 1, 2, 3, 4, 5]
