"""What the FedBiOT paper claims, asked in small: Dolly, eight clients of one category each, 8 blocks.

All runs: `instruct-7m`, two rounds of five steps; of Dolly nine rows of ten to train on, the tenth to score.
At β = 0 nothing is left out and nothing aligned. 0.5 leaves 3 of FedBiOT's 6 blocks (s = 2), and 2 of 4 else.
FedOT is aligned without the KL term, which is FedBiOT's, and no side has a proximal term.

Table:   Table 2 and Figure 2, beside FedOT; docs/claims.md, block fedbiot-table2
Command: python reproduce/fedbiot_claims.py fedbiot-table2
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k, ../shared/data/alpaca
Result:  1

Table:   Section 4, what compression costs; docs/claims.md, block fedbiot-compression
Command: python reproduce/fedbiot_claims.py fedbiot-compression
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k, ../shared/data/alpaca
Result:  1
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims import OUT, Claim, Outcome, Side, Trials, all_of, below, drawn, entry, less, said
from common import DATA, DOLLY, MODELS, ROOT, Prepared, Step, compare, main, spread, table
from fedbiot import emulated

from fedtune.report.tables import size

BETAS = (0.0, 0.5)
FOLDER = OUT / "fedbiot"
TRAIN, TEST = FOLDER / "train.jsonl", FOLDER / "test.jsonl"


def split(test: Path) -> None:
    """Writes every tenth row of Dolly to `test` and the others beside it."""
    rows = (ROOT / DOLLY).read_text(encoding="utf-8").splitlines(keepends=True)
    (ROOT / TRAIN).write_text("".join(row for i, row in enumerate(rows) if i % 10), encoding="utf-8")
    test.write_text("".join(rows[::10]), encoding="utf-8")


SPLIT = Prepared("every tenth row of Dolly", TEST, split)
ALL = (
    f"data.train={TRAIN}",
    "data.max_length=64",
    "data.batching=length-grouped",
    "method.batch_size=4",
    "method.alignment={steps_before: 40, batch_size: 4, lr: 3e-3}",
)
SCORED = (
    f"data.holdout={{source: {TEST}}}",
    "evaluation={tasks: [loss], every: 0, max_examples: 128, batch_size: 32, bootstrap: 0}",
)
VALIDATED = ("data.holdout={fraction: 0.1}", "evaluation={every: 0, max_examples: 64, batch_size: 32}")
NEEDS = (MODELS / "instruct-7m", DATA / "dolly15k", DATA / "alpaca")

KINDS = {  # configuration, and settings of its own
    "FedBiOT-2": ("fedbiot_dolly_0.2", ("method.alignment.steps=5",)),
    "FedBiOT-4": ("fedbiot_dolly_s4_0.2", ("method.alignment.steps=5",)),
    "FedOT": ("fedot_dolly_0.2", ("method.distill_weight=0",)),
}
WHOLE = ("FedBiOT-4", "FedOT")  # asked with nothing left out too
FIRST = f"FedBiOT-2-{BETAS[1]:g}"  # the rate of all is searched with it


def name(kind: str, beta: float) -> str:
    """A side's name."""
    return f"{kind}-{beta:g}"


def side(kind: str, beta: float) -> Side:
    """A method with a share β left out."""
    config, own = KINDS[kind]
    like = "" if name(kind, beta) == FIRST else FIRST
    return Side(name(kind, beta), config, (*own, f"method.layer_dropout={beta:g}"), like)


ASKED = [(kind, beta) for beta in BETAS for kind in KINDS if beta or kind in WHOLE]
# the searched one first: the others take its rate
SIDES = sorted((side(kind, beta) for kind, beta in ASKED), key=lambda side: bool(side.like))
TRIALS = Trials(FOLDER, tuple(SIDES), ALL, SCORED, VALIDATED)


def losses(kind: str, beta: float) -> list[float]:
    """AdapFu's held-out losses by seed."""
    return TRIALS.scores(name(kind, beta), "loss")


def adapemu(kind: str, beta: float) -> list[float]:
    """AdapEmu's held-out losses by seed."""
    found = [emulated(ROOT / TRIALS.folder(name(kind, beta), seed)) for seed in TRIALS.seeds]
    return [loss for loss in found if loss is not None]


def rows() -> str:
    """Both results of all sides, and AdapFu against FedOT's at the same β."""
    zero = TRIALS.scores(FIRST, "loss", "zero_shot")
    found = [["zero-shot", "", spread(zero), "", "", "", ""]]
    for kind, beta in ASKED:
        some = [TRIALS.summary(name(kind, beta), seed) for seed in TRIALS.seeds]
        off = "" if kind == "FedOT" else said(less(losses(kind, beta), losses("FedOT", beta)))
        sent = statistics.fmean(row["payload_bytes_per_client_round"] for row in some)
        memory = max(row["peak_memory_bytes"]["client"] for row in some)
        emu = adapemu(kind, beta)
        line = [kind, f"{beta:g}", spread(losses(kind, beta)), off, spread(emu) if emu else ""]
        found.append([*line, size(sent), size(memory)])
    header = ["side", "β", "AdapFu, loss", "less FedOT", "AdapEmu, loss", "bytes a client and round"]
    rate = f"{TRIALS.rate(TRIALS.sides[0]):.0e}".replace("e-0", "e-")
    return f"All at a rate of {rate}:\n\n{table([*header, 'client memory'], found)}"


