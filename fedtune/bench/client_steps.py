"""Memory and backward time of a client's steps: Fed-full, FedLoRA, FedAdapter, FedCyBGD and BAdam.

Two shapes with random weights: GPT-2 small (12 blocks, 124 million parameters), and a Llama of 22 blocks, as
TinyLlama at a quarter of its width (93 million). Batches are 2 x 256 tokens, all of which count in the loss.
Each case runs the method's own training code in a process of its own. A client of FedCyBGD gets its order as
a frame that another process wrote, and keeps what it holds on disk, as in a run; `rss_bytes` covers that too.
The others have the model from the start, without the message that brought it.

All sides have the same settings: `gradient_checkpointing: full`, the loss of `models/lean_loss.py`, and an
allocator that gives memory back. Cases with "no checkpointing" lack the first, on both sides of their ratios;
those with "offloaded" have `offload_params: disk` on both sides.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedtune.bench.process_memory import forget_peak, peak_rss, rss
from fedtune.core.cohort import Cohort
from fedtune.core.store import Store
from fedtune.core.temporary import temporary_folder
from fedtune.core.types import ClientEnv, Payload
from fedtune.core.wire import Content, decode, empty_frame, encode
from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedavg.settings import Config as FedAvgConfig
from fedtune.methods.fedcybgd import method as fedcybgd
from fedtune.methods.fedcybgd.client import begin_turn
from fedtune.methods.fedcybgd.settings import BAdamConfig
from fedtune.methods.fedcybgd.settings import Config as BlockConfig
from fedtune.methods.fedcybgd.training import train_blocks
from fedtune.methods.local_training import train
from fedtune.models.blocks import find_blocks
from fedtune.models.load import quiet, seeded
from fedtune.models.memory_efficient import memory_efficient, release_memory
from fedtune.models.parts import find_parts
from fedtune.models.pruning import best, find_attention, find_mlp
from fedtune.models.tuning import trainable

EXAMPLES, TOKENS = 2, 256
STEPS = {
    "local_steps": 2,
    "batch_size": EXAMPLES,
    "lr": 1e-6,
}  # an optimizer has its state from the second on
BLOCKS = ("first", "middle", "last")


class Shape(NamedTuple):
    """A model's class and configuration."""

    kind: type[PreTrainedModel]
    config: dict[str, Any]

    def model(self) -> PreTrainedModel:
        """The model with random weights, always the same."""
        settings = GPT2Config(**self.config) if self.kind is GPT2LMHeadModel else LlamaConfig(**self.config)
        with seeded(0):
            return self.kind(settings).eval()


TINY = "tiny"  # runs first in each process, so that all libraries are loaded
SHAPES = {
    "GPT-2, 12 blocks": Shape(GPT2LMHeadModel, {}),
    "Llama, 22 blocks": Shape(
        LlamaForCausalLM,
        {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 22,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
        },
    ),
    TINY: Shape(
        GPT2LMHeadModel,
        {"vocab_size": 64, "n_embd": 32, "n_head": 2, "n_layer": 4, "bos_token_id": 0, "eos_token_id": 0},
    ),
}
BARE = ", no checkpointing"
OFFLOADED = ", offloaded"
TRAINED: dict[str, dict[str, Any]] = {
    "Fed-full": {"trainable": "full"},
    "FedLoRA": {"trainable": "lora", "lora": {"rank": 16}},
    "FedAdapter": {"trainable": "adapter", "adapter": {"size": 32}},
}
WHOLE = {
    f"{name}{other}": FedAvgConfig.model_validate(
        {
            **STEPS,
            **trained,
            "gradient_checkpointing": "none" if other == BARE else "full",
            "offload_params": "disk" if other == OFFLOADED else "none",
        }
    )
    for other in ("", BARE, OFFLOADED)
    for name, trained in TRAINED.items()
    if other != OFFLOADED or name != "Fed-full"  # nothing of it is frozen
}
CYCLE: dict[str, dict[str, Any]] = {
    "FedCyBGD": {},
    "FedCyBGD, layer-drop": {"compression": "layer-drop"},
    "FedCyBGD, hybrid": {"compression": "hybrid"},
    f"FedCyBGD{BARE}": {"gradient_checkpointing": "none"},
    f"FedCyBGD{OFFLOADED}": {"offload_params": "disk"},
}
CASES = [
    *WHOLE,
    *(f"FedCyBGD, {block}" for block in BLOCKS),
    "FedCyBGD, layer-drop, first",
    *(f"FedCyBGD, hybrid, {block}" for block in BLOCKS[1:]),  # the first is that of layer-drop
    *(f"FedCyBGD{BARE}, {block}" for block in BLOCKS),
    *(f"FedCyBGD{OFFLOADED}, {block}" for block in BLOCKS),
    "BAdam, first",
]
"""What is measured, of each shape; the first is what the others are compared with."""


