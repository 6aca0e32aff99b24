"""A run to serve, and how it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fedtune

LORA: dict[str, Any] = {
    "data": {"train": "bundled", "clients": 2, "max_examples": 8, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.05, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}
CHAT = "/v1/chat/completions"
KEY = "a-key-of-25-characters-00"


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "mine", "messages": [{"role": "user", "content": text}], **more}


RIGHT = chat("Add 2 and 3.")


def run_to_serve(folder: Path) -> fedtune.Run:
    return fedtune.run(LORA, out=folder / "mine", progress=False)
