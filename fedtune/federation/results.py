"""What a finished run made: evaluated again, or written out for other tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.config.file import apply_overrides, load_config, parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.faults import faults
from fedtune.core.personal import result_models
from fedtune.core.state import from_payload
from fedtune.data.objects import ObjectData
from fedtune.data.prompts import other_template
from fedtune.errors import InputError
from fedtune.evaluation.registry import TASKS
from fedtune.evaluation.tasks import score, scorer, summarize
from fedtune.evaluation.types import Outcome
from fedtune.federation import checkpoint
from fedtune.federation.assembly import Assembly
from fedtune.federation.base_model import load_base
from fedtune.federation.data import Split, all_held_out, prepare_data, scored_tasks
from fedtune.federation.encoding import used_template
from fedtune.federation.evaluator import eval_settings
from fedtune.federation.folder import RunFolder, refuse_existing
from fedtune.federation.notes import asked_in_template
from fedtune.federation.plugins import require_plugins
from fedtune.federation.recorded import held_out_of, loaded_of, recorded_examples, refuse_other_data
from fedtune.federation.saving import save_models
from fedtune.federation.scoring import memory_for
from fedtune.federation.starting import model_to_train
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.models.folders import local_folder
from fedtune.models.load import Loaded, load_tokenizer
from fedtune.models.portable import classes_of, name_classes
from fedtune.models.save import BASE, TOKENIZER, adapter_base, classes_in, is_adapter, load_result

ZERO_SHOT = "zero-shot"  # the model that a run began with, beside its results


def evaluate_target(
    target: str, tasks: Sequence[str], overrides: Sequence[str], objects: ObjectData | None = None
) -> dict[str, Any]:
    """Scores of a run's result or of a model, on the held-out examples of its data block.

    Args:
        target: A run folder, a model folder, an adapter's, or a model's name.
        tasks: Task names.
        overrides: `key=value` settings to change.
        objects: Of a run, its examples, with `data.train: objects`; of another model, what it is scored on.

    Returns:
        `target`; `examples` (how many were held out); `tasks`: of each its `scorer` (name and version), main
        `metric` and `notes`; `template`, where it is another than the one in which the model was tuned;
        `scores`: by result name, task and metric; and `details`: by result name and
        task, what cannot be had again (an MT-bench judge's replies).

    Raises:
        InputError: The target is neither, the run has no result yet, or a task or setting is wrong.
    """
    wanted = [f"evaluation.tasks=[{', '.join(tasks)}]", *overrides]
    path = Path(target)
    if (path / "config.yaml").is_file():
        require_plugins(path)
        own, config = RunFolder.open(path).config(), load_config(path / "config.yaml", wanted)
        split = held_out_of(path, own, config, objects)
        found = results(path, own_base(own, config), objects)
        models = _to_score(path, found, split, config)
        tuned = tokenizer_of(path) if config.model.task == "causal-lm" else None
    else:
        adapter = is_adapter(path)
        config = model_config(adapter_base(path) if adapter else target, wanted)
        config = _with_classes(config, classes_in(path)) if adapter else _with_own_classes(config)
        split = all_held_out(config, objects) if objects else prepare_data(config, pooled=False)
        models = iter([("model", _of_target(path, config, split.labels, adapter=adapter))])
        own_words = adapter and config.model.task == "causal-lm" and (path / TOKENIZER).is_file()
        tuned = load_tokenizer(str(path.absolute()), Path(".")) if own_words else None
    return scores_of(target, models, split, config, tuned)


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    overrides: Sequence[str],
    objects: ObjectData | None = None,
) -> dict[str, Any]:
    """The same of a model in memory: the examples are those of the overrides' data block, or `objects`."""
    config = model_config("in-memory", [f"evaluation.tasks=[{', '.join(tasks)}]", *overrides])
    if config.model.task == "classification":
        about = cast(PreTrainedModel, model).config.to_dict() if hasattr(model, "config") else {}
        config = _with_classes(config, classes_of(about))
    split = all_held_out(config, objects) if objects else prepare_data(config, pooled=False)
    loaded = Loaded(cast(PreTrainedModel, model), tokenizer, config.model.name, weights_sha256="")
    return scores_of("model", [("model", loaded)], split, config)


def scores_of(
    target: str,
    models: Iterable[tuple[str, Loaded]],
    split: Split,
    config: RunConfig,
    tuned: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """The document of `evaluate_target`, for models by name.

    Args:
        target: What they are.
        models: With their tokenizers.
        split: What they are scored on.
        config: How.
        tuned: The tokenizer that says in which template they were tuned; None: their own.
    """
    settings, tasks = eval_settings(config, split.labels), scored_tasks(config, split)
    with faults("evaluation", lambda: memory_for(config)):
        outcomes, tokenizer = dict[str, dict[str, Outcome]](), tuned
        for name, loaded in models:
            outcomes[name] = score(loaded.model, loaded.tokenizer, split.evaluation, tasks, settings)
            tokenizer = tokenizer or loaded.tokenizer
    template, other = used_template(config, split.evaluation), None
    if tokenizer is not None:
        other = asked_in_template(config, split.evaluation, tokenizer)
        if template is not None:
            other = other_template(template, tokenizer)
    return {
        "target": target,
        "examples": len(split.evaluation),
        **({"template": other} if other else {}),
        "tasks": {
            task: _about(task, scorer(task, settings), [each[task] for each in outcomes.values()])
            for task in tasks
        },
        "scores": {name: summarize([found], settings) for name, found in outcomes.items()},
        "details": {
            name: {task: list(outcome.details) for task, outcome in found.items() if outcome.details}
            for name, found in outcomes.items()
        },
    }


def _about(task: str, scorer: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    metric = TASKS[task].metric if task in TASKS else next(iter(outcomes[0].metrics))
    notes = dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
    return {"scorer": scorer, "metric": metric, "notes": list(notes)}


def export_run(
    path: Path,
    config: RunConfig,
    out: Path,
    *,
    merge: bool,
    name: str | None = None,
    objects: ObjectData | None = None,
) -> list[Path]:
    """Writes a run's result(s) to `out`, which must not hold anything; returns the folders written.

    Args:
        path: The run's folder.
        config: Its configuration, with its inputs where they are now.
        out: The folder to write.
        merge: Fold an adapter into the weights.
        name: Which result, as client-0003; None: all.
        objects: The examples, with `data.train: objects` and a classifier, whose classes they have.

    Raises:
        InputError: The run has no result yet or none of that name, `out` is taken, or merging does not apply.
    """
    refuse_existing(out)
    if merge:  # into the weights that were quantised, where they are to be had
        config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})
    if name is None:
        models = ((each, loaded.model) for each, loaded in results(path, config, objects))
    else:
        models = (("global", one_result(path, config, name, objects).model) for _ in (name,))
    return save_models(models, tokenizer_of(path), out, merge=merge, what=f"export {out}")


def replay(
    path: Path, config: RunConfig, round: int, out: Path, objects: ObjectData | None = None
) -> list[Path]:
    """Rebuilds the model of an earlier round from its checkpoint and writes it to `out`.

    A FedKSeed checkpoint is a few vectors of K numbers, so all rounds can be kept (`checkpoints.keep: null`).

    Raises:
        InputError: The round has no checkpoint any more, `out` is taken, or the base model is another one.
    """
    refuse_existing(out)
    folder = path / "checkpoints"
    checkpoint.require(folder, round)
    saved = checkpoint.load(folder, round, config_sha256=RunFolder.open(path).config_sha256())
    assembly = Assembly.assemble(config, Clock(), objects)
    assembly.refuse_other_inputs(path)
    model = assembly.method.client_model(lambda: assembly.loaded.model)
    state = from_payload(registry.state_class(config.method_name), saved.state)
    models = result_models(assembly.method, state, saved.clients, model)
    return save_models(
        models, assembly.exported_tokenizer, out, merge=assembly.method.saves_merged, what=f"replay {out}"
    )


def classes(path: Path, config: RunConfig, objects: ObjectData | None) -> tuple[str, ...]:
    """The classes of a run's classifier, in the order of its outputs; of another model none.

    They are those that the run recorded. Of a run of an earlier version they are those of its data, if these
    are what they were.

    Raises:
        InputError: They are not, or are not there.
    """
    if config.model.task != "classification":
        return ()
    known = recorded_examples(path)
    if known is not None:
        return known.labels
    split = prepare_data(config, pooled=False, objects=objects)
    refuse_other_data(path, split, config.data.train)
    return split.labels


def results(path: Path, config: RunConfig, objects: ObjectData | None = None) -> Iterator[tuple[str, Loaded]]:
    """The models in a run's final/ folder: one a client, or the result and what stands beside it.

    Args:
        path: The run's folder.
        config: Its configuration, with its inputs where they are now.
        objects: Its examples, with `data.train: objects`.

    Raises:
        InputError: The run has no result yet, or its base model is another one now.
    """
    labels = classes(path, config, objects)
    for name, folder in result_folders(path).items():
        yield name, _result(path, folder, config, labels)


def result_folders(path: Path) -> dict[str, Path]:
    """Where each of a run's results is, by name; `global` first. Raises InputError if there is none yet."""
    final = path / "final"
    if not final.is_dir():
        raise InputError(f"{path} has no result yet; continue it with fedtune run --resume {path}")
    inside = [folder for folder in sorted(final.iterdir()) if folder.is_dir() and folder.name != BASE]
    named = {folder.name: folder for folder in inside}
    if any(name.startswith("client-") for name in named) and not any(p.is_file() for p in final.iterdir()):
        return named
    return {"global": final, **named}


def one_result(path: Path, config: RunConfig, name: str, objects: ObjectData | None) -> Loaded:
    """One of a run's results, as of `results`; or the model that it began with, named ZERO_SHOT.

    Raises:
        InputError: It has none of that name, or its base model is another one now.
    """
    if name == ZERO_SHOT:
        began = _base(path, config, classes(path, config, objects))
        method = registry.build(config.method, config.seed)
        adapted = model_to_train(config, method, lambda: began.model) if config.model.adapter else began.model
        return replace(began, model=cast(PreTrainedModel, adapted))
    folders = result_folders(path)
    if name not in folders:
        raise InputError(f"{path} has no result named {name!r}; it has {', '.join([*folders, ZERO_SHOT])}")
    return _result(path, folders[name], config, classes(path, config, objects))


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with a run's result."""
    return load_tokenizer(str(next(iter(result_folders(path).values())).absolute()), Path("."))


def own_base(own: RunConfig, asked: RunConfig) -> RunConfig:
    """A run's configuration with its base model where, and held as, it was asked for."""
    model = asked.model.model_dump(exclude={"initial", "task", "diffusion"})
    return own.model_copy(update={"model": own.model.model_copy(update=model)})


def _result(path: Path, folder: Path, config: RunConfig, labels: Sequence[str]) -> Loaded:
    """A result on its base model. Which base that is says the run, and not the adapter."""
    whole = str(folder.resolve())

    def base_model(name: str) -> Loaded:
        if name == whole:  # the result is a whole model, even where it began from scratch
            return _load(config, name, labels, whole=True)
        return _base(path, config, labels)

    return load_result(folder, base_model)


def _base(path: Path, config: RunConfig, labels: Sequence[str]) -> Loaded:
    """The base model that a run began with. Raises InputError if it is another one now."""
    try:
        loaded = _load(config, config.model.place, labels)
    except InputError as error:
        if local_folder(config.model.place) is not None:
            raise
        raise InputError(
            f"{error} {path} began with it; if it was moved, say where it is now: model.name=PLACE"
        ) from error
    return loaded_of(path, loaded)


def _of_target(path: Path, config: RunConfig, labels: Sequence[str], *, adapter: bool) -> Loaded:
    """A model that no run is known of; an adapter on the base that it names, or that `model.name` does."""
    if not adapter:
        return _load(config, config.model.place, labels)
    return load_result(path, lambda name: _load(config, config.model.place, labels))


def _load(config: RunConfig, name: str, labels: Sequence[str], *, whole: bool = False) -> Loaded:
    loaded = load_base(config, labels, place=name, whole=whole)
    name_classes(loaded.model.config, labels)
    return loaded


def _to_score(
    path: Path, found: Iterator[tuple[str, Loaded]], split: Split, config: RunConfig
) -> Iterator[tuple[str, Loaded]]:
    """A run's results, whose classes must be those of the examples that they are scored on."""
    for name, loaded in found:
        own = classes_of(loaded.model.config.to_dict())
        if config.model.task == "classification" and own != split.labels:
            raise InputError(
                f"{path} tells apart {', '.join(own)}, in this order; the examples have "
                f"{', '.join(split.labels)}. Set data.labels to the run's"
            )
        yield name, loaded


def _with_own_classes(config: RunConfig) -> RunConfig:
    """With the classes that a classifier's own configuration names, if `data.labels` names none."""
    folder = local_folder(config.model.place) if config.model.task == "classification" else None
    return config if folder is None else _with_classes(config, classes_in(folder))


def _with_classes(config: RunConfig, labels: Sequence[str]) -> RunConfig:
    if len(labels) < 2 or config.data.labels is not None:
        return config
    document = config.resolved()
    document["data"]["labels"] = list(labels)
    return parse_config(document, config.model.name)


def model_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """A configuration around a model that no run made. Raises InputError for a wrong setting."""
    document: dict[str, Any] = {"model": {"name": name}, "method": {"name": "zero-shot"}}
    apply_overrides(document, overrides)
    return parse_config(document, name)
