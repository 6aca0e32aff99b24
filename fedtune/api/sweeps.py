"""`fedtune.sweep`: one configuration over a grid of settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.api.commands import load
from fedtune.api.federate import check_workers, seeds_of, shown, stopped, with_objects
from fedtune.errors import InputError

if TYPE_CHECKING:
    from fedtune.config.schema import RunConfig


class Sweep:
    """What `fedtune.sweep` found.

    Attributes:
        path: The folder of its runs, with sweep.json, table.md, best.yaml and, where matplotlib is installed,
            sweep.svg.
        document: sweep.json: `points`, `rows`, `metric`, `best`.
    """

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path, self.document = path, document

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r}, {len(self.document['points'])} points, best: {self.best})"

    def __str__(self) -> str:
        """The table as Markdown: mean ± spread over seeds, the best first."""
        from fedtune.report.sweeps import sweep_markdown

        return sweep_markdown(self.document)

    def _repr_markdown_(self) -> str:
        return str(self)

    @property
    def best(self) -> str | None:
        """The name of the best point; None if no run of any came to its end."""
        name: str | None = self.document["best"]
        return name

    @property
    def settings(self) -> dict[str, str]:
        """The best point's settings, as they were written. Raises InputError if there is none."""
        for point in self.document["points"]:
            if point["name"] == self.best:
                return dict(point["settings"])
        raise InputError("no run of the sweep came to its end; its points say why in sweep.json")


def sweep(
    config: RunConfig | str | Path | Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]] | Sequence[str],
    *overrides: str,
    seeds: Sequence[int] | None = None,
    trials: int | None = None,
    validation: float | None = None,
    metric: str | None = None,
    out: str | Path | None = None,
    data: Any = None,
    progress: bool = True,
    workers: int = 1,
) -> Sweep:
    """Runs one configuration at every point of a grid and finds the best.

        fedtune.sweep("mine.yaml", {"method.lr": [1e-4, 3e-4], "method.lora.rank": [4, 8]}, validation=0.1)

    Args:
        config: What `load` takes.
        grid: Values by dotted key, or texts as on the command line: "method.lr=1e-4,3e-4".
        overrides: `key=value`, for all points.
        seeds: None: the configuration's own. The score of a point is the mean over them.
        trials: So many points, drawn from the grid with the configuration's seed; None: all.
        validation: Share of the training examples that is held out in place of what the configuration holds
            out, so that nothing is chosen by what a result is later scored on; best.yaml holds out what the
            configuration does.
        metric: By which the best is found, as "accuracy.accuracy"; None: the first task's main metric. Losses
            and perplexities are better when lower, our other scores when higher; unknown ones are refused.
        out: Folder of the runs; what is done there is taken over. None: runs/sweep, numbered if taken.
        data: As of `run`.
        progress: As of `run`.
        workers: So many runs at the same time, each in a process; the result is the same.

    Raises:
        InputError: As `run`, of any point, before the first runs; or the grid or a name is wrong.
    """
    from fedtune.config.file import dump_settings
    from fedtune.evaluation.better import better
    from fedtune.evaluation.registry import TASKS, possible
    from fedtune.federation.claim import claimed
    from fedtune.federation.files import write_text
    from fedtune.federation.sweep import axis, points
    from fedtune.federation.sweep import sweep as sweep_all
    from fedtune.report.sweeps import sweep_markdown, sweep_plot

    axes = [axis(word) for word in _words(grid)]
    if isinstance(data, Iterator):
        data = list(data)
    first, objects = with_objects(load(config, *overrides), data)
    chosen = seeds_of(seeds, first.seed)
    check_workers(workers)
    if validation is not None and not 0 < validation < 1:
        raise InputError(f"validation is a share of the training examples, as 0.1; got {validation}")
    grid_points = points(axes, trials, first.seed)

    def at(settings: Mapping[str, str], share: float | None = None) -> RunConfig:
        own = [f"{key}={value}" for key, value in settings.items()]
        try:
            found = with_objects(load(config, *overrides, *own), data)[0]
            if share is None:
                return found
            holdout = {**found.resolved()["data"]["holdout"], "validation": share}
            return load({**found.resolved(), "data": {**found.resolved()["data"], "holdout": holdout}})
        except InputError as error:
            raise InputError(f"at {', '.join(own)}: {error}") from None

    if metric is not None and metric.partition(".")[0] not in possible(first.evaluation.tasks):
        tasks = ", ".join(possible(first.evaluation.tasks))
        raise InputError(f"metric is task.metric of a task that is scored; there are {tasks}, got {metric}")
    if metric is not None:
        better(metric)
    elif (main := TASKS.get(chooses := possible(first.evaluation.tasks)[0])) is not None:
        better(f"{chooses}.{main.metric}")  # refused now where its direction is not known
    candidates = [(point, at(point.settings, validation)) for point in grid_points]
    with claimed(None if out is None else Path(out), Path("runs") / "sweep") as path:
        how = f'What is done is kept: the same call with out="{path}" goes on.'
        with shown(progress) as display, stopped(display, path, how):
            found = sweep_all(
                candidates, chosen, path, display, metric=metric, objects=objects, workers=workers
            )
            document = {**found, "validation": validation}
        write_text(path / "table.md", sweep_markdown(document))
        if (drawn := sweep_plot(document)) is not None:
            write_text(path / "sweep.svg", drawn)
        result = Sweep(path, document)
        if result.best is not None:
            write_text(path / "best.yaml", dump_settings(at(result.settings)))
    return result


def _words(grid: Mapping[str, Sequence[Any]] | Sequence[str]) -> list[str]:
    if isinstance(grid, str):
        raise InputError(f"grid is a dictionary or a list of texts, as in [{grid!r}]; got the text {grid!r}")
    if not isinstance(grid, Mapping):
        return list(grid)
    import json

    words = []
    for key, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"grid: {key} takes a list of values, as in [1e-4, 3e-4]; got {values!r}")
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        words.append(f"{key}={','.join(texts)}")
    return words
