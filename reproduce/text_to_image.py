"""One-shot fine-tuning of a text-to-image model in small: the bundled pipeline on drawn subjects.

Table:   Figure 4, text to image; docs/claims.md, block text-to-image
Command: python reproduce/text_to_image.py text-to-image
Time:    four minutes of two cores, in two processes (488 CPU seconds)
Needs:   diffusers, PIL
Result:  CLIP score of one round against five: dealt at random -0.0793 (-0.1112 to -0.0473), one subject a
         client -0.0799 (-0.1579 to -0.0018)

Table:   how many steps of the scheduler scores need; docs/text-to-image.md, block text-to-image-steps
Command: python reproduce/text_to_image.py text-to-image-steps
Time:    50 seconds of a core
Needs:   diffusers, PIL
Result:  CLIP score of the pre-trained pipeline 0.8967 after 6 steps, 0.8956 after 10, 0.8939 after 20

Table:   Figure 5 in pictures, after each arrival; docs/text-to-image.md, block text-to-image-arrivals
Command: python reproduce/text_to_image.py text-to-image-arrivals
Time:    seconds; the runs are those of the table above
Needs:   diffusers, PIL
Result:  CLIP score 0.4008 before; dealt at random 0.4969 after one client of five, 0.5324 after all

Table:   real pictures from loading to a result; docs/text-to-image.md, block dreambooth
Command: python reproduce/text_to_image.py dreambooth
Time:    1 minute of a core
Needs:   ../shared/data/dreambooth, diffusers, PIL
Result:  denoising loss of held-out pictures 0.5721 before, 0.5471 after one round, 0.5393 after five

Table:   what Stable Diffusion 1.5 sends, holds and computes; docs/text-to-image.md, block stable-diffusion
Command: python reproduce/text_to_image.py stable-diffusion
Time:    40 seconds of a core
Needs:   diffusers; the model's shape is in configs/papers/shapes
Result:  1 x 25 epochs send 31.9 MB, 5 x 5 send 159.4 MB; a client needs 5.92 GB, in bfloat16 3.21 GB
"""

from __future__ import annotations

import io
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from claims import OUT, SEEDS, Claim, Outcome, Side, Trials, above, all_of, entry, less, said
from common import DATA, ROOT, Entry, Step, compare, finished, main, spread, table

from fedtune.config.file import load_config
from fedtune.data.shapes import SUBJECTS, any_figure
from fedtune.planning.plan import plan

if TYPE_CHECKING:
    from PIL.Image import Image

ONE, MULTI = "pictures_one_shot", "pictures_multi_round"
MARGINS = {"clip_score": 0.02, "shown": 0.1}  # how far one round may be behind
NEEDS = ("diffusers", "PIL")
LEARNING = "local_epochs: 50, batch_size: 5, lr: 1e-2, lora: {rank: 8, alpha: 8}"
ARRIVING = (
    "method.arrival=asynchronous",
    "federation={quorum: 1, simulate: {delay_s: 60.0}}",
    "evaluation.arrivals=true",
)
SIDES = (  # those that take longest first, so that both processes end together
    Side("one", ONE, ARRIVING),  # after the last arrival it is the synchronous round
    Side("alone", ONE, (f"method={{name: standalone, {LEARNING}}}",)),
    Side("multi", MULTI),
    Side("pooled", ONE, (f"method={{name: centralized, {LEARNING}}}",)),
)
NAMED = {
    "zero": "zero-shot",
    "alone": "a client alone",
    "one": "one round of 50 epochs",
    "multi": "five rounds of 10",
    "pooled": "all pictures in one place",
}
SPLITS = {
    "dealt at random": ("data.partition={name: iid}",),
    "one subject a client": ("data={train: bundled, clients: null, partition: {name: by-field}}",),
}
METRICS = {
    "clip_score": "CLIP score",
    "clip_image_score": "CLIP, to real pictures",
    "shown": "pixel check",
    "shown/colour": "colours",
    "shown/shape": "shape",
}
SCORED = ("evaluation.tasks=[clip-score, pixel-check]",)  # the loss on held-out pictures stands in no table
TRIALS = {  # all pictures in one place are the same however they were dealt
    split: Trials(OUT / "text-to-image" / split.replace(" ", "-"), SIDES[: 4 - number], settings, SCORED)
    for number, (split, settings) in enumerate(SPLITS.items())
}
CORES = 2
PROMPTS = 100  # of the table of steps


