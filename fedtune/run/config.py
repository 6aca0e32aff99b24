"""The configuration of a run: one YAML, strictly typed, no unknown key, every default in its class."""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from fedtune.core.settings import Settings
from fedtune.data.partition import PARTITIONERS
from fedtune.errors import InputError, nearest
from fedtune.evaluation.tasks import TASKS
from fedtune.methods import registry


class ModelSettings(Settings):
    """Which model, and how it is held."""

    name: str = "bundled"  # bundled, a Hugging Face model folder, or a hub name
    dtype: Literal["float32", "bfloat16"] = "float32"
    initial: Literal["pretrained", "scratch"] = "pretrained"
    task: Literal["causal-lm", "classification"] = "causal-lm"
    device: Literal["auto", "cpu", "cuda"] = "auto"


By = Literal["category", "output"]


class Iid(Settings):
    """Examples shuffled and dealt out evenly."""

    name: Literal["iid"] = "iid"


class Dirichlet(Settings):
    """Each label's examples split by a Dirichlet(alpha) draw, redrawn until everyone has `minimum`."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    minimum: int = Field(10, ge=1)
    by: By = "category"


class ByField(Settings):
    """One value of a field a client."""

    name: Literal["by-field"] = "by-field"
    by: By = "category"


class Shards(Settings):
    """Examples sorted by label, cut into shards, a few shards a client."""

    name: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)
    by: By = "category"


class Quantity(Settings):
    """Unequal sizes: a Dirichlet(alpha) draw over the clients, or given fractions."""

    name: Literal["quantity"] = "quantity"
    alpha: float | None = Field(None, gt=0)
    fractions: list[float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("alpha") is None and values.get("fractions") is None:
            return {**values, "alpha": 1.0}
        return values

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.alpha is not None and self.fractions is not None:
            raise ValueError("alpha and fractions are both set; keep the one that is meant")
        return self


Partition = Annotated[Iid | Dirichlet | ByField | Shards | Quantity, Field(discriminator="name")]


class Holdout(Settings):
    """What is kept from all clients for evaluation: a fraction, a category, or another file."""

    fraction: float | None = Field(None, gt=0, lt=1)
    category: str | None = None  # a name, or `last` in sorted order
    source: str | None = None  # a file or hub name read like data.train
    split: str | None = None  # of a hub data set; default test

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.fraction, self.category, self.source)) != 1:
            raise ValueError("set exactly one of fraction, category and source")
        if self.split is not None and self.source is None:
            raise ValueError("split belongs to source")
        return self


class DataSettings(Settings):
    """Examples, how they are read, and who gets which."""

    train: str = "bundled"  # bundled, a .jsonl file, or a hub name
    split: str = "train"  # of a hub data set
    fields: dict[Literal["instruction", "input", "output", "category"], str] = Field(default_factory=dict)
    template: Literal["alpaca", "plain"] = "alpaca"
    loss_on: Literal["response", "all"] = "response"
    max_length: int = Field(512, ge=8)  # tokens of prompt and response together
    max_examples: int | None = Field(None, ge=1)  # a random subset of the training examples
    clients: int | None = Field(10, ge=1)  # None with by-field: one client a value
    partition: Partition = Iid()
    holdout: Holdout = Holdout(fraction=0.1)

    @model_validator(mode="after")
    def _clients(self) -> Self:
        if self.clients is None and self.partition.name != "by-field":
            raise ValueError(f"clients must be a number with partition {self.partition.name}")
        return self


class Simulate(Settings):
    """What goes wrong on purpose, in process."""

    dropout: float = Field(0.0, ge=0, lt=1)
    delay_s: float = Field(0.0, ge=0)


Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Federation(Settings):
    """Who is asked in a round, and what a round may do without."""

    clients_per_round: Count | Share | None = None  # a count, a fraction, or everyone
    quorum: Count | Share = 0.5  # replies a round needs: a count, or a fraction of those asked
    deadline_s: float | None = Field(None, gt=0)
    simulate: Simulate = Simulate()


class Evaluation(Settings):
    """What is measured on the held-out examples, and when."""

    tasks: list[str] = Field(["loss"], min_length=1)
    every: int = Field(1, ge=0)  # rounds; 0: only at the end
    arrivals: bool = False  # asynchronous: also after each arrival
    max_examples: int | None = Field(None, ge=1)  # the first n of the held-out examples, shuffled once
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _known(self) -> Self:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(
                    f"task {task!r} is not known; known are {', '.join(TASKS)}.{nearest(task, TASKS)}"
                )
        return self


class Transport(Settings):
    """How orders reach the clients."""

    name: Literal["in-process"] = "in-process"


class Checkpoints(Settings):
    """What a run keeps on the way."""

    keep: int | None = Field(2, ge=1)  # newest rounds; None: all


class RunConfig(Settings):
    """The whole configuration. Defaults live here and nowhere else."""

    seed: int = Field(0, ge=0)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    method: SerializeAsAny[Settings]
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    transport: Transport = Transport()
    checkpoints: Checkpoints = Checkpoints()

    @model_validator(mode="before")
    @classmethod
    def _bundled(cls, values: object) -> object:
        """The bundled model knows the plain template, and the bundled data bring their own test part."""
        if not isinstance(values, dict):
            return values
        model, data = values.get("model", {}), values.get("data", {})
        if not isinstance(model, dict) or not isinstance(data, dict):
            return values
        data = dict(data)
        if model.get("name", "bundled") == "bundled":
            data.setdefault("template", "plain")
        if data.get("train", "bundled") == "bundled":
            data.setdefault("holdout", {"source": "bundled"})
        return {**values, "data": data}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.evaluation.arrivals and getattr(self.method, "arrival", "") != "asynchronous":
            raise ValueError("evaluation.arrivals needs method.arrival: asynchronous")
        if self.model.task == "classification" and "rouge-l" in self.evaluation.tasks:
            raise ValueError("task rouge-l needs generated text; model.task is classification")
        return self

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return str(self.method.name)  # type: ignore[attr-defined]

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain values, defaults included; reading it back gives an equal one."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Identifies the resolved configuration."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `key=value` overrides with dotted keys, and checks the whole.

    Raises:
        InputError: The file is missing or not YAML, or a setting is unknown, of a wrong type or out of
            range. The message names every such setting and, for an unknown one, the nearest known.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    document = _yaml(text, str(path))
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise InputError(f"{path}: must map setting names to values, got {type(document).__name__}")
    apply_overrides(document, overrides)
    return parse_config(document, str(path))


def dump_config(config: RunConfig) -> str:
    """The YAML of a resolved configuration, which `load_config` reads back as an equal one."""
    return yaml.dump(config.resolved(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_config(document: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration in a mapping; `source` stands in front of each error. Raises InputError."""
    values = dict(document)
    method = values.get("method", {"name": "fedavg"})
    if not isinstance(method, dict):
        raise InputError(f"{source}: method must be a block of settings with a name, got {method!r}")
    if "name" not in method:
        raise InputError(f"{source}: method.name is missing; known are {', '.join(registry.METHODS)}")
    try:
        cls = registry.config_class(str(method["name"]))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    problems: list[str] = []
    try:
        values["method"] = cls.model_validate(method)
    except ValidationError as error:
        problems += _problems(error, cls, ("method",))
        values["method"] = cast(Any, cls).model_construct(name=method["name"])
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _problems(error, RunConfig, ())
    if problems:
        raise InputError("\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return config


def _problems(error: ValidationError, cls: type[BaseModel], prefix: tuple[str, ...]) -> list[str]:
    """One line a problem, with the dotted name as a user writes it."""
    lines = []
    for problem in error.errors(include_url=False):
        path, known = _walk(cls, problem["loc"])
        name = ".".join([*prefix, *path]) or "the configuration"
        got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{name} is not a known setting; here are known: {', '.join(known)}."
                + nearest(path[-1], known)
            )
        elif problem["type"] == "missing":
            lines.append(f"{name} is missing")
        elif problem["type"] == "union_tag_invalid":
            allowed = problem["ctx"]["expected_tags"].replace("'", "")
            tag = str(problem["ctx"]["tag"])
            lines.append(
                f"{name}.name {tag!r} is not known; known are {allowed}.{nearest(tag, PARTITIONERS)}"
            )
        else:
            if problem["type"] == "literal_error" and isinstance(problem["input"], str):
                got += "." + nearest(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
            text = problem["msg"].removeprefix("Value error, ")
            lines.append(
                f"{name}: {text[0].lower() + text[1:]}{'' if problem['type'] == 'value_error' else got}"
            )
    return lines


def _walk(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The dotted path of an error without pydantic's union tags, and the settings beside its last part."""
    path: list[str] = []
    blocks: list[type[BaseModel]] = [cls]
    for part in loc:
        tagged = [b for b in blocks if "name" in b.model_fields and b.model_fields["name"].default == part]
        if tagged and len(blocks) > 1:
            blocks = tagged
            continue
        path.append(str(part))
        inner = [
            b.model_fields[part].annotation
            for b in blocks
            if isinstance(part, str) and part in b.model_fields
        ]
        found = [block for annotation in inner for block in _blocks(annotation)]
        if not found:
            break
        blocks = found
    known = sorted({name for block in blocks for name in block.model_fields})
    return path, known


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    """The settings blocks that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [block for part in typing.get_args(annotation) for block in _blocks(part)]
    return []


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, and a key that stands twice is an error."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the text 1e-4, which `_Loader` would take for a number."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `key=value` pairs with dotted keys in a document. Raises InputError for anything else."""
    for override in overrides:
        _override(document, override)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(
            f"{override!r} is not an override; write key=value with a dotted key, as in method.lr=1e-4"
        )
    block = document
    for part in parts[:-1]:
        inner = block.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {part} is {inner!r}, not a block of settings")
        block = inner
    block[parts[-1]] = _yaml(value, f"override {override!r}")
