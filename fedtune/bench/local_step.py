"""A client's local steps against a loop as one writes it, transformers.Trainer, and TRL where there is one.

Random Llamas of two shapes, one with a small and one with a large vocabulary, LoRA and all weights, batches
of 4 examples of 16 to 128 tokens of which a quarter carry loss, or all. All ways take AdamW steps on the same
batches from the same weights and take turns; that they end at the same weights is checked
(`largest_difference`). Seconds are the processor's, of all steps, without what is done once before them;
`least` and `most` are ratios to the loop by hand of the same turn, of which the median is below the table.
`peak_bytes` is what tensors hold at most, beside the weights.

* by hand: `model(..., labels=...).loss`, `backward`, torch's fused AdamW, a rate that falls linearly.
* Trainer, TRL: their own loops at their defaults, without clipping, logs or files. They warm nothing up.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.core.store import Store
from fedtune.core.types import ClientEnv, Payload
from fedtune.data.batches import collate, on_device
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.local_training import step_batches, train
from fedtune.models.load import load_tokenizer, quiet, seeded
from fedtune.models.tuning import trainable

EXAMPLES, BATCH, STEPS, REPEATS = 32, 4, 6, 3
SMALL = {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 4}
LARGE = {"vocab_size": 151936, "hidden_size": 128, "num_hidden_layers": 4}
SHAPES: dict[str, tuple[dict[str, int], int]] = {  # and which part of the tokens has loss
    "32,000 words": (SMALL, 4),
    "32,000 words, loss on all": (SMALL, 1),
    "151,936 words": (LARGE, 4),
}
TRAINED: dict[str, dict[str, Any]] = {
    "LoRA": {"trainable": "lora", "lora": {"rank": 16}},
    "all weights": {"trainable": "full"},
}
RATE = 1e-3
ALIKE = 0.1 * RATE * STEPS  # Adam's first steps are of size RATE whatever the gradient's
Way = Callable[[ClientEnv, Config], Callable[[], object]]


def measure(shapes: Sequence[str] = tuple(SHAPES)) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row of each shape, of what is trained and of each way, and ratios to the loop by hand."""
    ways: dict[str, Way] = {"by hand": by_hand, "fedtune": by_fedtune, "Trainer": _trainer}
    if importlib.util.find_spec("trl") is not None:
        ways["TRL"] = _trl
    rows, ratios = list[dict[str, Any]](), dict[str, float]()
    for shape in shapes:
        for kind, trained in TRAINED.items():
            case = f"{shape}, {kind}"
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            peaks, found = dict[str, int](), dict[str, dict[str, Tensor]]()
            config = Config.model_validate(
                {"batch_size": BATCH, "local_steps": STEPS, "lr": RATE, "gradient_checkpointing": "none"}
                | trained
            )
            with quiet():
                model = config.attach(_model(shape), seed=0)
            start = {n: p.detach().clone() for n, p in trainable(model).items()}
            weights = sum(p.nbytes for p in model.parameters())
            for turn in range(1 + REPEATS):  # the first is of the memory, and warms what there is to warm
                for name, way in ways.items():
                    env = _env(model, shape)
                    with torch.no_grad():
                        for key, parameter in trainable(model).items():
                            parameter.copy_(start[key])
                    steps = way(env, config)
                    if not turn:
                        if name == "fedtune":  # whose steps are measured as in a run
                            steps()
                        else:
                            with env.memory.whole([model]):
                                steps()
                        peaks[name] = env.memory.peak_bytes - weights
                        found[name] = {n: p.detach().clone() for n, p in trainable(model).items()}
                        continue
                    started = time.process_time()
                    steps()
                    seconds[name].append(time.process_time() - started)
            for name, after in found.items():
                off = max(float((w - found["by hand"][n]).abs().max()) for n, w in after.items())
                assert off < ALIKE, (case, name, off)
                of = [own / plain for own, plain in zip(seconds[name], seconds["by hand"], strict=True)]
                row = {"case": f"{case}: {name}", "cpu_seconds": statistics.median(seconds[name])}
                row |= {"least": min(of), "most": max(of)} if name != "by hand" else {}
                rows.append(row | {"peak_bytes": peaks[name], "largest_difference": off})
                if name != "by hand":
                    ratios[f"cpu_seconds: {case}: {name} / by hand"] = statistics.median(of)
                    ratios[f"peak_bytes: {case}: {name} / by hand"] = peaks[name] / peaks["by hand"]
    return rows, ratios