def go(step: Step) -> None:
    """Makes a run, or goes on with it, in this process."""
    import torch

    import fedtune

    os.chdir(ROOT)
    torch.set_num_threads(1)
    _, _, config, *settings, _, out = step.command
    if (Path(out) / "config.yaml").exists():
        fedtune.open(out).resume(progress=False)
    else:
        fedtune.run(config, *settings, out=out, progress=False)


@dataclass(frozen=True)
class Together:
    """Runs of several trials in two processes, which import and load once."""

    trials: tuple[Trials, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.trials))

    def do(self) -> None:
        """Makes what is not there."""
        steps = [
            step
            for side in SIDES
            for trials in self.trials
            if side in trials.sides
            for seed in trials.seeds
            if (step := trials.step(side, seed)).made and not finished(ROOT / step.made)
        ]
        with ProcessPoolExecutor(min(CORES, len(os.sched_getaffinity(0))), get_context("spawn")) as pool:
            list(pool.map(go, steps))
        for trials in self.trials:
            trials.do()  # keeps no weights


REAL = DATA / "dreambooth"
DREAMBOOTH = Trials(
    OUT / "text-to-image-dreambooth",
    (
        Side("one", ONE, ("method.local_epochs=5",)),
        Side("multi", MULTI, ("method.local_epochs=1",)),
    ),
    (
        f"data={{train: {REAL}, clients: 5, partition: {{name: iid}}, holdout: {{fraction: 0.1}}}}",
        "data.pictures.caption=a photo of sks {folder}",
        "method.lr=1e-3",
        "evaluation={tasks: [denoising-loss], every: 0}",
    ),
    (),
    seeds=(0,),
)
RUNS = Together(tuple(TRIALS.values()))
CELL, FRAME, SMALL = 96, 4, 64  # pixels of a picture in a run's grid, of the white between, and of one here


def scores(trials: Trials, side: str, metric: str) -> list[float]:
    """By seed; of a client alone the mean over clients."""
    if side == "zero":
        return trials.scores("one", metric, "zero_shot")
    return trials.scores(side, metric)


def sides(trials: Trials) -> list[str]:
    """The rows of a split, in order."""
    return [side for side in NAMED if side in ("zero", *(own.name for own in trials.sides))]


def claim_table() -> str:
    """For each split a row a side."""
    found = []
    for split, trials in TRIALS.items():
        rows = []
        for side in sides(trials):
            cells = [spread(scores(trials, side, metric)) for metric in METRICS]
            off = less(scores(trials, side, "clip_score"), scores(trials, "multi", "clip_score"))
            rows.append([NAMED[side], *cells, "" if side == "multi" else said(off)])
        header = [split, *METRICS.values(), "CLIP score against five rounds"]
        found.append(table(header, rows))
    return "\n\n".join(found)


def claim_outcome() -> Outcome:
    """On a par if neither score is behind by more than its margin, with both splits."""
    verdicts, parts = [], []
    for split, trials in TRIALS.items():
        found = []
        for metric, margin in MARGINS.items():
            off = less(*(scores(trials, side, metric) for side in ("one", "multi")))
            verdicts.append(above(off, -margin))
            found.append(f"{said(off)} in {METRICS[metric]}")
        parts.append(f"{split}: one round {' and '.join(found)}")
    text = "; ".join(parts)
    return Outcome(all_of(verdicts), f"{text[0].upper()}{text[1:]}.")


CLAIM = Claim(
    "Pictures of a model that is tuned by LoRA in one round are as good as after five rounds, by CLIP score "
    "and by eye.",
    "Stable Diffusion 1.5 on subjects of DreamBooth over five clients: mean CLIP score 0.3343 after one "
    "round of 25 epochs, 0.3341 after five of 5.",
    "The bundled pipeline and CLIP, five drawn subjects of one colour over five clients, LoRA of rank 8, 50 "
    "epochs once against 5 x 10, all sides at 1e-2, the better of 3e-3 and 1e-2 for all pictures in one "
    f"place. Seen if over the seeds one round is neither more than {MARGINS['clip_score']} behind five in "
    f"CLIP score nor more than {MARGINS['shown']} in the pixel check, by the whole interval, with pictures "
    "dealt at random and with one subject a client; not seen if an interval lies below.",
    claim_table,
    claim_outcome,
)


