"""`fedtune validate`: configurations, checked before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fedtune
from fedtune.cli.display import Json, Plugin, begun_configs, print_json
from fedtune.errors import InputError


def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...",
            help="Settings files, and settings to change.",
            autocompletion=begun_configs,
        ),
    ],
    modules: Annotated[
        bool,
        typer.Option("--modules", help="Also say what will be trained, from the model's config.json."),
    ] = False,
    look: Annotated[
        bool, typer.Option("--data", help="Read the data too: what fedtune data has to say of them.")
    ] = False,
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """Check configurations without weights, and without data unless asked.

    Example: fedtune validate mine.yaml seed=3

    Example: fedtune validate mine.yaml --data
    """
    from fedtune.config.tracking import require_trackers
    from fedtune.federation.room import known_room, shortening

    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    configs = [argument for argument in arguments if argument not in overrides]
    if not configs:
        raise InputError(f"validate needs a configuration's file beside {' '.join(overrides)}")
    problems, good = [], []
    for path in configs:
        try:
            config = fedtune.load(path, *overrides)
            require_trackers(config.tracking)
            room = known_room(config)
            notes = shortening(config, room) if room and not look else []  # else it is among the checks
            if modules:
                from fedtune.planning.modules import trained_modules

                notes += trained_modules(config)
            about = {"config": path, "method": config.method_name, "model": config.model.name}
            if look:
                checks = fedtune.data_report(config)["checks"]
                if refused := [check["text"] for check in checks if check["level"] == "error"]:
                    raise InputError("; ".join(refused))
                notes += [check["text"] for check in checks]
            good.append({**about, "notes": notes} if notes else about)
        except InputError as error:
            problems.append(str(error) if path in str(error) else f"{path}: {error}")
    if problems:
        raise InputError("\n".join(problems))
    if as_json:
        print_json(good)
    else:
        for entry in good:
            print(f"{entry['config']}: {entry['method']} on {entry['model']}")
            for note in entry.get("notes", ()):
                print(f"  {note}")