def beside_others() -> Outcome:
    """Whether FedBiOT's AdapFu is below FedOT's at the same β."""
    parts, words = [], []
    for beta in BETAS[1:]:
        for kind in ("FedBiOT-2", "FedBiOT-4"):
            off = less(losses(kind, beta), losses("FedOT", beta))
            parts.append(below(off, 0.0))
            words.append(f"{kind} less FedOT at {beta:g}: {said(off)}")
    return Outcome(all_of(parts), f"{'; '.join(words)}.")


def costs(kind: str, beta: float) -> list[float]:
    """What AdapFu loses from no compression to β, by seed."""
    return less(losses(kind, beta), losses(kind, 0.0))


def compression() -> Outcome:
    """Whether compression costs FedBiOT less than FedOT, with as many blocks in the adapter."""
    parts, words = [], []
    for beta in BETAS[1:]:
        off = less(costs("FedBiOT-4", beta), costs("FedOT", beta))
        parts.append(below(off, 0.0))
        words.append(f"cost of {beta:g} for FedBiOT-4 less that for FedOT: {said(off)}")
    lead = [f"{beta:g}: {said(less(losses('FedBiOT-4', beta), losses('FedOT', beta)))}" for beta in BETAS]
    return Outcome(all_of(parts), f"{'; '.join(words)}. FedBiOT-4 less FedOT at {', '.join(lead)}.")


def what_it_costs() -> str:
    """What AdapFu loses by β."""
    found = [[kind, *(said(costs(kind, beta)) for beta in BETAS[1:])] for kind in WHOLE]
    return table(["side", *(f"β = {beta:g} less β = 0" for beta in BETAS[1:])], found)


def plot() -> bytes:
    """Loss of AdapFu by β, a line a method."""

    def draw(axes: Any) -> None:
        for kind in WHOLE:
            axes.plot(BETAS, [statistics.fmean(losses(kind, beta)) for beta in BETAS], "o-", label=kind)
        axes.set_xticks(BETAS)
        axes.set_xlabel("β")
        axes.set_ylabel("held-out loss of AdapFu")
        axes.legend(frameon=False)

    return drawn(draw)


TASKS = ("gsm8k", "rosetta", "dolly")
OTHERS = ("method.adapter_layers=4", "method.both_ends=true", "method.alignment.steps=0")


def full(betas: Sequence[float]) -> list[Step]:
    """LLaMA-2-7B on the paper's three tasks: all methods by β."""
    steps = []
    for task in TASKS:
        for beta in betas:
            own = (f"method.layer_dropout={beta:g}",)
            out = OUT / "fedbiot-full" / f"{task}-{beta:g}"
            both = [f"papers/fedbiot_{task}_s{s}_0.5" for s in (2, 4)]
            steps.append(compare(both, out / "fedbiot", *own))
            for method in ("fedot", "offsite-tuning"):
                changed = (f"method.name={method}", *OTHERS, "method.proximal=0", "method.distill_weight=0")
                steps.append(compare(both[1:], out / method, *own, *changed, references=False))
    return steps


ENTRIES = {
    "fedbiot-table2": entry(
        Claim(
            "With the same share of the emulator left out, FedBiOT ends above FedOT.",
            "AdapFu on GSM8K at β = 0.2 and 0.5: Offsite-tuning 9.93 and 7.58 %, FedOT 10.16 and 7.51 %, "
            "FedBiOT with two blocks 15.16 and 11.83 %, with four 15.23 and 14.03 %. AdapEmu: 3.03 and 2.27, "
            "2.43 and 1.90, 3.71 and 2.05, 3.41 and 1.82 %.",
            "On the held-out loss of AdapFu: seen if FedBiOT, with two blocks and with four, is below "
            "FedOT at β = 0.5.",
            rows,
            beside_others,
        ),
        [SPLIT, TRIALS],
        NEEDS,
        full=full((0.2, 0.5)),
    ),
    "fedbiot-compression": entry(
        Claim(
            "The more is left out, the larger is FedBiOT's lead: compression costs it less than the others.",
            "AdapFu on GSM8K from β = 0.2 to 0.5: Offsite-tuning loses 2.35, FedOT 2.65, FedBiOT with two "
            "blocks 3.33, with four 1.20 percentage points. There are no rows without compression.",
            "On the held-out loss of AdapFu, FedBiOT and FedOT with four blocks each: seen if going from "
            "β = 0 to 0.5 costs FedBiOT less.",
            what_it_costs,
            compression,
        ),
        [SPLIT, TRIALS],
        (*NEEDS, "matplotlib"),
        full=full((0.0, 0.2, 0.5)),
        plots={"claims_fedbiot_compression.svg": plot},
    ),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
