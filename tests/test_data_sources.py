from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data import task_folders
from fedtune.data.examples import Example
from fedtune.data.holdout import split_holdout
from fedtune.data.sources import bundled_examples, load_examples
from fedtune.data.templates import TEMPLATES, prompt, response
from fedtune.errors import InputError

PROJECT = Path(__file__).resolve().parents[1]
GOOD = b'{"instruction": "add", "output": "3"}\n'


def load(tmp_path: Path, content: bytes, name: str = "d.jsonl", **fields: str) -> list[Example]:
    (tmp_path / name).write_bytes(content)
    return load_examples(name, fields=fields, base=tmp_path)


def refused(tmp_path: Path, content: bytes, name: str = "d.jsonl", **fields: str) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, content, name, **fields)
    return str(caught.value)


# --- what is read -------------------------------------------------------------------------------------------


def test_identity_fields_and_absent_optional_keys(tmp_path: Path) -> None:
    rows = b'{"instruction": "a", "input": "b", "output": "c", "category": "d", "more": [1]}\n' + GOOD
    assert load(tmp_path, rows) == [Example("a", "b", "c", "d"), Example("add", "", "3", "")]


def test_mapped_nested_and_indexed_fields(tmp_path: Path) -> None:
    row = {"q": {"text": "who"}, "answers": {"text": ["me", "you"]}, "a.b": "dotted", "context": None}
    loaded = load(
        tmp_path,
        json.dumps(row).encode(),
        instruction="q.text",
        output="answers.text.1",
        category="a.b",
        input="context",
    )
    assert loaded == [Example("who", "", "you", "dotted")]


def test_numbers_become_text_as_json_writes_them(tmp_path: Path) -> None:
    rows = b'{"instruction": 12, "output": 3.5}\n{"instruction": -1, "output": 1.0}\n'
    assert load(tmp_path, rows) == [Example("12", "", "3.5"), Example("-1", "", "1.0")]


def test_blank_lines_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\n  \n" + GOOD.replace(b"\n", b"\r\n")) == [
        Example("add", "", "3"),
        Example("add", "", "3"),
    ]


def test_line_separators_inside_text_do_not_cut_lines(tmp_path: Path) -> None:
    row = {"instruction": "a\u2028b\u0085c", "output": "d\ne"}
    line = json.dumps(row, ensure_ascii=False).encode()
    assert load(tmp_path, line + b"\n" + GOOD)[0] == Example("a\u2028b\u0085c", "", "d\ne")


@pytest.mark.parametrize(
    "content", [b'\n [{"instruction": "a", "output": "b"}]', b'{"instruction":"a","output":"b"}']
)
def test_json_files_hold_an_array_or_lines(tmp_path: Path, content: bytes) -> None:
    assert load(tmp_path, content, "d.json") == [Example("a", "", "b")]


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(st.builds(Example, texts, texts, texts, texts), min_size=1, max_size=5), st.booleans())
def test_any_text_comes_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, examples: list[Example], ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    keys = ("instruction", "input", "output", "category")
    rows = [json.dumps({k: getattr(e, k) for k in keys}, ensure_ascii=ascii_only) for e in examples]
    assert load(folder, "\n".join(rows).encode()) == examples


def test_bundled_set_has_categories_and_no_test_example_in_training() -> None:
    train, test = load_examples("bundled", fields={}), load_examples("bundled", fields={}, split="test")
    assert train == bundled_examples() and test == bundled_examples("test")
    assert len({e.category for e in train}) >= 6
    assert {e.category for e in test} == {e.category for e in train}
    assert all(e.instruction and e.output for e in train + test)
    assert not {(e.instruction, e.input) for e in test} & {(e.instruction, e.input) for e in train}


