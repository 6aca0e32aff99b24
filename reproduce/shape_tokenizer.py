"""CLIP's tokenizer for captions of drawn shapes: every word that they have is one token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from score_pictures import TOKENS
from transformers import CLIPTokenizer

from fedtune.data import shapes

IDENTIFIERS = ("sks", "zwx", "vrn", "qpl", "tuj")  # words without a meaning yet, for subjects
WORDS = (
    *("a", "an", "two", "on", "background", "and", "small", "big", "photo", "of", "picture", "the", "in"),
    *("with", "toy", "drawing", *IDENTIFIERS, *shapes.COLOURS, *shapes.PATTERNS),
    *(noun for shape in (*shapes.SHAPES, *shapes.OTHERS) for noun in (shape, shapes.plural(shape))),
)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE whose merges spell `WORDS`, each one token; any other word goes down to bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + at) for at in range(len(others))]
    vocabulary = {token: at for at, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    rank: dict[tuple[str, str], int] = {}
    for word in sorted(set(WORDS), key=lambda word: (len(word), word)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            at = min(range(len(pairs)), key=lambda at: rank.get(pairs[at], len(rank)))
            rank.setdefault(pairs[at], len(rank))
            parts[at : at + 2] = ["".join(pairs[at])]
            vocabulary.setdefault(parts[at], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in rank)
    )
    made: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    made.save_pretrained(folder)
    return made
