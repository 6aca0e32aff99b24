"""The examples of a run as its sources give them, before any split: training, held-out, public."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.config.data import FILES, OBJECTS
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import numpy_generator
from fedtune.data.examples import Example
from fedtune.data.files import clients_in, is_here, is_pattern, left_over
from fedtune.data.objects import ObjectData
from fedtune.data.picture_folders import picture_files
from fedtune.data.pictures import load_pictures, pictures_by_client
from fedtune.data.reading import Reading
from fedtune.data.sources import bundled_examples, has_parts, held_out_split, load_examples
from fedtune.errors import InputError, nearest

HERE = Path(".")


def training_examples(config: RunConfig, objects: ObjectData | None, reading: Reading) -> ObjectData:
    """All examples before any split, and whose they are if they came client by client.

    Args:
        config: The run's configuration.
        objects: The examples, with `data.train: objects`.
        reading: Is told what was read.

    Raises:
        InputError: They are missing or malformed.
    """
    data = config.data
    if data.train == OBJECTS:
        if objects is None:
            raise InputError(
                f"data.train is {OBJECTS}: the examples come from Python and are in no file. Give them as "
                "data=... to fedtune.run or fedtune.open, or name a file in data.train"
            )
        reading.skipped += objects.skipped
        reading.said += objects.said
        return objects
    reading.what = "data.train"
    if data.clients == FILES:
        by_client = _by_client(config, data.train, data.split, reading)
        everything = tuple(example for part in by_client.values() for example in part)
        return ObjectData(everything, {name: len(part) for name, part in by_client.items()})
    if data.pictures is not None:
        found = load_pictures(data.train, "train", data.pictures.caption, reading)
        return ObjectData(tuple(found), {})
    streamed = data.max_examples if data.streaming else None
    return ObjectData(
        tuple(
            load_examples(
                data.train,
                fields=fields_of(config),
                split=data.split,
                base=HERE,
                reading=reading,
                streamed=streamed,
            )
        ),
        {},
    )


def held_out_in_source(
    config: RunConfig, reading: Reading, clients: Sequence[str] = ()
) -> tuple[list[Example], list[int]]:
    """The held-out examples of `data.holdout.source`, and whose each is where they are a file a client.

    Args:
        config: The run's configuration, which has that setting.
        reading: Is told what was read.
        clients: Names of the clients, where each may have a file; empty where nobody asks whose they are.

    Returns:
        The examples, and of each its client's number; no numbers where they are nobody's.

    Raises:
        InputError: They are missing or malformed, or a file is of no client.
    """
    source, split = config.data.holdout.source, config.data.holdout.split
    assert source is not None
    reading.what = "data.holdout.source"
    pictures = config.data.pictures
    if source == "bundled" and pictures is None:
        return bundled_examples("test"), []
    many = is_pattern(source, HERE) or (Path(source).is_dir() and not has_parts(Path(source)))
    if pictures is not None:
        many = many and not any(file.parent == Path(source) for file in picture_files(Path(source)))
    if config.data.clients == FILES and many:
        by_client = _by_client(config, source, split, reading)
        owners = _owners(by_client, clients, source, reading) if clients else []
        return [example for part in by_client.values() for example in part], owners
    if pictures is not None:
        return load_pictures(source, "test", pictures.caption, reading), []
    found = load_examples(
        source,
        fields=fields_of(config),
        split=split or held_out_split(source),
        base=HERE,
        reading=reading,
        streamed=config.evaluation.max_examples if config.data.streaming and not is_here(source) else None,
    )
    return found, []


def public_examples(config: RunConfig, reading: Reading | None = None) -> list[Example]:
    """The examples that the server holds itself; none without `data.public`.

    Args:
        config: The run's configuration.
        reading: Is told what was read.

    Raises:
        InputError: The file is missing or malformed.
    """
    public = config.data.public
    if public is None:
        return []
    account = config.reading if reading is None else reading
    account.what = "data.public.source"
    examples = load_examples(
        public.source,
        fields={str(ours): theirs for ours, theirs in public.fields.items()},
        split=public.split,
        base=HERE,
        setting="data.public.fields",
        reading=account,
    )
    if public.max_examples is not None and public.max_examples < len(examples):
        chosen = numpy_generator(config.seed, "public").permutation(len(examples))[: public.max_examples]
        examples = [examples[i] for i in sorted(chosen)]
    return examples


def fields_of(config: RunConfig) -> dict[str, str | None]:
    """Our field names to the source's keys."""
    return {str(ours): theirs for ours, theirs in config.data.fields.items()}


def _by_client(
    config: RunConfig, source: str, split: str | None, reading: Reading
) -> dict[str, list[Example]]:
    """The examples in each client's file or folder, by its name."""
    if (pictures := config.data.pictures) is not None:
        return pictures_by_client(source, pictures.caption, reading)
    if has_parts(HERE / source):
        raise InputError(
            f"{reading.what}: {source} is one data set as it was saved, or one of tasks, and no folder "
            "with a file a client; leave out data.clients: files"
        )
    there = clients_in(source, HERE, reading.what)
    mine, found = reading.another(), dict[str, list[Example]]()
    for name, place in there.items():
        own, part = reading.another(), split or held_out_split(str(place))
        found[name] = load_examples(
            str(place),
            fields=fields_of(config),
            split=part,
            base=HERE,
            reading=own,
        )
        mine.add(own)
    reading.kinds.clear()
    reading.add(mine)
    others = left_over(Path(source), there) if Path(source).is_dir() else []
    more = f"; not read, of no known format: {', '.join(others[:5])}" if others else ""
    reading.line(f"from {source}, of {len(found)} clients: {_some(list(found))}{more}")
    return found


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _owners(
    found: dict[str, list[Example]], clients: Sequence[str], source: str, reading: Reading
) -> list[int]:
    """Of each held-out example its client's number."""
    numbers = {name: number for number, name in enumerate(clients)}
    for name in found:
        if name not in numbers:
            raise InputError(
                f'data.holdout.source: {source} has a file of "{name}", and no client of data.train is '
                f"called so; there are {_some(clients)}.{nearest(name, clients)}"
            )
    missing = [name for name in clients if name not in found]
    if missing:
        reading.said.append(
            f"data.holdout.source: {source} has no file of {_some(missing)}: nothing of theirs is scored"
        )
    return [numbers[name] for name, part in found.items() for _ in part]
