"""What a run recorded of its inputs, and whether these are still what it had.

A run's base model and data are known by digests, wherever they are now. Its held-out examples are known one
by one: they are looked for by what they say, never drawn again, and so none is scored that was trained on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from fedtune.config.data import CLIENTS, OBJECTS, Holdout
from fedtune.config.places import MOVABLE
from fedtune.config.schema import RunConfig
from fedtune.data.examples import Example
from fedtune.data.files import is_here
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError
from fedtune.federation.data import Split, held_out_source, only_held_out, prepare_data
from fedtune.federation.files import read_json
from fedtune.models.folders import files_sha256, local_folder, settings_sha256, weight_files
from fedtune.models.load import Loaded
from fedtune.models.pipeline_folders import local_pipeline, part_settings_sha256, pipeline_sha256

EXAMPLES = "examples.json"
# of `data`: how examples are shown, and not which they are
_FREE = {"template", "loss_on", "max_length", "cache"}
_SOURCES = {"train", "split", "fields"}
log = logging.getLogger("fedtune")


@dataclass(frozen=True)
class Examples:
    """What examples.json says.

    Attributes:
        labels: A classifier's classes, in the order of its outputs.
        held_out: Digests of the held-out examples, in the order in which they are used.
        trained: Digests of those that clients trained on.
    """

    labels: tuple[str, ...]
    held_out: tuple[str, ...]
    trained: frozenset[str]


def examples_of(split: Split) -> dict[str, Any]:
    """What examples.json is to say of a run's examples."""
    return {
        "labels": list(split.labels),
        "held_out": [_digest(example) for example in split.held_out],
        "trained": sorted({_digest(example) for example in split.trained}),
    }


def trained_on_texts(path: Path, config: RunConfig) -> bool:
    """Whether all examples of the run in `path` are plain texts."""
    forms = read_json(path / "environment.json")["data"].get("forms", [config.data.format])
    return bool(forms == ["text"])


def recorded_examples(path: Path) -> Examples | None:
    """What the run in `path` recorded of its examples; None of one that an earlier version began."""
    if not (path / EXAMPLES).is_file():
        return None
    about = read_json(path / EXAMPLES)
    try:
        return Examples(tuple(about["labels"]), tuple(about["held_out"]), frozenset(about["trained"]))
    except (TypeError, KeyError):
        raise InputError(f"{path / EXAMPLES} is damaged: labels, held_out and trained are lists") from None


def refuse_other_model(path: Path, weights: str | None, settings: Mapping[str, str], name: str) -> None:
    """Refuses a base model that is not the one that the run in `path` began with.

    Args:
        path: The run's folder.
        weights: The digest of its weights now; None: not looked at.
        settings: Of each file beside them that loading reads, its digest now.
        name: Where they are.

    Raises:
        InputError: Names the file that differs.
    """
    if weights is not None:
        refuse_other(path, "model", weights, name)
    began = read_json(path / "environment.json")["model"].get("settings_sha256")
    if began is None:  # of a run that an earlier version began
        return
    for file in sorted(began.keys() | settings.keys()):
        was, now = began.get(file), settings.get(file)
        if was != now:
            raise InputError(
                f"{path} began with another model: sha256 of {file} was {_short(was)}, {name} now has "
                f"{_short(now)}; bring the old one back, or say where it is: model.name=PLACE"
            )


def refuse_other(path: Path, what: str, now: str, name: str, why: str = "") -> None:
    """Raises InputError if the run in `path` began with another model or other data.

    Args:
        path: The run's folder.
        what: "model" or "data".
        now: The digest of what is there now.
        name: Where that comes from.
        why: What is known of the difference.
    """
    key, setting = {"model": ("weights_sha256", "model.name"), "data": ("sha256", "data.train")}[what]
    was = read_json(path / "environment.json")[what][key]
    if was != now:
        raise InputError(
            f"{path} began with another {what}: {key} was {was[:12]}, {name} now has {now[:12]}{why}; bring "
            f"the old one back, or say where it is: {setting}=PLACE"
        )


def refuse_other_data(path: Path, split: Split, name: str) -> None:
    """Raises InputError if a split is not the one that the run in `path` began with; says what has moved."""
    known, why = recorded_examples(path), ""
    if known is not None:
        now = {_digest(example) for example in split.trained}
        taken = sum(digest in now for digest in set(known.held_out) - known.trained)
        why = (
            f" ({taken} of its {len(known.held_out)} held-out examples would be trained on)" if taken else ""
        )
    refuse_other(path, "data", split.sha256, name, why)


def refuse_other_classes(path: Path, labels: Sequence[str]) -> None:
    """Raises InputError if a classifier's outputs would stand for other classes than in the run in `path`."""
    known = recorded_examples(path)
    began = sorted(labels) if known is None else known.labels  # an earlier version sorted them
    if list(began) != list(labels):
        raise InputError(
            f"{path} began with the classes {', '.join(began)}, in this order, and not {', '.join(labels)}; "
            "bring the base model back as it was"
        )


def loaded_of(path: Path, loaded: Loaded) -> Loaded:
    """A base model as it was loaded, if it is the one that the run in `path` began with.

    Raises:
        InputError: It is another one.
    """
    refuse_other_model(path, loaded.weights_sha256, loaded.settings_sha256, loaded.name)
    began = read_json(path / "environment.json")["model"]
    alike = began.get("quantization", "none") == loaded.quantization
    if alike and (bits := began.get("quantized_sha256", "")) != loaded.quantized_sha256:
        raise InputError(
            f"{path} began with model {loaded.name}, quantised as {loaded.quantization}, with the bits "
            f"{_short(bits)}, and here they are {_short(loaded.quantized_sha256)}: another version of "
            "bitsandbytes quantised it; install the one that environment.json names"
        )
    return loaded


