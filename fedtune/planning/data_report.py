"""What a run will train on, before it is run: clients, lengths, what stands twice, what is cut, one example.

Only data, a tokenizer and a config.json are read. Texts are looked at whole. Tokens are counted of a sample
where there are more examples than that: evenly spread ones of each client, the same every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.config.schema import RunConfig
from fedtune.core.seeds import torch_generator
from fedtune.data.encoded import IGNORED, Counts, Encoded, EncodedSet
from fedtune.data.examples import Example
from fedtune.data.objects import ObjectData
from fedtune.data.prompts import prompts, taken_template, template_notes
from fedtune.data.templates import AUTO
from fedtune.errors import InputError, foreign
from fedtune.federation.data import Split, prepare_data
from fedtune.federation.encoding import encode_for, used_template
from fedtune.federation.notes import asked_in_template
from fedtune.federation.room import Room, batching_of, shortening
from fedtune.federation.sources import public_examples
from fedtune.models.load import load_tokenizer
from fedtune.planning.workload import a_pass, room_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 50_000  # examples whose tokens are counted
BARS = 12  # of the histogram
UNLIMITED = 2**30  # tokens


@dataclass(frozen=True)
class Tokens:
    """Lengths of examples in tokens.

    Attributes:
        whole: Of each example that was looked at, before anything is cut.
        counts: What became of them.
        padding: Tokens of a pass over them in batches, and how many of these are padding.
    """

    whole: list[int]
    counts: Counts
    padding: tuple[int, int]


def data_report(
    config: RunConfig, *, objects: ObjectData | None = None, sample: int = SAMPLE, example: int | None = None
) -> dict[str, Any]:
    """The document of `fedtune data --json`.

    Args:
        config: The run's configuration.
        objects: The examples, with `data.train: objects`.
        sample: The most examples whose tokens are counted.
        example: Which training example is shown: its index, as in partition.json; None: the first.

    Returns:
        `model`, `template`, `max_length`, `sources` (a line each), `skipped`; `examples` by group; `clients`:
        of each its `client`, `name`, `examples`, `labels`, `tokens` (`median`, `longest`, `looked_at`),
        `duplicates`, `empty`, `cut` and `dropped`; `lengths` (`edges`, `counts`, quantiles); `duplicates`
        (`within` a client, `between` clients, of `held_out` ones in training, `held_out_questions` with
        another answer); `padding`; `sampled`; `example`: its pieces, with and without loss; and `checks`:
        `level` (error: no run begins; or warning) and `text`.

    Raises:
        InputError: The data are not usable, or there is no such example.
    """
    if sample < 1:
        raise InputError(f"sample must be at least 1, got {sample}")
    split = prepare_data(config, pooled=False, objects=objects)
    public = public_examples(config, split.reading)
    room, tokenizer = room_of(config), load_tokenizer(config.model.place, Path("."))
    total = sum(map(len, split.clients.values()))
    look = _Look(config, split, room, tokenizer)
    tokens = {
        client: look.at(client, _spread(part, sample, total), split.owner(client))
        for client, part in split.clients.items()
    }
    twice = _twice(split)
    held = look.counts(split.held_out[:sample], "the held-out examples")
    counts = sum((one.counts for one in tokens.values()), Counts())
    looked = sum(len(one.whole) for one in tokens.values())
    document: dict[str, Any] = {
        "model": config.model.name,
        "template": _template(config, split, tokenizer),
        "max_length": room.tokens,
        "sources": [*split.reading.lines, *split.reading.said],
        "skipped": split.reading.document(),
        "examples": {
            "train": total,
            "held_out": len(split.held_out),
            "public": len(public) if config.data.public else None,
        },
        "clients": [
            _client(split, client, one, twice.within[client], answers=look.answers)
            for client, one in tokens.items()
        ],
        "lengths": histogram([n for one in tokens.values() for n in one.whole]),
        "duplicates": {
            "within": sum(twice.within.values()),
            "between": twice.between,
            "held_out": twice.held_out,
            "held_out_questions": twice.questions,
        },
        "encoded": {"train": counts.document(), "held_out": held.document()},
        "padding": {
            "batching": config.data.batching,
            "batch_size": look.batch_size,
            "computed": sum(one.padding[0] for one in tokens.values()),
            "padding": sum(one.padding[1] for one in tokens.values()),
        },
        "sampled": looked if looked < total else None,
        "example": look.example(first_example(split) if example is None else example) if total else None,
    }
    shown = [*split.trained, *split.held_out]
    template = used_template(config, shown)
    if template == AUTO:
        document["sources"].append(f"data.template: {taken_template(tokenizer)}")
    said = template_notes(template, tokenizer, shown) if template is not None else []
    if other := asked_in_template(config, shown, tokenizer):
        said.append(other)
    document["checks"] = [*_checks(config, document, split, room, twice), *map(_check, said)]
    return document


def first_example(split: Split) -> int:
    """The index of the first training example, as in partition.json: those before it are held out."""
    return min((index for part in split.partition["clients"] for index in part["indices"]), default=0)


class _Look:
    """Looks at the tokens of examples."""

    def __init__(
        self, config: RunConfig, split: Split, room: Room, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._config, self._split, self._room, self._tokenizer = config, split, room, tokenizer
        self.batch_size = int(getattr(config.method, "batch_size", 1))
        self.answers = config.model.task != "classification"

    def _encoded(
        self, items: Sequence[Example], whose: str, too_long: str = "cut", length: int = 0
    ) -> EncodedSet:
        return encode_for(
            self._config,
            items,
            self._tokenizer,
            self._split.labels,
            max_length=length or self._room.tokens,
            whose=whose,
            too_long=too_long,
        )

    def counts(self, items: Sequence[Example], whose: str) -> Counts:
        """What becomes of examples of which none is dropped."""
        return self._encoded(items, whose).counts

    def at(self, client: int, items: Sequence[Example], whose: str) -> Tokens:
        """The tokens of a client's examples."""
        found = self._encoded(items, whose)
        lengths = [int(length) for length in found.items.lengths]
        # those that fill the room may be longer, and so may conversations of any length, which have lost
        # turns: of these alone it is looked how long they are whole
        full = [
            place
            for place, length in enumerate(lengths)
            if length >= self._room.tokens or (found.counts.turns and items[place].turns)
        ]
        whole = dict(enumerate(lengths))
        if len(lengths) != len(items):  # a plain text became several examples
            lengths = [int(length) for length in self._encoded(items, whose, length=UNLIMITED).items.lengths]
            whole, full = dict(enumerate(lengths)), []
        if full:
            longer = self._encoded([items[place] for place in full], whose, length=UNLIMITED).items
            whole |= zip(full, (int(length) for length in longer.lengths), strict=True)
        kept = list(range(len(found.items)))
        counts = found.counts
        if self._config.data.too_long == "drop":
            kept = [place for place in kept if whole[place] <= self._room.tokens]
            counts = Counts(
                examples=len(kept),
                empty=counts.empty,
                duplicates=counts.duplicates,
                dropped=len(lengths) - len(kept),
            )
        batching = batching_of(self._config, self._room)
        drawn = torch_generator(self._config.seed, "plan", client)
        _, padding = a_pass([found.items[place] for place in kept], batching, self.batch_size, drawn)
        return Tokens(list(whole.values()), counts, padding)

    def example(self, index: int) -> dict[str, Any]:
        """One training example as the model reads it, in pieces with and without loss."""
        owner = next(
            (
                (client, part["indices"].index(index))
                for client, part in enumerate(self._split.partition["clients"])
                if index in part["indices"]
            ),
            None,
        )
        if owner is None:
            most = max(max(part["indices"]) for part in self._split.partition["clients"])
            raise InputError(f"example {index} is no training example; their indices go from 0 to {most}")
        client, place = owner
        item = self._encoded([self._split.clients[client][place]], f"example {index}").items[0]
        return {
            "index": index,
            "client": client,
            "tokens": len(item.input_ids),
            "with_loss": item.trained,
            "label": self._split.labels[item.labels[0]] if not self.answers else None,
            "pieces": self._pieces(item),
        }

    def _pieces(self, item: Encoded) -> list[dict[str, Any]]:
        """Stretches of tokens that all have loss, or all none, as text."""
        ids = list(item.input_ids)
        # the first token is predicted from nothing, so its label is never used
        losses = [place > 0 and label != IGNORED for place, label in enumerate(item.labels)]
        if not self.answers:
            losses = [False] * len(ids)
        edges = [0, *(at for at in range(1, len(ids)) if losses[at] != losses[at - 1]), len(ids)]
        pieces, before = [], ""
        for start, end in pairwise(edges):
            text = str(self._tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
            pieces.append({"text": text[len(before) :], "loss": losses[start], "tokens": end - start})
            before = text
        return pieces


def _spread(items: Sequence[Example], sample: int, total: int) -> Sequence[Example]:
    """As many of a client's examples as are its share of a sample, from start to end at even steps."""
    if total <= sample:
        return items
    count = max(1, round(len(items) * sample / total))
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, count)]


