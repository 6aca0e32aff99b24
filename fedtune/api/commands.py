"""The functions of `import fedtune`: one for each command, with Python objects in place of files.

Everything heavy is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.api.federate import check_workers, federate, objects_from, seeds_of, shown, stopped, with_objects
from fedtune.api.runs import Comparison, Run
from fedtune.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fedtune.config.schema import RunConfig
    from fedtune.federation.callbacks import Callback


def load(source: RunConfig | str | Path | Mapping[str, Any], *overrides: str) -> RunConfig:
    """A configuration, checked as a whole.

    Args:
        source: A YAML file, the name of one that comes with fedtune ("demo"), the same as a dictionary, or a
            configuration.
        overrides: `key=value` with dotted keys, as on the command line: "method.lr=1e-4".

    Returns:
        The configuration; its settings are attributes, as in `config.method.lr`.

    Raises:
        InputError: The file is missing or not YAML, or a setting is unknown, of a wrong type or out of
            range. Names every such setting and, for an unknown one, the nearest known.
    """
    from fedtune.config.file import apply_overrides, parse_config
    from fedtune.config.schema import RunConfig
    from fedtune.config.shipped import find
    from fedtune.config.yaml_text import read_yaml
    from fedtune.methods import registry

    if isinstance(source, RunConfig):
        if not overrides:
            return source
        document, name = source.given(), "the configuration"
    elif isinstance(source, Mapping):
        document, name = plain(source), "the configuration"
    elif isinstance(source, str | Path):
        document, name = read_yaml(find(Path(source))), str(source)
    else:
        raise InputError(
            f"a configuration is a YAML file's path, a dictionary or what fedtune.load gave; "
            f"got {type(source).__name__}"
        )
    if wrong := [item for item in overrides if not isinstance(item, str)]:
        raise InputError(f"overrides are texts, as in 'method.lr=1e-4', 'seed=1'; got {wrong[0]!r}")
    apply_overrides(document, overrides)
    config = parse_config(document, name)
    try:
        registry.check(config.method, config.seed)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return config


def run(
    config: RunConfig | str | Path | Mapping[str, Any],
    *overrides: str,
    out: str | Path | None = None,
    resume: bool = False,
    data: Any = None,
    callbacks: Sequence[Callback | Any] = (),
    progress: bool | Literal["json"] = True,
) -> Run:
    """Runs one federation to its end.

    Args:
        config: What `load` takes.
        overrides: As of `load`.
        out: The run's folder, which must not hold anything; None: runs/NAME, numbered if taken.
        resume: Continue the run in `out`, which has the same configuration; begin it if nothing is there.
        data: Examples as Python objects in place of `data.train`: a list of dictionaries, a
            `datasets.Dataset`, or a dictionary from clients' names to one of either, which is then the
            split. They are not written to the run's folder: `open` takes them again.
        callbacks: Objects with `on_client`, `on_round` or `on_end`; see `Callback`.
        progress: Show what happens, in a terminal or a notebook; "json": as lines of JSON on stderr; else
            only warnings are said, there.

    Raises:
        InputError: Configuration, data or model are not usable; nothing was written.
        FederationError: A round stayed under its quorum, or the machine failed. The folder holds a
            checkpoint; `open(out).resume()` goes on.
    """
    from fedtune.config.places import located
    from fedtune.federation.claim import claimed
    from fedtune.federation.plugins import require_plugins

    if resume:
        if out is None:
            raise InputError("resume=True needs the folder of the run that is to go on: out=...")
        require_plugins(Path(out))  # before its configuration is read, in which their names would be unknown
    settings, objects = with_objects(load(config, *overrides), data)
    settings = located(settings)  # the program may change its working folder afterwards
    stem = Path(config).stem if isinstance(config, str | Path) else settings.method_name
    where = None if out is None else Path(out)
    with claimed(where, Path("runs") / stem) as path, shown(progress) as display:
        federate(settings, path, objects, callbacks, display, resume=resume)
    return Run(path, settings, objects)


def status(run: str | Path) -> dict[str, Any]:
    """How a run stands that is under way, finished or killed, out of its folder alone.

    Args:
        run: Its folder.

    Returns:
        `run`, `state` (`under way`, `killed`, `done`, `stopped` or `interrupted`), `method`, `model`;
        `round`, the last one that is finished, of `rounds`; `evaluation`; `payload_bytes` and `framed_bytes`
        {`down`, `up`}; `clients`, one dictionary each: `client`, `name`, `examples`, `rounds`,
        `left_out`, `payload_bytes`, `fault`, and over a network `here` and `seen`; `now`, what a run that is
        under way or was killed says of itself, else None.

    Raises:
        InputError: It is no run's folder.
    """
    from fedtune.federation.status import status

    return status(Path(run))


def open(path: str | Path, *overrides: str, data: Any = None) -> Run:
    """A run that is in a folder, finished or not.

    Its base model and data are looked at when something needs them; others than it began with are refused.

    Args:
        path: The run's folder.
        overrides: Where its inputs are now, if they were moved: "model.name=/data/base",
            "data.train=x.jsonl".
        data: The examples, where the run was made with some; see `run`.

    Raises:
        InputError: It is not a run's folder, an override is of a setting, which a run has for good, or `data`
            are for a run that has files.
    """
    from fedtune.config.data import OBJECTS
    from fedtune.config.places import moved
    from fedtune.federation.folder import RunFolder

    config = moved(RunFolder.open(Path(path)).config(), overrides)
    if data is not None and config.data.train != OBJECTS:
        raise InputError(f"{path} was made with data.train: {config.data.train}; it takes no data=...")
    return Run(Path(path), config, objects_from(config, data))


def compare(
    configs: Sequence[RunConfig | str | Path | Mapping[str, Any]] | Mapping[str, Any],
    *overrides: str,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    data: Any = None,
    references: bool = True,
    progress: bool = True,
    workers: int = 1,
) -> Comparison:
    """Runs several configurations on the same split, over several seeds.

    Args:
        configs: What `load` takes, or a dictionary from rows' names to that. Files give their names to the
            rows, others are called by their method.
        overrides: `key=value`, for all of them.
        seeds: None: the first configuration's own.
        out: Folder of the runs; what is done there is taken over. None: runs/compare, numbered if taken.
        data: As of `run`.
        references: Add rows without training, of each client alone, and of all data in one place.
        progress: As of `run`.
        workers: So many runs at the same time, each in a process; the result is the same.

    Raises:
        InputError: As `run`; or two of them do not have the same split.
        FederationError: As `run`.
    """
    from fedtune.federation.claim import claimed
    from fedtune.federation.compare import Candidate, main_metrics
    from fedtune.federation.compare import compare as compare_all
    from fedtune.federation.files import write_text
    from fedtune.report.tables import compare_markdown

    named = _named(configs)
    if not named:
        raise InputError("compare needs at least one configuration")
    if isinstance(data, Iterator):
        data = list(data)  # it is read once a configuration
    loaded = {name: with_objects(load(config, *overrides), data) for name, config in named.items()}
    candidates = [Candidate(name, settings) for name, (settings, _) in loaded.items()]
    first, objects = next(iter(loaded.values()))
    chosen = seeds_of(seeds, first.seed)
    check_workers(workers)
    with claimed(None if out is None else Path(out), Path("runs") / "compare") as path:
        how = f'What is done is kept: the same call with out="{path}" goes on.'
        with shown(progress) as display, stopped(display, path, how):
            document = compare_all(
                candidates,
                chosen,
                path,
                display,
                references=references,
                objects=objects,
                workers=workers,
            )
        metrics = main_metrics(document["rows"], first.evaluation.tasks)
        write_text(path / "table.md", compare_markdown(document, metrics))
    return Comparison(path, document, metrics)


def evaluate(
    target: Run | str | Path | nn.Module,
    tasks: Sequence[str],
    *overrides: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
) -> dict[str, Any]:
    """Scores a run's result, or any model, on held-out examples, files, or lm-evaluation-harness's tasks.

    Args:
        target: A run or its folder, a model's or an adapter's folder, a model's name, or a model in memory.
        tasks: Names of tasks, as `fedtune ls tasks` has them.
        overrides: `key=value` settings to change: "data.train=x.jsonl", "evaluation.max_examples=100". Of an
            adapter's folder "model.name=PLACE" says where its base is.
        tokenizer: Of a model in memory.
        data: Examples to score a model on that no run made, as of `run`: all of them.

    Returns:
        The document of `fedtune eval --json`: `scores` by result, task and metric, and what they rest on.
        Those of a run are also added to evaluations.jsonl in its folder, which reports show.

    Raises:
        InputError: There is no result, or a task or setting is wrong.
    """
    from fedtune.federation.evaluations import evaluate_and_keep
    from fedtune.federation.results import evaluate_model, model_config

    if isinstance(tasks, str):
        raise InputError(f"tasks is a list of names, as in [{tasks!r}]; got the text {tasks!r}")
    if isinstance(target, Run):
        if data is not None:
            raise InputError("a run has its own data; open it with them: fedtune.open(path, data=...)")
        overrides = (*target.places(), *overrides)
        return evaluate_and_keep(str(target.folder), list(tasks), overrides, target.objects)
    objects = objects_from(model_config("in-memory", overrides), data)
    if isinstance(target, str | Path):
        return evaluate_and_keep(str(target), list(tasks), overrides, objects)
    if not callable(getattr(target, "parameters", None)):
        raise InputError(
            f"evaluate takes a run or its folder, a model's folder or name, or a model; got {target!r:.80}"
        )
    if tokenizer is None:
        raise InputError("a model in memory needs its tokenizer: evaluate(model, tasks, tokenizer=...)")
    if not callable(tokenizer):
        raise InputError(
            f"tokenizer must be one of transformers, as run.tokenizer() gives; got {tokenizer!r:.80}"
        )
    return evaluate_model(target, tokenizer, list(tasks), overrides, objects)


def available(what: str) -> list[dict[str, str]]:
    """What there is to name in a configuration.

    Args:
        what: methods, partitioners, tasks, templates, models, or configs, which come with fedtune.

    Returns:
        Of each its `name`, a `summary`, and its `origin`: fedtune, a package, a file, or this process.

    Raises:
        InputError: There is no such list.
    """
    from fedtune.config import shipped
    from fedtune.data import templates
    from fedtune.data.partition import PARTITIONERS
    from fedtune.evaluation.registry import TASKS
    from fedtune.methods.registry import METHODS
    from fedtune.models.names import listing

    lists = {
        "methods": METHODS.listing,
        "partitioners": PARTITIONERS.listing,
        "tasks": TASKS.listing,
        "templates": templates.listing,
        "models": listing,
        "configs": shipped.listing,
    }
    if what not in lists:
        raise InputError(f"there are {', '.join(lists)} to list; got {what!r}")
    return lists[what]()


def report_page(runs: Sequence[Run | str | Path], out: str | Path = "report.html") -> Path:
    """Writes one self-contained HTML page of several runs: scores, curves against rounds and bytes, memory.

    Args:
        runs: Runs or their folders, finished or not.
        out: The file, which must not exist.

    Raises:
        InputError: `out` is taken, its folder is not there, or something is not a run's folder.
    """
    from fedtune.report.page import write_report

    if isinstance(runs, str | Path | Run) or not runs:
        raise InputError(f"runs is a list of at least one run or folder, as in ['runs/mine']; got {runs!r}")
    paths = [run.folder if isinstance(run, Run) else Path(run) for run in runs]
    return write_report(paths, Path(out))


def plain(value: Any) -> Any:
    """A value as YAML would give it: paths as text, tuples as lists, numbers of numpy as numbers; a copy."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", ()):
        return value.item()
    return value


