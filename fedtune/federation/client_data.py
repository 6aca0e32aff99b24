"""Clients' examples as token ids, made when a client is first asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedtune.config.places import BESIDE, NONE
from fedtune.config.schema import RunConfig
from fedtune.data.cache import EncodedCache
from fedtune.data.encode import duplicates
from fedtune.data.encoded import Counts, EncodedList, EncodedSet
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.measure.clock import Clock

FOLDER = ".encoded"  # beside a run's folder
HELD = 512  # clients whose files are mapped at a time: a process may have some 65,000 mappings in all


class ClientData(Mapping[int, EncodedList]):
    """Each client's encoded examples. One that was not asked for is not encoded.

    Args:
        examples: Of each client.
        encode: Encodes a client's; takes its number and its examples.
        key: What examples are called in the cache; None: they are not kept there.
        empty: Whether an example without an answer counts: not of a classifier.
        clock: Counts the encoding.
    """

    def __init__(
        self,
        examples: Mapping[int, Sequence[Example]],
        encode: Callable[[int, Sequence[Example]], EncodedSet],
        key: Callable[[Sequence[Example]], str | None],
        *,
        empty: bool,
        clock: Clock,
    ) -> None:
        self._examples, self._encode, self._key = examples, encode, key
        self._empty, self._clock = empty, clock
        self._held: dict[int, EncodedList] = {}
        self._on_disk: dict[int, None] = {}  # of those held, the last one asked for last
        self._counts: dict[int, Counts] = {}
        self._waiting: dict[int, Counts] = {}
        self.cache: EncodedCache | None = None  # all stay in memory

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[int]:
        return iter(self._examples)

    def __getitem__(self, client: int) -> EncodedList:
        if client not in self._held:
            self._fetch(client)
        if client in self._on_disk:
            self._on_disk[client] = self._on_disk.pop(client)
        return self._held[client]

    def _fetch(self, client: int) -> None:
        examples, on_disk = self._examples[client], False
        with self._clock.part("encoding"):
            key = self._key(examples) if self.cache is not None else None
            if self.cache is None or key is None:
                found = self._encode(client, examples)
            else:
                found, on_disk = self.cache.fetch(key, lambda: self._encode(client, examples))
        self._held[client], self._counts[client] = found.items, found.counts
        if on_disk:
            self._on_disk[client] = None
            if len(self._on_disk) > HELD:
                oldest = next(iter(self._on_disk))
                del self._on_disk[oldest], self._held[oldest]

    def begin(self) -> None:
        """Writes what was encoded until now into the cache, and from now on all else when it is."""
        if self.cache is not None and self.cache.begin():
            self._held.clear()  # they come back as mapped files
            self._on_disk.clear()

    def look(self, clients: Iterable[int]) -> None:
        """Encodes the examples of clients of which it is not known yet what becomes of them."""
        for client in clients:
            if client in self._examples and client not in self._counts:
                self._fetch(client)

    def counts(self, client: int) -> Counts:
        """What became of a client's examples, or what their texts say as long as they wait."""
        if client in self._counts:
            return self._counts[client]
        if client not in self._waiting:
            examples = self._examples[client]
            self._waiting[client] = Counts(
                examples=len(examples),
                empty=sum(not e.output.strip() for e in examples) if self._empty else 0,
                duplicates=duplicates(examples),
                waiting=len(examples),
            )
        return self._waiting[client]


def cache_of(config: RunConfig, path: Path) -> EncodedCache | None:
    """Where a run keeps encoded examples: none of `data.cache: none`.

    Args:
        config: The run's configuration.
        path: The run's folder.

    Raises:
        InputError: `data.cache` names something that is no folder.
    """
    where = config.data.cache
    if where == NONE:
        return None
    if where == BESIDE:
        return EncodedCache(path.absolute().parent / FOLDER)
    folder = Path(where).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"data.cache is {where}, which is no folder; give a folder, {BESIDE} or {NONE}")
    return EncodedCache(folder)
