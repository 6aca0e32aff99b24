"""A result made ready for others: files without this machine's places, a card, and the way to the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.core.temporary import temporary_folder
from fedtune.errors import FederationError, InputError, ProgramError, system_error
from fedtune.federation.files import atomic_folder, disk_errors, read_json, write_text
from fedtune.federation.folder import refuse_existing
from fedtune.federation.formats import MERGED, PEFT
from fedtune.models.picture_results import INDEX, LORA
from fedtune.models.save import ADAPTER_CONFIG, BASE, PEFT_CONFIG

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CARD = "README.md"
NUMBERS = (".safetensors", ".gguf", ".model", ".png")  # files that are no text
WORDS = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")  # in which any word may stand


def is_repo(target: str) -> bool:
    """Whether a target is a hub's repository, as owner/name; else it is a folder.

    Raises:
        InputError: It may be either.
    """
    if target.startswith((".", "/", "~")) or target.count("/") > 1 or target.endswith("/"):
        return False
    if not REPO.fullmatch(target):
        raise InputError(
            f"{target} may be a folder or a repository: name a folder as ./{target}, and a repository of the "
            "hub as owner/name"
        )
    return True


def on_hub(name: str) -> bool:
    """Whether a model or data set is one that others find under this name."""
    return REPO.fullmatch(name.partition("@")[0]) is not None and not Path(name).exists()


def form_for_others(folder: Path) -> str | None:
    """The form in which others can load a result: an adapter if its base is on the hub, as it is there.

    Else a whole model; None, as the run made it, where it is one, or is an adapter that cannot become one.
    """
    if not (folder / PEFT_CONFIG).is_file():
        return None
    about = read_json(folder / PEFT_CONFIG)
    base = about.get("base_model_name_or_path")
    if isinstance(base, str) and on_hub(base) and not (folder / BASE).exists():
        return PEFT
    return MERGED if about.get("peft_type") in ("LORA", "IA3") else None


def library_of(folder: Path, form: str | None) -> str:
    """Which library loads a result that is written out so: `peft` and `fedtune` say that it is an adapter."""
    if (folder / INDEX).is_file() or (folder / LORA).is_file():
        return "diffusers"
    if (folder / ADAPTER_CONFIG).is_file():
        return "fedtune"
    return "peft" if (folder / PEFT_CONFIG).is_file() and form in (PEFT, None) else "transformers"


def publish(target: str, write: Callable[[Path], Any], card: str, *, public: bool, places: list[str]) -> str:
    """Writes a result and its card into a folder, or puts them into a repository of the hub.

    Args:
        target: The folder, which must not hold anything, or owner/name.
        write: Writes the result into a folder that is not there yet.
        card: The text of README.md.
        public: Make the repository one that everybody sees; and allow one that is.
        places: Of this machine; none may stand in any of the files.

    Returns:
        The folder, or the address of the commit.

    Raises:
        InputError: The folder is taken, or the hub refuses: who asks, the name, or what is public.
        FederationError: The disk cannot be written, or the hub cannot be reached.
    """
    if not is_repo(target):
        out = Path(target).expanduser()
        refuse_existing(out)
        with temporary_folder() as home:
            _prepare(home / "result", write, card, places)
            with disk_errors(f"push {out}"), atomic_folder(out) as new:
                shutil.copytree(home / "result", new, dirs_exist_ok=True)
        return str(out)
    with temporary_folder() as home:
        _allowed(target, public=public)
        _prepare(home / "result", write, card, places)
        return _upload(target, home / "result", public=public)


def _prepare(folder: Path, write: Callable[[Path], Any], card: str, places: list[str]) -> None:
    write(folder)
    for file in sorted(folder.rglob(CARD)):  # PEFT's form, of which nothing is filled in
        file.unlink()
    for file in sorted(folder.rglob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        clean = _without_places(document)
        if clean != document:
            write_text(file, json.dumps(clean, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    write_text(folder / CARD, card)
    for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
        if file.is_symlink():
            raise ProgramError(f"{file.name} is a link into this machine and cannot be given away")
        if file.suffix in NUMBERS or file.name in WORDS:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if found := next((place for place in places if len(place) > 1 and place in text), None):
            raise ProgramError(f"{file.name} names a place of this machine, {found}; nothing was given away")


def _without_places(value: Any) -> Any:
    """A document with the last part alone of what is the path of something on this machine."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and len(value) < 4096 and os.path.isabs(value) and os.path.exists(value):
        return Path(value).name or value
    return value


def _allowed(repo: str, *, public: bool) -> None:
    """Raises InputError for a repository that everybody sees, where that was not asked for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = _asked(repo, lambda: HfApi().repo_info(repo, repo_type="model"))
    except RepositoryNotFoundError:
        return
    if not there.private and not public:
        raise InputError(f"{repo} is there and everybody sees it; --public allows that")


def _upload(repo: str, folder: Path, *, public: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    _asked(repo, lambda: api.create_repo(repo, private=not public, exist_ok=True, repo_type="model"))
    done = _asked(
        repo,
        lambda: api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="model", commit_message="A model tuned by fedtune"
        ),
    )
    return str(getattr(done, "commit_url", done))


def _asked(repo: str, ask: Callable[[], Any]) -> Any:
    """What the hub answers. RepositoryNotFoundError is passed on where there is none of that name."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return ask()
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = str(error).strip().splitlines()
        why = f"status {status}: {said[-1] if said else ''}"
        if status in (401, 403):
            why += ". Log in with: hf auth login, as somebody who may write there"
        raise InputError(f"the hub refuses {repo}, {why}") from error
    except OfflineModeIsEnabled:
        raise InputError(f"{repo}: the hub is not asked, since HF_HUB_OFFLINE is set; unset it") from None
    except ValueError as error:
        raise InputError(f"{repo}: {error}") from error
    except OSError as error:
        raise FederationError(f"the hub cannot be reached for {repo}: {system_error(error)}") from error