def after_arrivals(trials: Trials, task: str, metric: str) -> list[list[float]]:
    """After each arrival, the scores by seed."""
    runs = []
    for seed in SEEDS:
        file = ROOT / trials.folder("one", seed) / "rounds.jsonl"
        last = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        runs.append([arrival["eval"][task][metric] for arrival in last["arrivals"]])
    return [list(some) for some in zip(*runs, strict=True)]


def arrivals_table() -> str:
    """A table a split, a row after each arrival."""
    columns = {"clip_score": "clip-score", "clip_image_score": "clip-score", "shown": "pixel-check"}
    found = []
    for split, trials in TRIALS.items():
        before = [spread(scores(trials, "zero", metric)) for metric in columns]
        after = [map(spread, after_arrivals(trials, task, metric)) for metric, task in columns.items()]
        rows = [["0", *before], *([str(n), *some] for n, some in enumerate(zip(*after, strict=True), 1))]
        found.append(table([f"clients, {split}", *(METRICS[metric] for metric in columns)], rows))
    return "\n\n".join(found)


def cells(file: str, trials: Trials, side: str) -> list[Image]:
    """The first picture of each prompt in a grid of a run of the first seed."""
    from PIL import Image

    step = CELL + FRAME
    with Image.open(ROOT / trials.folder(side, SEEDS[0]) / "pictures" / file) as sheet:
        boxes = [(FRAME, FRAME + row * step, step, (row + 1) * step) for row in range(len(SUBJECTS))]
        return [sheet.crop(box).resize((SMALL, SMALL), Image.Resampling.NEAREST) for box in boxes]


def sheet(columns: Iterable[tuple[str, Sequence[Image]]]) -> bytes:
    """Named columns of pictures as a PNG, the same bytes for the same pictures."""
    from PIL import Image, ImageDraw

    columns, step, top = list(columns), SMALL + FRAME, 14
    whole = Image.new("RGB", (len(columns) * step + FRAME, top + len(SUBJECTS) * step), "white")
    write = ImageDraw.Draw(whole)
    for at, (name, pictures) in enumerate(columns):
        write.text((FRAME + at * step, 1), name, fill="black")
        for row, picture in enumerate(pictures):
            whole.paste(picture, (FRAME + at * step, top + row * step))
    file = io.BytesIO()
    whole.quantize(256).save(file, format="PNG", optimize=True)
    return file.getvalue()


SHORT = {
    "zero": ("one", "round-0000.png"),
    "alone": ("alone", "round-0001-client-0000.png"),
    "one": ("one", "round-0001.png"),
    "multi": ("multi", "round-0005.png"),
    "pooled": ("pooled", "round-0001.png"),
}


def claim_picture() -> bytes:
    """Rows prompts, columns sides: dealt at random, then one subject a client."""
    columns = ((side, *SHORT[side], trials) for trials in TRIALS.values() for side in sides(trials))
    return sheet((name, cells(file, trials, side)) for name, side, file, trials in columns)


def arrivals_picture() -> bytes:
    """Rows prompts, columns after 0, 1, ... arrivals: dealt at random, then one subject a client."""
    files = ["round-0000.png", *(f"round-0001-arrival-{n:04d}.png" for n in range(1, len(SUBJECTS) + 1))]
    return sheet(
        (f"{count} clients", cells(file, trials, "one"))
        for trials in TRIALS.values()
        for count, file in enumerate(files)
    )


