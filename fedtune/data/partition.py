"""Partitioners: which client holds which examples.

`deal` calls one by its name. Each gives indices, those of one client beside those of the next; everything
random comes from the `rng` given. Of fedtune's own every example goes to exactly one client and no client is
empty, and where labels or values are taken, each client's count of each label depends on how often the labels
occur and never on the order of the examples.

The partitioners of flwr-datasets are not used: they need an older `datasets`, and their Dirichlet gives up
after ten redraws and hands out each label's examples in the order of the file.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.data.examples import Example
from fedtune.data.split import Dealt, Parts, checked, read_split
from fedtune.errors import InputError
from fedtune.registry import Registry

Partitioner = Callable[..., Any]
"""From examples, a number of clients, a generator, and its settings by name to each client's indices."""

PARTITIONERS: Registry[Partitioner] = Registry("partitioner", "data.partition.name", "fedtune.partitioners")


def register_partitioner(name: str, *, summary: str | None = None) -> Callable[[Partitioner], Partitioner]:
    """Makes `data.partition: {name: NAME}` stand for a function.

    The function is called as f(examples, clients, rng, *, settings...) and returns one sequence of indices a
    client, or a mapping from clients' names to such sequences. Each index has to be there exactly once. Its
    keyword-only parameters are the settings, checked against their annotations; their defaults are the
    settings' own.

    Args:
        name: What a configuration calls it.
        summary: One line for `fedtune ls partitioners`; None: the docstring's first.

    Raises:
        InputError: The name is taken, or the parameters are others than these.
    """

    def decorate(function: Partitioner) -> Partitioner:
        parameters = inspect.signature(function).parameters.values()
        settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        others = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        given = [p for p in others if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(given) != len(others) or len(given) != 3:
            raise InputError(
                f"partitioner {name}: its function must take (examples, clients, rng, *, settings...), got "
                f"{inspect.signature(function)}"
            )
        bare = [p.name for p in settings if p.annotation is p.empty or p.name == "name"]
        if bare:
            raise InputError(
                f"partitioner {name}: each setting needs a type and a name other than `name`; see {bare[0]}"
            )
        PARTITIONERS.register(name, function, function, summary)
        return function

    return decorate


def deal(
    name: str,
    examples: Sequence[Example],
    clients: int | None,
    rng: np.random.Generator,
    settings: Mapping[str, Any],
) -> Dealt:
    """Deals examples to clients with a partitioner.

    Args:
        name: Of the partitioner.
        examples: What is dealt.
        clients: How many clients; None: as many as a field has values (`by-field`), or a file lists (`file`).
        rng: Source of everything random.
        settings: The partitioner's.

    Raises:
        InputError: No such partitioner, impossible numbers, or a split that is none.
    """
    found = PARTITIONERS[name](examples, clients, rng, **settings)
    return (
        found if isinstance(found, Dealt) else checked(found, len(examples), clients, f"partitioner {name}")
    )


_DRAWS_AT_ONCE = 2**18  # numbers drawn in one call: 2 MiB, so that thousands of redraws take about a second


def iid(n: int, clients: int, rng: np.random.Generator) -> Parts:
    """Deals n shuffled examples to the clients; sizes differ by one at most.

    Raises:
        InputError: No client, or more clients than examples.
    """
    _check_clients(n, clients)
    return _sorted(np.array_split(rng.permutation(n), clients))


def dirichlet(
    labels: Sequence[str],
    clients: int,
    alpha: float,
    minimum: int,
    rng: np.random.Generator,
    max_redraws: int = 10_000,
) -> Parts:
    """Spreads each label over the clients in proportions drawn from a symmetric Dirichlet(alpha).

    The whole draw is repeated until every client has at least `minimum` examples. A client's count of a label
    is less than one away from its drawn share (see `whole_sizes`).

    Args:
        labels: One label an example.
        clients: Number of clients.
        alpha: Concentration, > 0. Small: a label sits with few clients; large: every client has the same mix.
        minimum: The fewest examples of a client, >= 1.
        rng: Source of the draws.
        max_redraws: How many draws are tried; only sizes are computed for a draw that fails.

    Raises:
        InputError: Impossible numbers, or no draw met the minimum, with the smallest client of the best draw.
    """
    groups = _groups(labels)
    _check_clients(len(labels), clients)
    counts = np.array([len(group) for group in groups])
    sizes = _dirichlet_sizes(counts, clients, alpha, minimum, rng, max_redraws)  # (labels, clients)
    pieces: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(clients)]
    for group, row in zip(groups, sizes, strict=True):
        for client, piece in enumerate(np.split(rng.permutation(group), np.cumsum(row)[:-1])):
            pieces[client].append(piece)
    return _sorted([np.concatenate(piece) for piece in pieces])


