"""The folder of a run that goes on: of the same configuration, or of one that has more rounds.

A run gets more rounds by its own configuration being changed in its folder, checkpoints included, which name
the configuration that they belong to. What is to be done is written down first and crossed out last, so that
it is finished when the run is continued next, whatever stopped it. more-rounds.jsonl keeps what was done, and
rounds-N/ the result and the summary that the run had after its N rounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.config.file import dump_config, parse_config
from fedtune.config.places import without_places
from fedtune.config.schema import RunConfig, document_sha256
from fedtune.config.yaml_text import load_yaml
from fedtune.errors import InputError
from fedtune.federation import checkpoint
from fedtune.federation.files import disk_errors, read_json, write_json, write_text
from fedtune.federation.folder import RunFolder

_INTENT = "more-rounds.json"
DONE = "more-rounds.jsonl"


def reopen(config: RunConfig, path: Path) -> RunFolder:
    """The folder of a run to go on with; its inputs may be elsewhere than when it began.

    Raises:
        InputError: It is no run's, or of another configuration, or cannot have as many rounds.
        FederationError: The disk is full or cannot be written; the next start goes on from there.
    """
    folder = RunFolder.open(path)
    _finish(path)
    mine, its = without_places(config), without_places(folder.config())
    if mine == its:
        return folder
    wanted, had = (each["method"].get("rounds") for each in (mine, its))
    if wanted != had and {**mine, "method": {**mine["method"], "rounds": had}} == its:
        _refuse(config, path, had, wanted)
        _extend(path, folder.config(), wanted)
        return folder
    different = [key for key in its if mine.get(key) != its[key]]
    raise InputError(
        f"{path} was started with another configuration; different: {', '.join(different)}. Continue it with "
        f"--resume {path} and {path / 'config.yaml'}, more method.rounds if need be, or start anew with --out"
    )


def _refuse(config: RunConfig, path: Path, had: int, wanted: int) -> None:
    """Raises InputError if the run in `path` cannot go on to so many rounds."""
    why = ""
    if wanted < had:
        why = "rounds can be added, and none taken away; checkpoints.rollback=N goes back to an earlier one"
    elif getattr(config.method, "lr_over", "round") == "run":
        why = "with method.lr_over: run the rates of the rounds that are done depend on how many there are"
    elif getattr(config.method, "fine_tune", None) is not None:
        why = "with method.fine_tune clients have made models of their own of the last round"
    elif config.federation.privacy is not None:
        why = "federation.privacy was promised to its clients for so many rounds"
    elif config.transport.name == "flower":
        why = "its clients, on other machines, have agreed to so many rounds"
    if why:
        raise InputError(
            f"{path} has method.rounds: {had}, got {wanted}, and it cannot go on to that: {why}. Leave "
            "method.rounds out, or start anew with --out"
        )


def _extend(path: Path, own: RunConfig, rounds: int) -> None:
    document = own.resolved()
    before = document["method"]["rounds"]
    document["method"]["rounds"] = rounds
    intent = {
        "from": before,
        "to": rounds,
        "after": max(checkpoint.rounds(path / "checkpoints"), default=0),
        "config": dump_config(parse_config(document, str(path))),
    }
    with disk_errors(f"{rounds} rounds for {path}"):
        write_json(path / _INTENT, intent)
    _finish(path)


def _finish(path: Path) -> None:
    """Does what is left of an extension; nothing where none was begun."""
    if not (path / _INTENT).exists():
        return
    intent: dict[str, Any] = read_json(path / _INTENT)
    digest = document_sha256(load_yaml(intent["config"], str(path)))
    with disk_errors(f"{intent['to']} rounds for {path}"):
        checkpoint.rename(path / "checkpoints", config_sha256=digest)
        write_text(path / "config.yaml", intent["config"])
        into = path / f"rounds-{intent['from']}"
        for result in ("final", "summary.json"):
            if (path / result).exists():
                into.mkdir(exist_ok=True)
                (path / result).rename(into / result)
        folder, entry = RunFolder(path), {key: intent[key] for key in ("from", "to", "after")}
        if entry not in list(folder.entries(DONE)):
            folder.append(DONE, entry)
        (path / _INTENT).unlink()
