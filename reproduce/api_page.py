"""The page of all functions and classes of `import fedtune`, from their signatures and docstrings.

A public name without a docstring, and an argument that its docstring's Args leave out, is an error.

Table:   every function and class of the Python front door; docs/api.md, whole file
Command: python reproduce/api_page.py api
Time:    seconds
Needs:   nothing
Result:  a section a name; a test holds the page to the code
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common import Entry, main

import fedtune

INTRO = """\
# Python reference

<!-- Made by reproduce/api_page.py from signatures and docstrings. Do not edit. -->

Everything that `import fedtune` gives. [python.md](python.md) shows it in use. A configuration is a YAML
file's path, a dictionary, or what `load` returned; [configuration.md](configuration.md) has its settings.
"""

GROUPS = {
    "Configurations": ("load", "available"),
    "Runs": (
        "run",
        "open",
        "Run",
        "compare",
        "Comparison",
        "sweep",
        "Sweep",
        "Rows",
        "evaluate",
        "report_page",
        "status",
    ),
    "Before a run": ("data_report", "plan", "rank", "diagnose"),
    "Callbacks": ("Callback", "ClientReport", "RoundState"),
    "Parts of one's own": (
        *("register_method", "register_partitioner", "register_task", "register_metric"),
        *("register_template", "load_plugin"),
    ),
    "Across machines": ("make_keys", "serve", "take_part"),
    "Errors": ("FedtuneError", "InputError", "FederationError"),
}
BESIDE = {"Rows", "__version__"}  # shown though not in `fedtune.__all__`, and in it though nothing to show
SECTIONS = ("Args", "Returns", "Raises", "Attributes")
WIDTH = 100  # of a signature's line


@dataclass(frozen=True)
class Doc:
    """A Google docstring: its text, and the items of each section by name; `""` where an item has none."""

    text: str
    sections: dict[str, dict[str, str]]


def page() -> str:
    """The whole page."""
    named = [name for names in GROUPS.values() for name in names]
    if wrong := set(named) ^ (set(fedtune.__all__) ^ BESIDE):
        raise ValueError(f"GROUPS and fedtune.__all__ differ in {', '.join(sorted(wrong))}")
    parts = [INTRO]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += _thing(name, _found(name))
    return "\n".join(parts)


def _found(name: str) -> Any:
    if name == "Rows":
        from fedtune.federation.rows import Rows

        return Rows
    return getattr(fedtune, name)


def _thing(name: str, thing: Any) -> Iterator[str]:
    """A function's or class's section."""
    called = name if name == "Rows" else f"fedtune.{name}"
    yield f"### `{called}`\n"
    if not isinstance(thing, type):
        yield f"```py\n{signature(called, thing)}\n```\n"
        yield from _body(called, thing)
        return
    yield from _body(called, thing, arguments=False)
    for attribute, value in vars(thing).items():
        if attribute.startswith("_") or not (isinstance(value, property) or inspect.isfunction(value)):
            continue
        own = f"{name}.{attribute}"
        yield f"#### `{own}`\n"
        if isinstance(value, property):
            returned = _annotation(inspect.signature(value.fget).return_annotation) if value.fget else ""
            yield f"```py\n{own}: {returned}\n```\n"
        else:
            yield f"```py\n{signature(own, value, bound=True)}\n```\n"
        yield from _body(own, value)


def _body(called: str, thing: Any, *, arguments: bool = True) -> Iterator[str]:
    """What the docstring says."""
    parsed = doc(called, thing)
    yield f"{parsed.text}\n"
    if arguments and callable(thing) and "Args" in parsed.sections:
        taken = {name for name in inspect.signature(thing).parameters if name != "self"}
        if wrong := taken ^ parsed.sections["Args"].keys():
            raise ValueError(f"{called}: Args and arguments differ in {', '.join(sorted(wrong))}")
    for title, items in parsed.sections.items():
        if title == "Returns":
            yield f"Returns: {' '.join(items.values())}\n"
            continue
        lines = [f"* `{name}`: {text}" for name, text in items.items()]
        yield "\n".join([f"{'Arguments' if title == 'Args' else title}:\n", *lines]) + "\n"


def doc(called: str, thing: Any) -> Doc:
    """Reads a docstring.

    Raises:
        ValueError: There is none.
    """
    whole = inspect.cleandoc(
        vars(thing).get("__doc__") or "" if isinstance(thing, type) else thing.__doc__ or ""
    )
    if not whole:
        raise ValueError(f"{called} has no docstring")
    before, *found = re.split(rf"(?m)^({'|'.join(SECTIONS)}):\n", whole)
    sections = {}
    for title, body in zip(found[::2], found[1::2], strict=True):
        body = inspect.cleandoc(f"\n{body}")
        if title == "Returns":
            sections[title] = {"": " ".join(body.split())}
        else:
            items = re.split(r"(?m)\n(?=\S)", body)
            pairs = [" ".join(item.split()).partition(": ") for item in items]
            sections[title] = {name: text for name, _, text in pairs}
    return Doc(before.strip(), sections)


def signature(called: str, function: Callable[..., Any], *, bound: bool = False) -> str:
    """A function's signature, one argument a line where it is long."""
    whole = inspect.signature(function)
    parameters = [p for name, p in whole.parameters.items() if not (bound and name == "self")]
    words: list[str] = []
    kinds = [p.kind for p in parameters]
    for place, parameter in enumerate(parameters):
        first_by_name = (
            parameter.kind is parameter.KEYWORD_ONLY and parameter.KEYWORD_ONLY not in kinds[:place]
        )
        if first_by_name and parameter.VAR_POSITIONAL not in kinds:
            words.append("*")
        words.append(_parameter(parameter))
    returned = _annotation(whole.return_annotation)
    line = f"{called}({', '.join(words)}) -> {returned}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{called}(", *(f"    {word}," for word in words), f") -> {returned}"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    text = f"{stars}{parameter.name}: {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {'...' if callable(parameter.default) else repr(parameter.default)}"


def _annotation(annotation: Any) -> str:
    """As it stands in the source; modules postpone their annotations."""
    assert isinstance(annotation, str), annotation
    return annotation


ENTRIES = {"api": Entry(page)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
