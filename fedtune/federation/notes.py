"""What a person should know before round 1: of the model, of the examples, of what is not looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedtune.config.data import CLIENTS
from fedtune.config.schema import RunConfig
from fedtune.data.encoded import Counts
from fedtune.data.examples import Example
from fedtune.data.prompts import prompts, taken_template, template_notes
from fedtune.data.reading import skipped_notes
from fedtune.data.templates import AUTO, CHAT
from fedtune.evaluation.generation import end_tokens
from fedtune.evaluation.registry import AUTO as AUTO_TASKS
from fedtune.evaluation.registry import CHOICES_TASK, asks, certain
from fedtune.federation.data import Split, scored_tasks
from fedtune.federation.encoding import describe, forms_of, template_of, used_template
from fedtune.federation.room import Room, shortening
from fedtune.models.load import Loaded
from fedtune.models.lora_targets import tuned_modules, tuned_text
from fedtune.models.quantize import describe as describe_quantized


def of_model(config: RunConfig, loaded: Loaded, split: Split) -> list[str]:
    """How the base model is held, what was read for it, and what its template does, a line each."""
    held = describe_quantized(loaded.model)
    said = [*([held] if held else []), *split.reading.said, *skipped_notes(split.reading.skipped)]
    if CHOICES_TASK in (tasks := taken_tasks(config, split)):
        said.append(f"evaluation.tasks: {tasks}")
    elif (
        split.reading.choices
        and config.model.task == "causal-lm"
        and not {AUTO_TASKS, CHOICES_TASK} & set(config.evaluation.tasks)
    ):
        said.append(f"evaluation.tasks: none of them scores choices; {CHOICES_TASK} does")
    template = used_template(config, split.examples)
    if template is not None:
        if template == AUTO and prompts(AUTO, loaded.tokenizer).name == CHAT:
            said.append(f"data.template: {taken_template(loaded.tokenizer)}")
        said += template_notes(template, loaded.tokenizer, split.examples)
        said += _other_end(prompts(template, loaded.tokenizer).end, loaded)
    if other := asked_in_template(config, split.examples, loaded.tokenizer):
        said.append(other)
    return said


def asked_in_template(
    config: RunConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """What to say where tasks with questions of their own are put to a model of plain texts, else None."""
    if template_of(config) is None or used_template(config, examples) is not None:
        return None
    evaluation = config.evaluation
    own = [task for task in certain(evaluation.tasks) if asks(task, in_template=evaluation.harness_template)]
    if not own:
        return None
    name = prompts(config.data.template, tokenizer).name
    return (
        f"the examples are plain texts, in no template; {', '.join(own)} is asked in {name} (data.template)"
    )


def taken_tasks(config: RunConfig, split: Split) -> str:
    """What `auto` among `evaluation.tasks` stood for, with the reason; empty without it."""
    if AUTO_TASKS not in config.evaluation.tasks:
        return ""
    tasks = scored_tasks(config, split)
    chosen = CHOICES_TASK in tasks and CHOICES_TASK not in config.evaluation.tasks
    return ", ".join(tasks) + (", because the held-out examples have choices" if chosen else "")


def taken(config: RunConfig, loaded: Loaded, split: Split, model: nn.Module) -> dict[str, str]:
    """What each setting that is `auto` stood for, by its name, with the reason where there is one to give.

    Args:
        config: The run's configuration.
        loaded: Its base model and tokenizer.
        split: Its examples.
        model: The same model, with what the method trains attached.
    """
    found, data, template = dict[str, str](), config.data, used_template(config, split.examples)
    if data.format == "auto":
        begin = "data.format: "
        said = [line.removeprefix(begin) for line in split.reading.said if line.startswith(begin)]
        found["data.format"] = "; ".join(said or forms_of(split.examples))
    if tasks := taken_tasks(config, split):
        found["evaluation.tasks"] = tasks
    if template == AUTO:
        found["data.template"] = taken_template(loaded.tokenizer)
    targets = tuned_text(tuned_modules(model))
    for kind in ("lora", "ia3"):
        settings = getattr(config.method, kind, None)
        trains = kind == getattr(config.method, "trainable", "lora")
        if targets and trains and settings is not None and settings.targets == "auto":
            found[f"method.{kind}.targets"] = targets
    if config.model.attention == "auto":
        found["model.attention"] = str(loaded.model.config._attn_implementation)
    return found


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
