"""One-shot fine-tuning's tables: beside several rounds, and its theory measured.

Table:   Table 1 in small, LoRA, a category a client; docs/results.md, block one-shot-by-field
Command: python reproduce/one_shot.py one-shot-by-field
Time:    21 minutes (the table's seconds, three seeds)
Needs:   nothing
Result:  pre-trained, one-shot ends +0.4040 ± 0.0128 above multi-round, at 2.3750 ± 0.0128; from random
         weights at 5.8625 ± 0.0303, multi-round at 5.7843 ± 0.0096

Table:   the same, shuffled evenly; docs/results.md, block one-shot-iid
Command: python reproduce/one_shot.py one-shot-iid
Time:    16 minutes (the table's seconds, three seeds)
Needs:   nothing
Result:  pre-trained, one-shot ends +0.2942 ± 0.0658 above multi-round, at 1.5575 ± 0.0635

Table:   Table 1 in small, all weights, a category a client; docs/results.md, block one-shot-full-by-field
Command: python reproduce/one_shot.py one-shot-full-by-field
Time:    10 minutes (the table's seconds, three seeds)
Needs:   nothing
Result:  pre-trained, one-shot ends +0.7470 ± 0.0174 above multi-round; from random weights at
         4.9594 ± 0.1152, multi-round at 4.1310 ± 0.0807

Table:   the same, shuffled evenly; docs/results.md, block one-shot-full-iid
Command: python reproduce/one_shot.py one-shot-full-iid
Time:    19 minutes (the table's seconds, three seeds)
Needs:   nothing
Result:  pre-trained, one-shot ends +0.2149 ± 0.0252 above multi-round; from random weights at
         3.0701 ± 0.0340, multi-round at 2.9468 ± 0.1243

Table:   Table 2 in small, Dolly; docs/results.md, block dolly
Command: python reproduce/one_shot.py dolly
Time:    46 minutes (the table's seconds, three seeds)
Needs:   ../shared/models/instruct-7m, ../shared/data/dolly15k
Result:  one-shot ends +0.0064 ± 0.0019 above multi-round, with 4.19 MB a way for 12.58 MB

Table:   Table 1 in small, GSM8K; docs/results.md, block gsm8k
Command: python reproduce/one_shot.py gsm8k
Time:    80 minutes (the table's seconds, three seeds)
Needs:   ../shared/models/instruct-7m, ../shared/data/gsm8k
Result:  one-shot ends +0.0818 ± 0.0092 above multi-round; neither solves a problem

Table:   Figures 2 and 3 in small; docs/theory.md, block quantities
Command: python reproduce/one_shot.py quantities
Time:    part of the half hour that all tables of the page take
Needs:   for the last three rows ../shared/models/stories260K-hf and instruct-7m, ../shared/data/dolly15k
Result:  the relative update of 128x4 is 0.0347 pre-trained and 0.119 from random weights; what the bound
         bounds is 0.107 to 0.368 of it

Table:   predictions from probes of four clients; docs/theory.md, block fewer
Command: python reproduce/one_shot.py fewer
Time:    part of the half hour that all tables of the page take
Needs:   nothing
Result:  128x4 pre-trained: predicted -0.000 ± 0.013, measured +0.298; from random weights +0.245 ± 0.007
         and +0.270

Table:   predictions, the pairs that their form was chosen on; docs/theory.md, block chosen
Command: python reproduce/one_shot.py chosen
Time:    minutes, once the four comparisons are done that begin with one-shot
Needs:   nothing
Result:  all weights, a category a client: predicted +1.200 ± 0.095, measured +0.747 ± 0.017

Table:   predictions, other pairs; docs/theory.md, block fresh
Command: python reproduce/one_shot.py fresh
Time:    part of the half hour that all tables of the page take
Needs:   for the last three rows ../shared/models/stories260K-hf and instruct-7m, ../shared/data/dolly15k
Result:  the bundled model: predicted +0.546 ± 0.029, measured +0.352

Table:   predictions, pairs measured once their form was fixed; docs/theory.md, block test
Command: python reproduce/one_shot.py test
Time:    part of the half hour that all tables of the page take
Needs:   for the last four rows ../shared/models/stories260K-hf and babyllama105-hf, ../shared/data/alpaca
         and dolly15k
Result:  furthest off is LoRA on babyllama: predicted +0.054 ± 0.019, measured -0.185 ± 0.041

Table:   how predictors rank the gaps; docs/theory.md, block correlations
Command: python reproduce/one_shot.py correlations
Time:    minutes, once chosen, fresh and test are done
Needs:   what those need
Result:  Spearman of the predicted gap: 0.93, 0.98 and 0.71 on the three lists, 0.90 on all 26 pairs

Table:   Figure 6 in small, six epochs in R rounds; docs/theory.md, block rounds
Command: python reproduce/one_shot.py rounds
Time:    part of the half hour that all tables of the page take
Needs:   for the last four rows ../shared/models/stories260K-hf, ../shared/data/dolly15k
Result:  one round loses 64.6% of six rounds' gain from the pre-trained weights, 20.3% from random ones
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import theory_tables
from common import DATA, DOLLY, MODELS, RESULTS, ROOT, SHARED, Entry, Step, compare, compared, main
from theory_tables import Source

MULTI, ONE = "bundled_multi_round", "bundled_one_shot"
THEORY, REAL = RESULTS / "theory", (ROOT / SHARED).is_dir()
ALL_WEIGHTS = ("method.trainable=full", "method.lora=null")


def one_shot(split: str, *settings: str, trained: str = "") -> tuple[Path, Step]:
    """Both schemes from both starts on this split: the folder, and the command."""
    out = RESULTS / f"one-shot{trained}-{split}"
    configs = (MULTI, ONE, f"{MULTI}_scratch", f"{ONE}_scratch")
    return out, compare(configs, out, f"data.partition.name={split}", *settings)


FULL = (*ALL_WEIGHTS, "method.lr=2e-3")
SMALL = {
    "one-shot-by-field": one_shot("by-field"),
    "one-shot-full-by-field": one_shot("by-field", *FULL, trained="-full"),
    "one-shot-iid": one_shot("iid"),
    "one-shot-full-iid": one_shot("iid", *FULL, trained="-full"),
}


def on_real(name: str) -> Entry:
    """Both schemes on real data."""
    data = DATA / ("dolly15k" if name == "dolly" else name)
    step = compare([f"{name}_multi_round", f"{name}_one_shot"], RESULTS / name)
    return Entry(lambda: compared(RESULTS / name), [step], [MODELS / "instruct-7m", data])


# The theory. Its pairs have a name, and settings on top of configs/bundled_multi_round.yaml.


def setting(key: str, **value: Any) -> str:
    """A block of settings for the command line."""
    return f"{key}={json.dumps(value)}"


def probe(name: str, settings: Sequence[str], *options: str) -> Step:
    """What `fedtune diagnose` measures."""
    command = ("fedtune", "diagnose", f"configs/{MULTI}.yaml", *settings, *options, "--json")
    return Step(command, THEORY / f"{name}.json", kept=True)


def both(name: str, settings: Sequence[str], seeds: str = "0") -> Step:
    """What both schemes come to."""
    return compare((MULTI, ONE), THEORY / name, *settings, seeds=seeds, references=False)


def source(name: str, kind: str = "probe") -> Source:
    """Where a pair is measured."""
    return Source(name, THEORY / f"{name}-{kind}.json", THEORY / name)


SIZES = {  # width x layers; the bundled model has 128x4 too, and 3,400 steps
    size: Step(
        (
            *("python", "reproduce/pretrain_bundled.py", "--width", size.split("x")[0]),
            *("--layers", size.split("x")[1], "--steps", "400", "--every", "400", "--threads", "1"),
            *("--out", f"runs/sizes/{size}"),
        ),
        Path("runs/sizes", size),
    )
    for size in ("32x2", "64x3", "128x4")
}
SHORT = ("data.max_examples=400", *FULL, "evaluation.tasks=[loss]", "evaluation.bootstrap=0")
PLAIN = {
    f"{size}-{initial}": (
        f"model.name=runs/sizes/{size}",
        "data.template=plain",
        f"model.initial={initial}",
        *SHORT,
    )
    for initial in ("pretrained", "scratch")
    for size in SIZES
} | {"bundled-pretrained": SHORT}


def held_out(examples: int) -> str:
    """An evaluation at the end alone."""
    return setting("evaluation", tasks=["loss"], every=0, max_examples=examples, batch_size=32, bootstrap=0)


def real(file: Path, clients: int, examples: int, template: str = "plain", **partition: Any) -> str:
    """Real data, Dolly with its categories."""
    fields = {"instruction": "instruction", "input": "context", "output": "response", "category": "category"}
    return setting(
        "data",
        train=str(file),
        **({"fields": fields} if file == DOLLY else {}),
        clients=clients,
        max_length=96,
        holdout={"fraction": 0.1},
        max_examples=examples,
        template=template,
        partition=partition,
    )


STORIES = {
    f"stories260K-{split}": (
        f"model.name={MODELS / 'stories260K-hf'}",
        held_out(64),
        *ALL_WEIGHTS,
        "method.lr=1e-3",
        real(DOLLY, 8, 320, name=split),
    )
    for split in ("by-field", "iid")
}
# Of eight clients and nine steps: a probe would be the whole run.
INSTRUCT = (
    f"model.name={MODELS / 'instruct-7m'}",
    held_out(64),
    real(DOLLY, 8, 160, template="alpaca", name="by-field"),
)
FRESH = PLAIN | (STORIES if REAL else {})
WHOLE = FRESH | ({"instruct-7m": INSTRUCT} if REAL else {})
ALPACA = DATA / "alpaca/alpaca_subset.jsonl"


def small(clients: int, examples: int, **partition: Any) -> tuple[str, ...]:
    """The bundled data on so many clients."""
    return (
        held_out(128),
        f"data.clients={clients}",
        f"data.max_examples={examples}",
        setting("data.partition", **partition),
    )


def of_size(size: str) -> tuple[str, ...]:
    """A model of this size."""
    return f"model.name=runs/sizes/{size}", "data.template=plain"


def of(model: str) -> tuple[str, ...]:
    """A real model."""
    return f"model.name={MODELS / model}", held_out(128)


# The pairs that the prediction was tested on once it was fixed: two seeds, of the last three one.
TEST: dict[str, tuple[str, ...]] = {
    "64x3-dirichlet-lora": (
        *of_size("64x3"),
        *small(12, 480, name="dirichlet", alpha=0.1, minimum=8),
        "method.lr=5e-3",
    ),
    "32x2-iid-full": (*of_size("32x2"), *small(5, 800, name="iid"), "method.lr=5e-3", *ALL_WEIGHTS),
    "bundled-dirichlet-full": (
        *small(3, 480, name="dirichlet", alpha=0.5, minimum=8),
        "method.lr=5e-4",
        *ALL_WEIGHTS,
    ),
    "bundled-iid-lora-scratch": ("model.initial=scratch", *small(6, 480, name="iid"), "method.lr=1e-2"),
}
TEST_ON_REAL: dict[str, tuple[str, ...]] = {
    "babyllama-alpaca-iid-lora": (
        *of("babyllama105-hf"),
        real(ALPACA, 4, 320, name="iid"),
        "method.lr=1e-2",
    ),
    "babyllama-dolly-dirichlet-full": (
        *of("babyllama105-hf"),
        real(DOLLY, 12, 480, name="dirichlet", alpha=0.3, minimum=8),
        "method.lr=5e-4",
        *ALL_WEIGHTS,
    ),
    "stories-alpaca-iid-full": (
        *of("stories260K-hf"),
        real(ALPACA, 6, 480, name="iid"),
        "method.lr=3e-3",
        *ALL_WEIGHTS,
    ),
    "stories-dolly-by-field-lora": (
        *of("stories260K-hf"),
        real(DOLLY, 8, 800, name="by-field"),
        "method.lr=1e-2",
    ),
}
TESTED = TEST | (TEST_ON_REAL if REAL else {})
ONE_SEED = list(TEST_ON_REAL)[1:]


def chosen() -> tuple[list[Source], list[Step]]:
    """The comparisons above, probed."""
    sources, steps = [], [step for _, step in SMALL.values()]
    for split in ("by-field", "iid"):
        for trained in ("lora", "full"):
            for initial in ("pretrained", "scratch"):
                name, end = f"{split}-{trained}-{initial}", "" if initial == "pretrained" else "_scratch"
                own = (f"data.partition.name={split}", f"model.initial={initial}")
                steps.append(probe(f"{name}-probe", (*own, *(FULL if trained == "full" else ()))))
                folder = RESULTS / f"one-shot{'-full' if trained == 'full' else ''}-{split}"
                file = THEORY / f"{name}-probe.json"
                sources.append(Source(name, file, folder, f"{MULTI}{end}", f"{ONE}{end}"))
    return sources, steps


def fresh() -> tuple[list[Source], list[Step]]:
    """Runs that are about as long as their probes."""
    sources, steps = [source(name) for name in FRESH], list(SIZES.values())
    for name, settings in FRESH.items():
        steps += [probe(f"{name}-probe", settings), both(name, settings)]
    if REAL:
        sources.append(source("instruct-7m", "whole"))
        steps += [probe("instruct-7m-whole", INSTRUCT, "--whole"), both("instruct-7m", INSTRUCT)]
    return sources, steps


def tested() -> tuple[list[Source], list[Step]]:
    """Other splits, rates, numbers of clients and data."""
    steps = list(SIZES.values())
    for name, settings in TESTED.items():
        seeds = "0" if name in ONE_SEED else "0,1"
        steps += [probe(f"{name}-probe", settings), both(name, settings, seeds)]
    return [source(name) for name in TESTED], steps


def fewer() -> tuple[list[Source], list[Step]]:
    """Runs of PLAIN, probed on four clients."""
    steps = list(SIZES.values())
    for name, settings in PLAIN.items():
        steps += [probe(f"{name}-four", settings, "--clients", "4"), both(name, settings)]
    return [Source(name, THEORY / f"{name}-four.json", THEORY / name) for name in PLAIN], steps


ROUNDS = (1, 2, 3, 6)  # six epochs in all
SERIES: dict[str, tuple[str, ...]] = {
    f"rounds-{initial}": (*SHORT, f"model.initial={initial}") for initial in ("pretrained", "scratch")
}
if REAL:
    SERIES["rounds-stories260K"] = STORIES["stories260K-by-field"]


def by_rounds() -> list[Step]:
    """Each of SERIES in each of ROUNDS."""
    return [
        compare(
            [MULTI],
            THEORY / f"{name}-{count}",
            *settings,
            f"method.rounds={count}",
            f"method.local_epochs={6 // count}",
            seeds="0",
            references=False,
        )
        for name, settings in SERIES.items()
        for count in ROUNDS
    ]


LISTS = {"chosen": chosen(), "fresh": fresh(), "test": tested()}


def predictions(sources: Sequence[Source], steps: Sequence[Step], *, partly: bool) -> Entry:
    """Predictions of a list beside what was measured."""
    return Entry(lambda: theory_tables.pairs(sources), steps, partly=partly)


ENTRIES = {
    **{name: Entry(lambda out=out: compared(out), [step]) for name, (out, step) in SMALL.items()},  # type: ignore[misc]
    "dolly": on_real("dolly"),
    "gsm8k": on_real("gsm8k"),
    "quantities": Entry(
        lambda: theory_tables.quantities([THEORY / f"{name}-whole.json" for name in WHOLE]),
        [*SIZES.values(), *(probe(f"{name}-whole", own, "--whole") for name, own in WHOLE.items())],
        partly=True,
    ),
    "fewer": predictions(*fewer(), partly=False),
    **{name: predictions(*some, partly=name != "chosen") for name, some in LISTS.items()},
    "correlations": Entry(
        lambda: theory_tables.correlations({name: sources for name, (sources, _) in LISTS.items()}),
        [step for _, steps in LISTS.values() for step in steps],
        partly=True,
    ),
    "rounds": Entry(
        lambda: theory_tables.rounds([THEORY / name for name in SERIES], ROUNDS), by_rounds(), partly=True
    ),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
