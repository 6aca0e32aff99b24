"""Answers in padded batches against `transformers.generate` on one example after the other.

The bundled model answers prompts of its held-out examples greedily: once up to the end token, where answers
are a few tokens and differ in length, and once without an end token, where all have the same length. Both
ways give the same tokens; a difference is an error. The two take turns, and the ratio is the median of the
pairs, since a machine's speed drifts.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fedtune.data import templates
from fedtune.data.encode import encode_prompts
from fedtune.data.sources import bundled_examples
from fedtune.evaluation.generation import generate_ids
from fedtune.models.load import Loaded, load_model

NEW_TOKENS = 32
BATCHES = (8, 32, 128)
REPEATS = 3


def measure(short: int = 128, long: int = 32) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of each way, and ratios of tokens a second to one example after the other.

    Args:
        short: Prompts answered up to the end token.
        long: Prompts answered by NEW_TOKENS tokens each.
    """
    loaded = load_model("bundled", dtype="float32", initial="pretrained", seed=0, base=Path("."))
    endless = copy.deepcopy(loaded)
    endless.tokenizer.eos_token = None
    endless.model.generation_config.eos_token_id = None
    texts = [templates.prompt(example, "plain") for example in bundled_examples("test")]
    prompts, _ = encode_prompts(texts, loaded.tokenizer, max_length=None)
    _alone(loaded, prompts[:2]), _batched(loaded, prompts[:2], 2)  # loads what is loaded late
    rows, ratios = list[dict[str, Any]](), dict[str, float]()
    for what, model, count in (
        ("answers to the end", loaded, short),
        (f"{NEW_TOKENS} tokens each", endless, long),
    ):
        more_rows, more_ratios = _pairs(what, model, prompts[:count])
        rows += more_rows
        ratios |= more_ratios
    return rows, ratios


def _pairs(
    what: str, loaded: Loaded, prompts: list[list[int]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    sizes = [size for size in BATCHES if size <= len(prompts)] or [len(prompts)]
    timed: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    tokens = 0
    for _ in range(REPEATS):
        expected, alone = _alone(loaded, prompts)
        tokens = sum(map(len, expected))
        for size in sizes:
            answers, seconds = _batched(loaded, prompts, size)
            assert answers == expected
            timed[size].append((seconds, alone))
    slow = statistics.median(alone for _, alone in timed[sizes[0]])
    rows = [_row(f"{what}, transformers.generate one at a time", slow, tokens)]
    ratios = {}
    for size, pairs in timed.items():
        rows.append(_row(f"{what}, batches of {size}", statistics.median(s for s, _ in pairs), tokens))
        ratio = statistics.median(alone / seconds for seconds, alone in pairs)
        ratios[f"tokens a second: {what}, batches of {size} / one at a time"] = ratio
    return rows, ratios


def _alone(loaded: Loaded, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    model: Any = loaded.model
    end, answers = loaded.tokenizer.eos_token_id, []
    started = time.perf_counter()
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=loaded.tokenizer.pad_token_id,
            )
            answers.append(out[0, len(prompt) :].tolist())
    seconds = time.perf_counter() - started
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers], seconds


def _batched(loaded: Loaded, prompts: list[list[int]], size: int) -> tuple[list[list[int]], float]:
    started = time.perf_counter()
    answers = generate_ids(
        loaded.model, loaded.tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=size
    )
    return answers, time.perf_counter() - started


def _row(case: str, seconds: float, tokens: int) -> dict[str, Any]:
    return {"case": case, "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
