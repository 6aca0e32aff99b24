"""Examples of a run: loaded, held out, dealt to clients."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.data import CLIENTS
from fedtune.config.partitions import Given, OneFile
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import numpy_generator
from fedtune.data import partition as split_by
from fedtune.data.examples import Example
from fedtune.data.holdout import own_part, scored_part, split_holdout
from fedtune.data.objects import ObjectData
from fedtune.data.reading import Reading
from fedtune.data.split import Dealt, Parts
from fedtune.errors import InputError
from fedtune.evaluation.registry import certain, refuse_unsuited, suited
from fedtune.federation.sources import held_out_in_source, training_examples
from fedtune.models.folders import local_folder, model_folder
from fedtune.models.save import classes_in


@dataclass(frozen=True)
class Split:
    """Who has which examples, and what is held out.

    Attributes:
        clients: Each client's examples.
        evaluation: The held-out examples, in the order in which they are used.
        labels: The classes, sorted, for a classification model; else empty.
        partition: What partition.json says: examples a client, by index into the training examples.
        sha256: Identifies the training and held-out examples.
        owners: Whose each held-out example is, with `holdout.client_fraction` or a held-out file a client.
        held_out: All held-out examples, in that order, beyond `evaluation.max_examples` too.
        own: What each client scores itself, with `evaluation.where: clients`; else empty.
        reading: What was read of the sources, and what was skipped.
    """

    clients: dict[int, list[Example]]
    evaluation: list[Example]
    labels: tuple[str, ...]
    partition: dict[str, Any]
    sha256: str
    owners: tuple[int, ...] = ()
    held_out: Sequence[Example] = ()
    own: Mapping[int, Sequence[Example]] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)

    @property
    def trained(self) -> list[Example]:
        """What clients train on."""
        return [example for part in self.clients.values() for example in part]

    @property
    def examples(self) -> list[Example]:
        """All that are trained on or scored."""
        return [*self.trained, *self.evaluation]

    def owner(self, client: int) -> str:
        """A client's number, and its name where it has one, for people."""
        listed = self.partition["clients"]
        name = listed[client].get("name") if client < len(listed) else None
        return f"client {client} ({name})" if name else f"client {client}"


def prepare_data(config: RunConfig, *, pooled: bool, objects: ObjectData | None = None) -> Split:
    """Loads and splits a run's examples; the same configuration and seed give the same split.

    Args:
        config: The run's configuration.
        pooled: One client holds everything (centralised training).
        objects: The examples, with `data.train: objects`.

    Raises:
        InputError: Files are missing or malformed, or the split asked for is not possible.
    """
    reading = config.reading
    if config.data.train == CLIENTS:
        return _server_split(config, reading)
    given = training_examples(config, objects, reading)
    train, held_out, owners = _hold_out(config, given, reading)
    if config.data.max_examples is not None and config.data.max_examples < len(train):
        chosen = numpy_generator(config.seed, "subset").permutation(len(train))[: config.data.max_examples]
        train = [train[i] for i in sorted(chosen)]
    dealt = _deal(config, train, given)
    indices, scored = dealt.parts, dict[int, Sequence[Example]]()
    if config.data.holdout.client_fraction is not None:
        indices, own = _hold_out_own(config, indices)
        held_out = [train[i] for part in own for i in part]
        owners = [client for client, part in enumerate(own) for _ in part]
        if config.evaluation.where == "clients":
            most = config.evaluation.max_examples
            for client, part in enumerate(own):
                chosen = scored_part(part, most, numpy_generator(config.seed, "evaluation", client))
                scored[client] = [train[i] for i in chosen]
    kept = [train[i] for i in sorted(i for part in indices for i in part)]
    order = numpy_generator(config.seed, "evaluation").permutation(len(held_out))
    in_order = [held_out[i] for i in order]
    order = order[: config.evaluation.max_examples]
    evaluation = in_order[: config.evaluation.max_examples]
    labels: tuple[str, ...] = ()
    if config.model.task == "classification":
        labels = tuple(config.data.labels or _in_order({example.output for example in kept}, config))
        unseen = {example.output for example in [*evaluation, *kept]} - set(labels)
        if unseen:
            whose = "that are not in data.labels" if config.data.labels else "that no training example has"
            raise InputError(f"held-out examples have classes {whose}: {sorted(unseen)[:5]}")
    refuse_unsuited(config.evaluation.tasks, evaluation)
    # of answers in free text every one would stand in partition.json, word for word
    classifies = config.model.task == "classification"
    values = [example.category or (example.output if classifies else "") for example in train]
    named = [{"name": name} for name in dealt.names] or [{}] * len(indices)
    summary = {
        "name": config.data.partition_name,
        "clients": [
            {**about, **name, "indices": part.tolist()}
            for about, name, part in zip(split_by.summarize(indices, values), named, indices, strict=True)
        ],
        "held_out": len(evaluation),
    }
    if reading.skipped:
        summary["skipped"] = reading.document()
    if pooled:
        clients = {0: kept}
    else:
        clients = {client: [train[i] for i in part] for client, part in enumerate(indices)}
    return Split(
        clients,
        evaluation,
        labels,
        summary,
        _sha256(kept, evaluation),
        tuple(owners[i] for i in order) if owners else (),
        in_order,
        scored,
        reading,
    )


def scored_tasks(config: RunConfig, split: Split) -> list[str]:
    """The tasks that a run's held-out examples are scored by; by clients those that need no look at them."""
    if config.evaluation.where == "clients":
        return certain(config.evaluation.tasks)
    return suited(config.evaluation.tasks, split.evaluation, classes=bool(split.labels))