def by_field(values: Sequence[str], clients: int | None, rng: np.random.Generator) -> Parts:
    """Gives clients whole values of a field.

    Args:
        values: One value an example; values are taken in sorted order.
        clients: None for one client a value. More clients than values: values are dealt to the clients in
            turn and the clients of a value share its shuffled examples evenly. Fewer: clients take values in
            turn.
        rng: Drawn from only where a value is shared.

    Raises:
        InputError: No field was mapped, more clients than examples, or a value with fewer examples than
            clients.
    """
    groups = _groups(values)
    clients = len(groups) if clients is None else clients
    _check_clients(len(values), clients)
    if clients <= len(groups):
        return _sorted([np.concatenate(groups[client::clients]) for client in range(clients)])
    parts: Parts = [np.empty(0, dtype=np.int64)] * clients
    for position, group in enumerate(groups):
        owners = range(position, clients, len(groups))
        if len(owners) > len(group):
            raise InputError(
                f'partition by-field: the value "{values[group[0]]}" has {len(group)} examples for '
                f"{len(owners)} clients, so some would be empty; lower data.clients from {clients}."
            )
        shared = np.array_split(rng.permutation(group), len(owners)) if len(owners) > 1 else [group]
        for owner, piece in zip(owners, shared, strict=True):
            parts[owner] = piece
    return _sorted(parts)


def shards(labels: Sequence[str], clients: int, shards_per_client: int, rng: np.random.Generator) -> Parts:
    """Cuts the examples, sorted by label, into equal shards and deals `shards_per_client` to each client.

    The pathological split of McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data" (2017), section 3: with 2 shards most clients have two labels. Shard sizes differ by
    one at most.

    Raises:
        InputError: No client, no shard, or more shards than examples.
    """
    groups = _groups(labels)
    _check_clients(len(labels), clients)
    total = clients * shards_per_client
    if shards_per_client < 1:
        raise InputError(f"partition shards: shards_per_client must be at least 1, got {shards_per_client}.")
    if total > len(labels):
        raise InputError(
            f"partition shards: {clients} clients with {shards_per_client} shards each need {total} "
            f"examples, there are {len(labels)}; lower data.clients or shards_per_client."
        )
    pieces = np.array_split(np.concatenate([rng.permutation(group) for group in groups]), total)
    dealt = rng.permutation(total).reshape(clients, shards_per_client)
    return _sorted([np.concatenate([pieces[shard] for shard in row]) for row in dealt])


def quantity(
    n: int,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float | None = None,
    fractions: Sequence[float] | None = None,
    minimum: int = 1,
    max_redraws: int = 10_000,
) -> Parts:
    """Deals n shuffled examples to clients of unlike size.

    Args:
        n: Number of examples.
        clients: Number of clients.
        rng: Source of the draws.
        alpha: Sizes in Dirichlet(alpha) proportions, redrawn until each is at least `minimum`.
        fractions: Or the parts themselves, one a client, with sum 1; sizes are rounded by largest remainder.
        minimum: The fewest examples of a client, >= 1.
        max_redraws: How many draws are tried with `alpha`.

    Raises:
        InputError: Not exactly one of `alpha` and `fractions`, or numbers that cannot be met.
    """
    _check_clients(n, clients)
    if (alpha is None) == (fractions is None):
        raise InputError("partition quantity: give either alpha or fractions, and not both.")
    if fractions is not None:
        sizes = _fraction_sizes(n, clients, fractions, minimum)
    else:
        assert alpha is not None
        sizes = _dirichlet_sizes(np.array([n]), clients, alpha, minimum, rng, max_redraws)[0]
    return _sorted(np.split(rng.permutation(n), np.cumsum(sizes)[:-1]))


