"""What clients train on, as far as a plan needs it: how many examples, and how long the longest batch is.

Local data and a tokenizer beside the config.json are read, and then these are the run's own numbers. Nothing
is downloaded for a plan but a model's config.json and tokenizer: of data that are not here the plan takes
`data.max_length` for every example, as far as the model sees, and says that it does not know how many there
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.config.partitions import FromFile
from fedtune.config.schema import RunConfig
from fedtune.data.encoded import Counts, Encoded
from fedtune.data.objects import ObjectData
from fedtune.data.split import load_split
from fedtune.errors import InputError
from fedtune.federation.data import prepare_data, public_examples
from fedtune.federation.encoding import describe, encode_for
from fedtune.federation.room import Room, example_room, shortening
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
        held_out: All held-out examples that are scored; as many of the longest as a batch has where they are
            not known.
        labels: Of a classifier, its classes, where they are known.
        notes: What had to be assumed.
    """

    clients: dict[int, int] | None
    population: int
    longest: tuple[Encoded, ...]
    public: tuple[Encoded, ...]
    held_out: Sequence[Encoded]
    labels: tuple[str, ...]
    notes: tuple[str, ...]

    def batch(self, size: int) -> list[Encoded]:
        """The largest batch of `size` examples (fewer where no client has as many): no other is larger."""
        rows = size if self.clients is None else min(size, max(self.clients.values()))
        items = list(self.longest[:rows])
        if len({len(item.input_ids) for item in items}) == 1 < len(items):
            last = items.pop()  # with padding there is a mask, and with a mask a step needs more memory
            labels = last.labels[:-1] if len(last.labels) > 1 else last.labels
            items.append(Encoded(last.input_ids[:-1] or last.input_ids, labels))
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
    here = all(map(_is_here, sources))
    tokenized = _has_tokenizer(config.model.name)
    longest = _assumed(config, rows, room.tokens)
    public = longest if data.public is not None else ()
    held_out: Sequence[Encoded] = _assumed_held_out(config, room.tokens)
    if not here:
        clients = (
            len(load_split(data.partition.path)) if isinstance(data.partition, FromFile) else data.clients
        )
        if clients is None:
            raise InputError(
                "data.clients is null and the data are not here to count them; a plan downloads none. "
                "Set data.clients"
            )
        notes.append(
            f"{', '.join(s for s in sources if not _is_here(s))} is not on this machine: every example is "
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
    tokenizer = load_tokenizer(config.model.name, Path("."))
    longest, each = (), dict[str, Counts]()
    for client, items in split.clients.items():
        found = encode_for(
            config, items, tokenizer, split.labels, max_length=room.tokens, whose=split.owner(client)
        )
        each["train"] = each.get("train", Counts()) + found.counts
        counts[client] = len(found.items)
        longest = _longest([*longest, *found.items.longest(rows)], rows)
    if data.public is not None and _is_here(data.public.source):
        found = encode_for(
            config,
            public_examples(config),
            tokenizer,
            split.labels,
            max_length=room.tokens,
            whose="the server's public examples",
        )
        each["public"] = found.counts
        public = tuple(found.items.longest(rows))
    held_out = encode_for(
        config,
        split.evaluation,
        tokenizer,
        split.labels,
        max_length=room.tokens,
        whose="the held-out examples",
        too_long="cut",
    ).items
    notes += describe(each, room.tokens)
    return Workload(counts, len(counts), longest, public, held_out, split.labels, tuple(notes))


def assumed(config: RunConfig, clients: int, rows: int) -> Workload:
    """Examples of `data.max_length` tokens, of which it is not known how many there are."""
    room = room_of(config)
    notes = [f"every example is taken to have {_in_words(config, room)} tokens, and each client a full batch"]
    longest = _assumed(config, rows, room.tokens)
    held_out = _assumed_held_out(config, room.tokens)
    return Workload(None, clients, longest, longest, held_out, (), tuple(notes))


def room_of(config: RunConfig) -> Room:
    """How long the run's examples may be."""
    return example_room(config, model_config(config.model.name, base=Path("."), task=config.model.task))


def _in_words(config: RunConfig, room: Room) -> str:
    if room.shortened:
        return f"the {room.tokens} that the model sees, of data.max_length ({config.data.max_length})"
    return f"data.max_length ({room.tokens})"


def _assumed(config: RunConfig, rows: int, length: int) -> tuple[Encoded, ...]:
    """Examples as long as allowed, of tokens that differ: so they cost most."""
    wide = config.model.task == "causal-lm"
    return tuple(
        Encoded(tuple(range(row * length, (row + 1) * length)), (0,) * (length if wide else 1))
        for row in range(rows)
    )


def _assumed_held_out(config: RunConfig, length: int) -> tuple[Encoded, ...]:
    """A full batch of evaluation, as far as its memory goes."""
    most = config.evaluation.max_examples or config.evaluation.batch_size
    return _assumed(config, min(most, config.evaluation.batch_size), length)


def within(items: Iterable[Encoded], vocabulary: int) -> list[Encoded]:
    """Examples with token ids that a model has."""
    return [Encoded(tuple(i % vocabulary for i in item.input_ids), item.labels) for item in items]


def _longest(items: Iterable[Encoded], rows: int) -> tuple[Encoded, ...]:
    return tuple(sorted(items, key=lambda item: -len(item.input_ids))[:rows])


def _is_here(source: str) -> bool:
    return source == "bundled" or Path(source).exists()


def _has_tokenizer(name: str) -> bool:
    folder = model_folder(name, Path("."), weights=False)
    return any((folder / file).is_file() for file in TOKENIZER_FILES)
