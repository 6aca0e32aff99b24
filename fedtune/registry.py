"""Parts by name, wherever they come from: fedtune itself, an installed package, a plugin file, this process.

One `Registry` a kind: methods, partitioners, evaluation tasks, templates. Decorators such as
`register_method` fill it. A package names its parts in its metadata (entry points), so that they are known
without importing it; a part is imported when it is used. A name stands for one part: where two claim it,
using it is an error.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from fedtune.errors import InputError, nearest

FEDTUNE = "fedtune"
HERE = "this process"

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """A part that has a name.

    Attributes:
        kind: What it is: method, partitioner, task or template.
        name: What a configuration calls it.
        summary: One line for people.
        origin: `fedtune`, a package and its version, `file` and its path, or `this process`.
        load: Gives the part; imports what it needs then.
        source: The class or function that was registered; None for fedtune's own.
    """

    kind: str
    name: str
    summary: str
    origin: str
    load: Callable[[], T]
    source: Any = None


class Registry(Generic[T]):
    """All parts of one kind by name.

    Args:
        kind: What a part is, in messages.
        setting: The setting that names one, in messages.
        group: The entry points of packages that bring one.
    """

    def __init__(self, kind: str, setting: str, group: str) -> None:
        self.kind, self._setting, self._group = kind, setting, group
        self._known: dict[str, Part[T]] = {}
        _registries.append(self)

    def built_in(self, name: str, summary: str, load: Callable[[], T]) -> None:
        """Adds one of fedtune's own. Raises InputError if the name is taken."""
        self._add(Part(self.kind, name, summary, FEDTUNE, load))

    def register(self, name: str, source: Any, part: T, summary: str | None = None) -> None:
        """Adds what a person or package brings.

        Args:
            name: Letters, digits, dots, dashes and underscores.
            source: The class or function that the decorator stands on.
            part: What it comes to.
            summary: One line; None: the first of the docstring of `source`.

        Raises:
            InputError: The name is taken or is none, `source` is neither a class nor a function, or there is
                no summary.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(
                f"{self.kind} {name!r}: a name has letters, digits, dots, dashes and underscores, as my-own"
            )
        if not (inspect.isclass(source) or inspect.isfunction(source)):
            raise InputError(
                f"{self.kind} {name!r}: what is registered is a class or function, got {source!r}"
            )
        line = (summary or inspect.cleandoc(source.__doc__ or "")).partition("\n")[0].strip()
        if not line:
            raise InputError(
                f"{self.kind} {name!r} says nowhere what it is: give {source.__name__} a docstring, or a "
                "summary=..."
            )
        self._add(Part(self.kind, name, line, _origin(source), lambda: part, source))

    def _add(self, part: Part[T]) -> None:
        before = self._known.get(part.name)
        if before is not None and not _redefined(before.source, part.source):
            raise InputError(
                f"the {self.kind} name {part.name!r} is taken: {before.origin} has "
                "registered it already; choose another"
            )
        self._known[part.name] = part

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._packages

    def __iter__(self) -> Iterator[str]:
        return iter([*self._known, *(name for name in self._packages if name not in self._known)])

    def __getitem__(self, name: str) -> T:
        return self.part(name).load()

    def get(self, name: str) -> T | None:
        """What has that name, or None if nothing has. Raises InputError as `part`."""
        if name not in self:
            return None
        return self[name]

    def part(self, name: str) -> Part[T]:
        """The part of a name; imports the package that brings it.

        Raises:
            InputError: Nothing has that name (suggests the nearest), two parts have it, or it cannot be
                imported.
        """
        points = self._packages.get(name, ())
        if len(points) > 1 or (points and name in self._known and self._known[name].origin == FEDTUNE):
            raise self._two(name, self._claims(name))
        if points:
            return self._brought(name, points[0])
        if name not in self._known:
            raise InputError(
                f"{self._setting} {name!r} is not known; known are {', '.join(self)}.{nearest(name, self)}"
            )
        return self._known[name]

    def listing(self) -> list[dict[str, str]]:
        """`name`, `summary` and `origin` of every part; in place of the summary why one cannot be used."""
        rows = []
        for name in self:
            try:
                part = self.part(name)
                row = {"name": name, "summary": part.summary, "origin": part.origin}
            except InputError as error:
                origin = " and ".join(self._claims(name))
                row = {"name": name, "summary": f"cannot be loaded: {error}", "origin": origin}
            rows.append(row)
        return rows

    @property
    def _packages(self) -> Mapping[str, list[EntryPoint]]:
        return _entry_points(self._group)

    def _claims(self, name: str) -> list[str]:
        """Everyone who says that a part of this name is theirs."""
        known = [self._known[name].origin] if name in self._known else []
        return list(dict.fromkeys([*known, *map(_package, self._packages.get(name, ()))]))

    def _two(self, name: str, claims: list[str]) -> InputError:
        return InputError(
            f"{' and '.join(claims)} each bring a {self.kind} {name!r}; it can be used when only one of them "
            "does: rename it there, or uninstall that package"
        )

    def _brought(self, name: str, point: EntryPoint) -> Part[T]:
        """What a package's entry point stands for; the package may have been imported before."""
        package, before = _package(point), self._known.get(name)
        try:
            with _importing(package):
                found = point.load()
        # Somebody else's code: whatever it raises makes this one name unusable and must not end the program.
        except (Exception, SystemExit) as error:
            _forget_half_imported()
            raise InputError(
                f"{package} brings the {self.kind} {name!r}, but its module {point.module} cannot be "
                f"imported: {_cause(error)}"
            ) from error
        part = self._known.get(name)
        if part is not None and part.source is found:
            return replace(part, origin=package)
        if before is not None and before.origin != package:
            raise self._two(name, [before.origin, package])
        raise InputError(
            f"{package} brings the {self.kind} {name!r}, but {point.value} is not registered under that "
            f"name; its author has to put the decorator of a {self.kind} on it (docs/plugins.md)"
        )


