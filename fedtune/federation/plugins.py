"""Parts of a run that are not fedtune's own: written down, asked for on resuming, known to its clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.data.partition import PARTITIONERS
from fedtune.data.templates import TEMPLATES
from fedtune.errors import InputError
from fedtune.evaluation.registry import TASKS
from fedtune.federation.files import read_json
from fedtune.methods.registry import METHODS
from fedtune.registry import FEDTUNE, HERE, Part, load_plugin, plugins


def record(config: RunConfig) -> dict[str, Any]:
    """What environment.json says of them.

    Returns:
        `plugins`: path and sha256 of each plugin file; `parts`: where each part that the configuration names
        comes from, if it is not fedtune's own.
    """
    return {
        "plugins": [{"path": str(plugin.path), "sha256": plugin.sha256} for plugin in plugins()],
        "parts": {f"{part.kind} {part.name}": part.origin for part in _foreign(config)},
    }


def require_plugins(run: Path | None, *, unchanged: bool = False) -> None:
    """Refuses a run whose plugin files are not loaded; anything else than a run folder is let pass.

    Args:
        run: The run's folder.
        unchanged: They also have to be what they were when it began.

    Raises:
        InputError: Names the files.
    """
    if run is None or not (run / "environment.json").is_file():
        return
    loaded = {plugin.sha256: plugin for plugin in plugins()}
    named = {plugin.path.name: plugin for plugin in plugins()}
    for before in read_json(run / "environment.json").get("plugins", []):
        path, sha256 = Path(before["path"]), str(before["sha256"])
        if sha256 in loaded:
            continue
        if path.name not in named:
            raise InputError(f"{run} was made with the plugin {path}; pass it again: --plugin {path}")
        if unchanged:
            raise InputError(
                f"{run} began with another plugin {path}: sha256 was {sha256[:12]}, "
                f"{named[path.name].path} now has {named[path.name].sha256[:12]}; bring the old one back"
            )


def refuse_this_process(config: RunConfig, because: str) -> None:
    """Refuses parts that other processes of this machine cannot know, `because` of which they would have to.

    Raises:
        InputError: Names the first such part.
    """
    for part in _foreign(config):
        if part.origin == HERE:
            raise InputError(
                f"{because}, and the {part.kind} {part.name} was registered in this process alone; put it "
                "in a file and pass that as a plugin (--plugin FILE), or make it a package with an entry "
                "point (docs/plugins.md)"
            )


def load_again(files: Sequence[tuple[str, str]]) -> None:
    """Loads the plugin files of the process that started this one.

    Args:
        files: Absolute path and sha256 of each.

    Raises:
        InputError: One cannot be loaded, or has changed in between.
    """
    for path, sha256 in files:
        if load_plugin(path).sha256 != sha256:
            raise InputError(f"plugin {path} has changed since the run was started")


def _foreign(config: RunConfig) -> Iterator[Part[Any]]:
    data = config.data
    parts: list[Part[Any]] = [METHODS.part(config.method_name), PARTITIONERS.part(data.partition_name)]
    parts += [TEMPLATES.part(name) for name in [data.template] if name in TEMPLATES]
    parts += [TASKS.part(t) for t in config.evaluation.tasks if t in TASKS]
    return (part for part in parts if part.origin != FEDTUNE)