def refuse_replaced(path: Path, config: RunConfig, objects: ObjectData | None = None) -> None:
    """Refuses a run whose inputs are here and are others than it had; what is not here is not asked for.

    Raises:
        InputError: Says which.
    """
    _refuse_replaced_model(path, config)
    _refuse_replaced_data(path, config, objects)


def _refuse_replaced_model(path: Path, config: RunConfig) -> None:
    if config.data.pictures is not None:
        pipeline = local_pipeline(config.model.place)
        if pipeline is not None:
            digests = pipeline_sha256(config.model.name, pipeline), part_settings_sha256(pipeline)
            refuse_other_model(path, *digests, config.model.name)
        return
    folder = local_folder(config.model.place)
    if folder is None:
        return
    weights = None
    if config.model.initial == "pretrained":
        weights = files_sha256(config.model.name, weight_files(config.model.name, folder))
    refuse_other_model(path, weights, settings_sha256(folder), config.model.name)


def _refuse_replaced_data(path: Path, config: RunConfig, objects: ObjectData | None = None) -> None:
    sources = (config.data.train, config.data.holdout.source)
    here = all(name in (None, CLIENTS) or is_here(str(name)) for name in sources)
    if config.data.train == OBJECTS:
        here = objects is not None
    if here:
        refuse_other_data(path, prepare_data(config, pooled=False, objects=objects), config.data.train)


def held_out_of(path: Path, own: RunConfig, config: RunConfig, objects: ObjectData | None) -> Split:
    """The held-out examples of a run, or those of other data that were asked for in their place.

    Args:
        path: The run's folder.
        own: Its configuration.
        config: The same with what was asked for.
        objects: Its examples, with `data.train: objects`.

    Raises:
        InputError: They are not there any more, or others of the same data were asked for.
    """
    known = recorded_examples(path)
    if own.data.holdout.validation is not None and config.data.holdout == _untouched(own):
        return _left_alone(path, own, config, known, objects)
    elsewhere = _sources(config) != _sources(own)
    given = config.data.holdout
    if given.source is not None and elsewhere and given == own.data.holdout:
        raise InputError(
            f"the run's held-out examples come from data.holdout.source, {given.source}; another data.train "
            "has none of them: set data.holdout.source to what the result is to be scored on"
        )
    if not elsewhere:
        _refuse_other_draw(own, config)
    if known is None:
        if not elsewhere:
            log.warning("%s is of a version that recorded no held-out examples: drawn again, checked", path)
            refuse_other(path, "data", prepare_data(own, pooled=False, objects=objects).sha256, _place(own))
        return prepare_data(config, pooled=False, objects=objects)
    there = {_digest(example): example for example in held_out_source(config, objects)}
    missing = sum(digest not in there for digest in known.held_out)
    if not missing:
        chosen = [there[digest] for digest in known.held_out]
        return only_held_out(chosen[: config.evaluation.max_examples], known.labels)
    if not elsewhere:
        why = f" ({missing} of its {len(known.held_out)} held-out examples are not there)"
        split = prepare_data(own, pooled=False, objects=objects)
        refuse_other(path, "data", split.sha256, _place(own), why)
    return _warned(path, known, prepare_data(config, pooled=False, objects=objects))


def _left_alone(
    path: Path, own: RunConfig, config: RunConfig, known: Examples | None, objects: ObjectData | None
) -> Split:
    """What a run was told to hold out and, with `data.holdout.validation`, never looked at."""
    if _sources(config) == _sources(own):
        data = own.data.model_copy(update={"holdout": _untouched(own)})
        _refuse_other_draw(own.model_copy(update={"data": data}), config)
    return _warned(path, known, prepare_data(config, pooled=False, objects=objects))


def _untouched(own: RunConfig) -> Holdout:
    return own.data.holdout.model_copy(update={"validation": None})


def _warned(path: Path, known: Examples | None, split: Split) -> Split:
    taken = sum(_digest(example) in known.trained for example in split.evaluation) if known else 0
    if taken:
        log.warning("%s trained on %d of the %d examples scored", path, taken, len(split.evaluation))
    return split


def _refuse_other_draw(own: RunConfig, config: RunConfig) -> None:
    mine, its = (c.data.model_dump(mode="json", exclude=_FREE) for c in (config, own))
    for key, value in its.items():
        if mine[key] != value:
            raise InputError(
                f"data.{key} is not the run's: its held-out examples are those that it recorded. Others are "
                f"those of other data: {', '.join(MOVABLE[1:3])}"
            )


def _sources(config: RunConfig) -> tuple[Any, ...]:
    holdout = config.data.holdout
    return (config.data.model_dump(include=_SOURCES), holdout.source, holdout.split)


def _place(config: RunConfig) -> str:
    return config.data.holdout.source or config.data.train


def _short(digest: str | None) -> str:
    return "missing" if digest is None else digest[:12]


def _turns(example: Example) -> list[str]:
    return example.said() if example.turns else []


def _digest(example: Example) -> str:
    """Identifies what an example says, as a list in JSON, with 64 bits."""
    said = map(
        encode_basestring_ascii,
        (example.instruction, example.input, example.output, example.category, *_turns(example)),
    )
    return hashlib.sha256(f"[{', '.join(said)}]".encode()).hexdigest()[:16]


def changed_inputs(path: Path, config: RunConfig) -> list[str]:
    """Which inputs of a run are not any more what it had, a sentence each: for who reads only its logs."""
    file, said = path / "environment.json", list[str]()
    if not file.is_file() or not {"model", "data"} <= read_json(file).keys():
        return said
    for check in (_refuse_replaced_model, _refuse_replaced_data):
        try:
            check(path, config)
        except InputError as error:
            said.append(str(error))
    return said