def _model(shape: str) -> LlamaForCausalLM:
    sizes, _ = SHAPES[shape]
    config = LlamaConfig(
        **sizes,  # type: ignore[arg-type]  # numbers all
        intermediate_size=sizes["hidden_size"] * 8 // 3,
        num_attention_heads=sizes["hidden_size"] // 64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with seeded(0):
        return LlamaForCausalLM(config)


def _env(model: torch.nn.Module, shape: str) -> ClientEnv:
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in torch.randint(16, 129, (EXAMPLES,), generator=generator).tolist():
        sizes, part = SHAPES[shape]
        ids = tuple(torch.randint(3, sizes["vocab_size"], (length,), generator=generator).tolist())
        prompt = length - length // part
        items.append(Encoded(ids, (IGNORED,) * prompt + ids[prompt:]))
    return ClientEnv(
        client=0,
        round=1,
        seed=0,
        model=model,
        items=items,
        pad_id=0,
        state=Payload(),
        memory=MemoryMeter("cpu"),
        device=torch.device("cpu"),
        store=Store(),
    )


def _batches(env: ClientEnv, config: Config) -> Iterator[list[Encoded]]:
    """The batches that fedtune draws, for the others."""
    for _, ((indices,)) in zip(range(STEPS), step_batches(env, config), strict=False):
        yield [env.items[index] for index in indices]


def by_fedtune(env: ClientEnv, config: Config) -> Callable[[], object]:
    """The steps of a client of FedAvg."""
    return lambda: train(env, trainable(env.model), config)


def by_hand(env: ClientEnv, config: Config) -> Callable[[], object]:
    """The same steps as one writes them down."""

    def steps() -> None:
        parameters = list(trainable(env.model).values())
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        env.model.train()
        for items in _batches(env, config):
            env.model(**on_device(collate(items, 0), env.device)).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return steps


def _trainer(env: ClientEnv, config: Config) -> Callable[[], object]:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as out:  # made by the trainer, and nothing is saved in it
        given = _given(Trainer, env, config)(
            model=env.model,
            args=TrainingArguments(output_dir=out, **ARGUMENTS),
            train_dataset=_Rows(env.items),
        )
    return _quietly(given)


def _trl(env: ClientEnv, config: Config) -> Callable[[], object]:
    import datasets
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found, unused-ignore]

    rows = datasets.Dataset.from_list([{"input_ids": list(item.input_ids)} for item in env.items])
    datasets.disable_progress_bars()
    with (
        quiet(),
        warnings.catch_warnings(action="ignore"),
        tempfile.TemporaryDirectory() as out,
    ):
        given = _given(SFTTrainer, env, config)(
            model=env.model,
            args=SFTConfig(output_dir=out, **ARGUMENTS, gradient_checkpointing=False),
            train_dataset=rows,
            processing_class=load_tokenizer("bundled", Path(".")),
        )
    return _quietly(given)


def _given(kind: Any, env: ClientEnv, config: Config) -> Any:
    """A class of trainers that takes fedtune's batches."""
    batches = [collate(items, 0) for items in _batches(env, config)]
    return type("Given", (kind,), {"get_train_dataloader": lambda self: batches})


def _quietly(trainer: Any) -> Callable[[], object]:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)

    def steps() -> None:
        with quiet(), warnings.catch_warnings(action="ignore"):
            trainer.train()

    return steps


class _Rows(torch.utils.data.Dataset[Encoded]):
    """So many examples, which are not asked for."""

    def __init__(self, items: Sequence[Encoded]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)


ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": RATE,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "linear",
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
