"""What a finished run made: evaluated again, or written out for other tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.config.file import apply_overrides, load_config, parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.faults import faults
from fedtune.core.seeds import derive_seed
from fedtune.core.state import from_payload
from fedtune.data.objects import ObjectData
from fedtune.errors import InputError
from fedtune.evaluation.tasks import TASKS, score, scorer, summarize
from fedtune.evaluation.types import Outcome
from fedtune.federation import checkpoint
from fedtune.federation.assembly import Assembly, refuse_other
from fedtune.federation.data import Split, all_held_out, prepare_data
from fedtune.federation.folder import RunFolder, refuse_existing
from fedtune.federation.plugins import require_plugins
from fedtune.federation.saving import save_models
from fedtune.federation.scoring import eval_settings, memory_for
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.models.load import Loaded, load_model, load_tokenizer
from fedtune.models.save import load_result


def evaluate_target(
    target: str, tasks: Sequence[str], overrides: Sequence[str], objects: ObjectData | None = None
) -> dict[str, Any]:
    """Scores of a run's result or of a model, on the held-out examples of its data block.

    Args:
        target: A run folder, a model folder, or a model's name.
        tasks: Task names.
        overrides: `key=value` settings to change.
        objects: Of a run, its examples, with `data.train: objects`; of another model, what it is scored on.

    Returns:
        `target`; `examples` (how many were held out); `tasks`: of each its `scorer` (name and version), main
        `metric` and `notes`; `scores`: by result name, task and metric; and `details`: by result name and
        task, what cannot be had again (an MT-bench judge's replies).

    Raises:
        InputError: The target is neither, the run has no result yet, or a task or setting is wrong.
    """
    wanted = [f"evaluation.tasks=[{', '.join(tasks)}]", *overrides]
    path = Path(target)
    if (path / "config.yaml").is_file():
        require_plugins(path)
        config = load_config(path / "config.yaml", wanted)
        split = prepare_data(config, pooled=False, objects=objects)
        if objects is not None:
            refuse_other(path, "data", split.sha256, "what was given")
        models = results(path, config, len(split.labels))
    else:
        config = model_config(target, wanted)
        split = all_held_out(config, objects) if objects else prepare_data(config, pooled=False)
        models = iter([("model", _load(config, config.model.name, len(split.labels)))])
    return scores_of(target, models, split, config)


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    overrides: Sequence[str],
    objects: ObjectData | None = None,
) -> dict[str, Any]:
    """The same of a model in memory: the examples are those of the overrides' data block, or `objects`."""
    config = model_config("in-memory", [f"evaluation.tasks=[{', '.join(tasks)}]", *overrides])
    split = all_held_out(config, objects) if objects else prepare_data(config, pooled=False)
    loaded = Loaded(cast(PreTrainedModel, model), tokenizer, config.model.name, weights_sha256="")
    return scores_of("model", [("model", loaded)], split, config)


def scores_of(
    target: str, models: Iterable[tuple[str, Loaded]], split: Split, config: RunConfig
) -> dict[str, Any]:
    """The document of `evaluate_target`, for models by name."""
    settings, tasks = eval_settings(config, split.labels), config.evaluation.tasks
    with faults("evaluation", lambda: memory_for(config)):
        outcomes = {
            name: score(loaded.model, loaded.tokenizer, split.evaluation, tasks, settings)
            for name, loaded in models
        }
    return {
        "target": target,
        "examples": len(split.evaluation),
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


def export_run(path: Path, out: Path, *, merge: bool, objects: ObjectData | None = None) -> list[Path]:
    """Writes a run's result(s) to `out`, which must not hold anything; returns the folders written.

    Args:
        path: The run's folder.
        out: The folder to write.
        merge: Fold an adapter into the weights.
        objects: The examples, with `data.train: objects` and a classifier, whose classes they have.

    Raises:
        InputError: The run has no result yet, `out` is taken, or merging does not apply.
    """
    config = RunFolder.open(path).config()
    refuse_existing(out)
    found = results(path, config, len(classes(config, objects)))
    models = ((name, loaded.model) for name, loaded in found)
    return save_models(
        models, load_tokenizer(config.model.name, Path(".")), out, merge=merge, what=f"export {out}"
    )


def replay(path: Path, round: int, out: Path, objects: ObjectData | None = None) -> list[Path]:
    """Rebuilds the model of an earlier round from its checkpoint and writes it to `out`.

    A FedKSeed checkpoint is a few vectors of K numbers, so all rounds can be kept (`checkpoints.keep: null`).

    Raises:
        InputError: The round has no checkpoint any more, `out` is taken, or the base model is another one.
    """
    run = RunFolder.open(path)
    config = run.config()
    refuse_existing(out)
    folder = path / "checkpoints"
    checkpoint.require(folder, round)
    saved = checkpoint.load(folder, round, config_sha256=run.config_sha256())
    assembly = Assembly.assemble(config, Clock(), objects)
    assembly.refuse_other_inputs(path)
    model = assembly.method.client_model(lambda: assembly.loaded.model)
    state = from_payload(registry.state_class(config.method_name), saved.state)
    models = assembly.method.export(state, model)
    return save_models(
        models, assembly.loaded.tokenizer, out, merge=assembly.method.saves_merged, what=f"replay {out}"
    )


def classes(config: RunConfig, objects: ObjectData | None) -> tuple[str, ...]:
    """The classes of a run's classifier; of another model none, and no data are read."""
    if config.model.task != "classification":
        return ()
    return prepare_data(config, pooled=False, objects=objects).labels


def results(path: Path, config: RunConfig, labels: int) -> Iterator[tuple[str, Loaded]]:
    """The models in a run's final/ folder: one a client, or the result and what stands beside it.

    Args:
        path: The run's folder.
        config: Its configuration.
        labels: Classes of a classifier; else 0.

    Raises:
        InputError: The run has no result yet, or it does not go with its base model.
    """
    for name, folder in result_folders(path).items():
        yield name, load_result(folder, lambda base: _load(config, base, labels))


def result_folders(path: Path) -> dict[str, Path]:
    """Where each of a run's results is, by name; `global` first. Raises InputError if there is none yet."""
    final = path / "final"
    if not final.is_dir():
        raise InputError(f"{path} has no result yet; continue it with fedtune run --resume {path}")
    named = {folder.name: folder for folder in sorted(final.iterdir()) if folder.is_dir()}
    if any(name.startswith("client-") for name in named):
        return named
    return {"global": final, **named}


def one_result(path: Path, config: RunConfig, name: str, labels: int) -> Loaded:
    """One of a run's results. Raises InputError if it has none of that name."""
    folders = result_folders(path)
    if name not in folders:
        raise InputError(f"{path} has no result named {name!r}; it has {', '.join(folders)}")
    return load_result(folders[name], lambda base: _load(config, base, labels))


def _load(config: RunConfig, name: str, labels: int) -> Loaded:
    return load_model(
        name,
        dtype=config.model.dtype,
        # a result that is a whole model has its weights in its own folder, even where it began from scratch
        initial=config.model.initial if name == config.model.name else "pretrained",
        task=config.model.task,
        num_labels=labels or None,
        seed=derive_seed(config.seed, "model"),
        base=Path("."),
    )


def model_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """A configuration around a model that no run made. Raises InputError for a wrong setting."""
    document: dict[str, Any] = {"model": {"name": name}, "method": {"name": "zero-shot"}}
    apply_overrides(document, overrides)
    return parse_config(document, name)
