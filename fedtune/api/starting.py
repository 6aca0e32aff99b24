"""A configuration to begin with: a commented one, or a copy of one that comes with fedtune."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from fedtune.config.shipped import about, shipped
from fedtune.errors import InputError, nearest

_SUFFIX = ".yaml"
_NAME, _TRAIN = r"(?m)^  name: \S+", r"(?m)^  train: (?!clients)\S+"  # of the model, and of the data


def starts() -> dict[str, str]:
    """What `init` can write, by name, with what each is."""
    return {name: about(path) for name, path in _files().items()}


def init(path: Path, *, template: str = "demo", model: str | None = None, data: str | None = None) -> Path:
    """Writes a commented configuration.

    Args:
        path: The file; without a suffix it gets .yaml.
        template: A name of `starts`.
        model: Goes in the place of the model's name.
        data: Goes in the place of the training examples.

    Returns:
        The file.

    Raises:
        InputError: There is something at `path` already, it cannot be written, there is no such template, or
            the template's clients have data of their own and `data` is given.
    """
    files = _files()
    if template not in files:
        raise InputError(
            f"--template {template}: there are {', '.join(files)}.{nearest(template, files)} Any other "
            "configuration that comes with fedtune is copied by fedtune cp"
        )
    path = path if path.suffix in (_SUFFIX, ".yml") else path.with_name(path.name + _SUFFIX)
    text = files[template].read_text(encoding="utf-8").replace("FILE", path.as_posix())
    if model is not None:
        text = re.sub(_NAME, lambda _: _line("name", model), text, count=1)
    if data is not None:
        text, found = re.subn(_TRAIN, lambda _: _line("train", data), text, count=1)
        if not found:
            raise InputError(f"--data goes with every template but {template}, whose clients have their own")
    return _written(path, text)


def copy(name: str, to: Path | None) -> Path:
    """Copies a configuration that comes with fedtune.

    Args:
        name: As `fedtune ls configs` lists it.
        to: A file, or a folder that is there; None: the working folder.

    Raises:
        InputError: There is none of that name, the place is taken, or it cannot be written.
    """
    known = shipped()
    source = known.get(name.removeprefix("configs/").removesuffix(_SUFFIX))
    if source is None:
        raise InputError(
            f"no configuration named {name} comes with fedtune (fedtune ls configs).{nearest(name, known)}"
        )
    place = Path(".") if to is None else to
    return _written(place / source.name if place.is_dir() else place, source.read_text(encoding="utf-8"))


def _files() -> dict[str, Path]:
    folder = Path(str(resources.files("fedtune.config") / "starts"))
    return {path.stem: path for path in sorted(folder.glob(f"*{_SUFFIX}"))}


def _written(path: Path, text: str) -> Path:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path} is there already, and is left as it is; give another name") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _line(key: str, text: str) -> str:
    from fedtune.config.yaml_text import dump_yaml

    return f"  {dump_yaml({key: text}).strip()}"
