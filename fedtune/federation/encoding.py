"""A run's examples as token ids: what was cut, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.data.encode import Counts, EncodedSet, encode_causal, encode_classification
from fedtune.data.examples import Example
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
            lines.append(f"of {found.examples + found.dropped:,} {name} examples {', '.join(said)}")
    return lines
