"""FedCyBGD's tables: bytes and memory of one block, beside full tuning, LoRA and adapters, small changes.

Table:   Tables 1 and 6, bytes of a first cycle; docs/fedcybgd.md, block bytes
Command: python reproduce/fedcybgd.py bytes
Time:    12 seconds
Needs:   nothing; the architectures alone are read
Result:  LLaMA-2-7B, down and up: 14.29 GB without compression, 7.81 GB with layer-drop, 7.91 GB hybrid

Table:   Tables 1, 2 and 10 in small, memory and backward time; docs/fedcybgd.md, block bench-memory
Command: python reproduce/fedcybgd.py bench-memory
Time:    half an hour on a busy machine
Needs:   nothing
Result:  a process with GPT-2's first block takes 0.303 of Fed-full's memory and 1.073 of FedLoRA's, with
         that of the Llama of 22 blocks 0.340 and 1.057; the backward pass takes 0.45 and 0.41 of
         Fed-full's time

Table:   rates on the bundled model; docs/results.md, block blocks-rates-bundled
Command: python reproduce/fedcybgd.py blocks-rates-bundled
Time:    not measured
Needs:   nothing
Result:  lowest losses: Fed-full 0.9148, LoRA 1.0991, adapter 1.2202, FedBAvg 0.9200, BAdam 0.7877,
         FedCyBGD 0.8952

Table:   Table 4 in small, bundled model and data; docs/results.md, block blocks-bundled
Command: python reproduce/fedcybgd.py blocks-bundled
Time:    28 minutes (the table's seconds, three seeds)
Needs:   nothing
Result:  FedCyBGD against full tuning: loss -0.0174 ± 0.0569; layer-drop +0.5446 ± 0.0740, hybrid
         +0.2207 ± 0.0088, LoRA +0.1885 ± 0.0147

Table:   Table 3 in small, SST-2; docs/results.md, block blocks-sst2
Command: python reproduce/fedcybgd.py blocks-sst2
Time:    10 minutes (the table's seconds, three seeds)
Needs:   ../shared/models/stories260K-hf, ../shared/data/glue
Result:  every method stays at chance: full tuning's accuracy is 0.4817 ± 0.0232, FedCyBGD's
         0.4625 ± 0.0156

Table:   Table 4 in small, Dolly; docs/results.md, block blocks-dolly
Command: python reproduce/fedcybgd.py blocks-dolly
Time:    17 minutes (the table's seconds, three seeds)
Needs:   ../shared/models/stories260K-hf, ../shared/data/dolly15k
Result:  FedCyBGD against full tuning: loss +0.1375 ± 0.0148; hybrid +0.5860 ± 0.0345, layer-drop
         +0.8408 ± 0.1327, LoRA +0.4335 ± 0.0297

Table:   changes smaller than bfloat16 can show; docs/fedcybgd.md, block small-rate
Command: python reproduce/fedcybgd.py small-rate
Time:    under four minutes
Needs:   nothing
Result:  in bfloat16 49,434 weights of the blocks moved, in float32 49,513: 5.80%

Table:   Tables 3 to 5 in small, one run each; docs/results.md, block fedcybgd-runs
Command: python reproduce/fedcybgd.py fedcybgd-runs
Time:    not measured
Needs:   ../shared/models/instruct-7m and, in ../shared/data, glue, squad, alpaca_gpt4, wikitext2, tinystories
Result:  losses fall on four of five: questions 4.0334 → 3.1872, instructions 3.4389 → 3.3848, MRPC
         0.7301 → 0.6554, SST-2 0.6993 → 0.6959; RTE 0.6928 → 0.7060
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    BENCH_MEMORY,
    DATA,
    DOLLY,
    MODELS,
    RESULTS,
    ROOT,
    Entry,
    Prepared,
    Printed,
    Step,
    compare,
    compared,
    main,
    run,
    table,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fedtune.bench.client_steps import SHAPES, TINY, same_settings
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import kept_of
from fedtune.models.load import load_model
from fedtune.models.parts import find_parts
from fedtune.models.pruning import find_attention, find_mlp, prune_groups
from fedtune.report.tables import size

SIZES = {  # name: configuration, bytes a weight
    "LLaMA-2-7B, bfloat16": (LlamaConfig(), 2),
    "GPT-2 small, float32": (AutoConfig.for_model("gpt2"), 4),
    "bundled, float32": (ROOT / "fedtune" / "models" / "bundled", 4),
}
RATIO = 0.5  # of dropping and of pruning


def traffic() -> str:
    """Bytes of a client, the mean over the turns of a first cycle with as many clients as blocks."""
    rows = []
    for name, (source, width) in SIZES.items():
        config = AutoConfig.from_pretrained(source) if isinstance(source, Path) else source
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parts, block = find_parts(model), find_blocks(model).modules[0]
        whole = sum(p.numel() for p in parts.parameters["0"].values())
        around = sum(
            p.numel()
            for part, named in parts.parameters.items()
            if not part.isdigit()
            for p in named.values()
        )
        heads, channels = (kept_of(n, RATIO) for n in (find_attention(block).groups, find_mlp(block).width))
        tensors = {n: torch.empty(p.shape) for n, p in block.named_parameters()}
        chosen = (torch.arange(n, dtype=torch.int32) for n in (heads, channels))
        pruned = sum(t.numel() for t in prune_groups(block, tensors, *chosen).values())
        n, up = parts.blocks, 4 * whole
        downs = {
            "none": [around + n * whole] * n,
            "layer-drop": [around + (1 + kept_of(n - 1, RATIO)) * whole] * n,
            "hybrid": [around + (1 + kept_of(n - 1 - t, RATIO)) * whole + t * pruned for t in range(n)],
        }
        totals = {mode: width * sum(each) / n + up for mode, each in downs.items()}
        rows.append(
            [name, str(n), f"{around / (around + n * whole):.1%}", f"{up / totals['none']:.1%}"]
            + [size(total) for total in totals.values()]
            + [f"{totals[mode] / totals['none']:.2f}" for mode in ("layer-drop", "hybrid")]
        )
    header = [
        "model",
        "blocks",
        "not in blocks",
        "upload in the total",
        *downs,
        "layer-drop / none",
        "hybrid / none",
    ]
    return table(header, rows)


def memory(file: Path) -> str:
    """Memory beside Fed-full and FedLoRA of the same settings, of tensors and process; backward time too."""
    documents = json.loads(file.read_text(encoding="utf-8"))
    rows = (documents[0] if isinstance(documents, list) else documents)["rows"]
    tables = []
    for shape in SHAPES:
        found = {r["case"].removeprefix(f"{shape}: "): r for r in rows if r["case"].startswith(f"{shape}: ")}
        if shape == TINY or not found:
            continue
        body = [_memory_row(case, row, found) for case, row in found.items() if "peak_bytes" in row]
        header = ["case"]
        for what in ("peak", "process"):
            header += [what, "of Fed-full, same settings", "of FedLoRA, same settings"]
        times = {case: row["backward_seconds"] for case, row in found.items() if "backward_seconds" in row}
        text = "; ".join(
            f"{case} {time:.2f} s ({time / times[same_settings(case, 'Fed-full')]:.2f})"
            for case, time in times.items()
        )
        tables.append(f"{shape}:\n\n{table(header, body)}\n\nBackward pass, mean over blocks: {text}.")
    return "\n\n".join(tables)


def _memory_row(case: str, row: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    cells = [case]
    for key in ("peak_bytes", "rss_bytes"):
        if key not in row:  # the system did not tell
            return [*cells, "", "", ""]
        cells += [
            size(row[key]),
            *(f"{row[key] / found[same_settings(case, to)][key]:.3f}" for to in ("Fed-full", "FedLoRA")),
        ]
    return cells


def runs(folders: Sequence[Path]) -> str:
    """Each task's first metrics before and after training, bytes and memory."""
    rows = []
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        scores, examples = [], set()
        for task, after in summary["evaluation"].items():
            before = summary["zero_shot"][task]
            examples.add(int(after["examples"]))
            scores += [
                f"{metric} {before[metric]:.4f} → {after[metric]:.4f}"
                for metric in ("loss", "accuracy", "exact_match", "f1")
                if metric in after
            ]
        payload = summary["payload_bytes"]
        row = [folder.name, f"{summary['rounds']} x {summary['clients']}", "<br>".join(scores)]
        row += [", ".join(map(str, sorted(examples)))]
        row += [f"{size(payload['down'])}, {size(payload['up'])}"]
        rows.append([*row, size(summary["peak_memory_bytes"]["client"])])
    header = ["configuration", "cycles x clients", "held-out, before → after", "examples"]
    return table([*header, "payload down, up", "client memory"], rows)


