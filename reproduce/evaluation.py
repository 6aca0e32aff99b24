"""Checks of evaluation: the bundled model, a real one, every kind of task, and HumanEval-X's own solutions.

The data folder is laid out as docs/evaluation.md says, with glue/, gsm8k/, squad/, humaneval_x/ and mt_bench/
in it.

Table:   the bundled model; docs/evaluation.md, block eval-bundled
Command: python reproduce/evaluation.py eval-bundled
Time:    20 seconds
Needs:   nothing
Result:  loss 2.5737 ± 0.1601, accuracy 0.4278 ± 0.0261, Rouge-L 0.5262 ± 0.0242

Table:   a real model on local files; docs/evaluation.md, block eval-local
Command: python reproduce/evaluation.py eval-local
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data, extra `eval`
Result:  ARC easy 0.3100 ± 0.0465, OpenBookQA 0.1200 ± 0.0327

Table:   every kind of task; docs/evaluation.md, block eval-all
Command: python reproduce/evaluation.py eval-all
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data, extra `eval`, compilers of C++, Java and Go
Result:  all kinds run; MMLU's 570 questions 0.2456 ± 0.0180

Table:   HumanEval-X's own solutions, and each problem with its body replaced; docs/evaluation.md, block
         humaneval-x-check
Command: python reproduce/evaluation.py humaneval-x-check
Time:    some ten minutes
Needs:   ../shared/data/humaneval_x, compilers of C++, Java and Go
Result:  all 164 of each language pass, and 0 with the body replaced; one of Go may fail, whose own
         solution does now and then

Table:   answers in batches against one after the other; docs/evaluation.md, block bench-generation
Command: python reproduce/evaluation.py bench-generation
Time:    a minute
Needs:   nothing
Result:  12.1 times the tokens a second with batches of 32

Table:   held-out losses against a loop with whole logits; docs/evaluation.md, block bench-evaluation
Command: python reproduce/evaluation.py bench-evaluation
Time:    a minute
Needs:   extra `eval` for the row of lm-eval
Result:  0.5 and 0.174 of the loop's CPU time, 0.139 and 0.138 of its memory
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common import DATA, MODELS, Entry, Printed, bench, main

from fedtune.cli.main import app
from fedtune.evaluation.code import verdicts
from fedtune.evaluation.compilers import Missing
from fedtune.evaluation.languages import LANGUAGES
from fedtune.evaluation.sandbox import CodeSettings

MODEL, FIRST = MODELS / "instruct-7m", 10  # examples a task

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


def settings(data: Path, limit: int, port: int) -> list[str]:
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


def every_task() -> str:
    """Every kind of task in one call.

    A server on the loopback plays MT-bench's judge: its marks follow the length of an answer and mean
    nothing. Answers are short: the scores show that all of it works.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = settings(DATA, FIRST, server.server_port)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app(["eval", str(MODEL), "--tasks", ",".join(TASKS), "--json", *own], standalone_mode=False)
    server.shutdown()
    header = (
        "| task | metric | score ± standard error | examples | scorer | notes |\n|---|---|---:|---:|---|---|"
    )
    return "\n".join([header, *rows(json.loads(out.getvalue()))])


REPLACED = {
    "python": "    return NotImplemented\n",
    "cpp": "    throw 1;\n}\n",
    "java": "        throw new IllegalStateException();\n    }\n}\n",
    "go": "    panic(1)\n}\n",
}


def canonical(folder: Path, name: str) -> list[str]:
    """The table's two rows of one language."""
    language = LANGUAGES[name]
    text = (folder / f"humaneval_{name}.jsonl").read_text(encoding="utf-8")
    problems = [json.loads(line) for line in text.split("\n") if line]
    made = []
    try:
        with language.toolchain() as toolchain:
            kept = [problem for problem in problems if not toolchain.lacks(problem)]
            for what in ("canonical", "replaced"):
                bodies = [
                    each["canonical_solution"] if what == "canonical" else REPLACED[name] for each in kept
                ]
                programs = [(each, language.program(each, b)) for each, b in zip(kept, bodies, strict=True)]
                found = verdicts(language, toolchain, programs, CodeSettings())
                kinds = Counter(kind for kind in found if kind != "passed")
                failed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()) or "none"
                version = language.version()
                made.append(f"| {version} | {what} | {len(found)} | {found.count('passed')} | {failed} |")
    except Missing as why:
        made.append(f"| {name}: {why} | | 0 | | |")
    return made


def solutions() -> str:
    """Every language whose compiler is here; another one has its reason in the table."""
    header = "| compiler | solutions | programs | passed | failed |\n|---|---|---:|---:|---|"
    folder = DATA / "humaneval_x"
    return "\n".join([header, *(row for language in LANGUAGES for row in canonical(folder, language))])


ENTRIES = {
    "eval-bundled": Entry(Printed(("fedtune", "eval", "bundled", "--tasks", "loss,accuracy,rouge-l"))),
    "eval-local": Entry(
        Printed(
            (
                *("fedtune", "eval", str(MODEL), "--tasks", "arc_easy_local,openbookqa_local,glue_local"),
                *(f"evaluation.data_folder={DATA}", "evaluation.limit=100"),
            )
        ),
        needs=(MODEL, DATA, "lm_eval"),
    ),
    "eval-all": Entry(every_task, needs=(MODEL, DATA, "lm_eval", "rouge")),
    "humaneval-x-check": Entry(solutions, needs=[DATA / "humaneval_x"]),
    "bench-generation": bench("generation"),
    "bench-evaluation": bench("evaluation"),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