def all_held_out(config: RunConfig, objects: ObjectData) -> Split:
    """Python objects to score a model on: all of them, and nobody's to train on."""
    examples = list(objects.examples)[: config.evaluation.max_examples]
    labels: tuple[str, ...] = ()
    if config.model.task == "classification":
        labels = tuple(config.data.labels or _in_order({e.output for e in objects.examples}, config))
    return only_held_out(examples, labels)


def _in_order(names: set[str], config: RunConfig) -> Sequence[str]:
    """Classes sorted; but as the base model has them, if it has a head for just these."""
    name = config.model.place
    folder = local_folder(name)
    if folder is None and "/" in name:  # of the hub: otherwise the order would depend on what is cached
        folder = model_folder(name, Path("."), weights=False)
    own = classes_in(folder) if folder is not None else ()
    return own if sorted(own) == sorted(names) else sorted(names)


def only_held_out(examples: list[Example], labels: Sequence[str]) -> Split:
    """Examples to score a model on, and nobody's to train on."""
    partition = {"name": "", "clients": [], "held_out": len(examples)}
    return Split({}, examples, tuple(labels), partition, _sha256([], examples), held_out=examples)


def _as_given(train: Sequence[Example], given: ObjectData) -> Dealt:
    """Each client's training examples, where they came client by client."""
    owners = {}  # by identity: two clients may have equal examples
    rest = iter(given.examples)
    for place, count in enumerate(given.clients.values()):
        owners.update({id(example): place for example in islice(rest, count)})
    parts: list[list[int]] = [[] for _ in given.clients]
    for index, example in enumerate(train):
        parts[owners[id(example)]].append(index)
    for client, part in zip(given.clients, parts, strict=True):
        if not part:
            raise InputError(
                f"no example of client {client!r} is left to train on: all are held out or beyond "
                "data.max_examples. Give it more, or hold out less (data.holdout)"
            )
    return Dealt([np.array(part, dtype=np.int64) for part in parts], tuple(given.clients))


def _server_split(config: RunConfig, reading: Reading) -> Split:
    """What the server has where every client has a file of its own: held-out examples, or none."""
    held_out: list[Example] = []
    if config.data.holdout.source is not None:  # else clients score their own
        held_out, _ = held_out_in_source(config, reading)
    order = numpy_generator(config.seed, "evaluation").permutation(len(held_out))
    in_order = [held_out[i] for i in order]
    evaluation = in_order[: config.evaluation.max_examples]
    refuse_unsuited(config.evaluation.tasks, evaluation)
    labels = tuple(config.data.labels or ()) if config.model.task == "classification" else ()
    unseen = {example.output for example in evaluation} - set(labels) if labels else set()
    if unseen:
        raise InputError(f"held-out examples have classes that data.labels lacks: {sorted(unseen)[:5]}")
    partition: dict[str, Any] = {"name": CLIENTS, "clients": [], "held_out": len(evaluation)}
    if reading.skipped:
        partition["skipped"] = reading.document()
    digest = _sha256([], evaluation)
    return Split({}, evaluation, labels, partition, digest, held_out=in_order, reading=reading)


def held_out_source(config: RunConfig, objects: ObjectData | None) -> list[Example]:
    """The examples among which the held-out ones are, before any split."""
    reading = config.reading
    if config.data.holdout.source is not None and config.data.holdout.validation is None:
        return held_out_in_source(config, reading)[0]
    return list(training_examples(config, objects, reading).examples)


def _hold_out(
    config: RunConfig, given: ObjectData, reading: Reading
) -> tuple[list[Example], list[Example], list[int]]:
    """Examples to train on and held-out ones, and whose each of these is where their source says so."""
    holdout, examples = config.data.holdout, list(given.examples)
    if holdout.client_fraction is not None:
        return examples, [], []
    if holdout.source is not None and holdout.validation is None:
        return examples, *held_out_in_source(config, reading, tuple(given.clients))
    if holdout.source is None:
        rng = numpy_generator(config.seed, "holdout")
        examples, held = split_holdout(
            examples, fraction=holdout.fraction, category=holdout.category, rng=rng
        )
        if holdout.validation is None:
            return examples, held, []
    rng = numpy_generator(config.seed, "validation")
    return *split_holdout(examples, fraction=holdout.validation, category=None, rng=rng), []


def _hold_out_own(config: RunConfig, parts: Parts) -> tuple[Parts, Parts]:
    """Each client's examples in two: those it trains on, and those it keeps for evaluation."""
    fraction = config.data.holdout.client_fraction
    assert fraction is not None
    left, own = [], []
    for client, part in enumerate(parts):
        rng = numpy_generator(config.seed, "holdout", client)
        train, held = own_part(len(part), fraction, rng, f"client {client}")
        left.append(part[train])
        own.append(part[held])
    return left, own


def _deal(config: RunConfig, train: Sequence[Example], given: ObjectData) -> Dealt:
    how = config.data.partition
    if given.clients and isinstance(how, Given | OneFile):
        return _as_given(train, given)
    settings = {field: getattr(how, field) for field in type(how).model_fields if field != "name"}
    rng = numpy_generator(config.seed, "partition")
    clients = config.data.clients if isinstance(config.data.clients, int) else None
    return split_by.deal(config.data.partition_name, train, clients, rng, settings)


def _sha256(*parts: Sequence[Example]) -> str:
    """Of each example as JSON with sorted keys; json.dumps of a dictionary takes several times as long."""
    digest, text = hashlib.sha256(), encode_basestring_ascii
    for part in parts:
        for e in part:
            digest.update(
                f'{{"category": {text(e.category)}, "input": {text(e.input)}, '
                f'"instruction": {text(e.instruction)}, "output": {text(e.output)}}}\n'.encode()
            )
            if e.turns:
                digest.update(f"{json.dumps(e.said())}\n".encode())
        digest.update(b"\0")
    return digest.hexdigest()
