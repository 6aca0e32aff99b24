"""The command `fedtune` on a pretended GPU, with a small shape in the place of a billion weights."""

from __future__ import annotations

from functools import partial

from pretended_gpu import PretendedGpu

from fedtune.bench import gpu_speed, zo_step
from fedtune.cli.main import main

SMALL = {
    "vocab_size": 32000,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}

if __name__ == "__main__":
    gpu_speed.measure = partial(gpu_speed.measure, SMALL)  # type: ignore[assignment]
    gpu_speed.TURNS = zo_step.REPEATS = 1
    gpu_speed.SEEDS = zo_step.SEEDS = 64
    with PretendedGpu():
        main()