# --- what is refused, with its place ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (b'{"instruction": "a", \n', ["d.jsonl:2", "not valid JSON", "column"]),
        (b"[1, 2]\n", ["d.jsonl:2", "must be a JSON object", "a list"]),
        (b'"text"\n', ["d.jsonl:2", "must be a JSON object", "text"]),
        (
            b'{"question": "a", "output": "b"}\n',
            ["d.jsonl:2", 'no key "instruction"', '"question", "output"'],
        ),
        (b'{"instruction": "a"}\n', ["d.jsonl:2", 'no key "output"', "data.fields.output"]),
        (b"{}\n", ["d.jsonl:2", 'no key "instruction"', "none"]),
        (b'{"instruction": "a", "output": ["b"]}\n', ["d.jsonl:2", "got a list", '"output.0"']),
        (b'{"instruction": "a", "output": {"b": 1}}\n', ["d.jsonl:2", "got an object"]),
        (b'{"instruction": "a", "output": null}\n', ["d.jsonl:2", "got null"]),
        (b'{"instruction": true, "output": "b"}\n', ["d.jsonl:2", "got true or false"]),
        (b'{"instruction": "a", "output": NaN}\n', ["d.jsonl:2", "got nan"]),
        (b'{"instruction": "a", "output": "\\ud800"}\n', ["d.jsonl:2", "surrogate"]),
        (b'{"instruction": "\xff", "output": "b"}\n', ["d.jsonl:2", "UTF-8"]),
        (b'{"instruction": ' + b"9" * 5000 + b"}\n", ["d.jsonl:2", "cannot be read"]),
        (b"[" * 200_000 + b"\n", ["d.jsonl:2"]),
    ],
)
def test_bad_line_is_named(tmp_path: Path, bad: bytes, parts: list[str]) -> None:
    message = refused(tmp_path, GOOD + bad + GOOD)
    assert all(part in message for part in parts), message


def test_mapped_optional_key_must_be_there(tmp_path: Path) -> None:
    message = refused(tmp_path, b'{"instruction": "a", "output": "b"}', input="context")
    assert "d.jsonl:1" in message and 'no key "context" for input' in message


@pytest.mark.parametrize("path", ["a.text.2", "a.text.-1", "a.text.x", "a.nothing", "a.text.0.0"])
def test_dotted_path_that_leads_nowhere(tmp_path: Path, path: str) -> None:
    message = refused(tmp_path, b'{"a": {"text": ["x", "y"]}, "output": "b"}', instruction=path)
    assert f'no key "{path}"' in message and '"a", "output"' in message


def test_json_array_places(tmp_path: Path) -> None:
    assert "d.json: item 2" in refused(tmp_path, b'[{"instruction": "a", "output": "b"}, 7]', "d.json")
    assert "d.json:3" in refused(tmp_path, b'[{"instruction": "a",\n "output": "b"},\n {]', "d.json")
    assert "d.json:2" in refused(tmp_path, b'[{"instruction": "a",\n "output": "\xff"}]', "d.json")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    assert "d.jsonl: holds no examples" in refused(tmp_path, content)
    assert "d.json: holds no examples" in refused(tmp_path, b"[]", "d.json")


def test_missing_file_folder_and_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "table.xlsx").write_text("a,b")
    for source, words in [
        ("gone.jsonl", "there is no such file"),
        ("folder.jsonl", "this folder has no file of examples and is empty"),
        ("table.xlsx", r"this kind of file is not read; read are \.jsonl, .*\.parquet"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            load_examples(source, fields={}, base=tmp_path)
        assert str(tmp_path / source) in str(caught.value)


def test_bad_fields_and_splits(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match=r'unknown field "instructions".*Did you mean "instruction"'):
        load_examples("d.jsonl", fields={"instructions": "q"}, base=tmp_path)
    with pytest.raises(InputError, match=r"data\.fields\.output is empty"):
        load_examples("d.jsonl", fields={"output": ""}, base=tmp_path)
    with pytest.raises(InputError, match='no split "test"'):
        load_examples("d.jsonl", fields={}, split="test", base=tmp_path)
    with pytest.raises(InputError, match='"train" and "test"'):
        load_examples("bundled", fields={}, split="validation")


# --- folders of Natural Instructions tasks ------------------------------------------------------------------


def write_task(folder: Path, name: str, instances: object, definition: object = ("Count.",)) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"Definition": definition, "Instances": instances}))


def instances(count: int) -> list[dict[str, object]]:
    return [{"id": f"{i}", "input": f"in {i}", "output": [f"out {i}", "another"]} for i in range(count)]


