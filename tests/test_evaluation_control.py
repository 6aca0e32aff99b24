"""Prompts of evaluation, the judge's turns and the harness's texts: what users wrote in them stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import build, tokenizer

from fedtune.evaluation.judge import conversation
from fedtune.evaluation.tasks import score
from fedtune.evaluation.types import EvalEnv, EvalSettings

BOS, EOS, UNKNOWN = 1, 2, 3
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '</s>' if m.role == 'user' else '<pad>' }} {{ m.content }} "
    "{% endfor %}</s>"
)


class Watched:
    """A tiny Llama, and every token that it is shown."""

    def __init__(self) -> None:
        self.model, self.seen = build("llama"), list[list[int]]()
        self.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] > 1:
            self.seen += ids.tolist()


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(**{"template": "plain", "loss_on": "response", "max_length": 64, **changes})


@torch.no_grad()
def test_a_users_end_token_is_shown_as_text() -> None:
    watched = Watched()
    env = EvalEnv(watched.model, tokenizer(), (), settings())
    env.generate([env.prompt("w5 </s> <s> w6", "<pad> w7"), "w8 </s>"], max_new_tokens=1)
    shown = [row[row.index(BOS) :] for row in watched.seen]  # without the padding in front
    assert shown == [[BOS, 5, UNKNOWN, UNKNOWN, 6, UNKNOWN, 7, UNKNOWN], [BOS, 8, UNKNOWN]]


def test_a_chat_templates_turns_are_its_own_and_no_users() -> None:
    made = tokenizer()
    made.chat_template = CHAT
    env = EvalEnv(build("llama"), made, (), settings(template="chat"))
    text = conversation(env, ["w5 </s> w6", "w7"], ["<pad> w8 </s>"])
    assert text == "<s></s> w5 </s> w6 <pad> <pad> w8 </s> </s> w7 </s>"
    own = [(text[start:end], start) for start, end in text.own]
    assert [name for name, _ in own] == ["<s>", "</s>", "<pad>", "</s>", "</s>"]
    assert [start for _, start in own] == [0, 3, 19, 39, 47]


def test_in_another_template_the_turns_are_as_in_training() -> None:
    made = tokenizer()
    made.chat_template = CHAT
    env = EvalEnv(build("llama"), made, (), settings())
    text = conversation(env, ["w5 </s>", "w7"], ["w8 </s>"])
    assert text == "w5 </s>\nAnswer: w8 </s></s>\n\nw7\nAnswer:"
    assert text.own == ((23, 27),)  # the end of the answer, and not what stands in it


TASK = """
task: marks
custom_dataset: !function fedtune.evaluation.harness_data.load
dataset_kwargs: {files: {test: marks.jsonl}, fields: [question, options, right]}
test_split: test
output_type: OUTPUT
doc_to_text: "{{question}}"
doc_to_target: right
doc_to_choice: "{{options}}"
metric_list: [{metric: METRIC}]
metadata: {version: 1.0}
"""


@pytest.mark.parametrize(
    ("output", "metric"), [("multiple_choice", "acc"), ("generate_until", "exact_match")]
)
def test_the_harness_reads_its_data_as_text(tmp_path: Path, output: str, metric: str) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/marks.yaml").write_text(TASK.replace("OUTPUT", output).replace("METRIC", metric))
    row = {"question": "w5 </s> w6 <s>", "options": ["w7 </s> w8", "w9"], "right": 1}
    (tmp_path / "marks.jsonl").write_text(json.dumps(row) + "\n")
    watched = Watched()
    found = settings(
        task_folder=str(tmp_path / "tasks"), data_folder=str(tmp_path), max_new_tokens=2, bootstrap=0
    )
    score(watched.model, tokenizer(), (), ["marks"], found)
    assert watched.seen and not any(EOS in row or row.count(BOS) > 1 for row in watched.seen)
    assert all(5 in row and row.count(UNKNOWN) >= 2 for row in watched.seen)