def steps_table() -> str:
    """What the pipeline scores as it was pre-trained, on prompts like those, a row a number of steps."""
    import numpy as np

    from fedtune.evaluation.pictures import load_clip
    from fedtune.evaluation.shapes import right
    from fedtune.models.pipelines import Drawing, draw_pictures, load_pipeline
    from fedtune.models.text_to_image import Learning

    found = load_pipeline("bundled", dtype="float32", base=ROOT, learning=Learning())
    rng, clip, rows = np.random.default_rng(50), load_clip("bundled"), []
    figures = [any_figure(rng, held_out=False) for _ in range(PROMPTS)]
    captions = [figure.caption() for figure in figures]
    texts, _ = clip.texts(captions)
    for steps in (4, 6, 8, 10, 20):
        made = draw_pictures(found.model, found.tokenizer, captions, range(PROMPTS), Drawing(steps, 3.0))
        alike = (clip.pictures(made) * texts).sum(1).tolist()
        pixels = made.numpy().astype(np.float32) / 127.5 - 1
        shown = [float(all(right(*one).values())) for one in zip(pixels, figures, strict=True)]
        error = [statistics.stdev(some) / PROMPTS**0.5 for some in (alike, shown)]
        means = zip(map(statistics.fmean, (alike, shown)), error, strict=True)
        rows.append([str(steps), *(f"{mean:.4f} ± {off:.4f}" for mean, off in means)])
    return table(["steps", "CLIP score", "pixel check"], rows)


def dreambooth_table() -> str:
    """A row a side: the loss on held-out pictures, and what was sent."""
    rows = []
    for name, side, which in (
        ("before", "one", "zero_shot"),
        ("one round of 5 epochs", "one", "evaluation"),
        ("five rounds of 1", "multi", "evaluation"),
    ):
        (loss,) = DREAMBOOTH.scores(side, "denoising_loss", which)
        sent = sum(DREAMBOOTH.summary(side, 0)["payload_bytes"].values())
        rows.append([name, f"{loss:.4f}", "" if which == "zero_shot" else f"{sent / 1e6:.2f} MB"])
    return table(["30 subjects over five clients", "denoising loss, held-out pictures", "sent"], rows)


def stable_diffusion() -> str:
    """A row for each form of the paper's run."""
    shape, rows = ROOT / "configs/papers/shapes/stable-diffusion-1.5", []
    for name, file in PLANNED.items():
        for dtype in ("float32", "bfloat16"):
            overrides = [f"model.name={shape}", f"model.dtype={dtype}"]
            found = plan(load_config(ROOT / f"configs/{file}.yaml", overrides)).document
            payload, step, once = (
                found["payload_bytes"],
                found["flops_per_token"],
                found["flops_once_a_picture"],
            )
            tokens = found["batch"]["longest"]
            flops = [step["forward"] * tokens, step["backward"] * tokens, *once.values()]
            rows.append(
                [
                    f"{name}, {dtype}",
                    f"{payload['per_client_round'] / 1e6:.2f} MB",
                    f"{payload['total'] / 1e6:.1f} MB",
                    *(
                        f"{found[f'{who}_peak_memory_bytes']['total'] / 1e9:.2f} GB"
                        for who in ("client", "evaluation")
                    ),
                    *(f"{count / 1e9:,.0f}" for count in flops),
                ]
            )
    header = [
        "",
        "a client and round",
        "the run",
        "client's memory",
        "evaluation's",
        "GFLOP forward",
        "backward",
    ]
    return table([*header, "autoencoder, once", "text encoder, once"], rows)


PLANNED = {"1 x 25 epochs": "papers/text_to_image", "5 x 5 epochs": "papers/text_to_image_multi_round"}
PAPER = ("papers/text_to_image_multi_round", "papers/text_to_image")
ENTRIES = {
    "text-to-image": entry(
        CLAIM,
        [RUNS],
        NEEDS,
        (compare(PAPER, OUT / "full" / "text-to-image"),),
        {"text_to_image.png": claim_picture},
    ),
    "text-to-image-arrivals": Entry(
        arrivals_table,
        [RUNS],
        NEEDS,
        plots={"text_to_image_arrivals.png": arrivals_picture},
    ),
    "text-to-image-steps": Entry(steps_table, needs=NEEDS),
    "dreambooth": Entry(dreambooth_table, [DREAMBOOTH], (REAL, *NEEDS)),
    "stable-diffusion": Entry(stable_diffusion, needs=NEEDS[:1]),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