@dataclass(frozen=True)
class _Twice:
    """What stands twice; two examples are equal if instruction, input and output are.

    Attributes:
        within: Of each client, examples equal to an earlier one of its own.
        between: Examples equal to one of an earlier client.
        held_out: Held-out examples equal to one that is trained on.
        questions: Held-out examples of which only the answer differs from one that is trained on.
        first: The first of the held-out examples that are trained on.
    """

    within: Mapping[int, int]
    between: int
    held_out: int
    questions: int
    first: Example | None


def _said(e: Example) -> Any:
    """What an example says; its category is no part of that."""
    return (
        (e.instruction, e.input, e.output, e.turns, e.tools)
        if e.turns
        else (e.instruction, e.input, e.output)
    )


def _asked(e: Example) -> Any:
    """What it asks: all before its last answer."""
    return (e.instruction, e.input, e.turns[:-1])


def _template(config: RunConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template in which examples are; None of plain texts and of a classifier."""
    asked = used_template(config, split.examples)
    if asked is None:
        return None
    return prompts(asked, tokenizer).name


def _twice(split: Split) -> _Twice:
    owner = dict[Any, int]()
    within, between = Counter[int](), 0
    asked = set[Any]()
    for client, part in split.clients.items():
        for e in part:
            between += owner.setdefault(_said(e), client) != client
            asked.add(_asked(e))
        within[client] = len(part) - len({_said(e) for e in part})
    leaked = [e for e in split.held_out if _said(e) in owner]
    known = sum(_asked(e) in asked for e in split.held_out if _said(e) not in owner and e.form != "text")
    return _Twice(within, between, len(leaked), known, leaked[0] if leaked else None)


def _client(split: Split, client: int, tokens: Tokens, within: int, *, answers: bool) -> dict[str, Any]:
    entry, part = split.partition["clients"][client], split.clients[client]
    return {
        "client": client,
        "name": entry.get("name", ""),
        "examples": len(part),
        "labels": {label: count for label, count in entry["labels"].items() if label},
        "tokens": {
            "median": float(np.median(tokens.whole)) if tokens.whole else 0.0,
            "longest": max(tokens.whole, default=0),
            "looked_at": len(tokens.whole),
        },
        "duplicates": within,
        "empty": sum(not e.output.strip() for e in part) if answers else 0,
        "cut": tokens.counts.cut,
        "dropped": tokens.counts.dropped,
    }


def histogram(lengths: list[int]) -> dict[str, Any]:
    """How many examples have how many tokens: bars of equal width, of a round number of tokens."""
    if not lengths:
        return {"edges": [], "counts": [], "quantiles": {}}
    longest = max(lengths)
    step = next(
        size * 10**power for power in range(10) for size in (1, 2, 5) if size * 10**power * BARS > longest
    )
    edges = list(range(0, longest + step + 1, step))
    counts, _ = np.histogram(lengths, bins=edges)
    places = {"0.5": 0.5, "0.9": 0.9, "0.99": 0.99, "1": 1.0}
    quantiles = {name: float(np.quantile(lengths, place)) for name, place in places.items()}
    return {"edges": edges, "counts": counts.tolist(), "quantiles": quantiles}


def _checks(
    config: RunConfig, document: Mapping[str, Any], split: Split, room: Room, twice: _Twice
) -> Iterator[dict[str, str]]:
    """What a person should know, the worst first."""
    train, held_out = document["examples"]["train"], document["examples"]["held_out"]
    counts = document["encoded"]["train"]
    looked = document["sampled"] or train
    of = f"of {looked:,} training examples" + (" that were looked at" if looked < train else "")
    how, clients = config.data.too_long, document["clients"]
    if counts["cut"] and how == "error":
        yield _check(
            f"{counts['cut']:,} {of} are longer than {room.tokens} tokens, and data.too_long is error: no "
            "run begins",
            level="error",
        )
    if twice.first is not None:
        yield _check(
            f"LEAK: {twice.held_out:,} of {held_out:,} held-out examples are trained on word for word (the "
            f"first: {foreign(twice.first.instruction, 60)!r}): a score on them says nothing of new examples"
        )
    lost = f"{counts['without_eos']:,} lose the end of their answer, {counts['without_prompt']:,} the whole "
    for count, text in (
        (twice.questions, f"of {held_out:,} held-out examples are trained on with another answer"),
        (document["skipped"]["rows"], "rows do not fit and are skipped (data.bad_rows)"),
        (twice.between, f"of {train:,} training examples stand with an earlier client too"),
        (document["duplicates"]["within"], f"of {train:,} repeat an earlier one of the same client"),
        (sum(client["empty"] for client in clients), f"of {train:,} have an empty answer"),
        (counts["cut"] * (how == "cut"), f"{of} are cut to {room.tokens} tokens; {lost}prompt"),
        (counts["dropped"], f"{of} are longer than {room.tokens} tokens and dropped"),
        (document["encoded"]["held_out"]["cut"], f"of {held_out:,} held-out ones are cut to {room.tokens}"),
    ):
        if count:
            yield _check(f"{count:,} {text}")
    lost_some = bool(counts["cut"] or counts["dropped"])
    yield from (_check(note) for note in shortening(config, room, lost=lost_some))
    alone = sum(len(client["labels"]) == 1 for client in clients) if len(split.labels) > 1 else 0
    if alone:
        yield _check(f"{alone} of {len(clients)} clients have examples of one class alone")


def _check(text: str, level: str = "warning") -> dict[str, str]:
    return {"level": level, "text": text}