def split(folder: Path) -> None:
    """Writes train.jsonl and test.jsonl: the questions of every sixth article are held out."""
    lines = [line for line in (DATA / "squad/xquad_en.jsonl").read_text(encoding="utf-8").split("\n") if line]
    articles = list(dict.fromkeys(json.loads(line)["title"] for line in lines))
    held_out = set(articles[::6])
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("test", True)):
        chosen = [line for line in lines if (json.loads(line)["title"] in held_out) == wanted]
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def narrow(folder: Path) -> None:
    """Writes the bundled model rounded to bfloat16, as float32: what both dtypes can start from."""
    bundled = load_model("bundled", dtype="bfloat16", initial="pretrained", seed=0, base=Path())
    torch.nn.Module.to(bundled.model, torch.float32)
    bundled.model.save_pretrained(folder)
    bundled.tokenizer.save_pretrained(folder)


def moved(model: Path, folders: Sequence[Path]) -> str:
    """How many weights of the blocks differ from the model's, when both are rounded to bfloat16."""
    rows = []
    for folder in folders:
        first, last = (
            {n: t for n, t in load_file(path / "model.safetensors").items() if ".layers." in n}
            for path in (model, folder / "final")
        )
        count = sum(int((first[n].bfloat16() != last[n].bfloat16()).sum()) for n in first)
        total = sum(t.numel() for t in first.values())
        rows.append([folder.name, f"{count:,}", f"{count / total:.2%}"])
    return table(["run", "weights that moved", "of the blocks'"], rows)