def measure(shapes: tuple[str, ...] = tuple(SHAPES)[:2]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each shape and case, ratios to Fed-full and FedLoRA, and those of backward time."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for shape in shapes:
        found = {case: _elsewhere(measure_case, shape, case) for case in CASES}
        for key in ("peak_bytes", "rss_bytes"):
            for case, row in found.items():
                for other in ("Fed-full", "FedLoRA"):
                    alike = same_settings(case, other)
                    if case not in WHOLE and key in row and key in found[alike]:
                        ratios[f"{key}: {shape}: {case} / {alike}"] = row[key] / found[alike][key]
        times = _elsewhere(backward_seconds, shape, "FedCyBGD, first")
        for case, seconds in times["backward_seconds"].items():
            found[case] = found.get(case, {}) | {"backward_seconds": seconds}
            if not case.startswith("Fed-full"):
                alike = f"Fed-full{BARE}" if BARE in case else "Fed-full"
                name = f"backward_seconds: {shape}: {case}, mean over blocks / {alike}"
                ratios[name] = seconds / times["backward_seconds"][alike]
        rows += [{"case": f"{shape}: {case}", **row} for case, row in found.items()]
    return rows, ratios


def same_settings(case: str, other: str) -> str:
    """The case of another method that has the settings of `case`; offloading leaves Fed-full as it is."""
    more = next((each for each in (BARE, OFFLOADED) if each in case), "")
    return f"{other}{more}" if f"{other}{more}" in WHOLE else other


def measure_case(shape: str, case: str, folder: Path) -> dict[str, Any]:
    """Memory of one case, in this process."""
    with _client(TINY, case, folder) as warm:
        warm(MemoryMeter("cpu"))
    before = rss()
    known = forget_peak()
    with _client(shape, case, folder) as steps:
        meter = MemoryMeter("cpu")
        steps(meter)
        peak = peak_rss()
    row: dict[str, Any] = {"peak_bytes": meter.peak_bytes}
    if known and before is not None and peak is not None:
        row["rss_bytes"] = peak - before
    return row


def backward_seconds(shape: str, case: str, folder: Path) -> dict[str, Any]:
    """CPU seconds of Fed-full, and of FedCyBGD as the mean over blocks, measured in turn."""
    model = SHAPES[shape].model().train()
    batch = collate(_items(shape), 0)
    parts = find_parts(model)
    seconds: dict[str, list[float]] = {}
    for block in range(0, parts.blocks, 1 if parts.blocks < 20 else 3):
        for case in ("Fed-full", f"Fed-full{BARE}", "FedCyBGD", f"FedCyBGD{BARE}"):
            model.requires_grad_(case.startswith("Fed-full"))
            for parameter in parts.parameters[str(block)].values():
                parameter.requires_grad_(True)
            with memory_efficient(model, checkpointing="none" if BARE in case else "full"):
                loss = model(**batch).loss
                started = time.process_time()  # of a busy machine the clock on the wall says little
                loss.backward()
                seconds.setdefault(case, []).append(time.process_time() - started)
            model.zero_grad(set_to_none=True)
    return {"backward_seconds": {case: statistics.fmean(each) for case, each in seconds.items()}}


@contextmanager
def _client(shape: str, case: str, folder: Path) -> Iterator[Callable[[MemoryMeter], object]]:
    """What a client does in its steps, with what it holds while it does that."""
    if case in WHOLE:
        config = WHOLE[case]
        model = config.attach(SHAPES[shape].model(), seed=0)
        release_memory()
        yield lambda meter: train(_env(shape, model, meter), trainable(model), config)
        return
    name, _, where = case.rpartition(", ")
    if name == "BAdam":
        model = SHAPES[shape].model().requires_grad_(False)
        parts = find_parts(model)
        block = parts.named([str(_place(where, parts.blocks))])
        settings = BAdamConfig.model_validate(STEPS)
        yield lambda meter: train_blocks(
            _env(shape, model, meter), iter([block]), settings, checkpointing=settings.gradient_checkpointing
        )
        return
    cycle = BlockConfig.model_validate({**STEPS, **CYCLE[name]})
    with open(folder / shape, "rb") as file:  # taken up as it is from the network
        frame = empty_frame((folder / shape).stat().st_size)
        file.readinto(frame)
    job = decode(frame).payload
    del frame
    env = replace(_env(shape, nn.Module(), MemoryMeter("cpu")), store=Store(folder / "held"))
    turn = begin_turn(job, env, cycle)
    (own,) = turn.own.values()
    yield lambda meter: train_blocks(
        _env(shape, turn.model, meter),
        iter([own]),
        cycle,
        checkpointing=cycle.gradient_checkpointing,
        resident=[turn.resident],
    )


def write_order(shape: str, case: str, folder: Path) -> dict[str, Any]:
    """The frame of the order that a client gets in its first cycle, when its block's turn has come."""
    name, _, where = case.rpartition(", ")
    method = fedcybgd.FedCyBGD(BlockConfig.model_validate({**STEPS, **CYCLE[name]}), 0)
    model = cast(PreTrainedModel, method.client_model(SHAPES[shape].model))
    blocks = find_blocks(model).modules
    turn = _place(where, len(blocks))
    updated = {str(block): block + 1 for block in range(turn)}
    half = method.config.prune_ratio
    state = replace(
        method.init(model),
        turns=turn,
        versions=updated,
        heads={b: best(torch.ones(find_attention(blocks[int(b)]).groups), half) for b in updated},
        channels={b: best(torch.ones(find_mlp(blocks[int(b)]).width), half) for b in updated},
    )
    everyone = tuple(range(len(blocks)))
    (order,) = method.plan(state, 1, Cohort(everyone, dict.fromkeys(everyone, EXAMPLES), len(everyone)))
    frame = encode(Content(order.payload))
    return {"payload_bytes": order.payload.nbytes, "written": (folder / shape).write_bytes(frame)}


def _place(where: str, blocks: int) -> int:
    return {"first": 0, "middle": blocks // 2, "last": blocks - 1}[where]


def _items(shape: str) -> list[Encoded]:
    words = SHAPES[shape].config.get("vocab_size", GPT2Config().vocab_size)
    drawn = torch.randint(words, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return [Encoded(tuple(row), tuple(row)) for row in drawn.tolist()]


def _env(shape: str, model: nn.Module, meter: MemoryMeter) -> ClientEnv:
    return ClientEnv(
        client=0,
        round=1,
        seed=0,
        model=model,
        items=_items(shape),
        pad_id=0,
        state=Payload(),
        memory=meter,
        device=torch.device("cpu"),
        store=Store(),
    )


def _elsewhere(work: Callable[[str, str, Path], dict[str, Any]], shape: str, case: str) -> dict[str, Any]:
    """What `work` finds in a process of its own; orders, where a case needs them, are written by others."""
    with temporary_folder() as folder:
        if case.startswith("FedCyBGD") and work is measure_case:
            for each in {TINY, shape}:
                _process(write_order, each, case, folder)
        return _process(work, shape, case, folder)


def _process(
    work: Callable[[str, str, Path], dict[str, Any]], shape: str, case: str, folder: Path
) -> dict[str, Any]:
    process = _context.Process(target=_answer, args=(work.__name__, shape, case, str(folder)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{shape}: {case}: {work.__name__} ended with status {process.exitcode}")
    answer: dict[str, Any] = json.loads((folder / work.__name__).read_text(encoding="utf-8"))
    return answer


def _answer(work: str, shape: str, case: str, folder: str) -> None:
    with quiet():
        found = globals()[work](shape, case, Path(folder))
    (Path(folder) / work).write_text(json.dumps(found), encoding="utf-8")


# forked, where that can be, from a server that has done the imports and nothing else
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_context: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _context.set_forkserver_preload([__name__])
