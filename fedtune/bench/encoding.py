"""Encoding clients' examples: CPU time against the plain tokenizer on the same texts, and bytes a token.

Examples are generated, 100 a client. The reference gives the tokenizer the same prompts and answers, in as
long lists, and keeps its lists of token ids. 1 % of the clients is every hundredth.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.core.temporary import temporary_folder
from fedtune.data.cache import EncodedCache
from fedtune.data.encode import AT_ONCE, texts
from fedtune.data.encoded import EncodedSet
from fedtune.data.examples import Example
from fedtune.federation.client_data import ClientData
from fedtune.federation.encoding import Keys, encode_for
from fedtune.measure.clock import Clock
from fedtune.models.load import load_tokenizer

SIZES = (50, 200)  # clients
OF_CLIENT, MOST, REPEATS = 100, 512, 3
T = TypeVar("T")


def measure() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows for the tokenizer alone, all clients, all from disk, and 1 % of them; by number of clients."""
    config = parse_config({"method": {"name": "fedavg"}}, "the benchmark")
    rows, ratios = list[dict[str, Any]](), dict[str, float]()
    for size in SIZES:
        with temporary_folder() as folder:
            cases = _cases(config, _generated(size), Path(folder))
        reference = cases["tokenizer alone"]
        for case, (seconds, tokens, held) in cases.items():
            of_token = held / tokens
            rows.append(
                {
                    "case": f"{size * OF_CLIENT:,} examples, {case}",
                    "cpu_seconds": seconds,
                    "tokens": tokens,
                    "bytes_a_token": of_token,
                }
            )
            if case != "tokenizer alone":
                ratios[f"cpu_seconds: {size * OF_CLIENT:,} examples, {case} / tokenizer alone"] = (
                    seconds / reference[0]
                )
        ratios[f"bytes_a_token: {size * OF_CLIENT:,} examples, arrays / lists"] = (
            cases["all clients"][2] / cases["all clients"][1] / (reference[2] / reference[1])
        )
    return rows, ratios


def _cases(
    config: RunConfig, clients: dict[int, list[Example]], folder: Path
) -> dict[str, tuple[float, int, int]]:
    """CPU seconds, tokens, and bytes that hold them, of each case."""
    tokenizer = load_tokenizer(config.model.name, Path("."))

    def encode(client: int, examples: Any) -> EncodedSet:
        return encode_for(config, examples, tokenizer, (), max_length=MOST, whose=f"client {client}")

    def asked(who: list[int], cache: bool) -> tuple[int, int]:
        keys = Keys(config, tokenizer, (), MOST)
        data = ClientData(clients, encode, keys, empty=True, clock=Clock())
        if cache:
            data.cache = EncodedCache(folder)
            data.begin()
        each = [data[client] for client in who]
        return sum(len(items.ids) for items in each), sum(items.nbytes for items in each)

    def alone() -> list[list[int]]:
        kept: list[list[int]] = []
        for part in written:
            kept += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return kept

    whole = [example for examples in clients.values() for example in examples]
    written = [
        [str(text) for text in part]
        for start in range(0, len(whole), AT_ONCE)
        for part in texts(whole[start : start + AT_ONCE], config.data.template, tokenizer)
    ]
    everyone = list(clients)
    seconds, lists = _timed(alone, REPEATS)
    integer = sys.getsizeof(2**20)  # of those up to 256 Python has one each
    held = sum(sys.getsizeof(ids) + integer * sum(i > 256 for i in ids) for ids in lists)
    found = {"tokenizer alone": (seconds, sum(map(len, lists)), held)}
    for case, who, cache in (
        ("all clients", everyone, False),
        ("all clients, and written to disk", everyone, True),
        ("all clients, from disk", everyone, True),
        ("1 % of the clients", everyone[::100], False),
    ):
        seconds, (tokens, held) = _timed(
            lambda who=who, cache=cache: asked(who, cache),  # type: ignore[misc]
            1 if cache else REPEATS,
        )
        found[case] = seconds, tokens, held
    return found


def _timed(do: Callable[[], T], times: int) -> tuple[float, T]:
    """CPU seconds of the quickest of so many, and what it gave."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        found = do()
        seconds.append(time.process_time() - started)
    return min(seconds), found


def _generated(clients: int) -> dict[int, list[Example]]:
    """Words of letters at random, in lengths as of instructions and answers."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 2000)]

    def text(least: int, most: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(least, most)))

    return {
        client: [Example(text(8, 30), text(0, 14), text(10, 70)) for _ in range(OF_CLIENT)]
        for client in range(clients)
    }
