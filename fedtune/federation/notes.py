"""What a person should know before round 1: of the model, of the examples, of what is not looked at."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.config.data import CLIENTS
from fedtune.config.schema import RunConfig
from fedtune.data.encoded import Counts
from fedtune.data.prompts import prompts, template_notes
from fedtune.data.reading import skipped_notes
from fedtune.evaluation.generation import end_tokens
from fedtune.federation.data import Split
from fedtune.federation.encoding import describe, template_of
from fedtune.federation.room import Room, shortening
from fedtune.models.load import Loaded
from fedtune.models.quantize import describe as describe_quantized


def of_model(config: RunConfig, loaded: Loaded, split: Split) -> list[str]:
    """How the base model is held, what was read for it, and what its template does, a line each."""
    held = describe_quantized(loaded.model)
    said = [*([held] if held else []), *split.reading.said, *skipped_notes(split.reading.skipped)]
    template = template_of(config)
    if template is not None:
        said += template_notes(template, loaded.tokenizer, [*split.trained, *split.evaluation])
        said += _other_end(prompts(template, loaded.tokenizer).end, loaded)
    return said


def of_examples(config: RunConfig, room: Room, counts: Mapping[str, Counts | None]) -> list[str]:
    """What a person should know of the examples and of what is not looked at, a line each."""
    known = {group: one for group, one in counts.items() if one is not None}
    notes = shortening(config, room, lost=any(one.cut or one.dropped for one in known.values()))
    notes += describe(known, room.tokens)
    if config.data.train == CLIENTS:
        notes.append(
            "what is cut or dropped of a client's file is counted there, and said on its own terminal"
        )
    federation = config.federation
    for name in ("secure_aggregation", "privacy"):
        if getattr(federation, name) is not None:
            notes.append(
                f"with federation.{name} no single update is looked at: who sends a bad one is not named"
            )
    return notes


def _other_end(end: int | None, loaded: Loaded) -> list[str]:
    """What to say where answers end with a token at which a server would not stop."""
    known = end_tokens(loaded.model, loaded.tokenizer)
    if end is None or end in known:
        return []
    names = [str(token) for token in loaded.tokenizer.convert_ids_to_tokens([end, *sorted(known)])]
    return [
        f"answers end with {names[0]}, and the model's own end is {', '.join(names[1:]) or 'none'}: a server "
        f"has to be told to stop at {names[0]} (eos_token_id {end} in generation_config.json)"
    ]