ALONE = ("fed_full", "fedlora", "fedadapter", "fedbavg", "badam", "fedcybgd")
METHODS = (*ALONE, "fedcybgd_layer_drop", "fedcybgd_hybrid")
EXACT = RESULTS / "exact"  # the bundled model in numbers that bfloat16 has too
MOVED = [RESULTS / f"small-rate-{dtype}" for dtype in ("bfloat16", "float32")]
QUESTIONS = RESULTS / "questions"
STORIES = MODELS / "stories260K-hf"


def beside_others(data: str, configs: Sequence[str], *settings: str, needs: Sequence[Path] = ()) -> Entry:
    """All methods on this data, three seeds."""
    out = RESULTS / f"blocks-{data}"
    return Entry(lambda: compared(out), [compare(configs, out, *settings, references=False)], needs)


def small_rate() -> list[Step | Prepared]:
    """One cycle at 1e-6 in both dtypes, from the same weights."""
    steps: list[Step | Prepared] = [Prepared("the bundled model, rounded to bfloat16", EXACT, narrow)]
    for out in MOVED:
        own = (f"model.name={EXACT}", f"model.dtype={out.name.removeprefix('small-rate-')}")
        steps.append(
            run("fedcybgd", out, *own, "method.lr=1e-6", "method.rounds=1", "evaluation.tasks=[loss]")
        )
    return steps


def cut_short() -> dict[Path, Step]:
    """One run of each kind of data, by folder."""
    encoders = ("method.rounds=2", "data.max_examples=400")
    shorter = ("method.rounds=1", "data.max_examples=160")
    train, test = QUESTIONS / "train.jsonl", QUESTIONS / "test.jsonl"
    own = {
        "encoder_sst2": encoders,
        "encoder_rte": encoders,
        "encoder_mrpc": encoders,
        "squad": (
            *shorter,
            f"data.train={train}",
            f"data.holdout.source={test}",
            "evaluation.tasks=[loss,squad]",
            f"evaluation.files.squad={test}",
            "evaluation.limit=50",
        ),
        "alpaca": shorter,
    }
    found = {}
    for name, settings in own.items():
        out = RESULTS / f"fedcybgd_{name}"
        found[out] = run(f"fedcybgd_{name}", out, *settings)
    return found


ENCODER = Step(
    (
        "python",
        "reproduce/pretrain_encoder.py",
        "--text",
        *(str(DATA / name) for name in ("wikitext2/valid.txt", "wikitext2/test.txt")),
        str(DATA / "tinystories/stories.jsonl"),
        "--steps",
        "200",
        "--threads",
        "1",
    ),
    Path("runs/encoder"),
)

ENTRIES = {
    "bytes": Entry(traffic),
    "bench-memory": Entry(lambda: memory(RESULTS / "memory.json"), [BENCH_MEMORY]),
    "blocks-rates-bundled": Entry(
        Printed(
            (
                "python",
                "reproduce/search_rates.py",
                str(RESULTS / "blocks-rates-bundled"),
                *(f"configs/{name}.yaml" for name in ALONE),
            ),
            fenced=False,
        )
    ),
    "blocks-bundled": beside_others("bundled", METHODS),
    "blocks-sst2": beside_others(
        "sst2", [f"sst2/{name}" for name in METHODS], needs=(STORIES, DATA / "glue")
    ),
    "blocks-dolly": beside_others(
        "dolly",
        METHODS,
        f"model.name={STORIES}",
        "evaluation={tasks: [loss], every: 0, max_examples: 100, batch_size: 32}",
        f"data={{train: {DOLLY}, fields: {{instruction: instruction, input: context, output: response}}, "
        "template: plain, max_length: 96, max_examples: 660, clients: 8, partition: {name: iid}, "
        "holdout: {fraction: 0.1}}",
        needs=(STORIES, DATA / "dolly15k"),
    ),
    "small-rate": Entry(lambda: moved(EXACT, MOVED), small_rate()),
    "fedcybgd-runs": Entry(
        lambda: runs(list(cut_short())),
        [
            ENCODER,
            Prepared("questions in two files, by article", QUESTIONS, split),
            *cut_short().values(),
        ],
        [
            MODELS / "instruct-7m",
            *(DATA / name for name in ("glue", "squad", "alpaca_gpt4", "wikitext2", "tinystories")),
        ],
    ),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