def test_a_task_folder(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "task2_b", instances(2))
    write_task(tmp_path / "tasks", "task1_a", [{"input": "", "output": "one"}], "Say one.")  # older versions
    assert load_examples("tasks", fields={}, base=tmp_path) == [
        Example("Say one.", "", "one", "task1_a"),
        Example("Count.", "in 0", "out 0", "task2_b"),
        Example("Count.", "in 1", "out 1", "task2_b"),
    ]
    asked = load_examples("tasks", fields={"instruction": "input"}, base=tmp_path)
    assert [(e.instruction, e.input) for e in asked] == [("", ""), ("in 0", ""), ("in 1", "")]


def test_listed_tasks_and_a_part_of_each(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 90), ("c", 3)):
        write_task(tmp_path / "tasks", name, instances(count))
    (tmp_path / "some.txt").write_text("c\n\n b\n")
    some = load_examples("tasks", fields={}, split="some.txt", base=tmp_path)
    assert [e.category for e in some] == ["c"] * 3 + ["b"] * 90
    part = load_examples("tasks", fields={}, split="some.txt[20%]", base=tmp_path)
    # 0.6 of three is one, 18 of 90
    assert Counter(e.category for e in part) == {"c": 1, "b": 18}
    assert [e for e in some if e in part] == part  # some of them, in their order
    assert part != load_examples("tasks", fields={}, split="some.txt", base=tmp_path)[:19]
    assert part == load_examples("tasks", fields={}, split="some.txt[20%]", base=tmp_path)
    few = load_examples("tasks", fields={}, split="train[0.5%]", base=tmp_path)
    assert Counter(e.category for e in few) == {"a": 1, "b": 1, "c": 1}
    assert len(load_examples("tasks", fields={}, split="train[100%]", base=tmp_path)) == 103


@given(st.integers(1, 300), st.integers(1, 100))
def test_a_part_of_a_task_is_that_part_and_spread_out(count: int, percent: int) -> None:
    part = task_folders.part_of_task("task1_a", count, percent)
    assert len(part) == min(count, max(1, round(count * percent / 100)))
    assert part == sorted(set(part)) and part[0] >= 0 and part[-1] < count
    assert set(task_folders.part_of_task("task1_a", count, max(1, percent - 1))) <= set(part)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("test", r'must be "train" for all tasks or a file that lists tasks; there is no file .*test'),
        ("gone.txt[20%]", "there is no file .*gone.txt"),
        ("train[0%]", "0 < P <= 100"),
        ("train[101%]", "0 < P <= 100"),
        ("", "0 < P <= 100"),
        ("typo.txt", r'typo.txt: .*tasks has no task "task1_b".*Did you mean "task1_a"'),
        ("twice.txt", "listed twice"),
        ("empty.txt", "tasks: holds no examples"),
    ],
)
def test_bad_splits_of_a_task_folder(tmp_path: Path, split: str, words: str) -> None:
    write_task(tmp_path / "tasks", "task1_a", instances(2))
    (tmp_path / "typo.txt").write_text("task1_b\n")
    (tmp_path / "twice.txt").write_text("task1_a\ntask1_a\n")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=words):
        load_examples("tasks", fields={}, split=split, base=tmp_path)


@pytest.mark.parametrize(
    ("instances_", "definition", "words"),
    [
        ([{"input": "a", "output": []}], "Do.", r't.json: instance 1: "output".*got null'),
        ([{"input": "a"}], "Do.", r't.json: instance 1: "output".*got null'),
        ([{"output": ["b"]}], "Do.", None),
        ([{"input": "a", "output": ["b"]}, "text"], "Do.", "instance 2: a record must be a JSON object"),
        ([{"input": "a", "output": ["b"]}], [], 'instance 1: "instruction".*got null'),
        ("none", "Do.", 'not a task of Natural Instructions: it has no list "Instances"'),
        ([], "Do.", "holds no examples"),
    ],
)
def test_bad_tasks(tmp_path: Path, instances_: object, definition: object, words: str | None) -> None:
    write_task(tmp_path / "tasks", "t", instances_, definition)
    if words is None:  # an absent input is an empty one, as in files
        assert load_examples("tasks", fields={}, base=tmp_path) == [Example("Do.", "", "b", "t")]
        return
    with pytest.raises(InputError, match=words):
        load_examples("tasks", fields={}, base=tmp_path)


