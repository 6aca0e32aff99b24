"""What a finished run made: evaluated again, or written out for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from fedtune.core.seeds import derive_seed
from fedtune.errors import InputError
from fedtune.evaluation.tasks import evaluate
from fedtune.models.bottleneck import find_bottlenecks
from fedtune.models.load import Loaded, load_model
from fedtune.models.save import load_result, save_result
from fedtune.run.config import RunConfig
from fedtune.run.config_file import apply_overrides, load_config, parse_config
from fedtune.run.data import Split, prepare_data
from fedtune.run.federation import eval_settings
from fedtune.run.files import disk_errors, whole_folder
from fedtune.run.folder import RunFolder, refuse_existing


def evaluate_target(target: str, tasks: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Scores of a run's result or of a model, on the held-out examples of its data block.

    Args:
        target: A run folder, a model folder, or a model's name.
        tasks: Task names.
        overrides: `key=value` settings to change.

    Returns:
        `target`, `examples` (how many were held out) and `scores`: by result name, task and metric.

    Raises:
        InputError: The target is neither, the run has no result yet, or a task or setting is wrong.
    """
    wanted = [f"evaluation.tasks=[{', '.join(tasks)}]", *overrides]
    path = Path(target)
    if (path / "config.yaml").is_file():
        config = load_config(path / "config.yaml", wanted)
        split = prepare_data(config, pooled=False)
        models = _results(path, config, split)
    else:
        config = _model_config(target, wanted)
        split = prepare_data(config, pooled=False)
        models = iter([("model", _load(config, config.model.name, split))])
    scores = {}
    for name, loaded in models:
        loaded.model.eval()
        scores[name] = evaluate(
            loaded.model, loaded.tokenizer, split.evaluation, tasks, eval_settings(config, split.labels)
        )
    return {"target": target, "examples": len(split.evaluation), "scores": scores}


def export_run(path: Path, out: Path, *, merge: bool) -> list[Path]:
    """Writes a run's result(s) to `out`, which must not hold anything; returns the folders written.

    Raises:
        InputError: The run has no result yet, `out` is taken, or merging does not apply.
    """
    config = RunFolder.open(path).config()
    refuse_existing(out)
    split = prepare_data(config, pooled=False)
    written = []
    with disk_errors(f"export to {out}"), whole_folder(out) as new:
        for name, loaded in _results(path, config, split):
            where = new if name == "global" else new / name
            where.mkdir(exist_ok=True)
            save_result(loaded.model, loaded.tokenizer, where, merge=merge and _is_adapter(loaded.model))
            written.append(out if name == "global" else out / name)
    return written


def _is_adapter(model: nn.Module) -> bool:
    """Whether something is attached to the base model; a whole model needs no merging."""
    return isinstance(model, PeftModel) or bool(find_bottlenecks(model))


def _results(path: Path, config: RunConfig, split: Split) -> Iterator[tuple[str, Loaded]]:
    """The models in a run's final/ folder: one, or one a client."""
    final = path / "final"
    if not final.is_dir():
        raise InputError(f"{path} has no result yet; continue it with fedtune run --resume {path}")
    several = sorted(
        folder for folder in final.iterdir() if folder.is_dir() and folder.name.startswith("client-")
    )
    for folder in several or [final]:
        yield (
            (folder.name if several else "global"),
            load_result(folder, lambda name: _load(config, name, split)),
        )


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
