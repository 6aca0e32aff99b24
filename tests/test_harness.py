"""Tasks of lm-evaluation-harness: scores as its command line gives them, on any model, without a network."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import save_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.errors import InputError
from fedtune.evaluation import harness_names
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.evaluation.harness_names import known_names
from fedtune.evaluation.registry import check_tasks
from fedtune.evaluation.tasks import evaluate, score, scorer
from fedtune.evaluation.types import EvalSettings
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import attach_adapter, attach_p_tuning, attach_prompt

pytest.importorskip("lm_eval", reason="needs the extra eval")

TASK = """
task: colours
custom_dataset: !function fedtune.evaluation.harness_data.load
dataset_kwargs:
  files: {test: colours.jsonl, train: colours.jsonl}
  fields: [question, options, right]
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: right
doc_to_choice: "{{options}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {version: 3.0}
"""
ANSWERS = """
task: answers
custom_dataset: !function fedtune.evaluation.harness_data.load
dataset_kwargs:
  files: {test: colours.jsonl}
  fields: [question, options, right]
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[right]}}"
generation_kwargs: {until: ["w9"], max_gen_toks: 6}
metric_list:
  - metric: exact_match
metadata: {version: 1.0}
"""


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Questions of w5 ... w63 of different lengths, with three options each."""
    generator = torch.Generator().manual_seed(5)

    def words(most: int) -> str:
        n = int(torch.randint(1, most, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(5, 60, (n,), generator=generator).tolist())

    return [
        {"question": words(12), "options": [words(4) for _ in range(3)], "right": i % 3} for i in range(count)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two tasks and their data."""
    folder = tmp_path_factory.mktemp("harness")
    save_folder(folder / "tiny")
    (folder / "tasks").mkdir()
    (folder / "tasks/colours.yaml").write_text(TASK)
    (folder / "tasks/answers.yaml").write_text(ANSWERS)
    write(folder / "colours.jsonl", rows())
    return folder


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


def settings(home: Path, **changes: Any) -> EvalSettings:
    plain: dict[str, Any] = {
        "template": "plain",
        "loss_on": "response",
        "max_length": 64,
        "task_folder": str(home / "tasks"),
        "data_folder": str(home),
        "bootstrap": 200,
    }
    return EvalSettings(**plain | changes)


def loaded(home: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(home / "tiny").eval()
    return model, AutoTokenizer.from_pretrained(home / "tiny")


def shaken(model: Any) -> Any:
    """Moves what is trained away from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "lora": lambda m: shaken(attach_lora(m, rank=2, alpha=4, dropout=0.5, targets=None, seed=1)),
    "adapter": lambda model: shaken(attach_adapter(model, size=4, seed=1)),
    "prompt": lambda model: shaken(attach_prompt(model, tokens=5, seed=1)),
    "p-tuning": lambda model: shaken(attach_p_tuning(model, tokens=5, hidden=16, seed=1)),
}


def log_probability(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Of the continuation's tokens after the context, one text without padding."""
    before = tokenizer(context)["input_ids"]
    ids = torch.tensor([before + tokenizer(continuation)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1]))


@pytest.mark.parametrize("name", WRAPPED)
def test_multiple_choice_by_hand(name: str, home: Path) -> None:
    model, tokenizer = loaded(home)
    model = WRAPPED[name](model)
    by_length, right, normed = [], [], []
    for row in rows():
        each = [
            log_probability(model, tokenizer, row["question"] + "\nAnswer:", " " + o) for o in row["options"]
        ]
        by_length.append([p / len(o) for p, o in zip(each, row["options"], strict=True)])
        right.append(max(range(3), key=each.__getitem__) == row["right"])
        normed.append(max(range(3), key=by_length[-1].__getitem__) == row["right"])
    assert 0 < sum(right) < len(right)
    outcome = score(model, tokenizer, [], ["colours"], settings(home))["colours"]
    assert list(outcome.metrics) == ["acc", "acc_norm"]
    assert list(outcome.metrics["acc"].items) == right
    assert list(outcome.metrics["acc_norm"].items) == normed
    got = evaluate(model, tokenizer, [], ["colours"], settings(home))["colours"]
    share = sum(right) / 12
    assert got["acc"] == share
    assert got["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert got["acc_low"] <= got["acc"] <= got["acc_high"]
    assert (got["examples"], got["truncated"]) == (12, 0)
    assert metrics_of(got) == ["acc", "acc_norm"]


def test_tasks_in_the_runs_template(home: Path) -> None:
    """All that stands before an answer is one question in it, with the template's words around."""
    model, tokenizer = loaded(home)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w7 ' + m.content + ' w8' }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
        "{{ 'w7 ' if add_generation_prompt else '' }}"
    )
    right = []
    for row in rows():
        asked = f"w7 {row['question']}\nAnswer: w8w7 "
        each = [log_probability(model, tokenizer, asked, option) for option in row["options"]]
        right.append(max(range(3), key=each.__getitem__) == row["right"])
    put = settings(home, template="chat", harness_template=True)
    outcome = score(model, tokenizer, [], ["colours", "answers"], put)
    assert list(outcome["colours"].metrics["acc"].items) == right
    assert right != list(
        score(model, tokenizer, [], ["colours"], settings(home))["colours"].metrics["acc"].items
    )


@pytest.mark.parametrize("name", ["plain", "prompt"])
def test_answers_end_before_a_stopping_text(name: str, home: Path) -> None:
    model, tokenizer = loaded(home)
    model = WRAPPED[name](model)
    expected = []
    for row in rows():
        ids = tokenizer(row["question"])["input_ids"]
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 6 and (not answer or answer[-1] != tokenizer.eos_token_id):
                logits = model(input_ids=torch.tensor([ids + answer])).logits
                answer.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(answer, skip_special_tokens=True).partition("w9")[0])
    assert any("w" in text for text in expected)
    references = [row["options"][row["right"]] for row in rows()]
    outcome = score(model, tokenizer, [], ["answers"], settings(home))["answers"]
    assert list(outcome.metrics["exact_match"].items) == [
        float(text == reference) for text, reference in zip(expected, references, strict=True)
    ]


