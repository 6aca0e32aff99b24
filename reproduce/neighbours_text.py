"""The field's methods beside each other on a language model: instruct-7m on Dolly, at random and by category.

Eight clients of twelve questions and answers, most of them cut to 64 tokens; three rounds of two local steps
on batches of four, LoRA of rank 8 unless the row says otherwise. What needs no gradients takes three steps a
round, so that all have the same passes (a backward pass counts as two). The learning rate of each row lies
between two that are worse on a grid of 1, 3, 10, …: mean loss of the held-out examples of four clients on
rows of Dolly that no run of the table sees, dealt at random. A client's loss is that of its own held-out
examples, with its own model where it has one: the mean over clients, and the worst. Three seeds; *against the
first* is the mean of the differences at the same seed. Bytes are a client's in a round, memory is measured.

Table:   loss, worst client, bytes, memory and lines by method; docs/neighbours.md, block neighbours-text
Command: python reproduce/neighbours_text.py neighbours-text
Time:    some twenty minutes (1,000 CPU seconds)
Needs:   ../shared
Result:  mean loss of a client, alike and by category: FedIT 3.9320 and 3.8962, FlexLoRA 3.9276 and 3.9021,
         FedEx-LoRA 3.9299 and 3.8948, FedSA-LoRA 3.9787 and 3.9230, one-shot 3.9435 and 3.9177, FedKSeed
         4.4075 and 4.2995; before 4.4205 and 4.3123
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import DOLLY, MODELS, RESULTS, ROOT, Entry, Prepared, climbed, main, spread, table

import fedtune
from fedtune.errors import FederationError
from fedtune.report.tables import size

HERE, MADE = RESULTS / "neighbours-text", RESULTS / "neighbours-text.json"
ROWS = {"shown": RESULTS / "neighbours-text-shown.jsonl", "searched": RESULTS / "neighbours-text-rates.jsonl"}
SEEDS, SEARCHED, APART = (
    (0, 1, 2),
    9,
    3000,
)  # the last so many rows of Dolly are those that rates are chosen on
SPLITS: dict[str, dict[str, Any]] = {
    "alike": {"clients": 8, "partition": {"name": "iid"}},
    "by category": {"clients": None, "partition": {"name": "by-field"}},
}
LORA: dict[str, Any] = {"name": "fedavg", "rounds": 3, "local_steps": 2, "batch_size": 4, "lora": {"rank": 8}}
KSEED: dict[str, Any] = {
    "name": "fedkseed",
    "rounds": 3,
    "local_steps": 3,
    "batch_size": 4,
    "seeds": 1024,
    "epsilon": 1e-3,
}
ENDLESS: dict[str, Any] = {k: v for k, v in KSEED.items() if k != "seeds"} | {"name": "infinite-pool"}
AVG, SEED = "methods/fedavg/", "methods/fedkseed/"
# by name: the method's settings, where its rates begin, and the files that are its own
FORMS: dict[str, tuple[dict[str, Any], float, Sequence[str]]] = {
    "FedIT (`mean`)": (LORA, 1e-2, ()),
    "FFA-LoRA (`freeze-a`)": ({**LORA, "aggregation": "freeze-a"}, 1e-2, ()),
    "RoLoRA (`alternate`)": ({**LORA, "aggregation": "alternate"}, 1e-2, (AVG + "rolora.py",)),
    "LoRA-FAIR (`refine`)": ({**LORA, "aggregation": "refine"}, 1e-2, (AVG + "lora_fair.py",)),
    "FlexLoRA (`svd`)": ({**LORA, "aggregation": "svd"}, 1e-2, (AVG + "flexlora.py",)),
    "FedEx-LoRA (`residual`)": ({**LORA, "aggregation": "residual"}, 1e-2, (AVG + "fedex_lora.py",)),
    "FLoRA (`stack`)": ({**LORA, "aggregation": "stack"}, 1e-2, (AVG + "lora_aggregation.py",)),
    "FedSA-LoRA (`own: [lora_B]`)": ({**LORA, "own": ["lora_B"]}, 1e-2, (AVG + "own_parts.py",)),
    "FedPer (`own`: the last two layers)": (
        {**LORA, "own": ["layers.6", "layers.7"]},
        1e-2,
        (AVG + "own_parts.py",),
    ),
    "FedKSeed": (KSEED, 1e-4, ()),
    "DeComFL": ({**ENDLESS, "download": "means"}, 1e-4, (SEED + "decomfl.py",)),
    "one-shot": ({**LORA, "rounds": 1, "local_steps": 6}, 1e-2, ()),
}


def federate(name: str, how: str, seed: int, lr: float, rows: str = "shown") -> dict[str, float]:
    """One federation's losses, bytes and peaks; of half of the clients on rows that rates are chosen on."""
    method = FORMS[name][0]
    config = {
        "seed": seed,
        "model": {"name": str(MODELS / "instruct-7m"), "dtype": "float32"},
        "data": {
            "train": str(ROWS[rows]),
            "fields": {"input": "context", "output": "response"},
            "max_length": 64,
            "max_examples": 120,
            "holdout": {"client_fraction": 0.2},
            **SPLITS[how],
            **({} if rows == "shown" else {"max_examples": 60, "clients": 4}),
        },
        "method": {**method, "lr": lr},
        "evaluation": {"tasks": ["loss"], "every": 0, "bootstrap": 0},
    }
    label = "".join(letter if letter.isalnum() else "-" for letter in f"{rows}-{how}-{name}-{seed}-{lr:g}")
    done = fedtune.run(config, out=HERE / label, resume=True, progress=False)
    summary = done.summary
    scored = summary["per_client"]["loss"]["loss"]
    exchanged = summary["rounds"] * summary["clients"]
    return {
        "mean": scored["mean"],
        "worst": scored["worst"],
        "before": summary["zero_shot_per_client"]["loss"]["loss"]["mean"],
        **{way: summary["payload_bytes"][way] / exchanged for way in ("down", "up")},
        **{where: summary["peak_memory_bytes"][where] for where in ("client", "server")},
    }


