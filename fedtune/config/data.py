"""Which examples there are, how they are read, and who gets which."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from fedtune.config.partitions import ByField, FromFile, Given, Iid, OneFile
from fedtune.config.pictures import Pictures
from fedtune.core.settings import Settings
from fedtune.data.batching import Name
from fedtune.data.conversations import Format
from fedtune.data.records import no_null
from fedtune.data.templates import template_setting
from fedtune.data.trees import Trees
from fedtune.errors import InputError

CLIENTS = "clients"  # as `data.train`: every client has a file of its own
FILES = "files"  # as `data.clients`: as many as `data.train` has files, each of one client
OBJECTS = "objects"  # as `data.train`: examples are given to `fedtune.run` as Python objects


class Holdout(Settings):
    """What is kept for evaluation: a fraction, a part of each client's, a category, or another file."""

    fraction: float | None = Field(None, gt=0, lt=1)
    client_fraction: float | None = Field(None, gt=0, lt=1)  # each client keeps this part of its own examples
    category: str | None = None  # a name, or `last` in sorted order
    source: str | None = None  # read like data.train; with clients: files also a file a client, by its name
    split: str | None = None  # of a hub data set or a folder with parts; default test
    validation: float | None = Field(None, gt=0, lt=1)  # a share of the training examples, scored instead

    @model_validator(mode="after")
    def _one(self) -> Self:
        ways = (self.fraction, self.client_fraction, self.category, self.source)
        if sum(value is not None for value in ways) != 1:
            raise ValueError("set exactly one of fraction, client_fraction, category and source")
        if self.split is not None and self.source is None:
            raise ValueError("split belongs to source")
        if self.validation is not None and self.client_fraction is not None:
            raise ValueError("validation goes with fraction, category and source, not with client_fraction")
        return self


FieldMap = dict[Literal["instruction", "input", "output", "category", "choices"], str | None]


def _needed(fields: FieldMap) -> FieldMap:
    for ours, theirs in fields.items():
        if theirs is None and ours in ("instruction", "output"):
            raise ValueError(no_null(ours))
    return fields


Fields = Annotated[FieldMap, AfterValidator(_needed)]
# `assistant` says of conversations what `response` says of instructions: every answer
LossOn = Annotated[
    Literal["response", "last", "all"], BeforeValidator(lambda on: "response" if on == "assistant" else on)
]


class Public(Settings):
    """Examples that the server holds itself, for methods that train there; read like data.train."""

    source: str  # bundled, a file, folder or pattern, or a hub name
    split: str = "train"  # of a hub data set or a folder with parts
    fields: Fields = Field(default_factory=dict)  # our field names to the source's, as in data.fields
    max_examples: int | None = Field(None, ge=1)  # a random subset


class DataSettings(Settings):
    """Examples, how they are read, and who gets which."""

    train: str = "bundled"
    split: str = "train"  # of a hub data set or a folder with parts
    streaming: bool = False  # of a hub data set: read max_examples rows from its start, and keep nothing
    fields: Fields = Field(default_factory=dict)
    bad_rows: Literal["error", "skip"] = "error"
    labels: list[str] | None = Field(None, min_length=2)  # classes of a classifier; null: those in data.train
    format: Format = "auto"
    trees: Trees = "best"  # of trees of answers: the best way from root to leaf, or all
    template: str = "auto"
    loss_on: LossOn = "response"
    max_length: int = Field(512, ge=8)  # tokens of prompt and response together; at most what the model sees
    too_long: Literal["cut", "drop", "error"] = "cut"  # what is done with training examples that are longer
    cache: str = Field("beside", min_length=1)  # of encoded examples: beside the run, a folder, or none
    max_examples: int | None = Field(None, ge=1)  # a random subset of the training examples
    batching: Name = "random"  # what shares a batch: any examples, those of like length, or rows of several
    clients: Annotated[int, Field(ge=1)] | Literal["files"] | None = 10
    partition: SerializeAsAny[Settings] = Iid()
    holdout: Holdout = Holdout(fraction=0.1)
    public: Public | None = None
    pictures: Pictures | None = None  # with model.task: text-to-image

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, values: object) -> object:
        """A file says itself how many clients there are, and files are a split themselves."""
        if isinstance(values, dict) and isinstance(values.get("partition"), FromFile):
            return {"clients": None, **values}
        if isinstance(values, dict) and values.get("clients") == FILES:
            return {"partition": OneFile(), **values}
        return values

    @field_validator("template")
    @classmethod
    def _a_template(cls, name: str) -> str:
        """A file's text takes its place, so that a run has all that it needs, wherever it goes on."""
        try:
            return template_setting(name)
        except InputError as error:
            raise ValueError(str(error).removeprefix("data.").removeprefix("template: ")) from None

    @model_validator(mode="after")
    def _clients(self) -> Self:
        if (
            self.clients is None
            and self.train != CLIENTS
            and not isinstance(self.partition, ByField | FromFile)
        ):
            raise ValueError(f"clients must be a number with partition {self.partition_name}")
        if (self.clients == FILES) != isinstance(self.partition, OneFile):
            raise ValueError(
                f"clients: {FILES} is a split itself, each file one client: leave partition out, got clients "
                f"{self.clients} and partition {self.partition_name}"
            )
        if self.clients == FILES and self.train in ("bundled", CLIENTS, OBJECTS):
            raise ValueError(
                f"clients: {FILES} needs a folder or a pattern of files as train, got {self.train}"
            )
        if self.streaming and self.max_examples is None:
            raise ValueError("streaming needs max_examples: how many rows are read, from the start")
        if self.streaming and (self.clients == FILES or self.train in ("bundled", CLIENTS, OBJECTS)):
            raise ValueError(f"streaming is for data sets of the hub, got train: {self.train}")
        if isinstance(self.partition, Given) and self.train != OBJECTS:
            raise ValueError(f"partition given is for Python objects (train: {OBJECTS}), got {self.train}")
        return self

    @property
    def partition_name(self) -> str:
        """Name of the partitioner."""
        return str(self.partition.name)  # type: ignore[attr-defined]
