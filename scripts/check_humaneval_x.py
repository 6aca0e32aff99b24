"""Runs every canonical solution of HumanEval-X, and every problem with its body replaced; prints a table.

    python scripts/check_humaneval_x.py FOLDER [LANGUAGE ...]

FOLDER holds humaneval_python.jsonl and so on. All 164 of a language must pass in its first row and none in
its second, but for Go/95, whose own solution fails now and then (see fedtune/evaluation/languages.py). A
language whose compiler is not here is left out, with the reason. Some ten minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from fedtune.evaluation.code import verdicts
from fedtune.evaluation.compilers import Missing
from fedtune.evaluation.languages import LANGUAGES
from fedtune.evaluation.sandbox import CodeSettings

REPLACED = {
    "python": "    return NotImplemented\n",
    "cpp": "    throw 1;\n}\n",
    "java": "        throw new IllegalStateException();\n    }\n}\n",
    "go": "    panic(1)\n}\n",
}


def rows(folder: Path, name: str) -> list[str]:
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


if __name__ == "__main__":
    print("| compiler | solutions | programs | passed | failed |\n|---|---|---:|---:|---|")
    for language_name in sys.argv[2:] or LANGUAGES:
        print("\n".join(rows(Path(sys.argv[1]), language_name)), flush=True)
