"""FedCyBGD beside full tuning, LoRA and adapters on other tasks of GLUE, at the rates that SST-2 gave.

Table:   Table 3, CoLA with MiniLM; docs/claims.md, block table3-cola
Command: python reproduce/fedcybgd_glue.py table3-cola
Time:    not measured
Needs:   ../shared/models/minilm-l6, ../shared/data/glue
Result:  1

Table:   Table 3, MRPC with MiniLM; docs/claims.md, block table3-mrpc
Command: python reproduce/fedcybgd_glue.py table3-mrpc
Time:    not measured
Needs:   ../shared/models/minilm-l6, ../shared/data/glue
Result:  1

Table:   Table 3, RTE with MiniLM; docs/claims.md, block table3-rte
Command: python reproduce/fedcybgd_glue.py table3-rte
Time:    not measured
Needs:   ../shared/models/minilm-l6, ../shared/data/glue
Result:  1
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from functools import partial

from claims import OUT, Claim, Outcome, Trials, Verdict, compared_sides, entry
from common import DATA, MODELS, ROOT, Entry, main, spread
from fedcybgd_claims import BATCH, CLIENTS, CYCLES, DECIDING, MARGIN, NEEDS, SST2, of_others

TASKS = {  # columns, parts of training and test, examples of a client, tokens
    "cola": ("sentence", "", "cola_in_domain_train", "cola_in_domain_dev", 128, 32),
    "mrpc": ("sentence1", "sentence2", "mrpc_train", "mrpc_test", 64, 96),
    "rte": ("sentence1", "sentence2", "rte_train", "rte_dev", 64, 96),
}
PRINTED = {
    "cola": "Matthews' correlation 0.57, 0.45, 0.42 and 0.52",
    "mrpc": "accuracy 0.87, 0.72, 0.71 and 0.80",
    "rte": "accuracy 0.73, 0.55, 0.56 and 0.57",
}
LEARNED = 0.02  # accuracy above the more common class
SCORED = (
    "evaluation={tasks: [loss, accuracy, matthews], every: 0, max_examples: 500, batch_size: 64}",
    "evaluation.bootstrap=0",
)


def trials(task: str) -> Trials:
    """The four sides that decide Table 3, on a task."""
    first, second, train, test, examples, tokens = TASKS[task]
    fields = f"instruction: {first}, {f'input: {second}, ' if second else ''}output: label"
    data = DATA / "glue"
    return Trials(
        OUT / f"table3-{task}",
        DECIDING,
        (
            f"model={{name: {MODELS / 'minilm-l6'}, task: classification}}",
            f"data={{train: {data / train}.jsonl, fields: {{{fields}}}, template: plain, "
            f"max_length: {tokens}, max_examples: {CLIENTS * examples}, clients: {CLIENTS}, "
            f"batching: length-grouped, holdout: {{source: {data / test}.jsonl}}}}",
            f"method.batch_size={BATCH}",
        ),
        SCORED,
    )


def common_class(task: str) -> float:
    """Share of the most common class among the test examples."""
    lines = (ROOT / DATA / f"glue/{TASKS[task][3]}.jsonl").read_text(encoding="utf-8").splitlines()
    return max(Counter(json.loads(line)["label"] for line in lines).values()) / len(lines)


def task_table(task: str) -> str:
    """Scores of each side beside Fed-full's."""
    asked = trials(task)
    zero = spread(asked.scores("Fed-full", "accuracy", "zero_shot"))
    rates = ", ".join(f"{side.name} {asked.rate(side):.0e}".replace("e-0", "e-") for side in asked.sides)
    return (
        f"{compared_sides(asked, ('accuracy', 'matthews', 'loss'), 'Fed-full')}\n\nBefore training: accuracy "
        f"{zero}; the more common class {common_class(task):.4f}. Rates, of SST-2: {rates}."
    )


def task_outcome(task: str) -> Outcome:
    """By the rule of Table 3, once Fed-full learns the task."""
    asked = trials(task)
    decided, reached = of_others(asked), statistics.fmean(asked.scores("Fed-full", "accuracy"))
    if reached > common_class(task) + LEARNED:
        return decided
    because = (
        f"Fed-full itself does not learn it here ({reached:.4f}; the more common class "
        f"{common_class(task):.4f}). {decided.because}"
    )
    return Outcome(Verdict.OPEN, because)


def claimed(task: str) -> Entry:
    """Table 3's claim on a task."""
    examples = TASKS[task][4]
    claim = Claim(
        f"The same as on SST-2, on {task.upper() if task != 'cola' else 'CoLA'}.",
        f"RoBERTa-base, Fed-full, LoRA, adapter and FedCyBGD: {PRINTED[task]}.",
        f"As on SST-2, with {examples} examples of each client, {CYCLES} cycles or rounds and the rates that "
        f"SST-2 gave, three seeds. Seen if FedCyBGD's accuracy is less than {MARGIN} below Fed-full's and "
        "above FedLoRA's and FedAdapter's, by seed; not decidable if Fed-full's mean accuracy is not more "
        f"than {LEARNED} above the more common class.",
        partial(task_table, task),
        partial(task_outcome, task),
    )
    return entry(claim, [SST2, trials(task)], NEEDS)


ENTRIES = {f"table3-{task}": claimed(task) for task in TASKS}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
