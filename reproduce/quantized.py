"""What a quantised base saves in memory, and what that costs in loss.

Table:   memory of LoRA training of a Llama of 156 M weights, by plan, ledger and process, and Llama-2-7B
         planned; docs/quantized.md, block quantized-memory
Command: python reproduce/quantized.py quantized-memory
Time:    two minutes of CPU
Needs:   bitsandbytes; the shape of Llama-2-7B is in configs/papers/shapes
Result:  397.94 MB with bfloat16 and 173.66 MB with nf4 by plan and ledger, 451.96 MB and 214.57 MB by
         process; of a Llama of 7 B weights 30.05 GB and 20.43 GB, planned

Table:   held-out loss of a model of 7 M weights on Dolly after three rounds of LoRA, three seeds;
         docs/quantized.md, block quantized-loss
Command: python reproduce/quantized.py quantized-loss
Time:    two minutes of CPU
Needs:   bitsandbytes, ../shared/models/instruct-7m, ../shared/data/dolly15k
Result:  3.9132 with bfloat16 and 3.9197 with nf4 (4.1931 and 4.1960 before), +0.0064 ± 0.0026 apart
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import DOLLY, MODELS, ROOT, Entry, main, spread, table

import fedtune
from fedtune.config.file import load_config, parse_config
from fedtune.planning.plan import plan
from fedtune.report.tables import size

KINDS = {"bfloat16": "none", "int8": "int8", "nf4": "nf4"}
SEEDS = (0, 1, 2)
PAPERS = ROOT / "configs" / "papers"
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
}


def small_run(model: Path, kind: str) -> dict[str, Any]:
    """Two rounds of two clients, two steps of 4 x 64 tokens each."""
    return {
        "model": {"name": str(model), "dtype": "bfloat16", "quantization": kind, "device": "cpu"},
        "data": {"template": "plain", "max_examples": 16, "max_length": 64, "clients": 2},
        "method": {"name": "fedavg", "rounds": 2, "local_steps": 2, "batch_size": 4},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 2, "bootstrap": 0},
    }


def in_a_process(model: Path, kind: str) -> dict[str, int]:
    """What the second round of such a run needed: by the ledger, and beyond what the process had before."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(model), kind],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: Path, kind: str) -> dict[str, int]:
    """The same in this process."""
    from fedtune.bench.process_memory import forget_peak, peak_rss, rss

    class Again:
        def on_round(self, *_: Any) -> None:
            forget_peak()

    with tempfile.TemporaryDirectory() as folder:
        document = small_run(Path("bundled"), "none")
        fedtune.run(document, out=Path(folder) / "first", progress=False)  # imports, and what libraries keep
        before = rss() or 0
        run = fedtune.run(
            small_run(model, kind), out=Path(folder) / "run", progress=False, callbacks=[Again()]
        )
        return {
            "ledger": run.summary["peak_memory_bytes"]["client"],
            "process": (peak_rss() or 0) - before,
        }


def random_model(folder: Path) -> Path:
    """A Llama with the bundled model's tokenizer, whose weights are noise, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedtune.models.load import load_tokenizer, quiet, seeded

    tokenizer = load_tokenizer("bundled", Path("."))
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **SIZES)
    with seeded(0), quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def memory() -> str:
    """A row for each way to hold the base."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder))
        for name, kind in KINDS.items():
            config = parse_config(small_run(model, kind), name)
            planned = plan(config).document["client_peak_memory_bytes"]
            found = in_a_process(model, kind)
            seven = load_config(
                PAPERS / "multi_round_lora.yaml",
                [
                    f"model.name={PAPERS / 'shapes' / 'llama-2-7b'}",
                    f"model.quantization={kind}",
                    "model.dtype=bfloat16",
                    "method.rounds=1",
                    "data.clients=1",
                ],
            )
            large = plan(seven).document["client_peak_memory_bytes"]
            rows.append(
                [
                    name,
                    size(planned["weights"]),
                    size(planned["total"]),
                    size(found["ledger"]),
                    size(found["process"]),
                    size(large["weights"]),
                    size(large["total"]),
                ]
            )
    header = ["base", "weights, planned", "step, planned", "ledger", "process", "7 B: weights", "7 B: step"]
    return table(header, rows)


def loss(kind: str, seed: int) -> tuple[float, float]:
    """Held-out loss of the untrained model and after three rounds."""
    document = {
        "seed": seed,
        "model": {"name": str(ROOT / MODELS / "instruct-7m"), "dtype": "bfloat16", "quantization": kind},
        "data": {
            "train": str(ROOT / DOLLY),
            "fields": {"input": "context", "output": "response"},
            "max_examples": 400,
            "max_length": 96,
            "clients": 2,
        },
        "method": {"name": "fedavg", "rounds": 3, "local_steps": 10, "batch_size": 4, "lr": 1e-3},
        "evaluation": {"tasks": ["loss"], "every": 0, "max_examples": 100, "bootstrap": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        run = fedtune.run(document, out=Path(folder) / "run", progress=False)
        scores = [entry["eval"]["loss"]["loss"] for entry in run.rounds if entry["eval"]]
        return float(scores[0]), float(scores[-1])


def losses() -> str:
    """A row for each way to hold the base."""
    rows, first = [], list[float]()
    for name, kind in {"bfloat16": "none", "nf4": "nf4"}.items():
        found = [loss(kind, seed) for seed in SEEDS]
        after = [trained for _, trained in found]
        first = first or after
        apart = [one - other for one, other in zip(after, first, strict=True)]
        rows.append(
            [
                name,
                spread([before for before, _ in found]),
                spread(after),
                "" if kind == "none" else spread(apart, "+"),
            ]
        )
    return table(["base", "before", "after three rounds", "less that of bfloat16"], rows)


ENTRIES = {
    "quantized-memory": Entry(memory, needs=("bitsandbytes",)),
    "quantized-loss": Entry(losses, needs=("bitsandbytes", MODELS / "instruct-7m", DOLLY)),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main(__doc__, ENTRIES)
