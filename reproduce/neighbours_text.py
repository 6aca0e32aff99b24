"""A few of the neighbours on a language model: LoRA of instruct-7m on Dolly, dealt at random and by category.

Eight clients of twelve questions and answers, of which most are cut to 96 tokens, two rounds of an epoch,
LoRA of rank 8, the same rate for all. A client's loss is that of its own held-out examples, with its own
model where it has one: the mean over clients, and the worst. The loss of all held-out examples before
training is in the first row. Three seeds; *against the first* is the mean of the differences at the same
seed. Bytes are a client's in a round, memory is measured.

Table:   loss, worst client, bytes and memory by method; docs/neighbours.md, block neighbours-text
Command: python reproduce/neighbours_text.py neighbours-text
Time:    some six minutes (250 CPU seconds)
Needs:   ../shared
Result:  mean loss of a client, alike and by category: FedIT 4.1276 and 3.9899, FlexLoRA 4.1340 and 3.9901,
         FedSA-LoRA 4.1522 and 4.0038 with half the bytes; before 4.4065 and 4.2671
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import DOLLY, MODELS, RESULTS, ROOT, Entry, Prepared, main, spread, table
from neighbours import PLACE

import fedtune
from fedtune.report.tables import size

HERE, MADE = RESULTS / "neighbours-text", RESULTS / "neighbours-text.json"
SEEDS = (0, 1, 2)
SPLITS: dict[str, dict[str, Any]] = {
    "alike": {"clients": 8, "partition": {"name": "iid"}},
    "by category": {"clients": None, "partition": {"name": "by-field"}},
}
# by name: the method's settings, and the files that are its own
FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "FedIT (`mean`)": ({}, ()),
    "FlexLoRA (`svd`)": ({"aggregation": "svd"}, ("flexlora.py",)),
    "FedSA-LoRA (`own: [lora_B]`)": ({"own": ["lora_B"]}, ("own_parts.py",)),
}


def federate(name: str, how: str, seed: int) -> dict[str, float]:
    """One federation's losses, bytes and peaks."""
    config = {
        "seed": seed,
        "model": {"name": str(MODELS / "instruct-7m"), "dtype": "float32"},
        "data": {
            "train": str(DOLLY),
            "fields": {"input": "context", "output": "response"},
            "max_length": 96,
            "max_examples": 120,
            "holdout": {"client_fraction": 0.2},
            **SPLITS[how],
        },
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 8, "lr": 5e-3, "lora": {"rank": 8}}
        | FORMS[name][0],
        "evaluation": {"tasks": ["loss"], "every": 0, "bootstrap": 0},
    }
    label = "".join(letter if letter.isalnum() else "-" for letter in f"{how}-{name}-{seed}")
    done = fedtune.run(config, out=HERE / label, resume=True, progress=False)
    summary = done.summary
    scored = summary["per_client"]["loss"]["loss"]
    exchanged = summary["rounds"] * summary["clients"]
    return {
        "mean": scored["mean"],
        "worst": scored["worst"],
        "before": summary["zero_shot"]["loss"]["loss"],
        **{way: summary["payload_bytes"][way] / exchanged for way in ("down", "up")},
        **{where: summary["peak_memory_bytes"][where] for where in ("client", "server")},
    }


def measure(path: Path) -> None:
    """All cells."""
    found = {
        f"{how}/{name}": [federate(name, how, seed) for seed in SEEDS] for name in FORMS for how in SPLITS
    }
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def rows() -> str:
    """A row for each form, below one of the untrained model."""
    found, first = json.loads((ROOT / MADE).read_text(encoding="utf-8")), next(iter(FORMS))
    before = [["before"]]
    for how in SPLITS:
        before[0] += [spread([run["before"] for run in found[f"{how}/{first}"]]), "", ""]
    lines = [[*before[0], *[""] * 5]]
    for name, (_, files) in FORMS.items():
        cells = []
        for how in SPLITS:
            runs, others = found[f"{how}/{name}"], found[f"{how}/{first}"]
            off = [run["mean"] - other["mean"] for run, other in zip(runs, others, strict=True)]
            cells += [spread([run["mean"] for run in runs]), "" if name == first else spread(off, "+")]
            cells += [spread([run["worst"] for run in runs])]
        one = found[f"alike/{name}"][0]
        own = sum(len((ROOT / PLACE / file).read_text(encoding="utf-8").splitlines()) for file in files)
        sizes = [size(one[key]) for key in ("down", "up", "client", "server")]
        lines.append([name, *cells, *sizes, str(own) if own else ""])
    header = ["method"]
    for how in SPLITS:
        header += [f"loss, {how}", "against the first", "worst client"]
    return table([*header, "down", "up", "client memory", "server memory", "lines of its own"], lines)


STEPS = [Prepared("federations", MADE, measure)]
ENTRIES = {"neighbours-text": Entry(rows, STEPS, [DOLLY, MODELS / "instruct-7m"])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