def searched(name: str) -> Callable[[float], float]:
    """The loss by rate, on rows of nobody's; infinite where training ended."""

    def loss(lr: float) -> float:
        try:
            return federate(name, "alike", SEARCHED, lr, "searched")["mean"]
        except FederationError:
            return math.inf

    return loss


def parted(path: Path) -> None:
    """Dolly in two: rows of the table, and rows that rates are chosen on."""
    lines = (ROOT / DOLLY).read_text(encoding="utf-8").splitlines(keepends=True)
    (ROOT / ROWS["searched"]).write_text("".join(lines[-APART:]), encoding="utf-8")
    (ROOT / path).write_text("".join(lines[:-APART]), encoding="utf-8")


def measure(path: Path) -> None:
    """All cells; what is there of an interrupted measurement is kept."""
    part = (ROOT / path).with_suffix(".part")
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    for name, (_, start, _) in FORMS.items():
        if name in found:
            continue
        best = climbed(searched(name), start)
        runs = {how: [federate(name, how, seed, best) for seed in SEEDS] for how in SPLITS}
        found[name] = {"rate": best, **runs}
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.replace(ROOT / path)


def rows() -> str:
    """A row for each form, below one of the untrained model."""
    found, first = json.loads((ROOT / MADE).read_text(encoding="utf-8")), next(iter(FORMS))
    before = ["before", ""]
    for how in SPLITS:
        before += [spread([run["before"] for run in found[first][how]]), "", ""]
    lines = [[*before, *[""] * 5]]
    for name, (_, _, files) in FORMS.items():
        cells = [f"{found[name]['rate']:.0e}".replace("e-0", "e-")]
        for how in SPLITS:
            runs, others = found[name][how], found[first][how]
            off = [run["mean"] - other["mean"] for run, other in zip(runs, others, strict=True)]
            cells += [spread([run["mean"] for run in runs]), "" if name == first else spread(off, "+")]
            cells += [spread([run["worst"] for run in runs])]
        one = found[name]["alike"][0]
        own = sum(len((ROOT / "fedtune" / file).read_text(encoding="utf-8").splitlines()) for file in files)
        sizes = [size(one[key]) for key in ("down", "up", "client", "server")]
        lines.append([name, *cells, *sizes, str(own) if own else ""])
    header = ["method", "rate"]
    for how in SPLITS:
        header += [f"loss, {how}", "against the first", "worst client"]
    return table([*header, "down", "up", "client memory", "server memory", "lines of its own"], lines)


STEPS = [Prepared("rows of Dolly", ROWS["shown"], parted), Prepared("federations", MADE, measure)]
ENTRIES = {"neighbours-text": Entry(rows, STEPS, [DOLLY, MODELS / "instruct-7m"])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