@dataclass(frozen=True)
class Plugin:
    """A plugin file that was loaded: its path as given and whole, its SHA-256, and its module's name."""

    path: Path
    file: Path
    sha256: str
    module: str


_registries: list[Registry[Any]] = []
_plugins: dict[Path, Plugin] = {}  # by resolved path
_package_being_imported: str | None = None


def load_plugin(path: str | Path) -> Plugin:
    """Imports a Python file whose decorators register parts; one that is loaded already is left as it is.

    The file is one that the person at the command line or in the program named. A configuration cannot name
    one, and over a network none is sent.

    Raises:
        InputError: There is no such file, it fails (with line and cause), or it has changed since this
            process loaded it.
    """
    path = Path(path)
    file = path.resolve()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"plugin {path} cannot be read: {error.strerror or error}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if file in _plugins:
        if _plugins[file].sha256 != sha256:
            raise InputError(
                f"plugin {path} has changed since it was loaded; start Python anew to load it again"
            )
        return _plugins[file]
    plugin = Plugin(path, file, sha256, f"fedtune_plugin_{sha256[:12]}_{file.stem}")
    module = ModuleType(plugin.module)
    module.__file__ = str(file)
    _plugins[file], sys.modules[plugin.module] = plugin, module
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)  # the bytes that the digest is of
    # A person's own code, at the one place where it is imported: they get its line and cause, not ours.
    except (Exception, SystemExit) as error:
        del _plugins[file], sys.modules[plugin.module]
        _forget_half_imported()
        line = _line(error, str(file))
        raise InputError(f"plugin {path}{f', line {line}' if line else ''}: {_cause(error)}") from error
    return plugin


def plugins() -> tuple[Plugin, ...]:
    """The plugin files that this process has loaded."""
    return tuple(_plugins.values())


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Inside, parts can be registered and plugins loaded as anywhere; at the end they are forgotten."""
    known, loaded = [dict(registry._known) for registry in _registries], dict(_plugins)
    try:
        yield
    finally:
        for registry, before in zip(_registries, known, strict=True):
            registry._known.clear()
            registry._known.update(before)
        _plugins.clear()
        _plugins.update(loaded)


def _redefined(before: Any, now: Any) -> bool:
    """Whether a part is the same one, written anew: a notebook's cell that was run again."""
    both = [getattr(source, "__module__", None) for source in (before, now)] == ["__main__", "__main__"]
    return both and before.__qualname__ == now.__qualname__


def _origin(source: Any) -> str:
    for plugin in _plugins.values():
        if plugin.module == source.__module__:
            return f"file {plugin.path}"
    return _package_being_imported or HERE


@contextmanager
def _importing(package: str) -> Iterator[None]:
    """What registers itself inside comes from this package."""
    global _package_being_imported
    before, _package_being_imported = _package_being_imported, package
    try:
        yield
    finally:
        _package_being_imported = before


def _forget_half_imported() -> None:
    """Takes out what a module registered before it failed; Python has taken out the module itself."""
    for registry in _registries:
        for name, part in list(registry._known.items()):
            if part.source is not None and part.source.__module__ not in sys.modules:
                del registry._known[name]


@cache
def _entry_points(group: str) -> Mapping[str, list[EntryPoint]]:
    """A group's entry points by name, read from the installed packages when first asked for."""
    found: dict[str, list[EntryPoint]] = defaultdict(list)
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        found[point.name].append(point)
    return dict(found)


def _package(point: EntryPoint) -> str:
    return "a package without metadata" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _cause(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, InputError):
        return str(error)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split()).removesuffix(":")


def _line(error: BaseException, file: str) -> int | None:
    """The line of a file at which an error came up, or the last one there on the way to it."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None
