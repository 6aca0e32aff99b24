"""Every method on a tiny random model of every family: two rounds, export, and the result read back.

Table:   families against methods; docs/families.md, block families
Command: python reproduce/families.py families
Time:    a quarter of an hour
Needs:   nothing
Result:  301 of 325 work: 25 families, 13 methods; the others are refused with a sentence
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from common import Entry, main, table
from tiny_models import ENCODERS, FAMILIES, save

import fedtune
from fedtune.errors import FedtuneError, ProgramError
from fedtune.methods.registry import METHODS

STEPS: dict[str, Any] = {"batch_size": 2, "local_steps": 2, "lr": 1e-2, "rounds": 2}
SEEDS: dict[str, Any] = {"local_steps": 2, "batch_size": 2, "lr": 1e-3, "rounds": 2}
LORA = {"rank": 2, "alpha": 4.0}
EMULATED: dict[str, Any] = {
    **STEPS,
    "adapter_layers": 1,
    "layer_dropout": 0.3,
    "lora": LORA,
    "alignment": {"steps_before": 2, "steps": 1, "batch_size": 2},
}
ENDS: dict[str, Any] = {
    **EMULATED,
    "adapter_layers": 2,
    "alignment": {"steps_before": 2, "steps": 0, "batch_size": 2},
}
# By what stands in the table's head: settings, and blocks of the model.
TRIED: dict[str, tuple[dict[str, Any], int]] = {
    "fedavg": ({**STEPS, "lora": LORA}, 2),
    "fedkseed": ({**SEEDS, "seeds": 8}, 2),
    "fedkseed-pro": ({**SEEDS, "seeds": 8}, 2),
    "infinite-pool": (SEEDS, 2),
    "fedbiot": (EMULATED, 4),
    "fedot": (ENDS, 5),
    "offsite-tuning": (ENDS, 5),
    "fedcybgd": (STEPS, 2),
    "fedbavg": (STEPS, 2),
    "badam": ({**STEPS, "rounds": None, "local_steps": 4, "switch_interval": 2}, 2),
    "standalone": ({**STEPS, "rounds": None, "lora": LORA}, 2),
    "centralized": ({**STEPS, "rounds": None, "trainable": "full"}, 2),
    "zero-shot": ({}, 2),
}
FOLDER = tempfile.TemporaryDirectory()
WORKS = "works"


@cache
def model(family: str, blocks: int) -> Path:
    """The folder of the family's model, made once."""
    return save(family, blocks, Path(FOLDER.name) / f"{family}-{blocks}")


def rows(family: str, count: int = 16) -> list[dict[str, Any]]:
    """Words, and one to answer; for an encoder one of three classes."""
    return [
        {
            "instruction": " ".join(f"w{4 + (7 * row + 5 * place) % 60}" for place in range(3 + row % 4)),
            "output": f"c{row % 3}" if family in ENCODERS else f"w{4 + 11 * row % 60} w{4 + 13 * row % 60}",
        }
        for row in range(count)
    ]


def tried(family: str, name: str) -> str:
    """`WORKS`, or the sentence with which the program refuses it. What else is raised goes on."""
    settings, blocks = TRIED[name]
    method = {"name": name, **{key: value for key, value in settings.items() if value is not None}}
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "public.jsonl"
        public.write_text("\n".join(map(json.dumps, rows(family, 2))), encoding="utf-8")
        config: dict[str, Any] = {
            "model": {"name": str(model(family, blocks)), "dtype": "float32"},
            "data": {"clients": 2, "max_length": 24, "template": "plain", "cache": "none"},
            "method": method,
            "evaluation": {"tasks": ["loss"], "every": 0, "bootstrap": 0},
        }
        if family in ENCODERS:
            config["model"]["task"] = "classification"
        if "alignment" in settings:
            config["data"]["public"] = {"source": str(public)}
        try:
            done = fedtune.run(config, out=Path(folder) / "run", data=rows(family), progress=False)
            expected = done.scores
            found = fedtune.evaluate(done, ["loss"])["scores"]
            exported = done.export(Path(folder) / "exported")
        except ProgramError:
            raise
        except FedtuneError as error:
            return str(error)
        if name != "zero-shot" and not all(path.is_dir() for path in exported):
            raise AssertionError(f"{family}, {name}: nothing was exported")
        compare(family, name, expected, found)
    return WORKS


def plain(said: str, family: str) -> str:
    """A sentence without the folder that the family's model is in."""
    return re.sub(rf"\S*/{re.escape(family)}-\d+", family, said)


def compare(family: str, name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises AssertionError if what was read back has another loss than the run gave it.

    Args:
        family: Of the model.
        name: The method's.
        expected: The run's scores by task: of the global result, or the mean of the clients'.
        found: Scores by result.
    """
    results = [found["global"]] if "global" in found else list(found.values())
    again = sum(result["loss"]["loss"] for result in results) / len(results)
    said = expected["loss"]["loss"]
    if not (math.isfinite(said) and math.isclose(said, again, rel_tol=1e-4)):
        raise AssertionError(f"{family}, {name}: the loss was {said}, and {again} of what was read back")


def all_of_them() -> str:
    """A row a family; sentences are below it, once each."""
    sentences: dict[str, int] = {}
    lines = []
    for family in FAMILIES:
        cells = []
        for name in METHODS:
            said = plain(tried(family, name), family)
            cells.append(WORKS if said == WORKS else f"[{sentences.setdefault(said, len(sentences) + 1)}]")
        lines.append([f"`{family}`", *cells])
    listed = "\n".join(f"{number}. {said}" for said, number in sentences.items())
    found = [cell for line in lines for cell in line[1:]]
    said = (
        f"{found.count(WORKS)} of {len(found)} work: {len(FAMILIES)} families, {len(list(METHODS))} methods."
    )
    return f"{table(['family', *METHODS], lines)}\n\n{said}\n\n{listed}"


ENTRIES = {"families": Entry(table=all_of_them)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
