"""A judge for machines without one: likeness to the reference answer, behind the interface of a real judge.

The mark is 1 + 9 · max(0, cos(answer, reference)) of a sentence encoder, a MiniLM, whose embeddings are means
over tokens. It cannot tell a true answer from a false one in the same words. What it shows is the whole way
from a run to its marks, through the endpoint, prompts and parsing of a language model that judges, and which
of two models stays nearer to what people wrote.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from common import MODELS
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ENCODER = MODELS / "minilm-l6"
NAME = "likeness by minilm-l6"
REFERENCE = ("[The Start of Reference Answer]\n", "\n[The End of Reference Answer]")
ANSWER = ("[The Start of Assistant's Answer]\n", "\n[The End of Assistant's Answer]")


@cache
def encoder() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The encoder, as it was trained to be used: the mean of its last states."""
    model: PreTrainedModel = AutoModel.from_pretrained(ENCODER, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(ENCODER), model.eval()


def embedded(texts: Sequence[str]) -> Tensor:
    """(texts, width), each of length 1; an empty text is zeros."""
    tokenizer, model = encoder()
    inputs = tokenizer([text or " " for text in texts], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs.attention_mask[..., None]
    means = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return means * torch.tensor([[float(bool(text.strip()))] for text in texts])


def mark(answer: str, reference: str) -> float:
    """From 1 to 10."""
    first, second = embedded([answer, reference])
    return 1 + 9 * max(0.0, float(first @ second))


def between(text: str, ends: tuple[str, str]) -> str:
    """What stands between two lines of a judge's prompt.

    Raises:
        ValueError: They are not there.
    """
    _, begin, rest = text.partition(ends[0])
    found, end, _ = rest.rpartition(ends[1]) if ends is ANSWER else rest.partition(ends[1])
    if not (begin and end):
        raise ValueError(f"the prompt has no {ends[0].strip()}")
    return found


@contextmanager
def judging() -> Iterator[str]:
    """The address of a judge that answers while this lasts, on this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Judge(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][-1]["content"]
        given = mark(between(said, ANSWER), between(said, REFERENCE))
        reply = {"role": "assistant", "content": f"By its likeness to the reference: [[{given:.4f}]]"}
        body = json.dumps({"choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a run has hundreds of requests."""


def as_questions(folder: Path, talks: Sequence[Sequence[str]], prompts: Path) -> dict[str, str]:
    """Writes questions and their answers as MT-bench has them; what `evaluation.files` is then.

    Args:
        folder: Where.
        talks: Of each a question and the answer that people wrote.
        prompts: The published prompts of the judge.
    """
    questions = folder / "judged.jsonl"
    references = folder / "judged_references.jsonl"
    # "reasoning" is a category whose prompt has the reference answer in it, asked greedily
    rows = [{"question_id": n, "category": "reasoning", "turns": [ask]} for n, (ask, _) in enumerate(talks)]
    known = [{"question_id": n, "choices": [{"turns": [said]}]} for n, (_, said) in enumerate(talks)]
    for path, lines in ((questions, rows), (references, known)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {
        "mt-bench": str(questions),
        "mt-bench-references": str(references),
        "mt-bench-prompts": str(prompts),
    }
