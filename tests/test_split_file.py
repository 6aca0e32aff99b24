"""Splits that a file holds: which client has which examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import fedtune, write_config
from plugin_parts import refused

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.federation.data import prepare_data
from fedtune.planning.plan import plan

pytestmark = pytest.mark.usefixtures("parts_as_before")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with six examples in ten.jsonl."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]
    (tmp_path / "six.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def of_file(here: Path, split: Any, **changes: Any) -> Any:
    (here / "split.json").write_text(split if isinstance(split, str) else json.dumps(split))
    changes.setdefault("partition", {"name": "file", "path": "split.json"})
    data = {"train": "six.jsonl", "holdout": {"source": "bundled"}, **changes}
    return parse_config({"data": data}, "c.yaml")


def dealt(config: Any) -> list[list[str]]:
    clients = prepare_data(config, pooled=False).clients
    return [[example.instruction for example in clients[client]] for client in sorted(clients)]


def test_a_split_from_a_file(here: Path) -> None:
    made = of_file(here, {"north": [5, 0], "south": [1, 2, 3, 4]})
    assert made.data.clients is None
    assert dealt(made) == [["q0", "q5"], ["q1", "q2", "q3", "q4"]]
    clients = prepare_data(made, pooled=False).partition["clients"]
    assert [(c["client"], c["name"], c["examples"], c["indices"]) for c in clients] == [
        (0, "north", 2, [0, 5]),
        (1, "south", 4, [1, 2, 3, 4]),
    ]
    assert parse_config(made.resolved(), "again") == made
    assert dealt(of_file(here, [[3], [0, 1, 2, 4, 5]], clients=2)) == [["q3"], ["q0", "q1", "q2", "q4", "q5"]]
    assert (
        "name"
        not in prepare_data(of_file(here, [[3], [0, 1, 2, 4, 5]]), pooled=False).partition["clients"][0]
    )


def test_examples_that_a_file_leaves_out(here: Path) -> None:
    partition = {"name": "file", "path": "split.json", "rest": "leave-out"}
    made = of_file(here, [[1], [4, 2]], partition=partition)
    assert dealt(made) == [["q1"], ["q2", "q4"]]
    assert [e.instruction for e in prepare_data(made, pooled=True).clients[0]] == ["q1", "q2", "q4"]
    with pytest.raises(InputError, match=r"1 examples are given more than once: 1$"):
        dealt(of_file(here, [[1], [1, 2]], partition=partition))


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        (
            [[0, 1], [2, 3]],
            {},
            r"2 of 6 training examples belong to nobody: 4, 5\. .*partition.rest: leave-out",
        ),
        ([[0, 1, 2], [2, 3, 4, 5]], {}, "1 examples are given more than once: 2"),
        (
            [[0, 1, 2], [3, 4, 5, 6]],
            {},
            "client 1: there are 6 training examples, so indices go from 0 to 5, got 6",
        ),
        ({"a": [0, 1, 2, 3, 4, 5], "b": []}, {}, "client b is empty"),
        ([[0, 1, 2], [3, 4, 5]], {"clients": 3}, "it has 2 clients, and data.clients is 3"),
        ([[0, 1, 2], [3, 4, 5]], {"clients": 1}, "it has 2 clients, and data.clients is 1"),
        ([[0, 1, 2], [3, 4, 10**30]], {}, "indices go from 0 to 5, got 1000"),
        ([[0, 1, 2], ["3", 4, 5]], {}, "an index is a whole number, got '3'"),
        ([], {}, "it has no client"),
        (3, {}, "must be an object .* or a list of lists, got 3"),
        ("[[0, 1", {}, "split.json: not JSON: Expecting"),
        ('{"a": [0], "a": [1]}', {}, "a client's name stands twice"),
        ([[0]], {"partition": {"name": "file", "path": "no.json"}}, "no.json: cannot be read: No such file"),
        ([[0]], {"partition": {"name": "file", "path": "."}}, "cannot be read: Is a directory"),
    ],
)
def test_files_that_are_no_split(here: Path, split: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"data.partition.path .*{message}"):
        dealt(of_file(here, split, **changes))


def test_settings_of_a_split_from_a_file(here: Path) -> None:
    for partition, message in (
        ({"name": "file"}, "data.partition.path is missing"),
        ({"name": "file", "path": "x", "rest": "leave"}, 'data.partition.rest: .*Did you mean "leave-out"'),
    ):
        with pytest.raises(InputError, match=message):
            of_file(here, [], partition=partition)


def test_a_plan_takes_the_clients_of_the_file(here: Path) -> None:
    document = plan(of_file(here, [[0], [1, 2], [3, 4, 5]])).document
    assert (document["clients"], document["local_steps"]) == (3, {"least": 1, "most": 1})
    away = of_file(here, [[0], [1, 2], [3, 4, 5]], train="owner/set")
    assert plan(away).document["clients"] == 3


def test_a_run_does_not_go_on_with_another_split(here: Path) -> None:
    document = {
        "data": {"max_examples": 6, "max_length": 64, "partition": {"name": "file", "path": "split.json"}},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        "checkpoints": {"journal": "always"},
    }
    write_config(here / "c.yaml", document)
    (here / "split.json").write_text("[[0, 1, 2], [3, 4, 5]]")
    killed = fedtune(
        "run", "c.yaml", "--out", "run", "--quiet", cwd=here, die_at=1, watched="round-0002.replies"
    )
    assert killed.status == -9
    (here / "split.json").write_text("[[0, 1, 3], [2, 4, 5]]")
    refused(
        fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=here),
        "run began with another split than file now gives",
    )
    (here / "split.json").write_text("[[0, 1, 2], [5, 4, 3]]")
    done = fedtune("run", "c.yaml", "--resume", "run", "--quiet", cwd=here)
    assert done.status == 0, done.err
