from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.batches import ALIKE, collate, endless_batches, epoch_batches, padding
from fedtune.data.encoded import Encoded


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_collate_pads_on_the_right_and_keeps_a_pad_token_that_is_text() -> None:
    batch = collate([Encoded((1, 2), (-100, 2)), Encoded((5, 6, 7, 2), (-100, 6, 7, 2))], pad_id=2)
    assert batch["input_ids"].tolist() == [[1, 2, 2, 2], [5, 6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 6, 7, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_of_classes() -> None:
    batch = collate([Encoded((1, 2, 3), (4,)), Encoded((1,), (0,))], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 9, 9]]
    assert batch["labels"].tolist() == [4, 0]


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**40))
def test_an_epoch_is_each_example_once(n: int, batch_size: int, seed: int) -> None:
    batches = list(epoch_batches(n, batch_size, generator(seed)))
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * ((n - 1) // batch_size)
    assert batches == list(epoch_batches(n, batch_size, generator(seed)))


def test_endless_batches_are_epochs_shuffled_anew() -> None:
    one = generator(3)
    epochs = [batch for _ in range(3) for batch in epoch_batches(7, 3, one)]
    assert list(islice(endless_batches(7, 3, generator(3)), 9)) == epochs
    assert epochs[0:3] != epochs[3:6]


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    list(epoch_batches(50, 8, generator(0)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_to_batch() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_id=0)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        next(endless_batches(0, 4, generator(0)))
    with pytest.raises(ValueError, match="at least 1, got 4 and 0"):
        next(epoch_batches(4, 0, generator(0)))


def test_a_seed_gives_these_batches() -> None:
    assert list(epoch_batches(5, 2, generator(3))) == [[1, 0], [3, 4], [2]]
    assert list(epoch_batches(1, 1, generator(3))) == [[0]]
    assert next(endless_batches(1, 1, generator(3))) == [0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 9))
def test_examples_of_like_length_share_a_batch(lengths: list[int], size: int, seed: int) -> None:
    batches = list(epoch_batches(len(lengths), size, generator(seed), lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    assert batches == list(epoch_batches(len(lengths), size, generator(seed), lengths))
    # no two batches' lengths cross: all of one are at most as long as all of the other
    spans = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in batches)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_groups_by_hand() -> None:
    # by length the examples are 1, 3, 2, 0, 4: cut by two, the longest is left over
    batches = list(epoch_batches(5, 2, generator(3), [4, 1, 3, 2, 5]))
    assert sorted(batches) == [[1, 3], [2, 0], [4]]
    # three batches of a pass come in the order of a permutation drawn behind that of the examples
    drawn = generator(3)
    torch.randperm(5, generator=drawn)
    assert batches == [[[1, 3], [2, 0], [4]][at] for at in torch.randperm(3, generator=drawn).tolist()]
    # 1 + 2 and 3 + 4 pad one token each
    assert padding(batches, [4, 1, 3, 2, 5]) == (2 * 2 + 2 * 4 + 5, 2)


def test_batches_of_like_lengths_come_in_random_order_and_pad_little() -> None:
    lengths = [1 + 7 * i % 100 for i in range(1000)]
    passes = islice(endless_batches(1000, 10, generator(1), lengths), 300)
    longest = [max(lengths[i] for i in batch) for batch in passes]
    one, two = longest[:100], longest[100:200]
    assert one != sorted(one) and one != two and sorted(one) == sorted(two) == list(range(1, 101))
    assert padding([[0, 1], [2]], [3, 5, 4]) == (14, 2)
    computed, padded = padding(epoch_batches(1000, 10, generator(1), lengths), lengths)
    assert (computed, padded) == (sum(lengths), 0)
    assert padding(epoch_batches(1000, 10, generator(1)), lengths)[1] > 0.4 * sum(lengths)


def test_only_so_many_batches_are_sorted_together() -> None:
    lengths = list(range(2 * ALIKE + 1))
    batches = list(epoch_batches(len(lengths), 2, generator(0), lengths))
    shuffled = torch.randperm(len(lengths), generator=generator(0)).tolist()
    first, rest = sorted(shuffled[: 2 * ALIKE]), shuffled[2 * ALIKE :]
    assert sorted(batches) == sorted([first[at : at + 2] for at in range(0, 2 * ALIKE, 2)] + [rest])