def test_a_folder_that_holds_no_tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    with pytest.raises(InputError, match="tasks: this folder has no file of examples and is empty"):
        load_examples("tasks", fields={}, base=tmp_path)
    (tmp_path / "tasks" / "x.json").write_text("[1]")
    with pytest.raises(InputError, match=r"x\.json: item 1: a record must be a JSON object"):
        load_examples("tasks", fields={}, base=tmp_path)
    (tmp_path / "tasks" / "x.json").write_text('{"Instances": ')
    with pytest.raises(InputError, match=r"x\.json:1: not valid JSON"):
        load_examples("tasks", fields={}, base=tmp_path)


# --- Hugging Face data sets, without network ----------------------------------------------------------------


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(
            [{"q": "a", "input": None, "y": 1}, {"q": "b", "input": "c", "y": 0}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fields = {"instruction": "q", "output": "y"}
    assert load_examples("owner/set:main", fields=fields, split="test") == [
        Example("a", "", "1"),
        Example("b", "c", "0"),
    ]
    load_examples("owner/set", fields=fields)
    assert asked == [("owner/set", "main", "test"), ("owner/set", None, "train")]
    with pytest.raises(
        InputError, match=r'data set "owner/set", row 0: no key "instruction".*"q", "input", "y"'
    ):
        load_examples("owner/set", fields={})


def test_a_name_that_means_a_place_here_is_not_asked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    (tmp_path / "data" / "dolly").mkdir(parents=True)
    for name, words in (
        ("data/dolyl", 'no "data/dolyl" on this machine.*Did you mean "data/dolly"'),
        ("bundeld", 'Did you mean "bundled".*written OWNER/NAME'),
        ("./owner/set", "there is no"),
        ("a/b/c:main", "there is no"),
    ):
        with pytest.raises(InputError, match=words):
            load_examples(name, fields={}, base=tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'owner/set' on the Hub"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist on the Hub"),
        ValueError('Unknown split "train". Should be one of ["test"].'),
        RuntimeError("Dataset scripts are no longer supported"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
    ],
)
def test_hub_failures_are_one_clear_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_examples("owner/set", fields={})
    assert 'the data set "owner/set" (split "train")' in str(caught.value)
    assert str(error) in str(caught.value)
    assert caught.value.__cause__ is error


# --- templates ----------------------------------------------------------------------------------------------


def test_alpaca_is_the_published_prompt() -> None:
    assert prompt(Example("Add {these}.", "1 {0} 2", "3"), "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1 {0} 2\n\n### Response:"
    )
    assert prompt(Example("Say {hi}.", "", "hi"), "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {hi}.\n\n### Response:"
    )
    assert response(Example("Say hi.", "", "hi"), "alpaca") == "hi"


def test_plain_template() -> None:
    assert prompt(Example("Add.", "1 2", "3"), "plain") == "Add.\n1 2\nAnswer:"
    assert prompt(Example("Say hi.", "", "hi"), "plain") == "Say hi.\nAnswer:"
    assert response(Example("Say hi.", "", "hi"), "plain") == " hi"


@pytest.mark.parametrize("function", [prompt, response])
def test_unknown_template(function: object) -> None:
    assert callable(function)
    with pytest.raises(
        InputError, match=r"data.template 'alpacca' is not known.*alpaca, plain.*Did you mean \"alpaca\""
    ):
        function(Example("a"), "alpacca")
    assert list(TEMPLATES) == ["alpaca", "plain"]


# --- hold-out -----------------------------------------------------------------------------------------------


def of_categories(names: str) -> list[Example]:
    return [Example(str(index), category=name) for index, name in enumerate(names)]


def test_holdout_of_a_category() -> None:
    rng = np.random.default_rng(0)
    examples = of_categories("bcabcb")
    for asked in ("c", "last"):
        train, held = split_holdout(examples, fraction=None, category=asked, rng=rng)
        assert "".join(e.category for e in train) == "babb" and [e.instruction for e in held] == ["1", "4"]
    assert split_holdout(examples, fraction=None, category=None, rng=rng) == (examples, [])
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn
    named_last = [Example("x", category="last"), Example("y", category="z")]
    assert split_holdout(named_last, fraction=None, category="last", rng=rng)[1] == named_last[:1]


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_holdout_of_a_fraction(n: int, fraction: float, seed: int) -> None:
    examples = [Example(str(index)) for index in range(n)]
    count = max(1, round(fraction * n))
    if count == n:
        with pytest.raises(InputError, match="leaves none"):
            split_holdout(examples, fraction=fraction, category=None, rng=np.random.default_rng(seed))
        return
    train, held = split_holdout(examples, fraction=fraction, category=None, rng=np.random.default_rng(seed))
    assert len(held) == count
    assert sorted(train + held, key=lambda e: int(e.instruction)) == examples
    assert [int(e.instruction) for e in train] == sorted(int(e.instruction) for e in train)
    assert (train, held) == split_holdout(
        examples, fraction=fraction, category=None, rng=np.random.default_rng(seed)
    )


@pytest.mark.parametrize(
    ("names", "fraction", "category", "words"),
    [
        ("ab", 0.5, "a", "not both"),
        ("ab", None, "aa", 'category "aa"; there are "a", "b"\\.'),
        ("abcdefghijklmnopqrst", None, "aa", '"s", "t"\\.'),  # 20 are named
        ("abcdefghijklmnopqrstu", None, "aa", '"s", "t", …\\.'),
        ("aa", None, "last", "none would be left"),
        ("ab", 0.0, None, "between 0 and 1"),
        ("ab", 1.0, None, "between 0 and 1"),
        ("ab", float("nan"), None, "between 0 and 1"),
    ],
)
def test_bad_holdouts(names: str, fraction: float | None, category: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        split_holdout(
            of_categories(names), fraction=fraction, category=category, rng=np.random.default_rng(0)
        )


# --- real data ----------------------------------------------------------------------------------------------


def test_natural_instructions_as_in_the_fedkseed_paper(shared_data: Path) -> None:
    """The split of configs/fedkseed_ni.yaml: no task on both sides, a client a training task."""
    lists, folder = PROJECT / "configs" / "natural_instructions", "natural_instructions/tasks"
    train, test = (
        load_examples(folder, fields={}, split=f"{lists / part}_tasks.txt[{percent}%]", base=shared_data)
        for part, percent in (("train", 20), ("test", 2))
    )
    counts, held = Counter(e.category for e in train), Counter(e.category for e in test)
    assert (len(counts), len(held), not counts & held) == (206, 8, True)
    whole = Counter(e.category for e in load_examples(folder, fields={}, base=shared_data))
    assert whole.keys() == counts.keys() | held.keys() and whole.total() == 40846
    assert all(count == round(whole[task] / 5) for task, count in counts.items())
    assert all(count == max(1, round(whole[task] / 50)) for task, count in held.items())


def test_dolly(shared_data: Path) -> None:
    dolly = load_examples(
        "dolly15k/databricks-dolly-15k.jsonl",
        fields={"input": "context", "output": "response"},
        base=shared_data,
    )
    assert Counter(e.category for e in dolly) == {  # the published counts
        "open_qa": 3742, "general_qa": 2191, "classification": 2136, "closed_qa": 1773, "brainstorming": 1766,
        "information_extraction": 1506, "summarization": 1188, "creative_writing": 709,
    }  # fmt: skip
    train, held = split_holdout(dolly, fraction=None, category="last", rng=np.random.default_rng(0))
    assert (len(train), len(held), {e.category for e in held}) == (13823, 1188, {"summarization"})


@pytest.mark.parametrize(
    ("path", "fields", "rows"),
    [
        ("alpaca/alpaca_subset.jsonl", {}, 18669),
        ("gsm8k/test.jsonl", {"instruction": "question", "output": "answer"}, 1319),
        ("glue/rte_dev.jsonl", {"instruction": "sentence1", "input": "sentence2", "output": "label"}, 277),
        ("glue/mrpc_test.jsonl", {"instruction": "sentence1", "input": "sentence2", "output": "label"}, 1725),
        ("mmlu/mmlu_dev.jsonl", {"instruction": "question", "output": "answer", "category": "subject"}, 285),
        ("mt_bench/mt_bench_question.jsonl", {"instruction": "turns.0", "output": "turns.1"}, 80),
    ],
)
def test_real_files(shared_data: Path, path: str, fields: dict[str, str], rows: int) -> None:
    assert len(load_examples(path, fields=fields, base=shared_data)) == rows
