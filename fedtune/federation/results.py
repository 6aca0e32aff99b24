"""What a finished run made: evaluated again, or written out for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.file import apply_overrides, load_config, parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import derive_seed
from fedtune.core.state import from_payload
from fedtune.errors import InputError
from fedtune.evaluation.subject import Outcome
from fedtune.evaluation.tasks import TASKS, score, scorer, summarize
from fedtune.federation import checkpoint
from fedtune.federation.assembly import Assembly
from fedtune.federation.data import Split, prepare_data
from fedtune.federation.folder import RunFolder, refuse_existing
from fedtune.federation.plugins import require_plugins
from fedtune.federation.saving import save_models
from fedtune.federation.scoring import eval_settings
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.models.load import Loaded, load_model, load_tokenizer
from fedtune.models.save import load_result


def evaluate_target(target: str, tasks: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Scores of a run's result or of a model, on the held-out examples of its data block.

    Args:
        target: A run folder, a model folder, or a model's name.
        tasks: Task names.
        overrides: `key=value` settings to change.

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
        split = prepare_data(config, pooled=False)
        models = _results(path, config, split)
    else:
        config = _model_config(target, wanted)
        split = prepare_data(config, pooled=False)
        models = iter([("model", _load(config, config.model.name, split))])
    settings = eval_settings(config, split.labels)
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


def export_run(path: Path, out: Path, *, merge: bool) -> list[Path]:
    """Writes a run's result(s) to `out`, which must not hold anything; returns the folders written.

    Raises:
        InputError: The run has no result yet, `out` is taken, or merging does not apply.
    """
    config = RunFolder.open(path).config()
    refuse_existing(out)
    split = prepare_data(config, pooled=False)
    models = ((name, loaded.model) for name, loaded in _results(path, config, split))
    return save_models(
        models, load_tokenizer(config.model.name, Path(".")), out, merge=merge, what=f"export {out}"
    )


def replay(path: Path, round: int, out: Path) -> list[Path]:
    """Rebuilds the model of an earlier round from its checkpoint and writes it to `out`.

    A FedKSeed checkpoint is a few vectors of K numbers, so all rounds can be kept (`checkpoints.keep: null`).

    Raises:
        InputError: The round has no checkpoint any more, `out` is taken, or the base model is another one.
    """
    config = RunFolder.open(path).config()
    refuse_existing(out)
    folder = path / "checkpoints"
    checkpoint.require(folder, round)
    saved = checkpoint.load(folder, round, config_sha256=config.sha256())
    parts = Assembly.assemble(config, Clock())
    parts.refuse_other_inputs(path)
    model = parts.method.client_model(lambda: parts.loaded.model)
    state = from_payload(registry.state_class(config.method_name), saved.state)
    models = parts.method.export(state, model)
    return save_models(
        models, parts.loaded.tokenizer, out, merge=parts.method.saves_merged, what=f"replay {out}"
    )


def _results(path: Path, config: RunConfig, split: Split) -> Iterator[tuple[str, Loaded]]:
    """The models in a run's final/ folder: one a client, or the result and what stands beside it."""
    final = path / "final"
    if not final.is_dir():
        raise InputError(f"{path} has no result yet; continue it with fedtune run --resume {path}")
    named = {folder.name: folder for folder in sorted(final.iterdir()) if folder.is_dir()}
    if not any(name.startswith("client-") for name in named):
        named = {"global": final, **named}
    for name, folder in named.items():
        yield name, load_result(folder, lambda base: _load(config, base, split))


def _load(config: RunConfig, name: str, split: Split) -> Loaded:
    return load_model(
        name,
        dtype=config.model.dtype,
        # a result that is a whole model has its weights in its own folder, even where it began from scratch
        initial=config.model.initial if name == config.model.name else "pretrained",
        task=config.model.task,
        num_labels=len(split.labels) or None,
        seed=derive_seed(config.seed, "model"),
        base=Path("."),
    )


def _model_config(name: str, overrides: Sequence[str]) -> RunConfig:
    document: dict[str, Any] = {"model": {"name": name}, "method": {"name": "zero-shot"}}
    apply_overrides(document, overrides)
    return parse_config(document, name)
