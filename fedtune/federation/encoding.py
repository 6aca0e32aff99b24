"""A run's examples as token ids: what was cut, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.data.cache import key_of, tokenizer_sha256
from fedtune.data.encode import AT_ONCE, encode_causal, encode_classification, encode_pairs, texts
from fedtune.data.encoded import Counts, EncodedSet
from fedtune.data.examples import Example
from fedtune.data.pictures import Frame, encode_pictures
from fedtune.data.prompts import prompts, sha256_of
from fedtune.errors import InputError


def encode_for(
    config: RunConfig,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int,
    whose: str,
    too_long: str | None = None,
    frame: Frame | None = None,
) -> EncodedSet:
    """Examples as token ids, of pictures with their pixels.

    Args:
        config: The run's configuration.
        examples: What to encode.
        tokenizer: Of the run's model.
        labels: A classifier's classes.
        max_length: As `example_room` gives it.
        whose: Names their owner in errors: "client 3".
        too_long: None: as the configuration says.
        frame: Of pictures, as `picture_frame` gives it.

    Raises:
        InputError: An example cannot be encoded, or none is left.
    """
    data = config.data
    if frame is not None:
        try:
            return encode_pictures(examples, tokenizer, frame=frame, tokens=max_length)
        except InputError as error:
            raise InputError(f"{whose}: {error}") from None
    how = data.too_long if too_long is None else too_long
    try:
        if config.model.task == "classification":
            found = encode_classification(
                examples, tokenizer, labels=labels, max_length=max_length, too_long=how
            )
        elif config.of_pairs:
            found = encode_pairs(
                examples, tokenizer, template=data.template, max_length=max_length, too_long=how
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


def template_of(config: RunConfig) -> str | None:
    """The template that a run's examples are put into; None of a classifier, which reads them as they are."""
    return config.data.template if config.model.task == "causal-lm" else None


def forms_of(examples: Iterable[Example]) -> list[str]:
    """Which forms examples have, sorted: instruction, conversation, text."""
    return sorted({example.form for example in examples})


def used_template(config: RunConfig, examples: Iterable[Example]) -> str | None:
    """The template of a run with these examples; None also where all are plain texts, which are in none."""
    return None if forms_of(examples) == ["text"] else template_of(config)


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
        """Of a client's examples; None of pictures, and where a tokenizer or an example cannot have one."""
        if self._tokenizer is None or self.config.data.pictures is not None:
            return None
        data = self.config.data
        settings: dict[str, Any] = {"max_length": self.max_length, "too_long": data.too_long}
        if self.config.model.task == "classification":
            settings |= {"labels": list(self.labels)}
        else:
            settings |= {"pairs": True} if self.config.of_pairs else {"loss_on": data.loss_on}
            how = prompts(data.template, self.tokenizer)
            if not how.apart:  # the program stands for the texts that it makes, which take long to make
                settings |= {"template": sha256_of(how.text)}
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
            classifies = self.config.model.task == "classification"
            if classifies or not prompts(self.config.data.template, self.tokenizer).apart:
                yield from ([] for _ in part)  # the key has the fields and the turns anyway
            else:
                yield from texts(part, self.config.data.template, self.tokenizer)


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
        if found.turns:
            lost.append(f"{found.turns:,} turns at the start of conversations are left out")
        if found.without_eos:
            lost.append(f"{found.without_eos:,} lost the end of the answer and have no end token")
        said = []
        if found.cut:
            more = f" ({', '.join(lost)})" if lost else ""
            said.append(f"{found.cut:,} are cut to {max_length} tokens{more}")
        if found.parted:
            said.append(f"parts of {found.parted:,} texts longer than {max_length} tokens are examples each")
        if found.dropped:
            said.append(f"{found.dropped:,} are longer than {max_length} tokens and dropped")
        if found.duplicates:
            said.append(f"{found.duplicates:,} repeat an earlier one of the same owner")
        if found.empty:
            said.append(f"{found.empty:,} have an empty answer")
        if found.unanswered:
            said.append(f"{found.unanswered:,} turns stand behind the last answer and are left out")
        if said:
            name = {"train": "training", "held_out": "held-out"}.get(group, group)
            later = f"; {found.waiting:,} are of clients that no round has asked yet" if found.waiting else ""
            lines.append(f"of {found.examples + found.dropped:,} {name} examples {', '.join(said)}{later}")
    return lines
