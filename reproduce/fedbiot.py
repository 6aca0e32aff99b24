"""FedBiOT's tables: beside FedOT and Offsite-tuning, the rates that were tried, a client's step.

`fedtune compare` shows one model a run, AdapFu; here AdapEmu stands beside it, and both references are taken
from each run with the same seed. What comparisons came to is with `alignment.form: paper` and
`distill_weight: 1`, the defaults then.

Table:   rates on the bundled model; docs/results.md, block fedbiot-sweep
Command: python reproduce/fedbiot.py fedbiot-sweep
Time:    not measured
Needs:   nothing
Result:  lr 0.03 with alignment.lr 0.003 ends lowest, AdapFu at 1.8525; FedAvg's LoRA at 1.6609

Table:   rates on Dolly; docs/results.md, block fedbiot-sweep-dolly
Command: python reproduce/fedbiot.py fedbiot-sweep-dolly
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k, ../shared/data/alpaca
Result:  AdapFu at 4.0619 with lr 0.01 and at 4.0407 with 0.03

Table:   all methods on the bundled model; docs/results.md, block fedbiot-bundled
Command: python reproduce/fedbiot.py fedbiot-bundled
Time:    not measured
Needs:   nothing
Result:  less zero-shot FedBiOT is -0.4326 ± 0.0864, and with channel pruning of 0.2 -0.5646 ± 0.0365;
         FedOT with that -0.5897 ± 0.0896

Table:   all methods on Dolly (the instruction task of the paper in small); docs/results.md, block
         fedbiot-dolly; docs/fedbiot.md, block fedbiot-dolly
Command: python reproduce/fedbiot.py fedbiot-dolly
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k, ../shared/data/alpaca
Result:  AdapFu less stand-alone at dropout 0.2: FedBiOT +0.0197 ± 0.0087, with four blocks
         -0.0107 ± 0.0118, FedOT -0.0307 ± 0.0066

Table:   the same for eight rounds of ten steps; docs/results.md, block fedbiot-dolly-long
Command: python reproduce/fedbiot.py fedbiot-dolly-long
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k, ../shared/data/alpaca
Result:  AdapFu less stand-alone: FedBiOT -0.1131 ± 0.0239, with four blocks -0.1460 ± 0.0236, FedOT
         -0.1564 ± 0.0228

Table:   Table 5, a client's step beside LoRA on the whole model; docs/fedbiot.md, block bench-emulator
Command: python reproduce/fedbiot.py bench-emulator
Time:    not measured; more than three minutes on a busy machine
Needs:   nothing
Result:  at dropout 0.2 a step takes 0.74 of the memory and 0.548 of the time, at 0.5 0.615 and 0.427

Table:   the proximal term beside the dense product; docs/fedbiot.md, block bench-proximal
Command: python reproduce/fedbiot.py bench-proximal
Time:    20 seconds
Needs:   nothing
Result:  the dense product takes 93.3 times the memory and 132 times the time
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from common import DATA, MODELS, RESULTS, Entry, Step, bench, main, spread, table
from common import compare as compare_all
from common import run as run_one

from fedtune.report.tables import size

BySeed = dict[int, float]
REFERENCES = ("zero-shot", "standalone")  # rows that fedtune compare adds


def rows(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The summaries of a comparison by configuration, in its order."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]:
        found[row["config"]].append(row)
    return dict(found)


def loss(row: Mapping[str, Any]) -> float:
    """Held-out loss of a run's result; AdapFu's where there are two."""
    return float(row["evaluation"]["loss"]["loss"])


def emulated(run: Path) -> float | None:
    """Held-out loss of AdapEmu after the last round; None for a run without an emulator."""
    rounds = run / "rounds.jsonl"
    if not rounds.exists():  # zero-shot rows are taken from other runs
        return None
    last = json.loads(rounds.read_text(encoding="utf-8").splitlines()[-1])
    models = last.get("eval_clients", {})
    return float(models["adapemu"]["loss"]["loss"]) if "adapemu" in models else None


def sweep(runs: Sequence[Path]) -> str:
    """What was tried: the settings that were varied, and both results."""
    lines = []
    for run in runs:
        method = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["method"]
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        alignment, emu = method.get("alignment"), emulated(run)
        line = [method["name"], f"{method['lr']:g}"]
        line += [f"{alignment['lr']:g}", str(alignment["steps_before"])] if alignment else ["", ""]
        line += [f"{method[key]:g}" if emu is not None else "" for key in ("proximal", "distill_weight")]
        line += [f"{loss(summary):.4f}", "" if emu is None else f"{emu:.4f}"]
        lines.append(line)
    header = ["method", "lr", "alignment.lr", "steps_before", "ε", "λ", "AdapFu", "AdapEmu"]
    return table(header, lines)


def comparison(folder: Path) -> str:
    """A comparison's configurations with both results and AdapFu's differences from the references."""
    found = rows(folder)
    losses: dict[str, BySeed] = {
        name: {row["seed"]: loss(row) for row in group} for name, group in found.items()
    }
    header = ["configuration", "AdapFu", *(f"less {name}" for name in REFERENCES), "AdapEmu"]
    header += ["payload a client and round", "client memory"]
    lines = []
    for name, group in found.items():
        line = [name, spread(list(losses[name].values()))]
        for other in REFERENCES:
            pairs = [value - losses[other][seed] for seed, value in losses[name].items()]
            line.append("" if name == other else spread(pairs, "+"))
        own = [
            value for row in group if (value := emulated(folder / f"{name}-seed{row['seed']}")) is not None
        ]
        line.append(spread(own) if own else "")
        line.append(size(statistics.fmean(row["payload_bytes_per_client_round"] for row in group)))
        line.append(size(max(row["peak_memory_bytes"]["client"] for row in group)))
        lines.append(line)
    seeds = len(next(iter(found.values())))
    caption = f"Held-out loss a token, mean ± standard deviation over {seeds} seeds:"
    return f"{caption}\n\n{table(header, lines)}"


TRIED = RESULTS / "fedbiot-sweep"
SHORT = ("seed=7", "evaluation.bootstrap=0")  # no comparison has the seed
AS_THEN = ("method.alignment.form=paper", "method.distill_weight=1")
RATES = (  # lr, alignment.lr, steps before, proximal, distill weight
    ("3e-3", "1e-3", "60", "0", "1"),
    ("1e-2", "1e-3", "60", "0", "1"),
    ("1e-2", "3e-4", "60", "0", "1"),
    ("1e-2", "3e-3", "60", "0", "1"),
    ("1e-2", "1e-2", "60", "0", "1"),
    ("1e-2", "3e-3", "300", "0", "1"),
    ("3e-2", "3e-3", "60", "0", "1"),
    ("3e-2", "3e-3", "60", "1e-2", "1"),
    ("3e-2", "3e-3", "60", "0", "10"),
    ("1e-1", "3e-3", "60", "0", "1"),
)
REAL = (MODELS / "instruct-7m", DATA / "dolly15k", DATA / "alpaca")


def tried() -> dict[Path, Step]:
    """Short runs on the bundled model, by folder."""
    length = ("method.rounds=4", "method.local_steps=10")
    found: dict[Path, Step] = {}
    for rates in RATES:
        lr, align, before, proximal, distill = rates
        out = TRIED / ",".join(rates)
        found[out] = run_one(
            "fedbiot",
            out,
            *SHORT,
            *length,
            f"method.lr={lr}",
            f"method.alignment.lr={align}",
            f"method.alignment.steps_before={before}",
            f"method.proximal={proximal}",
            f"method.distill_weight={distill}",
            AS_THEN[0],
        )
    for lr in ("1e-2", "3e-2"):
        out = TRIED / f"fedavg-{lr}"
        own = (f"method.lr={lr}", "method.betas=[0.9, 0.999]")
        found[out] = run_one("fedbiot_fedavg", out, *SHORT, *length, *own)
    return found


def tried_on_dolly() -> dict[Path, Step]:
    """Short runs on Dolly, by folder."""
    found = {}
    for lr, align in (("1e-2", "1e-3"), ("3e-2", "3e-3")):
        out = TRIED / f"dolly-{lr}"
        own = (f"method.lr={lr}", f"method.alignment.lr={align}", *AS_THEN)
        found[out] = run_one(
            "fedbiot_dolly_0.2", out, *SHORT, "method.rounds=3", "evaluation.max_examples=100", *own
        )
    return found


def at_both_rates(*names: str) -> list[str]:
    """Configurations at each rate of dropout."""
    return [f"{name}_{dropout}" for dropout in (0.2, 0.5) for name in names]


def compared(name: str, configs: list[str], needs: tuple[Path, ...] = (), *settings: str) -> Entry:
    """A comparison over three seeds."""
    out = RESULTS / name
    return Entry(lambda: comparison(out), [compare_all(configs, out, *settings)], needs)


ENTRIES = {
    "fedbiot-sweep": Entry(lambda: sweep(list(tried())), list(tried().values())),
    "fedbiot-sweep-dolly": Entry(
        lambda: sweep(list(tried_on_dolly())), list(tried_on_dolly().values()), REAL
    ),
    "fedbiot-bundled": compared(
        "fedbiot-bundled",
        ["fedbiot_fedavg", "fedbiot", *at_both_rates("fedbiot_pruning", "fedot_pruning", "offsite_pruning")],
    ),
    "fedbiot-dolly": compared(
        "fedbiot-dolly",
        [
            "fedbiot_fedavg_dolly",
            *at_both_rates("fedbiot_dolly", "fedbiot_dolly_s4", "fedot_dolly", "offsite_dolly"),
        ],
        REAL,
    ),
    "fedbiot-dolly-long": compared(
        "fedbiot-dolly-long",
        ["fedbiot_fedavg_dolly", "fedbiot_dolly_0.2", "fedbiot_dolly_s4_0.2", "fedot_dolly_0.2"],
        REAL,
        "method.rounds=8",
        "method.local_steps=10",
    ),
    "bench-emulator": bench("emulator"),
    "bench-proximal": bench("proximal"),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
