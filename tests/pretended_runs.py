"""Whole runs on a pretended GPU: no device mistake, and the result of a CPU."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from model_families import save_folder
from pretended_gpu import PretendedGpu
from torch.nn.attention import SDPBackend, sdpa_kernel

import fedtune
from fedtune.methods import registry
from fedtune.planning.plan import plan

WORDS = [f"w{index}" for index in range(4, 64)]
ROWS = [
    {"instruction": " ".join(WORDS[i : i + 3]), "output": " ".join(WORDS[i + 1 : i + 2 + i % 3])}
    for i in range(8)
]
TWO = {"rounds": 2}
STEPS = {"local_steps": 2, "batch_size": 2, "lr": 0.01}
SEEDS = {"seeds": 16, "local_steps": 2, "lr": 1e-4, "epsilon": 1e-3}
ALIGNED = {"steps_before": 2, "steps": 1, "batch_size": 2, "lr": 1e-2}
EMULATED = {**STEPS, "adapter_layers": 1, "layer_dropout": 0.3, "lora": {"rank": 2}, "alignment": ALIGNED}
ENDS = {**EMULATED, "adapter_layers": 2, "alignment": {**ALIGNED, "steps": 0}}
TRAINABLE: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"rank": 2, "dropout": 0.5}},
    "ia3": {},
    "adapter": {"adapter": {"size": 3}},
    "prompt": {"prompt": {"tokens": 3}},
    "prefix": {"prefix": {"tokens": 3}},
    "p-tuning": {"p_tuning": {"tokens": 3, "hidden": 6}},
}
# By method its forms; of each the settings of the method, and "model" or "federation" beside them.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "fedavg": {
        **{name: {**STEPS, "trainable": name, **more} for name, more in TRAINABLE.items()},
        "scaffold": {**STEPS, **TWO, "trainable": "full", "optimizer": "sgd", "control_variates": True},
        "diloco": {
            **STEPS,
            **TWO,
            "trainable": "full",
            "keep_optimizer": True,
            "server_optimizer": {"name": "nesterov"},
        },
        "offloaded": {**STEPS, "lora": {"rank": 2}, "offload_params": "disk"},
        "stack": {**STEPS, **TWO, "lora": {"rank": 2}, "aggregation": "stack"},
        "asynchronous-dora": {**STEPS, "lora": {"rank": 2, "use_dora": True}, "arrival": "asynchronous"},
        "proximal-kahan": {
            **STEPS,
            "trainable": "full",
            "proximal": 0.1,
            "max_grad_norm": 1.0,
            "masters": "kahan",
            "model": {"dtype": "bfloat16"},
        },
        "narrow": {
            **STEPS,
            "trainable": "full",
            "optimizer": "adamw-8bit",
            "masters": "stochastic",
            "optimizer_in_backward": True,
            "gradient_checkpointing": "full",
            "model": {"dtype": "bfloat16"},
        },
        "secure": {**STEPS, "lora": {"rank": 2}, "federation": {"secure_aggregation": {}}},
        "private": {  # noise is drawn from the system, and never the same
            **STEPS,
            "lora": {"rank": 2},
            "federation": {"privacy": {"clip": 0.1, "noise_multiplier": 0.0, "delta": 0.01}},
        },
    },
    "fedkseed": {
        "hadamard4": {**SEEDS, **TWO},
        "gaussian": {**SEEDS, "noise": "gaussian"},
    },
    "fedkseed-pro": {"plain": SEEDS},
    "infinite-pool": {"plain": {n: v for n, v in {**SEEDS, **TWO}.items() if n != "seeds"}},
    "fedbiot": {
        "plain": {**EMULATED, **TWO, "proximal": 0.1},
        "pruned": {**EMULATED, "emulator": "channel-pruning"},
    },
    "fedot": {"plain": ENDS},
    "offsite-tuning": {"plain": ENDS},
    "fedcybgd": {
        "hybrid": {**STEPS, **TWO, "compression": "hybrid"},
        "offloaded": {**STEPS, "offload_params": "disk"},
        "lora": {**STEPS, "trainable": "lora", "lora": {"rank": 2}, "compression": "layer-drop"},
        "adapter": {**STEPS, "trainable": "adapter", "adapter": {"size": 3}},
    },
    "fedbavg": {"plain": STEPS},
    "badam": {"plain": {**STEPS, "switch_interval": 1}},
    "standalone": {"plain": {**STEPS, "lora": {"rank": 2}}},
    "centralized": {"plain": {**STEPS, "trainable": "full"}},
    "zero-shot": {"plain": {}},
}
BLOCKS = {"fedbiot": 4, "fedot": 6, "offsite-tuning": 6, "fedcybgd": 4}  # what divides them needs more
ROOM = 10_000  # bytes of indices, tables and batches that a plan does not count
LISTED = [
    pytest.param(method, form, id=f"{method}-{form}")
    for method in registry.METHODS
    for form in FORMS.get(method, {"missing": {}})
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for blocks in (2, *{*BLOCKS.values()}):
        save_folder(folder / str(blocks), blocks=blocks)
    (folder / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def settings(tiny: Path, method: str, form: dict[str, Any], device: str) -> dict[str, Any]:
    own = {name: value for name, value in form.items() if name not in ("model", "federation")}
    rounds = {"rounds": 1} if "rounds" in registry.config_class(method).model_fields else {}
    blocks = BLOCKS.get(method, 2)
    return {
        "model": {"name": str(tiny / str(blocks)), "device": device, **form.get("model", {})},
        "data": {
            "clients": 2,
            "template": "plain",
            "max_length": 16,
            **({"public": {"source": str(tiny / "public.jsonl")}} if "alignment" in own else {}),
        },
        "method": {"name": method, **rounds, **own},
        "federation": form.get("federation", {}),
        "evaluation": {"tasks": ["loss"], "max_examples": 2, "bootstrap": 0},
    }


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def results(run: fedtune.Run) -> dict[str, Any]:
    """What a run ends with: digests of its files of weights, and its losses."""
    return {
        **digests(run.path / "final"),
        "scores": run.summary["evaluation"],
        "loss": [r["train_loss"] for r in run.rounds],
    }


def memory(run: fedtune.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "memory.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "form"), LISTED)
def test_a_run_on_a_gpu_ends_with_the_bits_of_a_cpu(
    method: str, form: str, tiny: Path, tmp_path: Path
) -> None:
    chosen = FORMS[method][form]
    with sdpa_kernel(SDPBackend.MATH), PretendedGpu() as gpu:
        there = fedtune.run(
            settings(tiny, method, chosen, "cuda"), data=ROWS, out=tmp_path / "gpu", progress=False
        )
    assert gpu.of("launch") or gpu.of("kernel")
    with sdpa_kernel(SDPBackend.MATH):
        here = fedtune.run(
            settings(tiny, method, chosen, "cpu"), data=ROWS, out=tmp_path / "cpu", progress=False
        )
    assert results(there) == results(here)
    planned = plan(there.config, objects=there.objects).document["memory_by_device"]
    for on_gpu, on_cpu in zip(memory(there), memory(here), strict=True):
        where, peak = on_cpu["where"], on_cpu["peak_bytes"]
        assert on_gpu["peak_bytes"] == pytest.approx(peak, rel=0.08), where
        assert on_gpu["device_bytes"] <= 1.15 * planned[where]["device_bytes"] + ROOM
        assert on_gpu["host_bytes"] <= 1.15 * planned[where]["host_bytes"] + ROOM
        if where == "server" and not planned["server"]["device_bytes"]:  # whatever else lies on the card
            assert (on_gpu["device_bytes"], on_gpu["host_bytes"]) == (0, peak)
    clients = [entry["device_bytes"] for entry in memory(there) if entry["where"] == "client"]
    assert not clients or max(clients) >= 0.8 * planned["client"]["device_bytes"]
    assert there.summary["peak_by_device"].keys() == there.summary["peak_memory_bytes"].keys()
    assert "peak_by_device" not in here.summary


def test_a_run_is_resumed_and_exported_on_a_gpu(tiny: Path, tmp_path: Path) -> None:
    chosen, merged = FORMS["fedavg"]["lora"], {}
    for device, rounds in (("cuda", 1), ("cpu", 2)):
        document = settings(tiny, "fedavg", {**chosen, "rounds": rounds}, device)
        on = PretendedGpu() if device == "cuda" else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), on:
            run = fedtune.run(document, data=ROWS, out=tmp_path / device, progress=False)
            run = run.resume(rounds=2, progress=False) if rounds == 1 else run
        run.export(tmp_path / f"{device}-merged", merge=True)
        merged[device] = results(run), digests(tmp_path / f"{device}-merged")
    assert merged["cuda"] == merged["cpu"] and merged["cpu"][1]
