"""Whether a GPU computes what it should: the bits of all noise, and every method once in bfloat16.

Noise: weights that a kernel wrote, against those that the CPU wrote, element by element. `differing` is how
many are not the same bits, and has to be 0.

Methods: one round of two clients with two steps each on a small random model in bfloat16, on the GPU and on
the CPU. Sums are rounded in another order there, so losses agree to `ALIKE` and not to the bit. `device` is
the most that a client's step held on the GPU by the run's own account, `planned` what its plan said before,
and `allocated` what PyTorch's allocator had handed out at its peak for all roles in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fedtune.bench.billion import write_inputs
from fedtune.config.file import parse_config
from fedtune.core.temporary import temporary_folder
from fedtune.errors import InputError, ProgramError
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import registry
from fedtune.models.load import quiet
from fedtune.planning.plan import plan
from fedtune.zeroth import KINDS, SeedPool, rebuild_, rebuild_perturbed_
from fedtune.zeroth.pool import Noise

DTYPES = torch.float32, torch.bfloat16, torch.float16
PIECES = ((1, 1, 0), (100, 5001, 3), (4096, 70_001, 2**33 + 5), (4096, 1 << 20, 0))  # K, weights, first
ALIKE = 0.01  # of a loss; what two steps change is more with most
ROOM = 1.15, 20_000  # of what is planned; bytes of indices and tables that a plan does not count
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
STEPS = {"lr": 1e-2, "local_steps": 2, "batch_size": 4}
SEEDS = {"lr": 1e-5, "local_steps": 1, "epsilon": 3e-4}
EMULATED = {**STEPS, "adapter_layers": 1, "alignment": {"steps_before": 1, "steps": 1, "batch_size": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "fedkseed": {**SEEDS, "seeds": 64},
    "fedkseed-pro": {**SEEDS, "seeds": 64},
    "infinite-pool": SEEDS,
    "fedbiot": EMULATED,
    "fedot": {**EMULATED, "adapter_layers": 2, "layer_dropout": 0.5},
    "offsite-tuning": {**EMULATED, "adapter_layers": 2, "layer_dropout": 0.5},
    "zero-shot": {},
}
"""Of methods that take others than `STEPS`."""
IN_FLOAT32 = {"infinite-pool"}  # adds each step to the weights, which bfloat16 would lose


def measure(methods: tuple[str, ...] | None = None) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row of each kind of noise and dtype, and of each method; ratios of memory and plan.

    Args:
        methods: Which; None: all that are registered.

    Raises:
        InputError: PyTorch sees no GPU.
        ProgramError: Something is not as it should be; the message names all of it.
    """
    device = the_gpu()
    rows = [_bits(cast(Noise, kind), dtype, device) for kind in KINDS for dtype in DTYPES]
    wrong = [f"{row['case']}: {row['differing']} weights differ" for row in rows if row["differing"]]
    ratios: dict[str, float] = {}
    with temporary_folder() as folder, quiet():
        write_inputs(SHAPE, folder)
        for name in registry.METHODS if methods is None else methods:
            row = _once(name, folder)
            rows.append(row)
            if row.get("planned"):
                ratios[f"a client's bytes on the GPU: {name}: measured / planned"] = (
                    row["device"] / row["planned"]
                )
                if row["device"] > ROOM[0] * row["planned"] + ROOM[1]:
                    wrong.append(f"{name}: {row['device']:,} bytes, planned {row['planned']:,}")
            if abs(row["loss"] - row["loss of the CPU"]) > ALIKE * row["loss of the CPU"]:
                wrong.append(f"{name}: a loss of {row['loss']:.4f}, on the CPU {row['loss of the CPU']:.4f}")
    if wrong:
        raise ProgramError("not what it should be on this GPU: " + "; ".join(wrong))
    return rows, ratios


def the_gpu() -> torch.device:
    """The GPU that is in use.

    Raises:
        InputError: PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise InputError("this benchmark is of a GPU, and PyTorch sees none here; run it where there is one")
    return torch.device("cuda", torch.cuda.current_device())


def _bits(kind: Noise, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How many weights a kernel writes otherwise than the CPU, in place and perturbed."""
    differing = count = 0
    for seeds, n, first in PIECES:
        pool, drawn = SeedPool(2**64 - seeds, seeds, kind), np.random.default_rng(0)
        w0 = torch.from_numpy(drawn.normal(scale=0.02, size=n).astype(np.float32)).to(dtype)
        a = drawn.normal(scale=1e-3, size=seeds)
        a[40:] *= kind == "hadamard4"  # a sum over other noise takes time for each
        expected, there, out = torch.empty_like(w0), w0.to(device), torch.empty_like(w0, device=device)
        rebuild_(expected, w0, pool, "w", a, first=first)
        rebuild_(out, there, pool, "w", a, first=first)
        differing += _different(out, expected)
        rebuild_perturbed_(expected, w0, pool, "w", a, 0, -5e-4, first=first)
        rebuild_perturbed_(there, there, pool, "w", a, 0, -5e-4, first=first)
        differing += _different(there, expected)
        count += 2 * n
    name = str(dtype).removeprefix("torch.")
    return {"case": f"noise: {kind}, {name}", "weights": count, "differing": differing}


def _different(one: torch.Tensor, two: torch.Tensor) -> int:
    bits = {2: torch.int16, 4: torch.int32}[two.element_size()]
    return int((one.cpu().view(bits) != two.view(bits)).sum())


def _once(name: str, folder: Path) -> dict[str, Any]:
    """A round of a method on the GPU and on the CPU."""
    row: dict[str, Any] = {"case": f"method: {name}"}
    for device in ("cuda", "cpu"):
        config = parse_config(_document(name, device, folder), "bench gpu-checks")
        out = folder / f"{name}-{device}"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        summary = run(config, out, Silent())
        loss = summary["evaluation"]["loss"]["loss"]
        if device == "cpu":
            row["loss of the CPU"] = loss
            continue
        row["loss"] = loss
        if clients := summary["peak_by_device"].get("client"):
            row["device"] = clients["device_bytes"]
            row["planned"] = plan(config).document["memory_by_device"]["client"]["device_bytes"]
        row["allocated"] = torch.cuda.max_memory_allocated()
    return row


def _document(name: str, device: str, folder: Path) -> dict[str, Any]:
    own = SETTINGS.get(name, STEPS)
    rounds = {"rounds": 1} if "rounds" in registry.config_class(name).model_fields else {}
    return {
        "model": {
            "name": str(folder / "model"),
            "device": device,
            "dtype": "float32" if name in IN_FLOAT32 else "bfloat16",
        },
        "data": {
            "train": (train := str(folder / "train.jsonl")),
            "clients": 2,
            "template": "plain",
            "max_length": 32,
            "cache": "none",
            "holdout": {"source": str(folder / "test.jsonl")},
            **({"public": {"source": train}} if "alignment" in own else {}),
        },
        "method": {"name": name, **rounds, **own},
        "evaluation": {"tasks": ["loss"], "bootstrap": 0, "every": 0},
    }