def _named(configs: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Configurations by the names of their rows."""
    if isinstance(configs, str | Path):
        raise InputError(f"compare takes a list of configurations, as in [{str(configs)!r}]")
    if isinstance(configs, Mapping) and "method" not in configs:
        for name in configs:  # of a folder too
            if not isinstance(name, str) or not name.strip(". ") or "/" in name:
                raise InputError(
                    f"a configuration's name is a text without /, as in 'one-shot'; got {name!r}"
                )
        return dict(configs)
    if isinstance(configs, Mapping):
        raise InputError("compare takes several configurations: a list, or a dictionary from names to them")
    named: dict[str, Any] = {}
    for config in configs:
        of_file = isinstance(config, str | Path)
        if of_file and "=" in str(config) and not Path(config).exists():
            raise InputError(
                f"{config} is a setting, and compare takes configurations here; on the command line a "
                f"setting of all rows is --set {config}, in Python it comes after the list"
            )
        stem = Path(config).stem if of_file else load(config).method_name
        if not of_file:
            same = sum(name.rpartition("-")[0] == stem or name == stem for name in named)
            stem = f"{stem}-{same + 1}" if same else stem
        if stem in named:
            raise InputError(
                f"configurations need different names, got {stem}, {stem}; rename one of the files, or give "
                "a dictionary from names to configurations"
            )
        named[stem] = config
    return named