def summarize(parts: Sequence[npt.NDArray[np.int64]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Describes a partition for partition.json.

    Returns:
        One object a client: `client` (its position), `examples` (its size), `labels` (label to count,
        sorted).
    """
    return [
        {
            "client": client,
            "examples": len(part),
            "labels": dict(sorted(Counter(labels[index] for index in part).items())),
        }
        for client, part in enumerate(parts)
    ]


def _dirichlet_sizes(
    counts: npt.NDArray[np.int64],
    clients: int,
    alpha: float,
    minimum: int,
    rng: np.random.Generator,
    max_redraws: int,
) -> npt.NDArray[np.int64]:
    """Draws sizes (labels, clients): rows sum to `counts` (labels,), columns reach `minimum`."""
    n = int(counts.sum())
    if not 0 < alpha < math.inf:
        raise InputError(f"partition alpha must be a number > 0, got {alpha}.")
    _check_minimum(n, clients, minimum)
    if max_redraws < 1:
        raise InputError(f"partition max_redraws must be at least 1, got {max_redraws}.")
    draws_at_once = max(1, _DRAWS_AT_ONCE // (len(counts) * clients))
    best = 0
    for done in range(0, max_redraws, draws_at_once):
        draws = min(draws_at_once, max_redraws - done)
        proportions = rng.dirichlet(np.full(clients, alpha), size=(draws, len(counts)))
        sizes = whole_sizes(proportions, counts, rng)  # (draws, labels, clients)
        smallest = sizes.sum(axis=1).min(axis=1)  # (draws,)
        enough = np.flatnonzero(smallest >= minimum)
        if enough.size:
            drawn: npt.NDArray[np.int64] = sizes[enough[0]]
            return drawn
        best = max(best, int(smallest.max()))
    raise InputError(
        f"partition: no draw of Dirichlet({alpha}) over {clients} clients gave each at least {minimum} of "
        f"the {n} examples in {max_redraws} tries; in the best one the smallest client had {best}. "
        "Raise alpha, or lower minimum or data.clients."
    )


def whole_sizes(
    proportions: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Turns proportions (..., labels, clients) into whole sizes with sums `counts` (labels,) over clients.

    Cumulative rounding with one random offset a label (systematic sampling): a size is floor or ceiling of
    its exact share, and its mean over offsets is that share. Without the offset every rare label would go to
    the same clients.
    """
    offsets = rng.random((*proportions.shape[:-1], 1))
    edges = np.floor(np.cumsum(proportions, axis=-1) * counts[:, None] + offsets).astype(np.int64)
    edges[..., -1] = counts  # exact where the sum of proportions is not quite 1
    np.minimum(edges, counts[:, None], out=edges)
    return np.diff(edges, axis=-1, prepend=0)


def _fraction_sizes(n: int, clients: int, fractions: Sequence[float], minimum: int) -> npt.NDArray[np.int64]:
    if len(fractions) != clients:
        raise InputError(f"partition quantity: {clients} clients, but {len(fractions)} fractions.")
    if not all(0 < fraction <= 1 for fraction in fractions) or abs(math.fsum(fractions) - 1) > 1e-6:
        raise InputError(
            f"partition quantity: fractions must be > 0 with sum 1, got {list(fractions)} "
            f"with sum {math.fsum(fractions):g}."
        )
    _check_minimum(n, clients, minimum)
    exact = np.array(fractions) / math.fsum(fractions) * n
    sizes: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    # stable sort: of equal remainders the first client's is rounded up
    sizes[np.argsort(sizes - exact, kind="stable")[: n - int(sizes.sum())]] += 1
    if sizes.min() < minimum:
        raise InputError(
            f"partition quantity: fraction {fractions[int(sizes.argmin())]} of {n} examples is "
            f"{sizes.min()}, below the minimum of {minimum}; raise the fraction."
        )
    return sizes


def _groups(labels: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    """The indices of each label's examples, labels in sorted order."""
    places: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        places.setdefault(label, []).append(index)
    if set(places) == {""}:
        raise InputError(
            "partition: no example has a category; set data.fields.category to the key that the data is "
            'split by, or use the partition "iid" or "quantity".'
        )
    return [np.array(places[label], dtype=np.int64) for label in sorted(places)]


def _check_clients(n: int, clients: int) -> None:
    if clients < 1:
        raise InputError(f"data.clients must be at least 1, got {clients}.")
    if clients > n:
        raise InputError(
            f"data.clients is {clients}, but there are only {n} examples, so some clients would be empty; "
            f"set data.clients to {n} or fewer, or give more data."
        )


def _check_minimum(n: int, clients: int, minimum: int) -> None:
    if minimum < 1:
        raise InputError(f"partition minimum must be at least 1, got {minimum}: a client cannot be empty.")
    if minimum * clients > n:
        raise InputError(
            f"partition minimum: {clients} clients with at least {minimum} examples each need "
            f"{minimum * clients}, there are {n}; lower minimum to {n // clients} or less, or data.clients."
        )


def _sorted(parts: Sequence[npt.NDArray[np.int64]]) -> Parts:
    return [np.sort(part) for part in parts]


def _given(examples: Sequence[Example], clients: int | None, rng: np.random.Generator) -> Parts:
    raise InputError("partition given: only examples that come client by client are split so")


def _field_values(examples: Sequence[Example], by: str) -> list[str]:
    return [getattr(example, by) for example in examples]


for _name, _summary, _function in (
    ("iid", "shuffled and dealt out evenly", lambda e, n, rng: iid(len(e), n, rng)),
    (
        "dirichlet",
        "each label spread over clients by Dirichlet(alpha), at least `minimum` examples a client",
        lambda e, n, rng, *, alpha, minimum, by: dirichlet(_field_values(e, by), n, alpha, minimum, rng),
    ),
    (
        "by-field",
        "one value of a field (category, language, task) a client",
        lambda e, n, rng, *, by: by_field(_field_values(e, by), n, rng),
    ),
    (
        "shards",
        "sorted by label, cut into equal shards, `shards_per_client` dealt to each client",
        lambda e, n, rng, *, shards_per_client, by: shards(_field_values(e, by), n, shards_per_client, rng),
    ),
    (
        "quantity",
        "labels alike, sizes unlike: by Dirichlet(alpha) or by given fractions",
        lambda e, n, rng, *, alpha, fractions: quantity(len(e), n, rng, alpha=alpha, fractions=fractions),
    ),
    (
        "file",
        "the indices that a JSON file lists for each client",
        lambda e, n, rng, *, path, rest: read_split(path, len(e), n, leave_out=rest == "leave-out"),
    ),
    ("given", "as they came: Python objects that are given client by client", _given),
    ("files", "each file of data.train is a client's (data.clients: files)", _given),
):
    PARTITIONERS.built_in(_name, _summary, lambda function=_function: function)  # type: ignore[misc]
