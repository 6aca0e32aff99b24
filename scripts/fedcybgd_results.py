"""Tables of FedCyBGD in docs/.

    python scripts/fedcybgd_results.py bytes             a first cycle's bytes, from the architectures
    python scripts/fedcybgd_results.py memory FILE       memory, backward time: `fedtune bench memory --json`
    python scripts/fedcybgd_results.py runs RUN...       scores before and after, a line a run
    python scripts/fedcybgd_results.py split FILE FOLDER questions in two files, by article: train and test
    python scripts/fedcybgd_results.py narrow FOLDER     a bfloat16 copy of the bundled model, as float32
    python scripts/fedcybgd_results.py moved MODEL RUN.. weights that differ from MODEL's, rounded to bfloat16

scripts/results.sh puts what these print into the pages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fedtune.bench.client_steps import SHAPES, TINY
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import kept_of
from fedtune.models.load import load_model
from fedtune.models.parts import find_parts
from fedtune.models.pruning import find_attention, find_mlp, prune_groups
from fedtune.report.tables import size

MODELS = {  # name: configuration, bytes a weight
    "LLaMA-2-7B, bfloat16": (LlamaConfig(), 2),
    "GPT-2 small, float32": (AutoConfig.for_model("gpt2"), 4),
    "bundled, float32": (Path(__file__).resolve().parent.parent / "fedtune" / "models" / "bundled", 4),
}
RATIO = 0.5  # of dropping and of pruning


def traffic() -> str:
    """Bytes of a client, the mean over the turns of a first cycle with as many clients as blocks."""
    rows = []
    for name, (source, width) in MODELS.items():
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
    """Memory beside Fed-full and FedLoRA, of tensors and of the process; backward time beside Fed-full."""
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
            header += [what, "of Fed-full", "of FedLoRA"]
        times = {case: row["backward_seconds"] for case, row in found.items() if "backward_seconds" in row}
        text = "; ".join(
            f"{case} {time:.2f} s ({time / times['Fed-full']:.2f})" for case, time in times.items()
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
            *(f"{row[key] / found[other][key]:.3f}" for other in ("Fed-full", "FedLoRA")),
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


def split(file: Path, folder: Path) -> None:
    """Writes train.jsonl and test.jsonl: the questions of every sixth article are held out."""
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["bytes"]:
            print(traffic())
        case ["memory", file]:
            print(memory(Path(file)))
        case ["runs", *folders] if folders:
            print(runs([Path(folder) for folder in folders]))
        case ["split", file, folder]:
            split(Path(file), Path(folder))
        case ["narrow", folder]:
            narrow(Path(folder))
        case ["moved", model, *folders] if folders:
            print(moved(Path(model), [Path(folder) for folder in folders]))
        case _:
            raise SystemExit(__doc__)
