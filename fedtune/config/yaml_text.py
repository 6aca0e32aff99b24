"""YAML as people mean it, and no text that costs more than it is long.

1e-4 is a number, and a key that stands twice an error. The alias of a block stands for a copy of it, and
copies of copies make a page of text into gigabytes. How much a text stands for is therefore counted before
anything is built from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import InputError

TEXT_LIMIT = 256 * 1024  # bytes of a file
VALUE_LIMIT = 100_000  # values, each alias counted as what it stands for
DEPTH_LIMIT = 50  # blocks inside blocks


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, and refuses a key that stands twice."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the text 1e-4, which `_Loader` would take for a number."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """A character that YAML takes for a line's end would be lost outside of double quotes."""
    style = '"' if any(sign in text for sign in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {str(key)[:80]!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(text: str, source: str) -> Any:
    """The value that a YAML text stands for; `source` stands in front of an error.

    Raises:
        InputError: It is not YAML, is longer than TEXT_LIMIT, or stands for more than VALUE_LIMIT values or
            DEPTH_LIMIT blocks inside each other.
    """
    if len(text) > TEXT_LIMIT:
        raise InputError(f"{source}: longer than the {TEXT_LIMIT:,} characters that are read as YAML")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, 1, source)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise InputError(f"{source}: more than {DEPTH_LIMIT} blocks inside each other") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # all but the first: what a text cannot be read as, such as a number of thousands of digits
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source}: not valid YAML: {reason}") from None


def _count(node: yaml.Node, known: dict[int, int], depth: int, source: str) -> int:
    """Values that a node stands for, itself included."""
    if depth > DEPTH_LIMIT:
        raise InputError(f"{source}: more than {DEPTH_LIMIT} blocks inside each other, or one inside itself")
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known, depth + 1, source) for part in parts)
        if known[id(node)] > VALUE_LIMIT:
            raise InputError(
                f"{source}: stands for more than {VALUE_LIMIT:,} values, each alias (*name) counted as what "
                "it stands for"
            )
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises InputError if it is missing, not YAML or no mapping."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(TEXT_LIMIT + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    document = load_yaml(text, str(path))
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise InputError(f"{path}: must map setting names to values, got {type(document).__name__}")
    return document


def dump_yaml(document: Any) -> str:
    """The YAML of plain values, which `load_yaml` reads back as equal ones."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
