"""What clients train on, as far as a plan needs it: how many examples, and how long the longest batch is.

Local data and a tokenizer beside the config.json are read, and then these are the run's own numbers. Nothing
is downloaded for a plan but a model's config.json and tokenizer: of data that are not here the plan takes
`data.max_length` for every example, as far as the model sees, and says that it does not know how many there
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedtune.config.partitions import FromFile
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import torch_generator
from fedtune.data.batches import epoch_batches, padding
from fedtune.data.batching import Batching
from fedtune.data.encoded import Counts, Encoded, lengths_of, longest_of
from fedtune.data.files import is_here
from fedtune.data.objects import ObjectData
from fedtune.data.split import load_split
from fedtune.errors import InputError
from fedtune.federation.data import prepare_data
from fedtune.federation.encoding import describe, encode_for
from fedtune.federation.room import Room, batching_of, example_room, shortening
from fedtune.federation.sources import public_examples
from fedtune.models.folders import TOKENIZER_FILES, model_folder
from fedtune.models.load import load_tokenizer, model_config


@dataclass(frozen=True)
class Workload:
    """The data of a run.

    Attributes:
        clients: Examples of each client; None where the data are not here.
        population: How many clients there are.
        longest: The longest examples, of any client, in descending order.
        public: The server's longest public examples, likewise; empty without any.
        held_out: All held-out examples that are scored, or where clients score their own those of the client
            with the largest batch; as many of the longest as a batch has where they are not known.
        labels: Of a classifier, its classes, where they are known.
        notes: What had to be assumed.
        tokens: Of all clients' batches, over one pass, and how many of them are padding; None where the data
            or a tokenizer are not here.
        packed: Rows of each client, where a batch is of rows of several examples; `longest` are rows then.
    """

    clients: dict[int, int] | None
    population: int
    longest: tuple[Encoded, ...]
    public: tuple[Encoded, ...]
    held_out: Sequence[Encoded]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    tokens: tuple[int, int] | None = None
    packed: dict[int, int] | None = None

    @property
    def passes(self) -> dict[int, int] | None:
        """Of how many rows a pass of each client is: of its examples, where they are not packed."""
        return self.packed or self.clients

    def batch(self, size: int) -> list[Encoded]:
        """The largest batch of `size` examples (fewer where no client has as many): no other is larger."""
        rows = size if self.passes is None else min(size, max(self.passes.values()))
        items = list(self.longest[:rows])
        if len({len(item.input_ids) for item in items}) == 1 < len(items) and type(items[-1]) is Encoded:
            # with padding there is a mask, and with a mask a step needs more memory
            items.append(_shorter(items.pop()))
        return items


def read(config: RunConfig, *, pooled: bool, rows: int, objects: ObjectData | None = None) -> Workload:
    """What the configuration's data come to.

    Args:
        config: The run's configuration.
        pooled: One client holds all data.
        rows: The most examples that a batch will be asked for.
        objects: The examples, with `data.train: objects`.

    Raises:
        InputError: Local data are malformed or cannot be split as asked; or their number of clients is to
            come from data that are not here.
    """
    data, notes = config.data, list[str]()
    room = room_of(config)
    notes += shortening(config, room)
    sources = [] if objects else [data.train]
    sources += [data.holdout.source] if data.holdout.source else []
    here = all(map(is_here, sources))
    tokenized = _has_tokenizer(config.model.place)
    longest = _assumed(config, rows, room.tokens)
    public = longest if data.public is not None else ()
    held_out: Sequence[Encoded] = _assumed_held_out(config, room.tokens)
    if not here:
        clients = (
            len(load_split(data.partition.path)) if isinstance(data.partition, FromFile) else data.clients
        )
        if not isinstance(clients, int):
            raise InputError(
                f"data.clients is {clients or 'null'} and the data are not here to count them; a plan "
                "downloads none. Set data.clients"
            )
        notes.append(
            f"{', '.join(s for s in sources if not is_here(s))} is not on this machine: every example is "
            f"taken to have {_in_words(config, room)} tokens, and each client a full batch"
        )
        population = 1 if pooled else clients
        return Workload(None, population, longest, public, held_out, tuple(data.labels or ()), tuple(notes))
    split = prepare_data(config, pooled=pooled, objects=objects)
    counts = {client: len(items) for client, items in split.clients.items()}
    if not tokenized:
        notes.append(
            f"model {config.model.name} has no tokenizer here: every example is taken to have "
            f"{_in_words(config, room)} tokens"
        )
        held_out = held_out[: len(split.evaluation)]
        return Workload(counts, len(counts), longest, public, held_out, split.labels, tuple(notes))
    tokenizer = load_tokenizer(config.model.place, Path("."))
    longest, each = (), dict[str, Counts]()
    batching, packed = batching_of(config, room), dict[int, int]()
    computed = padded = 0
    size = getattr(config.method, "batch_size", 1)
    for client, items in split.clients.items():
        found = encode_for(
            config, items, tokenizer, split.labels, max_length=room.tokens, whose=split.owner(client)
        )
        each["train"] = each.get("train", Counts()) + found.counts
        counts[client] = len(found.items)
        drawn = torch_generator(config.seed, "plan", client)
        of_client, (more, waste) = a_pass(found.items, batching, size, drawn)
        longest = _longest([*longest, *longest_of(of_client, rows)], rows)
        if batching.name == "packed":
            packed[client] = len(of_client)
        computed, padded = computed + more, padded + waste
    if data.public is not None and is_here(data.public.source):
        found = encode_for(
            config,
            public_examples(config),
            tokenizer,
            split.labels,
            max_length=room.tokens,
            whose="the server's public examples",
        )
        each["public"] = found.counts
        public = tuple(longest_of(batching.rows(found.items, torch_generator(config.seed, "plan")), rows))
    groups = [
        encode_for(
            config,
            scored,
            tokenizer,
            split.labels,
            max_length=room.tokens,
            whose="the held-out examples",
            too_long="cut",
        ).items
        for scored in split.own.values() or [split.evaluation]
    ]
    held_out = max(groups, key=lambda items: _largest(items, config.evaluation.batch_size))
    notes += describe(each, room.tokens)
    tokens = (computed, padded) if computed else None
    about = split.labels, tuple(notes), tokens, packed or None
    return Workload(counts, len(counts), longest, public, held_out, *about)


def a_pass(
    items: Sequence[Encoded], batching: Batching, size: int, generator: torch.Generator
) -> tuple[Sequence[Encoded], tuple[int, int]]:
    """What the batches of a client's pass are made of, their tokens, and how many of these are padding.

    Args:
        items: The client's examples.
        batching: How they become batches.
        size: Rows of a batch.
        generator: A CPU generator.
    """
    rows = batching.rows(items, generator)
    if not len(rows):
        return rows, (0, 0)
    return rows, padding(epoch_batches(len(rows), size, generator, batching.lengths(rows)), lengths_of(rows))


def assumed(config: RunConfig, clients: int, rows: int) -> Workload:
    """Examples of `data.max_length` tokens, of which it is not known how many there are."""
    room = room_of(config)
    notes = [f"every example is taken to have {_in_words(config, room)} tokens, and each client a full batch"]
    longest = _assumed(config, rows, room.tokens)
    held_out = _assumed_held_out(config, room.tokens)
    return Workload(None, clients, longest, longest, held_out, (), tuple(notes))


def room_of(config: RunConfig) -> Room:
    """How long the run's examples may be."""
    return example_room(config, model_config(config.model.place, base=Path("."), task=config.model.task))


