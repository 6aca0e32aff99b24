"""A checkpoint is mapped, and widened tensor by tensor: loading takes no second copy of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_families import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

MB = 10**6

LOADED = """
import json, sys, threading
from pathlib import Path
import torch
from fedtune.models.load import load_model

def anonymous():  # memory of the process's own; what is mapped from a file is the file's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def load(name, dtype):
    return load_model(name, dtype=dtype, initial="pretrained", seed=0, base=Path(".")).model

load("bundled", "float32")  # so that what is imported on the way is there
before, over, seen = anonymous(), threading.Event(), [0]

def watch():
    while not over.wait(0.002):
        seen.append(anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], sys.argv[2])
over.set()
thread.join()
print(json.dumps([max(seen) - before, anonymous() - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """73 million bfloat16 weights in four files."""
    path = tmp_path_factory.mktemp("large") / "model"
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 4}
    config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=2048, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(path, max_shard_size="40MB")
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for a process's memory")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_no_copy_beside_the_weights(checkpoint: Path, dtype: str) -> None:
    """As it is stored, nothing of its own; widened, the wide weights and no narrow ones beside them."""
    command = [sys.executable, "-c", LOADED, str(checkpoint), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, after, weights = json.loads(done.stdout.splitlines()[-1])
    own = 0 if dtype == "bfloat16" else weights
    assert weights > 140 * MB
    assert own <= after + MB  # the weights are there
    assert peak < own + 40 * MB  # a whole second copy would be 146 MB at least
