"""Puts every kind of task to one model in one `fedtune eval --json` call, and prints its scores as a table.

    python scripts/check_evaluation.py MODEL DATA [LIMIT]

DATA is laid out as docs/evaluation.md says, with glue/, gsm8k/, squad/, humaneval_x/ and mt_bench/ in it. A
server on the loopback plays MT-bench's judge: its marks follow the length of an answer and mean nothing. Each
task takes its first LIMIT examples (10), and answers are short: the scores show that all of it works.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedtune.cli.main import app

TASKS = (
    *("loss", "accuracy", "rouge-l", "rouge-l-fedkseed", "matthews", "pearson"),
    *("arc_challenge_local", "arc_easy_local", "openbookqa_local", "mmlu_local", "glue_local"),
    *("gsm8k_local", "gsm8k_cot_local", "gsm8k-0shot", "gsm8k-cot-8shot", "squad"),
    *("humaneval-x-python", "humaneval-x-cpp", "humaneval-x-java", "humaneval-x-go", "mt-bench"),
)


class Judge(BaseHTTPRequestHandler):
    """Marks an answer 1 to 10 by its length."""

    def do_POST(self) -> None:
        """One chat completion."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mark = 1 + len(asked["messages"][-1]["content"]) % 10
        reply = json.dumps({"choices": [{"message": {"content": f"Rating: [[{mark}]]"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is for fedtune."""


def settings(data: str, limit: int, port: int) -> list[str]:
    """What the tasks need. The held-out examples are SST-2's, whose labels 0 and 1 are also numbers."""
    humaneval = [
        f"evaluation.files.humaneval-x-{name}={data}/humaneval_x/humaneval_{name}.jsonl"
        for name in ("python", "cpp", "java", "go")
    ]
    return [
        f"data.train={data}/glue/sst2_dev.jsonl",
        "data.fields={instruction: sentence, output: label}",
        "data.holdout={fraction: 0.5}",
        f"evaluation.max_examples={limit}",
        f"evaluation.limit={limit}",
        "evaluation.max_new_tokens=48",
        "evaluation.batch_size=16",
        f"evaluation.data_folder={data}",
        f"evaluation.files.gsm8k={data}/gsm8k/test.jsonl",
        f"evaluation.files.gsm8k-exemplars={data}/gsm8k/train.jsonl",
        f"evaluation.files.squad={data}/squad/xquad.en.json",
        *humaneval,
        f"evaluation.files.mt-bench={data}/mt_bench/mt_bench_question.jsonl",
        f"evaluation.files.mt-bench-references={data}/mt_bench/mt_bench_reference_answer_gpt-4.jsonl",
        f"evaluation.files.mt-bench-prompts={data}/mt_bench/judge_prompts.jsonl",
        f"evaluation.judge={{url: 'http://127.0.0.1:{port}/v1', model: plays-the-judge}}",
    ]


def rows(document: dict[str, Any]) -> list[str]:
    """A line a task: its main metric, or the first it has."""
    lines = []
    for task, about in document["tasks"].items():
        scores = document["scores"]["model"][task]
        metric = about["metric"] if about["metric"] in scores else next(iter(scores))
        error = scores.get(f"{metric}_stderr")
        error_text = "" if error is None else f" ± {error:.4f}"
        said = re.sub(r", [^,]*\bplays-the-judge\b", "", "; ".join(about["notes"]))
        lines.append(
            f"| {task} | {metric} | {scores[metric]:.4f}{error_text} | {scores.get('examples', '')} "
            f"| {about['scorer']} | {said} |"
        )
    return lines


if __name__ == "__main__":
    model, folder = sys.argv[1:3]
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    call = ["eval", model, "--tasks", ",".join(TASKS), "--json", *settings(folder, first, server.server_port)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app(call, standalone_mode=False)
    print("| task | metric | score ± standard error | examples | scorer | notes |")
    print("|---|---|---:|---:|---|---|")
    print("\n".join(rows(json.loads(out.getvalue()))))