def _in_words(config: RunConfig, room: Room) -> str:
    if room.shortened:
        return f"the {room.tokens} that the model sees, of data.max_length ({config.data.max_length})"
    return f"data.max_length ({room.tokens})"


def _assumed(config: RunConfig, rows: int, length: int) -> tuple[Encoded, ...]:
    """Examples as long as allowed, of tokens that differ: so they cost most."""
    wide = config.model.task == "causal-lm"
    parts = (length // 2, length - length // 2) if config.data.batching == "packed" else ()
    return tuple(
        Encoded(tuple(range(row * length, (row + 1) * length)), (0,) * (length if wide else 1), parts)
        for row in range(rows)
    )


def _assumed_held_out(config: RunConfig, length: int) -> tuple[Encoded, ...]:
    """A full batch of evaluation, as far as its memory goes."""
    most = config.evaluation.max_examples or config.evaluation.batch_size
    return _assumed(config, min(most, config.evaluation.batch_size), length)


def within(items: Iterable[Encoded], vocabulary: int) -> list[Encoded]:
    """Examples with token ids that a model has."""
    return [replace(item, input_ids=tuple(i % vocabulary for i in item.input_ids)) for item in items]


def _shorter(item: Encoded) -> Encoded:
    """Without its last token, if it has another."""
    if len(item.input_ids) == 1:
        return item
    labels = item.labels[:-1] if len(item.labels) > 1 else item.labels
    parts = (*item.parts[:-1], item.parts[-1] - 1) if item.parts else ()
    return Encoded(item.input_ids[:-1], labels, tuple(filter(None, parts)))


def _largest(items: Sequence[Encoded], size: int) -> int:
    """Tokens of the largest batch of held-out examples, padding included."""
    return min(len(items), size) * max((len(item.input_ids) for item in items), default=0)


def _longest(items: Iterable[Encoded], rows: int) -> tuple[Encoded, ...]:
    return tuple(sorted(items, key=lambda item: -len(item.input_ids))[:rows])


def _has_tokenizer(name: str) -> bool:
    folder = model_folder(name, Path("."), weights=False)
    return any((folder / file).is_file() for file in TOKENIZER_FILES)
