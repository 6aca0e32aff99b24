"""A run's examples as token ids: how long they may be, what was cut, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.data.cache import key_of, tokenizer_sha256
from fedtune.data.encode import AT_ONCE, encode_causal, encode_classification, texts
from fedtune.data.encoded import Counts, EncodedSet
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.methods.tuning import Tuning
from fedtune.models.context import positions
from fedtune.models.folders import BUNDLED
from fedtune.models.load import model_config

LEAST = 8  # tokens of an example: what data.max_length asks for


@dataclass(frozen=True)
class Room:
    """How long a run's examples may be.

    Attributes:
        tokens: Of prompt and answer together.
        shortened: Why that is less than `data.max_length`; empty where it is not.
    """

    tokens: int
    shortened: str = ""


def reserved_tokens(config: RunConfig) -> int:
    """Tokens of the model's context that the method's soft prompt takes."""
    method = config.method
    if not isinstance(method, Tuning):
        return 0
    return (method.prompt.tokens if method.prompt else 0) + (method.p_tuning.tokens if method.p_tuning else 0)


def example_room(config: RunConfig, model: PretrainedConfig) -> Room:
    """`data.max_length`, or what the model sees beside the method's soft prompt if that is less.

    Args:
        config: The run's configuration.
        model: Its model's.

    Raises:
        InputError: No example fits.
    """
    asked, limit, reserved = config.data.max_length, positions(model), reserved_tokens(config)
    if limit is None or asked <= limit - reserved:
        return Room(asked)
    beside = f", of which the soft prompt takes {reserved}" if reserved else ""
    if limit - reserved < LEAST:
        raise InputError(
            f"{config.model.name} sees {limit} tokens{beside}: no example fits. Take a model that sees more"
            + (", or a shorter prompt" if reserved else "")
        )
    return Room(
        limit - reserved,
        f"data.max_length is {asked}, but {config.model.name} sees {limit} tokens{beside}: an example has at "
        f"most {limit - reserved}",
    )


def shortening(config: RunConfig, room: Room, *, lost: bool = False) -> list[str]:
    """What is said where the model sees less than `data.max_length`; nothing of a default that does no harm.

    Args:
        config: The run's configuration.
        room: As `example_room` gives it.
        lost: Whether an example was cut or dropped.
    """
    meant = config.data.max_length != type(config.data).model_fields["max_length"].default
    return [room.shortened] if room.shortened and (meant or lost) else []


def known_room(config: RunConfig) -> Room | None:
    """As `example_room`, of a model that is on this machine; None of others: nothing is downloaded for it.

    Raises:
        InputError: No example fits, or the model's configuration cannot be read.
    """
    name = config.model.name
    if name != BUNDLED and not Path(name).expanduser().is_dir():
        return None
    return example_room(config, model_config(name, base=Path("."), task=config.model.task))


def encode_for(
    config: RunConfig,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int,
    whose: str,
    too_long: str | None = None,
) -> EncodedSet:
    """Examples as token ids.

    Args:
        config: The run's configuration.
        examples: What to encode.
        tokenizer: Of the run's model.
        labels: A classifier's classes.
        max_length: As `example_room` gives it.
        whose: Names their owner in errors: "client 3".
        too_long: None: as the configuration says.

    Raises:
        InputError: An example cannot be encoded, or none is left.
    """
    data = config.data
    how = data.too_long if too_long is None else too_long
    try:
        if config.model.task == "classification":
            found = encode_classification(
                examples, tokenizer, labels=labels, max_length=max_length, too_long=how
            )
        else:
            found = encode_causal(
                examples,
                tokenizer,
                template=data.template,
                loss_on=data.loss_on,
                max_length=max_length,
                too_long=how,
            )
    except InputError as error:
        raise InputError(f"{whose}: {error}") from None
    if examples and not found.items:
        raise InputError(
            f"{whose}: each of its {len(examples)} examples is longer than {max_length} tokens, and "
            "data.too_long is drop, so none is left. Raise data.max_length, set data.too_long to cut, or "
            "leave it out"
        )
    return found


@dataclass(frozen=True)
class Keys:
    """What encoded examples are called in a cache: a digest of all that they depend on.

    Attributes:
        config: The run's configuration.
        tokenizer: Of the run's model.
        labels: A classifier's classes.
        max_length: As `example_room` gives it.
    """

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    labels: Sequence[str]
    max_length: int

    def __call__(self, examples: Sequence[Example]) -> str | None:
        """Of a client's examples; None of a tokenizer without, and where encoding says what is wrong."""
        if self._tokenizer is None:
            return None
        data = self.config.data
        settings: dict[str, Any] = {"max_length": self.max_length, "too_long": data.too_long}
        if self.config.model.task == "classification":
            settings |= {"labels": list(self.labels)}
        else:
            settings |= {"loss_on": data.loss_on}
        try:
            return key_of(self._tokenizer, settings, examples, self._texts(examples))
        except InputError:
            return None

    @cached_property
    def _tokenizer(self) -> str | None:
        return tokenizer_sha256(self.tokenizer)

    def _texts(self, examples: Sequence[Example]) -> Iterator[Sequence[str]]:
        for start in range(0, len(examples), AT_ONCE):
            part = examples[start : start + AT_ONCE]
            if self.config.model.task == "classification":  # the fields themselves, which the key has anyway
                yield from ([] for _ in part)
            else:
                yield from zip(*texts(part, self.config.data.template, self.tokenizer), strict=True)


def describe(counts: Mapping[str, Counts], max_length: int) -> list[str]:
    """One line for people a group of examples of which something was cut, dropped or odd.

    Args:
        counts: By the group's name: train, public, held_out.
        max_length: Tokens that they were cut to.
    """
    lines = []
    for group, found in counts.items():
        lost = []
        if found.without_prompt:
            lost.append(f"{found.without_prompt:,} lost the whole prompt")
        if found.without_eos:
            lost.append(f"{found.without_eos:,} lost the end of the answer and have no end token")
        said = []
        if found.cut:
            more = f" ({', '.join(lost)})" if lost else ""
            said.append(f"{found.cut:,} are cut to {max_length} tokens{more}")
        if found.dropped:
            said.append(f"{found.dropped:,} are longer than {max_length} tokens and dropped")
        if found.duplicates:
            said.append(f"{found.duplicates:,} repeat an earlier one of the same owner")
        if found.empty:
            said.append(f"{found.empty:,} have an empty answer")
        if said:
            name = {"train": "training", "held_out": "held-out"}.get(group, group)
            later = f"; {found.waiting:,} of them no round has asked for yet" if found.waiting else ""
            lines.append(f"of {found.examples + found.dropped:,} {name} examples {', '.join(said)}{later}")
    return lines
