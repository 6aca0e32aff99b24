"""The page of all settings, from the configuration classes: their types, defaults and meaning.

A setting's meaning is the comment beside it in its class, or the entry below; one without either is an error.

Table:   every setting; docs/configuration.md, whole file
Command: python reproduce/configuration.py configuration
Time:    seconds
Needs:   nothing
Result:  a table a block of settings; a test holds the page to it
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import annotated_types
from common import Entry, main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedtune.config.file import parse_config
from fedtune.config.partitions import PARTITIONS
from fedtune.config.schema import RunConfig
from fedtune.core.settings import Settings
from fedtune.methods import registry

INTRO = """\
# Configuration

<!-- Made by reproduce/configuration.py from the configuration classes. Do not edit. -->

A run is described by one YAML file. Types are strict: an unknown setting, a number where text belongs, or a
value out of range is an error that names the setting. A setting that is left out has the default given here.
On the command line `key=value` changes a setting, with dots into the blocks:
`fedtune run configs/demo.yaml method.lr=1e-4`. `null` means none. `fedtune validate FILE` checks a file
without weights or data, and each run folder holds the whole resolved configuration in `config.yaml`.
"""

DEFAULT_METHOD = parse_config({}, "defaults").method_name  # the parser sets it, no class does
# Where the class has no comment, because the name says it to a reader of the code.
MEANINGS = {  # by class or, for a method's own settings, by the method's name
    "RunConfig.seed": "every random choice of the run is drawn from it",
    "RunConfig.method": "the method and its settings, by `name`; see the sections that start with `method`",
    "ModelSettings.dtype": "of the base model; what is added is float32. float16: methods without gradients",
    "ModelSettings.initial": "`scratch`: the same architecture with random weights",
    "ModelSettings.task": "`classification`: RoBERTa or BERT; classes are the outputs in the training data",
    "ModelSettings.device": "`auto`: the GPU if there is one; `cpu`; `cuda`; or one as `cuda:1`; "
    "`[cuda:0, cuda:1]`: clients of `transport.workers` train on these, the server works on the first; "
    "one model over several is not there, see planning.md",
    "Dirichlet.alpha": "small: few labels a client; large: everyone has the same mix",
    "Dirichlet.minimum": "examples that each client has at least",
    "Dirichlet.by": "the field whose values are the labels",
    "ByField.by": "the field whose values are dealt to the clients",
    "Shards.shards_per_client": "shards that each client gets",
    "Shards.by": "the field whose values are the labels",
    "Quantity.alpha": "of the Dirichlet draw of the sizes; 1.0 if neither this nor `fractions` is set",
    "Quantity.fractions": "each client's part of the examples; their sum is 1",
    "Holdout.fraction": "this part of the examples, at random",
    "DataSettings.train": "`bundled`; a file, a folder, or a pattern as `parts/*.parquet`; a hub name, "
    "`owner/name:configuration@revision`; `clients`: a file of its own each; `objects`: given from Python",
    "DataSettings.fields": "our field names to the source's keys; dots lead into objects, braces make a "
    "template of several keys; null: none (`input`, `category` and `choices` alone)",
    "DataSettings.bad_rows": "what is done with rows that do not fit; skipped ones are counted and listed",
    "DataSettings.clients": "`files`: one a file of `train`; null: one a value (`by-field`), the file's "
    "(`file`), all (`train: clients`)",
    "DataSettings.template": "`auto`: the tokenizer's chat template, `alpaca` without one, `plain` for "
    "the bundled model; `chat`, a `.jinja` file, or a name of `fedtune ls templates` (chat.md)",
    "DataSettings.format": "what records are; `auto`: as the first one looks (chat.md)",
    "DataSettings.partition": "who gets which examples, one of the blocks below or your own (plugins.md)",
    "DataSettings.holdout": "what is held out; for the bundled data `{source: bundled}`, its test part",
    "DataSettings.loss_on": "`response` (or `assistant`): on every answer; `last`: on a conversation's last; "
    "`all`: on prompts too",
    "Simulate.dropout": "chance that a client does not reply in a round",
    "Simulate.delay_s": "mean time until a client's reply, exponentially distributed; virtual seconds",
    "Federation.deadline_s": "seconds after which a reply is late and its client is left out of the round",
    "Evaluation.tasks": "see `fedtune ls tasks`; `auto`: loss, and multiple-choice where there are choices",
    "Checkpoints.journal": "keep replies on disk until their round ends, so that a killed run need not train "
    "them again; `auto`: not where the round before took less than 30 s and its clients are of this machine",
    "Computing.deterministic": "of a GPU: the same bits each time, or what is fastest; a CPU has the "
    "same bits either way (wire.md)",
    "Computing.tf32": "float32 products of a GPU in TF32: 10 bits of a number's 23, several times as fast",
    "Transport.name": "in-process: all clients on this machine, on one base model",
    "Transport.workers": "processes that simulated clients train in; `auto`: by cores, clients and memory",
    "fedavg.rounds": "communication rounds; 1 is one-shot",
    "fedavg.arrival": "`asynchronous`: each arrival is folded in at once; needs `rounds: 1`",
    "fedavg.aggregation": "of LoRA factors: `mean`, `stack` (FLoRA), `freeze-a` (FFA-LoRA), `svd` "
    "(FlexLoRA), `residual` (FedEx-LoRA), `refine` (LoRA-FAIR), `alternate` (RoLoRA)",
    "fedavg.proximal": "μ of FedProx: μ/2 · squared distance to the round's start is added to the loss",
    "fedavg.control_variates": "SCAFFOLD; needs `optimizer: sgd` and `momentum: 0`",
    "Training.local_epochs": "passes over a client's examples a round; 1 if `local_steps` is not set either",
    "Training.local_steps": "or optimiser steps a round",
    "Training.batch_size": "examples a batch; rows with data.batching: packed",
    "Training.optimizer": "rebuilt for each client and round",
    "Training.lr": "learning rate at the first step of a round",
    "Training.lr_schedule": "how the rate falls behind the warm-up: `linear` or `cosine` to 0, or not",
    "Training.weight_decay": "decoupled with `adamw`, added to the gradient with `sgd`",
    "Training.max_grad_norm": "gradients of a larger norm are scaled down to it",
    "Lora.rank": "columns of B",
    "Lora.alpha": "the update is alpha / rank · BA",
    "Lora.dropout": "chance that an input of A is zeroed while training",
    "Adapter.size": "width of the bottleneck",
    "Prompt.tokens": "trained vectors in front of the input",
    "PTuning.tokens": "vectors in front of the input",
    "PTuning.hidden": "width of the MLP that makes them",
    "ServerOptimizer.name": "what is done with the mean update: added, momentum (FedAvgM), Adam (FedAdam)",
    "ServerOptimizer.lr": "the server's learning rate; 1 with `mean` is FedAvg",
}


def page() -> str:
    """The whole page."""
    used: set[str] = set()
    parts = [INTRO, *_section("", RunConfig, used, title="The whole")]
    parts += _methods(used)
    stale = MEANINGS.keys() - used
    if stale:
        raise ValueError(f"MEANINGS describes settings that are not there or have a comment: {sorted(stale)}")
    return "\n".join(parts)


def _methods(used: set[str]) -> Iterator[str]:
    shared: dict[type[BaseModel], list[str]] = {}
    for name in registry.METHODS:
        cls = registry.config_class(name)
        bases = [base for base in cls.__mro__[1:] if issubclass(base, Settings) and base is not Settings]
        for base in bases:
            shared.setdefault(base, []).append(name)
        also = [_first_line(base).rstrip(".") for base in bases]
        yield f"## method: {name}\n"
        yield f"{_sentence(registry.METHODS.part(name).summary)}\n"
        if also:
            yield f"It also has the settings of: {'; '.join(also)} (below).\n"
        yield from _body("method", cls, used, own=set(cls.__annotations__) - {"name"}, label=name)
    for block, names in shared.items():
        yield f"## method, of {', '.join(names)}: {_first_line(block).rstrip('.')}\n"
        yield from _body("method", block, used, own=set(block.__annotations__))


def _section(path: str, cls: type[BaseModel], used: set[str], *, title: str) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{_first_line(cls)}\n"
    yield from _body(path, cls, used, own=set(cls.model_fields))


def _body(
    path: str, cls: type[BaseModel], used: set[str], *, own: set[str], label: str = ""
) -> Iterator[str]:
    """The table of a block's settings, then a section for each block inside it."""
    comments, rows, inner = _comments(cls), [], []
    for name, field in cls.model_fields.items():
        if name not in own:
            continue
        dotted = f"{path}.{name}".lstrip(".")
        blocks = list(PARTITIONS) if name == "partition" else _blocks(field.annotation)
        if blocks and blocks != [Settings]:
            inner += [(dotted, block, len(blocks) > 1) for block in blocks]
            if len(blocks) == 1 and (field.default is None or field.default == blocks[0].model_construct()):
                continue  # its own table has all its defaults
        if name == "name" and len(typing.get_args(field.annotation)) == 1 and path != "transport":
            continue  # stands in the heading
        key = f"{label or cls.__name__}.{name}"
        meaning = comments.get(name, "").replace("None", "`null`") or None
        if meaning is None:
            used.add(key)
            meaning = MEANINGS.get(key)
        if meaning is None:
            raise ValueError(f"{key} has neither a comment in its class nor an entry in MEANINGS")
        default = f"`{{name: {DEFAULT_METHOD}}}`" if dotted == "method" else _default(field)
        rows.append((f"`{dotted}`", _type(field.annotation, field.metadata), default, meaning))
    if rows:
        yield _table(rows)
    for dotted, block, several in inner:
        named = f": {{name: {block.model_fields['name'].default}}}" if several else ""
        yield from _section(dotted, block, used, title=f"`{dotted}{named}`")


def _table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ["| setting | values | default | |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _comments(cls: type[BaseModel]) -> dict[str, str]:
    """Each setting's comment at the end of its line."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
        token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: by_line[node.lineno]
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.lineno in by_line
    }


def _blocks(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in typing.get_args(annotation) for block in _blocks(part)]


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = _bounds(metadata)
    if origin is typing.Annotated:
        inner = [
            m for extra in args[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
        ]
        return _type(args[0], inner)
    if _blocks(annotation):
        return "block"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part, metadata) for part in args)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return f"{_type(args[0])}, each to {_type(args[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    return names[annotation] + bounds


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = []
    for item in metadata:
        if isinstance(
            item, annotated_types.Ge | annotated_types.Gt | annotated_types.Le | annotated_types.Lt
        ):
            word = type(item).__name__.lower()
            found.append(f"{signs[word]} {getattr(item, word)}")
    return f" {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_none=True)
        return f"`{{{', '.join(f'{key}: {item}' for key, item in given.items())}}}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _first_line(cls: type[BaseModel]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


ENTRIES = {"configuration": Entry(page)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