def test_answers_that_are_right_count(home: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(home)
    known = score(model, tokenizer, [], ["answers"], settings(home))["answers"]
    assert sum(known.metrics["exact_match"].items) == 0  # random words are never the option
    found = rows(4)
    for row in found[:3]:
        ids = tokenizer(row["question"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        row["options"][row["right"]] = tokenizer.decode(out, skip_special_tokens=True).partition("w9")[0]
    write(tmp_path / "colours.jsonl", found)
    got = evaluate(model, tokenizer, [], ["answers"], settings(home, data_folder=str(tmp_path)))
    assert got["answers"]["exact_match"] == 0.75
    limited = evaluate(model, tokenizer, [], ["answers"], settings(home, data_folder=str(tmp_path), limit=3))
    assert (limited["answers"]["exact_match"], limited["answers"]["examples"]) == (1.0, 3)


def command_line(
    model: Path, tasks: str, home: Path, folder: Path, data: Path, *arguments: str
) -> dict[str, Any]:
    """Results of the harness's own command line, in a process of its own."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={model},dtype=float32", "--tasks", tasks),
        *("--include_path", str(folder), "--metadata", json.dumps({"data_folder": str(data)})),
        *("--output_path", str(home / "out"), *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    newest = max((home / "out").rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    document: dict[str, Any] = json.loads(newest.read_text())["results"]
    return document


def same_scores(theirs: dict[str, Any], ours: dict[str, dict[str, float]]) -> None:
    for task, metrics in ours.items():
        for metric in metrics_of(metrics):
            assert metrics[metric] == theirs[task][f"{metric},none"]  # to the last digit
            assert metrics[f"{metric}_stderr"] == pytest.approx(
                theirs[task][f"{metric}_stderr,none"], rel=1e-12
            )


@pytest.mark.slow
def test_scores_are_those_of_the_command_line(home: Path, tmp_path: Path) -> None:
    theirs = command_line(
        home / "tiny", "colours", tmp_path, home / "tasks", home, "--num_fewshot", "2", "--batch_size", "5"
    )
    model, tokenizer = loaded(home)
    ours = evaluate(model, tokenizer, [], ["colours"], settings(home, few_shot=2, batch_size=5))
    same_scores(theirs, ours)
    without = evaluate(model, tokenizer, [], ["colours"], settings(home))
    assert without["colours"]["acc_norm"] != ours["colours"]["acc_norm"]  # the solved examples matter


@pytest.mark.slow
def test_real_scores_are_those_of_the_command_line(
    shared_data: Path, shared_models: Path, tmp_path: Path
) -> None:
    folder, tasks = shared_models / "stories260K-hf", "arc_easy_local,sst2_local"
    local = Path(__file__).parents[1] / "fedtune/evaluation/harness_tasks"
    theirs = command_line(folder, tasks, tmp_path, local, shared_data, "--limit", "40", "--batch_size", "16")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = EvalSettings("plain", "response", 64, data_folder=str(shared_data), limit=40, batch_size=16)
    same_scores(theirs, evaluate(model, AutoTokenizer.from_pretrained(folder), [], tasks.split(","), plain))


def test_versions_stand_beside_the_scores(home: Path) -> None:
    version = metadata.version("lm_eval")
    assert scorer("colours", settings(home)) == f"lm-eval {version}, colours 3.0, 0-shot"
    assert scorer("colours", settings(home, few_shot=2)) == f"lm-eval {version}, colours 3.0, 2-shot"


def test_what_is_too_long_is_cut_and_counted(home: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(home)  # sees 64 tokens
    found = rows(3)
    found[1]["question"] = " ".join(["w5"] * 100)
    write(tmp_path / "colours.jsonl", found)
    got = evaluate(model, tokenizer, [], ["colours", "answers"], settings(home, data_folder=str(tmp_path)))
    assert [got[task]["truncated"] for task in ("colours", "answers")] == [1, 1]
    found[1]["options"][2] = " ".join(["w5"] * 100)
    (tmp_path / "long").mkdir()
    write(tmp_path / "long/colours.jsonl", found)
    with pytest.raises(InputError, match="an answer option has 100 tokens, but the model sees 64"):
        score(model, tokenizer, [], ["colours"], settings(home, data_folder=str(tmp_path / "long")))


def test_nothing_is_left_changed_or_printed(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded(home)
    tokenizer.pad_token = None
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, level = torch.random.get_rng_state(), logging.getLogger("lm_eval").level
    capfd.readouterr()
    score(model, tokenizer, [], ["colours", "answers"], settings(home))
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token is None
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert logging.getLogger("lm_eval").level == level
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_names_that_nobody_knows(home: Path) -> None:
    with pytest.raises(InputError, match=r"task 'colors' is not known.*lm_eval ls tasks.*mean \"colours\"\?"):
        check_tasks(["loss", "colors"], str(home / "tasks"))
    with pytest.raises(InputError, match=r"mean \"hellaswag\"\?"):
        check_tasks(["helaswag"], None)
    papers = [
        "mmlu",
        "arc_challenge",
        "arc_easy",
        "gsm8k",
        "hellaswag",
        "boolq",
        "openbookqa",
        "glue",
        "squadv2",
    ]
    check_tasks(["loss", *papers, "colours", "arc_easy_local"], str(home / "tasks"))


@pytest.mark.slow
def test_every_name_of_the_harness_is_found() -> None:
    from lm_eval.tasks import TaskManager

    missing = set(TaskManager().all_tasks) - known_names(None)
    assert not missing
    with pytest.raises(InputError, match="task 'Question:' is not known to lm-evaluation-harness"):
        scorer("Question:", EvalSettings("plain", "response", 64))  # text that only looks like a name


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_names, "installed", lambda: False)
    check_tasks(["loss"], None)
    with pytest.raises(InputError, match=r"arc_easy is not one of fedtune's own.*install fedtune\[eval\]"):
        check_tasks(["arc_easy"], None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "w5", "options": ["w6", "w7"]}', "line 13: .*needs the fields .*; right is missing"),
        ('["question"]', "line 13: .* needs an object on each line, got list"),
        ("{", "line 13: not JSON"),
    ],
)
def test_data_that_a_task_cannot_use(line: str, message: str, home: Path, tmp_path: Path) -> None:
    text = (home / "colours.jsonl").read_text() + line + "\n"
    (tmp_path / "colours.jsonl").write_text(text)
    with pytest.raises(InputError, match=rf"task colours: .*colours\.jsonl, {message}"):
        score(*loaded(home), [], ["colours"], settings(home, data_folder=str(tmp_path)))


def test_folders_that_are_not_there(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task colours: no such file: .*colours\.jsonl"):
        score(*loaded(home), [], ["colours"], settings(home, data_folder=str(tmp_path)))
    with pytest.raises(
        InputError, match=r"task colours: it reads colours\.jsonl.*set evaluation\.data_folder"
    ):
        score(*loaded(home), [], ["colours"], settings(home, data_folder=None))
    with pytest.raises(InputError, match=r"evaluation\.task_folder: no such folder"):
        score(*loaded(home), [], ["colours"], settings(home, task_folder=str(tmp_path / "none")))
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(InputError, match=r"broken\.yaml: not YAML"):
        score(*loaded(home), [], ["colours"], settings(home, task_folder=str(tmp_path)))


def test_yaml_that_names_other_fields(home: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK.replace("{{question}}", "{{query}}"))
    with pytest.raises(InputError, match=r"task colours: 'query' is undefined"):
        score(*loaded(home), [], ["colours"], settings(home, task_folder=str(tmp_path)))


def test_data_that_would_have_to_be_downloaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    (tmp_path / "t.yaml").write_text("task: far\ndataset_path: owner/nowhere\ntest_split: test\n")
    with pytest.raises(InputError, match=r"task far: its .* data could not be loaded.*without a network"):
        score(*loaded(home), [], ["far"], settings(home, task_folder=str(tmp_path)))


def test_code_is_not_run_without_a_sandbox(home: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK + "unsafe_code: true\n")
    with pytest.raises(InputError, match="without a sandbox"):
        score(*loaded(home), [], ["colours"], settings(home, task_folder=str(tmp_path)))


def test_a_classifier_has_no_such_tasks(home: Path) -> None:
    with pytest.raises(InputError, match="colours is for generated text"):
        score(*loaded(home), [], ["colours"], settings(home, labels=("a", "b")))


def local_data(folder: Path) -> Path:
    """Two lines of every file that fedtune's local tasks read; of MMLU two a subject."""
    choice = {"query": "w5 w6", "choices": ["w7", "w8 w9"], "gold": 1}
    pair = {"sentence1": "w5", "sentence2": "w6 w7"}
    files: dict[str, list[dict[str, Any]]] = {
        "arc/arc_challenge": [choice, {**choice, "gold": 0}],
        "arc/arc_easy": [choice, choice],
        "arc/openbook_qa": [choice, choice],
        "glue/sst2_dev": [{"sentence": "w5", "label": 1}] * 2,
        "glue/cola_in_domain_dev": [{"sentence": "w5", "label": 1}] * 2,
        "glue/cola_out_of_domain_dev": [{"sentence": "w6", "label": 0}] * 2,
        "glue/rte_dev": [{**pair, "label": "entailment"}, {**pair, "label": "not_entailment"}],
        "glue/mrpc_test": [{**pair, "label": 1}, {**pair, "label": 0}],
        "gsm8k/test": [{"question": "w5 w6", "answer": "w7 #### 4"}] * 2,
        "gsm8k/train": [{"question": "w5 " * i, "answer": f"w7 #### {i}"} for i in range(5, 15)],
    }
    text = (Path(__file__).parents[1] / "fedtune/evaluation/harness_tasks/mmlu.yaml").read_text()
    subjects = [line.split("task: ")[1].split(",")[0] for line in text.splitlines() if "- {task: " in line]
    assert len(set(subjects)) == 57
    for part in ("test", "dev"):
        files[f"mmlu/mmlu_{part}"] = [
            {"subject": subject, "question": "w5", "choices": ["w6", "w7", "w8", "w9"], "answer": letter}
            for subject in subjects
            for letter in "AB"
        ]
    for name, found in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.jsonl", found)
    return folder


def test_every_local_task(home: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(home)
    tasks = {
        "arc_challenge_local": ("acc", 2),
        "arc_easy_local": ("acc", 2),
        "openbookqa_local": ("acc", 2),
        "glue_local": ("cola_local/mcc", 4),
        "mmlu_local": ("acc", 114),
        "gsm8k_local": ("exact_match,strict-match", 2),
        "gsm8k_cot_local": ("exact_match,strict-match", 2),
    }
    plain = settings(home, task_folder=None, data_folder=str(local_data(tmp_path)), max_new_tokens=4)
    got = evaluate(model, tokenizer, [], list(tasks), plain)
    for task, (metric, examples) in tasks.items():
        assert next(iter(got[task])) == metric
        assert got[task]["examples"] == examples
        assert 0 <= got[task][metric] <= 1
        assert f"{metric}_stderr" in got[task]
        assert f"{metric}_low" in got[task]
    assert got["mmlu_local"]["acc"] == pytest.approx(
        sum(value for name, value in got["mmlu_local"].items() if name.startswith("acc/")) / 57
    )
    assert metrics_of(got["glue_local"]) == [
        "cola_local/mcc", "mrpc_local/acc", "mrpc_local/f1", "rte_local/acc", "sst2_local/acc",
    ]  # fmt: skip
    assert scorer("gsm8k_cot_local", plain).endswith("gsm8k_cot_local 1.0, 8-shot")
    assert got["gsm8k_cot_local"]["truncated"] == 2  # eight examples do not fit into 64 tokens
