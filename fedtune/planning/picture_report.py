"""What a text-to-image model will train on: the document of `fedtune data`, of pictures and captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.schema import RunConfig
from fedtune.data.encoded import Counts
from fedtune.data.examples import Example
from fedtune.data.pictures import picture_size
from fedtune.errors import InputError, foreign
from fedtune.federation.data import Split, prepare_data
from fedtune.models.pipelines import meta_pipeline, pipeline_tokenizer
from fedtune.planning.data_report import first_example, histogram
from fedtune.planning.pictures import side_of

Check = dict[str, str]


def picture_report(config: RunConfig, *, example: int | None = None) -> dict[str, Any]:
    """The same document as `data_report`: tokens are those of captions, equal are pictures of the same bytes.

    Args:
        config: The run's configuration.
        example: Which training picture is shown: its index, as in partition.json; None: the first.

    Raises:
        InputError: The pictures are not usable, or there is no such picture.
    """
    split = prepare_data(config, pooled=False)
    index = first_example(split) if example is None else example
    pipeline = meta_pipeline(config.model.place, dtype=config.model.dtype, base=Path("."))
    tokenizer = pipeline_tokenizer(config.model.place, Path("."))
    room, side = int(pipeline.config.max_position_embeddings), side_of(config, pipeline)

    def length(one: Example) -> int:
        return len(tokenizer(one.instruction, truncation=False, verbose=False)["input_ids"])

    lengths = {client: [length(one) for one in part] for client, part in split.clients.items()}
    everything = [n for some in lengths.values() for n in some]
    trained = Counter(one.output for part in split.clients.values() for one in part)
    within = {client: len(part) - len({one.output for one in part}) for client, part in split.clients.items()}
    leaked = [one for one in split.held_out if one.output in trained]
    sizes = [picture_size(one) for one in (*split.trained, *split.held_out)]
    cut = {client: sum(n > room for n in some) for client, some in lengths.items()}
    held = Counts(examples=len(split.held_out), cut=sum(length(one) > room for one in split.held_out))
    shown = sorted(sizes, key=lambda size: size[0] * size[1])
    duplicates = {
        "within": sum(within.values()),
        "between": len(everything) - len(trained) - sum(within.values()),
        "held_out": len(leaked),
        "held_out_questions": 0,
    }
    taken = config.data.pictures.crop if config.data.pictures else ""
    sources = [*split.reading.lines, *split.reading.said]
    sources.append(
        f"pictures of {_by(shown[0])} to {_by(shown[-1])} pixels, brought to {_by((side, side))} "
        f"(data.pictures.crop: {taken})"
    )
    small = sum(min(size) < side for size in sizes)
    return {
        "model": config.model.name,
        "template": None,
        "max_length": room,
        "sources": sources,
        "skipped": split.reading.document(),
        "examples": {"train": len(everything), "held_out": len(split.held_out), "public": None},
        "clients": [
            {
                "client": client,
                "name": split.partition["clients"][client].get("name", ""),
                "examples": len(some),
                "labels": {k: n for k, n in split.partition["clients"][client]["labels"].items() if k},
                "tokens": {"median": float(np.median(some)), "longest": max(some), "looked_at": len(some)},
                "duplicates": within[client],
                "empty": 0,
                "cut": cut[client],
                "dropped": 0,
            }
            for client, some in lengths.items()
        ],
        "lengths": histogram(everything),
        "duplicates": duplicates,
        "encoded": {
            "train": Counts(examples=len(everything), cut=sum(cut.values())).document(),
            "held_out": held.document(),
        },
        "padding": {
            "batching": config.data.batching,
            "batch_size": int(getattr(config.method, "batch_size", 1)),
            "computed": room * len(everything),
            "padding": sum(max(room - n, 0) for n in everything),
        },
        "sampled": None,
        "example": _example(split, index, length(_of(split, index)[1])),
        "checks": list(_checks(duplicates, leaked, sum(cut.values()), held.cut, small, side, room)),
    }


def _of(split: Split, index: int) -> tuple[int, Example]:
    """The client of a training picture, and the picture."""
    for client, part in enumerate(split.partition["clients"]):
        if index in part["indices"]:
            return client, split.clients[client][part["indices"].index(index)]
    most = max(max(part["indices"]) for part in split.partition["clients"])
    raise InputError(f"example {index} is no training picture; their indices go from 0 to {most}")


def _example(split: Split, index: int, tokens: int) -> dict[str, Any]:
    client, one = _of(split, index)
    return {
        "index": index,
        "client": client,
        "picture": one.picture,
        "tokens": tokens,
        "with_loss": 0,
        "label": None,
        "pieces": [{"text": one.instruction, "loss": False, "tokens": tokens}],
    }


def _checks(
    duplicates: dict[str, int],
    leaked: Sequence[Example],
    cut: int,
    held_cut: int,
    small: int,
    side: int,
    room: int,
) -> Iterator[Check]:
    """What a person should know, the worst first."""
    if leaked:
        yield _warning(
            f"LEAK: {len(leaked):,} held-out pictures are trained on (the first: "
            f"{foreign(leaked[0].picture, 60)!r}): a score on them says nothing of new pictures"
        )
    for count, text in (
        (duplicates["between"], "training pictures stand with an earlier client too"),
        (duplicates["within"], "repeat an earlier picture of the same client"),
        (cut, f"captions are cut to {room} tokens"),
        (held_cut, f"captions of held-out pictures are cut to {room} tokens"),
        (small, f"pictures have a side of less than {side} pixels and are enlarged"),
    ):
        if count:
            yield _warning(f"{count:,} {text}")


def _warning(text: str) -> Check:
    return {"level": "warning", "text": text}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
