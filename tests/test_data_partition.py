from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.data.partition import (
    PARTITIONERS,
    Parts,
    by_field,
    dirichlet,
    iid,
    quantity,
    shards,
    summarize,
    whole_sizes,
)
from fedtune.data.sources import load_examples
from fedtune.errors import InputError

Split = Callable[[list[str], np.random.Generator], Parts]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def counts(parts: Parts, labels: list[str]) -> list[Counter[str]]:
    return [Counter(labels[index] for index in part) for part in parts]


def check_partition(parts: Parts, n: int, clients: int) -> None:
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part in parts:
        assert len(part) > 0 and part.dtype == np.int64 and part.tolist() == sorted(part.tolist())


labels_lists = st.lists(st.sampled_from(["x", "y", "z", "long label", "é"]), min_size=1, max_size=80)
seeds = st.integers(0, 2**63)


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[str], int, str, Split]:
    """Labels, a number of clients, a partitioner's name, and a call of it that can succeed."""
    labels = draw(labels_lists)
    n = len(labels)
    clients = draw(st.integers(1, n))
    name = draw(st.sampled_from(sorted(set(PARTITIONERS) - {"file", "files", "given"})))
    alpha = draw(st.sampled_from([0.3, 1.0, 1e6]))
    if name == "iid":
        return labels, clients, name, lambda ls, r: iid(len(ls), clients, r)
    if name == "dirichlet":
        clients = min(clients, 5, max(1, n // 8))
        return labels, clients, name, lambda ls, r: dirichlet(ls, clients, alpha, 1, r)
    if name == "by-field":
        values = len(set(labels))
        rarest = min(Counter(labels).values())
        clients = draw(st.integers(1, max(1, min(n, values * rarest))))
        return labels, clients, name, lambda ls, r: by_field(ls, clients, r)
    if name == "shards":
        each = draw(st.integers(1, max(1, n // clients)))
        return labels, clients, name, lambda ls, r: shards(ls, clients, each, r)
    clients = min(clients, 5, max(1, n // 8))
    return labels, clients, name, lambda ls, r: quantity(len(ls), clients, r, alpha=alpha)


@given(splits(), seeds)
def test_every_example_once_and_the_seed_decides(split: tuple[list[str], int, str, Split], seed: int) -> None:
    labels, clients, _, call = split
    parts = call(labels, rng(seed))
    check_partition(parts, len(labels), clients)
    again = call(labels, rng(seed))
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@given(splits(), seeds, st.randoms(use_true_random=False))
def test_label_counts_do_not_depend_on_the_order(
    split: tuple[list[str], int, str, Split], seed: int, random: object
) -> None:
    labels, _, name, call = split
    shuffled = list(labels)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = call(labels, rng(seed)), call(shuffled, rng(seed))
    if name in ("iid", "quantity"):  # these never look at labels: sizes alone are promised
        assert [len(part) for part in one] == [len(part) for part in other]
    else:
        assert counts(one, labels) == counts(other, shuffled)


@given(st.integers(1, 200), st.data(), seeds)
def test_iid_sizes(n: int, data: st.DataObject, seed: int) -> None:
    clients = data.draw(st.integers(1, n))
    sizes = [len(part) for part in iid(n, clients, rng(seed))]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


# --- dirichlet ----------------------------------------------------------------------------------------------


def test_huge_alpha_gives_every_client_the_same_mix() -> None:
    labels = ["a"] * 400 + ["b"] * 200 + ["c"] * 40
    for client in counts(dirichlet(labels, 20, 1e12, 1, rng(1)), labels):
        assert abs(client["a"] - 20) <= 1 and abs(client["b"] - 10) <= 1 and abs(client["c"] - 2) <= 1


def test_tiny_alpha_gives_few_labels_a_client() -> None:
    labels = [f"label {index % 12:02}" for index in range(1200)]
    parts = dirichlet(labels, 3, 0.001, 1, rng(2))
    # a label's 100 examples are all but surely with one client
    assert sum(len(client) for client in counts(parts, labels)) <= 14
    even = dirichlet(labels, 3, 100.0, 1, rng(2))
    assert [len(client) for client in counts(even, labels)] == [12, 12, 12]


def test_shares_against_hand_checked_proportions() -> None:
    proportions = np.array([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9]])
    # 10 x (.5, .3, .2) is whole, so no offset moves it
    assert whole_sizes(proportions, np.array([10, 10]), rng(0)).tolist() == [[5, 3, 2], [1, 0, 9]]

    class Offsets:
        def random(self, shape: tuple[int, ...]) -> np.ndarray:
            assert shape == (2, 1)
            return np.array([[0.25], [0.75]])

    # 7: edges floor(3.5 + .25), floor(5.6 + .25), 7; 5: edges floor(.5 + .75), floor(.5 + .75), 5
    found = whole_sizes(proportions, np.array([7, 5]), Offsets())  # type: ignore[arg-type]
    assert found.tolist() == [[3, 2, 2], [1, 0, 4]]


@given(st.integers(1, 50), st.integers(1, 8), st.floats(0.05, 20), seeds)
def test_shares_are_rounded_and_sum_up(n: int, clients: int, alpha: float, seed: int) -> None:
    source = rng(seed)
    proportions = source.dirichlet(np.full(clients, alpha), size=(6, 2))
    sizes = whole_sizes(proportions, np.array([n, 2 * n]), source)
    assert (sizes >= 0).all()
    assert (sizes.sum(axis=-1) == np.array([n, 2 * n])).all()
    assert (abs(sizes - proportions * np.array([n, 2 * n])[:, None]) < 1 + 1e-9).all()


def test_shares_are_unbiased() -> None:
    # a label with one example must not always go to the same client
    proportions = np.broadcast_to([0.2, 0.5, 0.3], (20_000, 1, 3))
    mean = whole_sizes(proportions, np.array([1]), rng(4)).mean(axis=(0, 1))
    assert np.allclose(mean, [0.2, 0.5, 0.3], atol=0.02)  # five standard errors


@settings(max_examples=30)
@given(st.integers(2, 10), st.integers(1, 12), seeds)
def test_minimum_is_honoured(clients: int, minimum: int, seed: int) -> None:
    labels = [str(index % 5) for index in range(clients * minimum * 2)]
    assume(len(labels) >= 20)
    parts = dirichlet(labels, clients, 3.0, minimum, rng(seed))
    check_partition(parts, len(labels), clients)
    assert min(len(part) for part in parts) >= minimum
    sizes = [len(part) for part in quantity(len(labels), clients, rng(seed), alpha=5.0, minimum=minimum)]
    assert min(sizes) >= minimum and sum(sizes) == len(labels)


def test_examples_of_a_label_are_shuffled() -> None:
    first = dirichlet(["a"] * 100, 2, 1e9, 1, rng(0))[0]
    assert first.tolist() != list(range(len(first)))


def test_unreachable_minimum_says_how_near_it_came() -> None:
    labels = [str(index % 2) for index in range(40)]
    with pytest.raises(InputError) as caught:
        dirichlet(labels, 10, 0.05, 4, rng(0), max_redraws=300)
    message = str(caught.value)
    assert "at least 4 of the 40 examples in 300 tries; in the best one the smallest client had 0" in message
    assert "Raise alpha, or lower minimum or data.clients" in message


def test_ten_thousand_redraws_of_a_hopeless_split() -> None:
    labels = [str(index % 7) for index in range(14_000)]
    with pytest.raises(InputError, match="in 10000 tries"):
        dirichlet(labels, 200, 0.05, 10, rng(0))


# --- by field -----------------------------------------------------------------------------------------------


def test_by_field_one_client_a_value_in_sorted_order() -> None:
    parts = by_field(["de", "fr", "de", "", "fr"], None, rng())
    assert [part.tolist() for part in parts] == [[3], [0, 2], [1, 4]]


def test_by_field_fewer_clients_take_values_in_turn() -> None:
    parts = by_field(["a", "b", "c", "d", "e", "a"], 2, rng())
    assert [part.tolist() for part in parts] == [[0, 2, 4, 5], [1, 3]]


def test_by_field_more_clients_share_values_evenly() -> None:
    values = ["a"] * 7 + ["b"] * 5
    parts = by_field(values, 5, rng(3))
    # clients 0, 2, 4 share the seven of "a"; clients 1 and 3 the five of "b"
    assert counts(parts, values) == [{"a": 3}, {"b": 3}, {"a": 2}, {"b": 2}, {"a": 2}]
    check_partition(parts, 12, 5)


def test_by_field_shares_shuffled_examples_and_no_others() -> None:
    values = ["b", "a", "a", "b", "a", "a", "a", "b", "a", "a"]
    parts = by_field(values, 3, rng(3))
    assert parts[1].tolist() == [0, 3, 7]  # whole: nothing is drawn
    shuffled = rng(3).permutation([1, 2, 4, 5, 6, 8, 9])
    assert [parts[0].tolist(), parts[2].tolist()] == [
        sorted(shuffled[:4].tolist()),
        sorted(shuffled[4:].tolist()),
    ]
    assert parts[0].tolist() != [1, 2, 4, 5] != sorted(by_field(values, 3, rng(4))[0].tolist())


def test_by_field_as_many_clients_as_a_value_has_examples_is_the_most() -> None:
    assert sorted(part.tolist() for part in by_field(["a", "a", "a"], 3, rng())) == [[0], [1], [2]]
    with pytest.raises(InputError, match=r"lower data\.clients from 4"):
        by_field(["a", "b", "b", "b"], 4, rng())


def test_a_seed_gives_these_examples_to_these_clients() -> None:
    """As in earlier versions: another version's run goes on with the split that it began with."""
    letters = list("abacabadab")
    found = {
        "iid": iid(10, 3, rng(7)),
        "dirichlet": dirichlet(letters, 3, 1.0, 1, rng(7)),
        "by-field": by_field(["a"] * 5 + ["b"] * 3, 3, rng(7)),
        "shards": shards(letters, 2, 2, rng(7)),
        "alpha": quantity(10, 3, rng(7), alpha=2.0),
        "fractions": quantity(10, 3, rng(7), fractions=[0.5, 0.3, 0.2]),
    }
    assert {name: [part.tolist() for part in parts] for name, parts in found.items()} == {
        "iid": [[0, 1, 7, 8], [2, 3, 6], [4, 5, 9]],
        "dirichlet": [[2, 9], [0, 3, 7, 8], [1, 4, 5, 6]],
        "by-field": [[0, 2, 4], [5, 6, 7], [1, 3]],
        "shards": [[0, 3, 4, 7, 8], [1, 2, 5, 6, 9]],
        "alpha": [[0, 3, 4, 5], [6, 8, 9], [1, 2, 7]],
        "fractions": [[0, 1, 3, 7, 8], [2, 4, 6], [5, 9]],
    }


def test_the_least_that_is_allowed_is_allowed() -> None:
    for parts in (
        iid(3, 3, rng()),
        dirichlet(["a", "b", "c", "c"], 2, 5.0, 2, rng()),
        shards(["a", "b"], 2, 1, rng()),
        quantity(2, 1, rng(), fractions=[1.0], minimum=2),
        quantity(4, 2, rng(), alpha=9.0, minimum=2),
        dirichlet(["a", "b"], 1, 1.0, 1, rng(), max_redraws=1),
    ):
        check_partition(parts, sum(map(len, parts)), len(parts))


# --- shards and quantity ------------------------------------------------------------------------------------


def test_shards_hold_two_labels_a_client() -> None:
    labels = [str(index % 10) for index in range(1000)]
    parts = shards(labels, 50, 2, rng(5))
    check_partition(parts, 1000, 50)
    assert {len(part) for part in parts} == {20}
    assert all(len(client) <= 2 for client in counts(parts, labels))
    assert sum(len(client) == 2 for client in counts(parts, labels)) > 25


@given(labels_lists, st.data(), seeds)
def test_shard_sizes(labels: list[str], data: st.DataObject, seed: int) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    each = data.draw(st.integers(1, len(labels) // clients))
    sizes = [len(part) for part in shards(labels, clients, each, rng(seed))]
    small = len(labels) // (clients * each)
    assert all(each * small <= size <= each * (small + 1) for size in sizes)


def test_quantity_by_fractions_rounds_by_largest_remainder() -> None:
    # exact 4.8, 3.6, 2.4, 1.2: floors 4, 3, 2, 1 leave 2 for the remainders .8 and .6
    sizes = [len(part) for part in quantity(12, 4, rng(), fractions=[0.4, 0.3, 0.2, 0.1])]
    assert sizes == [5, 4, 2, 1]
    # .29 x 100 is 28.999… in floating point
    assert [len(part) for part in quantity(100, 2, rng(), fractions=[0.29, 0.71])] == [29, 71]
    # equal remainders: the first client's is rounded up
    assert [len(part) for part in quantity(5, 2, rng(), fractions=[0.5, 0.5])] == [3, 2]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), seeds)
def test_quantity_by_fractions_is_within_one(weights: list[int], seed: int) -> None:
    n = 9 * 8 + sum(weights)
    fractions = [weight / sum(weights) for weight in weights]
    parts = quantity(n, len(weights), rng(seed), fractions=fractions)
    check_partition(parts, n, len(weights))
    assert all(abs(len(part) - f * n) < 1 for part, f in zip(parts, fractions, strict=True))


# --- summary and refusals -----------------------------------------------------------------------------------


def test_summary() -> None:
    parts = [np.array([0, 2, 3]), np.array([1])]
    assert summarize(parts, ["b", "a", "b", "a"]) == [
        {"client": 0, "examples": 3, "labels": {"a": 1, "b": 2}},
        {"client": 1, "examples": 1, "labels": {"a": 1}},
    ]


ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iid(3, 4, rng()), "data.clients is 4, but there are only 3 examples.*set data.clients to 3"),
        (lambda: iid(3, 0, rng()), "data.clients must be at least 1, got 0"),
        (lambda: dirichlet(ABC, 4, 1.0, 1, rng()), "data.clients is 4, but there are only 3"),
        (lambda: dirichlet(ABC, 2, 1.0, 2, rng()), "need 4, there are 3; lower minimum to 1"),
        (lambda: dirichlet(ABC, 2, 1.0, 0, rng()), "minimum must be at least 1, got 0"),
        (lambda: dirichlet(ABC, 2, 0.0, 1, rng()), "alpha must be a number > 0, got 0"),
        (lambda: dirichlet(ABC, 2, float("nan"), 1, rng()), "alpha must be a number > 0, got nan"),
        (lambda: dirichlet(ABC, 2, float("inf"), 1, rng()), "alpha must be a number > 0, got inf"),
        (lambda: dirichlet(ABC, 2, 1.0, 1, rng(), max_redraws=0), "max_redraws must be at least 1"),
        (
            lambda: dirichlet(["", ""], 2, 1.0, 1, rng()),
            "no example has a category; set data.fields.category",
        ),
        (lambda: by_field(["", ""], None, rng()), "no example has a category"),
        (lambda: by_field(ABC, 4, rng()), "data.clients is 4, but there are only 3"),
        (lambda: by_field(["a", "b", "b", "b"], 4, rng()), '"a" has 1 examples for 2 clients'),
        (lambda: shards(ABC, 2, 2, rng()), "2 clients with 2 shards each need 4 examples, there are 3"),
        (lambda: shards(ABC, 2, 0, rng()), "shards_per_client must be at least 1, got 0"),
        (lambda: quantity(9, 2, rng()), "either alpha or fractions"),
        (lambda: quantity(9, 2, rng(), alpha=1.0, fractions=[0.5, 0.5]), "either alpha or fractions"),
        (lambda: quantity(9, 2, rng(), fractions=[1.0]), "2 clients, but 1 fractions"),
        (lambda: quantity(9, 2, rng(), fractions=[0.5, 0.6]), "sum 1, got .* with sum 1.1"),
        (lambda: quantity(9, 2, rng(), fractions=[1.0, 0.0]), "must be > 0"),
        (lambda: quantity(9, 2, rng(), fractions=[0.99, 0.01]), "fraction 0.01 of 9 examples is 0, below"),
        (lambda: quantity(9, 10, rng(), alpha=1.0), "data.clients is 10, but there are only 9"),
    ],
)
def test_impossible_partitions(call: Callable[[], Parts], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_dolly_over_200_clients(shared_data: Path) -> None:
    dolly = load_examples(
        "dolly15k/databricks-dolly-15k.jsonl",
        fields={"input": "context", "output": "response"},
        base=shared_data,
    )
    labels = [example.category for example in dolly if example.category != "summarization"]
    for alpha in (0.5, 5.0):
        parts = dirichlet(labels, 200, alpha, 10, rng(7))
        check_partition(parts, 13823, 200)
        assert min(len(part) for part in parts) >= 10
