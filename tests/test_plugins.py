"""Parts of one's own: registered in this process, in a plugin file or by a package; splits from a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from command import Result, fedtune, outcome, write_config
from model_families import tokenizer

from fedtune import registry
from fedtune.config.file import parse_config
from fedtune.core.settings import Settings
from fedtune.data.encode import encode_causal
from fedtune.data.examples import Example
from fedtune.data.partition import PARTITIONERS, register_partitioner
from fedtune.data.templates import TEMPLATES, prompt, register_template, response
from fedtune.errors import InputError
from fedtune.evaluation.subject import Outcome, Scored, Subject
from fedtune.evaluation.tasks import TASKS, register_metric, register_task
from fedtune.federation.client import join
from fedtune.federation.data import prepare_data
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import registry as methods
from fedtune.methods.references import Nothing, ZeroShot
from fedtune.planning.plan import plan
from fedtune.registry import Registry
from fedtune.transport.acceptance import Acceptance, NotAccepted

KINDS: tuple[Registry[Any], ...] = (methods.METHODS, PARTITIONERS, TASKS, TEMPLATES)
DOCUMENT: dict[str, Any] = {
    "data": {"clients": 3, "max_examples": 24, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    before = [dict(kind._known) for kind in KINDS]
    plugins = dict(registry._plugins)
    yield
    for kind, known in zip(KINDS, before, strict=True):
        kind._known.clear()
        kind._known.update(known)
    registry._plugins.clear()
    registry._plugins.update(plugins)


def config(**data: Any) -> Any:
    return parse_config({**DOCUMENT, "data": {**DOCUMENT["data"], **data}}, "c.yaml")


def refused(result: Result, *parts: str) -> None:
    assert result.status == 2, result.err
    assert result.out == "" and "Traceback" not in result.err
    for part in parts:
        assert part in result.err


# --- registering in this process ----------------------------------------------------------------------------


class Mine(Settings):
    name: Literal["mine"] = "mine"


class Whole(ZeroShot):
    """The model as it is."""


def test_a_method_has_its_name_summary_and_origin() -> None:
    assert methods.register_method("mine", config=Mine, state=Nothing)(Whole) is Whole
    part = methods.METHODS.part("mine")
    assert (part.summary, part.origin, part.source) == ("The model as it is.", "this process", Whole)
    assert isinstance(methods.build(methods.config_class("mine")(), 0), Whole)
    assert methods.state_class("mine") is Nothing
    row = {"name": "mine", "summary": "The model as it is.", "origin": "this process"}
    assert methods.METHODS.listing()[-1] == row


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fedavg", {}, r"settings Mine need the field name: Literal\[\"fedavg\"\] = \"fedavg\""),
        (
            "mine",
            {"config": dict},
            "must be a class derived from fedtune.core.settings.Settings, got <class 'dict'>",
        ),
        ("mine", {"state": dict}, "state must be a frozen dataclass, got <class 'dict'>"),
        ("mine", {"state": SimpleNamespace}, "state must be a frozen dataclass"),
    ],
)
def test_a_method_whose_classes_are_none(name: str, changes: dict[str, Any], message: str) -> None:
    before = methods.METHODS.listing()
    with pytest.raises(InputError, match=message):
        methods.register_method(name, **{"config": Mine, "state": Nothing, **changes})(Whole)
    assert methods.METHODS.listing() == before


def test_a_method_that_lacks_something() -> None:
    class Half:
        """Half a method."""

        def init(self) -> None: ...

    register = methods.register_method("mine", config=Mine, state=Nothing)
    with pytest.raises(
        InputError, match="Half lacks prepare, client_model, plan, client_step, server_step, exp"
    ):
        register(Half)

    class Silent(Whole):
        """Says nothing of itself."""

        def __init__(self, config: Settings, seed: int) -> None:
            pass

    register(Silent)
    with pytest.raises(InputError, match="method mine: Silent lacks config "):
        methods.build(Mine(), 0)
    Silent.config, Silent.arrival = Mine(), "whenever"  # type: ignore[attr-defined,assignment]
    with pytest.raises(InputError, match=r"arrival must be one of plan-order, .*, got 'whenever'"):
        methods.build(Mine(), 0)


@pytest.mark.parametrize(
    ("register", "name"),
    [
        (register_partitioner, "iid"),
        (register_template, "plain"),
        (register_metric, "accuracy"),
        (lambda name: register_task(name, metric="m"), "gsm8k-0shot"),
    ],
)
def test_a_name_that_is_taken(register: Callable[[str], Any], name: str) -> None:
    def part(examples: Any, clients: Any, rng: Any) -> Any:
        """One."""

    with pytest.raises(InputError, match=f"name '{name}' is taken: fedtune has registered it already"):
        register(name)(part)
    register("mine")(part)
    with pytest.raises(InputError, match="name 'mine' is taken: this process has registered it already"):
        register("mine")(part)


def test_names_and_summaries() -> None:
    for name in ("", "a b", "a,b", "../x", "-x"):
        with pytest.raises(InputError, match="a name has letters, digits, dots, dashes"):
            register_template(name)(lambda example: "")
    with pytest.raises(InputError, match="says nowhere what it is: give <lambda> a docstring"):
        register_template("mine")(lambda example: "")
    with pytest.raises(InputError, match="what is registered is a class or function, got 3"):
        register_template("mine", summary="three")(3)  # type: ignore[arg-type]
    register_template("mine", summary="empty")(lambda example: "")
    with pytest.raises(
        InputError, match=r"data.template 'mien' is not known; known are .*mine\. Did you mean \"mine\""
    ):
        TEMPLATES["mien"]


# --- partitioners -------------------------------------------------------------------------------------------


def by_length(
    examples: Sequence[Example], clients: int, rng: np.random.Generator, *, strength: int = 2, flip: bool
) -> list[list[int]]:
    """Sorted by length and dealt in turn."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].instruction), reverse=flip)
    return [order[client::clients] for client in range(clients)]


def test_a_partitioner_and_its_settings() -> None:
    register_partitioner("by-length")(by_length)
    made = config(partition={"name": "by-length", "flip": True})
    assert made.resolved()["data"]["partition"] == {"name": "by-length", "strength": 2, "flip": True}
    assert parse_config(made.resolved(), "again") == made
    split = prepare_data(made, pooled=False)
    assert [len(items) for items in split.clients.values()] == [8, 8, 8]
    assert split.partition["name"] == "by-length"
    longest = max(len(e.instruction) for items in split.clients.values() for e in items)
    assert any(len(example.instruction) == longest for example in split.clients[0])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"flip": True, "strenght": 3}, 'data.partition.strenght is not a known .*Did you mean "strength"'),
        (
            {"flip": True, "strength": "3"},
            "data.partition.strength: input should be a valid integer, got '3'",
        ),
        ({"flip": 1}, "data.partition.flip: input should be a valid boolean, got 1"),
        ({}, "data.partition.flip is missing"),
    ],
)
def test_wrong_settings_of_a_partitioner(block: dict[str, Any], message: str) -> None:
    register_partitioner("by-length")(by_length)
    with pytest.raises(InputError, match=message):
        config(partition={"name": "by-length", **block})
    with pytest.raises(InputError, match=r"'by-lenght' is not known.*Did you mean \"by-length\""):
        config(partition={"name": "by-lenght"})
    with pytest.raises(InputError, match="clients must be a number with partition by-length"):
        config(clients=None, partition={"name": "by-length", "flip": True})


def test_parameters_that_cannot_be_settings() -> None:
    def two(examples: Any, clients: Any) -> None:
        """Two parameters."""

    def bare(examples: Any, clients: Any, rng: Any, *, strength=3) -> None:  # type: ignore[no-untyped-def]
        """A setting without a type."""

    def odd(examples: Any, clients: Any, rng: Any, *, strength: object = 3, how: Registry[Any]) -> None:
        """A setting that no YAML can give."""

    with pytest.raises(
        InputError, match=r"must take \(examples, clients, rng, \*, settings...\), got \(examples"
    ):
        register_partitioner("two")(two)
    with pytest.raises(
        InputError, match="each setting needs a type and a name other than `name`; see strength"
    ):
        register_partitioner("bare")(bare)
    register_partitioner("odd")(odd)
    with pytest.raises(InputError, match="partitioner odd: its parameters cannot be settings: "):
        config(partition={"name": "odd"})


EVERYONE = [*range(24)]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            [EVERYONE[:8], EVERYONE[8:16], EVERYONE[16:23]],
            "1 of 24 training examples belong to nobody: 23. Give",
        ),
        ([EVERYONE[:9], EVERYONE[8:16], EVERYONE[16:]], "1 examples are given more than once: 8$"),
        ([EVERYONE[:8], EVERYONE[8:]], "it has 2 clients, and data.clients is 3"),
        ([EVERYONE, [], []], "client 1 is empty; every client needs an example"),
        ({"a": EVERYONE, "north": [], "c": []}, "client north is empty"),
        ([EVERYONE[:8], EVERYONE[8:16], [*EVERYONE[16:], 24]], "indices go from 0 to 23, got 24"),
        ([EVERYONE[:8], EVERYONE[8:16], [*EVERYONE[16:], -1]], "indices go from 0 to 23, got -1"),
        ([EVERYONE[:8], EVERYONE[8:16], [16.0]], "an index is a whole number, got 16.0"),
        ([EVERYONE[:8], EVERYONE[8:16], [True]], "an index is a whole number, got True"),
        ([EVERYONE[:8], EVERYONE[8:16], 16], "client 2: must have a list of indices, got 16"),
        (None, "a split is one list of indices a client, got NoneType"),
        ("abc", "a split is one list of indices a client, got str"),
        ([], "it has 0 clients, and data.clients is 3"),
    ],
)
def test_what_a_partitioner_returns_is_checked(split: Any, message: str) -> None:
    @register_partitioner("mine")
    def mine(examples: Any, clients: Any, rng: Any) -> Any:
        """Whatever the test says."""
        return split

    with pytest.raises(InputError, match=f"partitioner mine: .*{message}"):
        prepare_data(config(partition={"name": "mine"}), pooled=False)


def test_a_partitioner_may_return_arrays_and_names() -> None:
    @register_partitioner("mine")
    def mine(examples: Any, clients: int, rng: np.random.Generator) -> Mapping[str, Any]:
        """Named clients."""
        return {f"site {n}": part for n, part in enumerate(np.array_split(rng.permutation(24), clients))}

    split = prepare_data(config(partition={"name": "mine"}), pooled=False)
    assert [client["name"] for client in split.partition["clients"]] == ["site 0", "site 1", "site 2"]
    assert all(client["indices"] == sorted(client["indices"]) for client in split.partition["clients"])


# --- splits from a file -------------------------------------------------------------------------------------


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


# --- templates ----------------------------------------------------------------------------------------------


def test_a_template_by_hand() -> None:
    @register_template("mine", response=lambda example: f" <{example.output}>")
    def mine(example: Example) -> str:
        """Question and mark."""
        return f"{example.instruction}?"

    register_template("short")(mine)
    example = Example("w5 w6", output="w7")
    assert (prompt(example, "mine"), response(example, "mine")) == ("w5 w6?", " <w7>")
    assert response(example, "short") == "w7"
    register_template("bad", summary="makes None")(lambda example: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="template bad must make text of an example, got NoneType"):
        prompt(example, "bad")
    words = tokenizer()
    encoded = encode_causal([example], words, template="short", loss_on="response", max_length=16).items[0]
    ids = words(["w5 w6?", "w7"], add_special_tokens=False)["input_ids"]
    assert list(encoded.input_ids)[-len(ids[0]) - len(ids[1]) - 1 :] == [*ids[0], *ids[1], words.eos_token_id]


TEMPLATE = '''
from fedtune import registry
from fedtune.data.templates import register_template

@register_template("like-plain", response=lambda example: " " + example.output)
def like_plain(example):
    """As plain."""
    about = f"{example.input}\\n" if example.input else ""
    return f"{example.instruction}\\n{about}Answer:"

@register_template("loud", response=lambda example: " " + example.output)
def loud(example):
    """In capitals."""
    return f"{example.instruction.upper()}\\nANSWER:"
'''


def test_a_template_in_training_evaluation_and_generation(tmp_path: Path) -> None:
    document = {**DOCUMENT, "evaluation": {"tasks": ["loss", "accuracy"], "max_examples": 8}}
    write_config(tmp_path / "c.yaml", document)
    (tmp_path / "mine.py").write_text(TEMPLATE)
    found = {}
    for name in ("plain", "like-plain", "loud"):
        template = ("--plugin", "mine.py", f"data.template={name}", "--quiet")
        done = fedtune("run", "c.yaml", *template, "--out", name, cwd=tmp_path)
        assert done.status == 0, done.err
        found[name] = outcome(tmp_path / name)
    assert found["like-plain"]["final"] == found["plain"]["final"]
    assert found["like-plain"]["rounds"] == found["plain"]["rounds"]
    assert found["loud"]["final"] != found["plain"]["final"]
    assert found["loud"]["rounds"][0]["eval"]["loss"] != found["plain"]["rounds"][0]["eval"]["loss"]
    again = fedtune("eval", "loud", "--tasks", "loss", "--plugin", "mine.py", "--json", cwd=tmp_path)
    scores = again.json()["scores"]["global"]["loss"]
    assert scores == pytest.approx(found["loud"]["rounds"][-1]["eval"]["loss"], rel=1e-5)


# --- tasks and metrics --------------------------------------------------------------------------------------


def test_a_metric_is_the_mean_over_the_answers() -> None:
    @register_metric("first-letter", lower_is_better=True)
    def first_letter(answer: str, reference: str) -> float:
        """Whether the first letters are the same."""
        return np.float32(answer[:1] == reference[:1])  # type: ignore[return-value]

    subject: Any = SimpleNamespace(
        answers=["ab", "b", "cd", "x"], examples=[Example("", output=text) for text in ("a", "bb", "d", "xy")]
    )
    task = TASKS["first-letter"]
    found = task.function(subject)
    assert (task.metric, task.examples, task.scorer()) == ("first_letter", True, "this process")
    assert found.metrics["first_letter"].value == 0.75
    assert found.metrics["first_letter"].lower_is_better
    register_metric("broken", summary="gives NaN")(lambda answer, reference: float("nan"))
    with pytest.raises(
        InputError, match="metric broken must give a finite number, got nan for the answer 'ab'"
    ):
        TASKS["broken"].function(subject)


def test_a_task_gives_an_outcome_with_its_metric() -> None:
    given: list[Any] = [Outcome({"size": Scored([1, 2])}), Outcome({"other": Scored([1])}), {"size": 1}]

    @register_task("size", metric="size")
    def size(subject: Subject) -> Outcome:
        """What the test says."""
        return given.pop(0)  # type: ignore[no-any-return]

    assert TASKS["size"].function(None).metrics["size"].value == 1.5  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(InputError, match="task size must give an Outcome with the metric size, got "):
            TASKS["size"].function(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"task size needs generated text; model.task is classification"):
        parse_config({"model": {"task": "classification"}, "evaluation": {"tasks": ["size"]}}, "c.yaml")


METRIC = '''
from fedtune.evaluation.tasks import register_metric

@register_metric("length")
def length(answer, reference):
    """Letters of the answer."""
    return len(answer)
'''


def test_a_metric_beside_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRIC)
    settings = ("data.max_length=64", "evaluation.max_examples=6")
    command = ("eval", "bundled", "--tasks", "accuracy,length", *settings)
    found = fedtune(*command, "--plugin", "mine.py", "--json", cwd=tmp_path)
    assert found.status == 0, found.err
    document = found.json()
    assert document["tasks"]["length"]["scorer"] == "file mine.py"
    assert document["tasks"]["length"]["metric"] == "length"
    assert document["scores"]["model"]["length"]["length"] > 0
    refused(fedtune(*command, "--json", cwd=tmp_path), "length")


# --- plugin files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nif:\n", "plugin mine.py, line 2: SyntaxError: invalid syntax"),
        (
            "def f():\n    return 1 / 0\n\nf()\n",
            "plugin mine.py, line 2: ZeroDivisionError: division by zero",
        ),
        ("import nowhere_to_be_found", "line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("import sys\nsys.exit(7)", "plugin mine.py, line 2: SystemExit: 7"),
        (
            METRIC.replace('"length"', '"loss"'),
            "line 4: the task name 'loss' is taken: fedtune has registered it",
        ),
        (METRIC + METRIC, "line 11: the task name 'length' is taken: file mine.py has registered it already"),
        ("\0", "plugin mine.py: "),
        (None, "plugin mine.py cannot be read: No such file or directory"),
    ],
)
def test_a_broken_plugin_is_one_message(text: str | None, message: str, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", DOCUMENT)
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = fedtune("run", "c.yaml", "--out", "run", "--plugin", "mine.py", cwd=tmp_path)
    refused(result, "fedtune: plugin mine.py" if text != "\0" else "", message)
    assert len(result.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in (".out", ".err")) == before


def test_a_failed_plugin_leaves_nothing_and_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METRIC + "\n1 / 0\n")
    with pytest.raises(InputError, match="line 9: ZeroDivisionError"):
        registry.load_plugin(path)
    assert "length" not in TASKS and registry.plugins() == ()
    path.write_text(METRIC)
    plugin = registry.load_plugin(path)
    assert registry.load_plugin(path) == plugin and registry.plugins() == (plugin,)
    assert TASKS.part("length").origin == f"file {path}"
    path.write_text(METRIC + "# changed\n")
    with pytest.raises(InputError, match="has changed since it was loaded; start Python anew"):
        registry.load_plugin(path)


OPTION = ("run", "compare", "validate", "plan", "diagnose", "eval", "report", "export", "replay", "ls")


@pytest.mark.parametrize("command", [*OPTION, "server", "client"])
def test_every_command_that_reads_a_configuration_takes_plugins(command: str, tmp_path: Path) -> None:
    assert "--plugin" in fedtune(command, "--help", cwd=tmp_path).out


def test_a_run_is_resumed_with_the_plugins_that_it_was_made_with(tmp_path: Path) -> None:
    document = {**DOCUMENT, "evaluation": {"tasks": ["loss", "length"], "max_examples": 2, "every": 0}}
    write_config(tmp_path / "c.yaml", document)
    (tmp_path / "mine.py").write_text(METRIC)
    plugin = ("--plugin", "mine.py")
    killed = fedtune(
        *("run", "c.yaml", "--out", "run", "--quiet", *plugin), cwd=tmp_path, die_at=1, watched=".final.tmp"
    )
    assert killed.status == -9
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert [found["path"] for found in about["plugins"]] == ["mine.py"]
    assert about["parts"] == {"task length": "file mine.py"}
    resume = ("run", "c.yaml", "--resume", "run", "--quiet")
    without = "run was made with the plugin mine.py; pass it again: --plugin mine.py"
    refused(fedtune(*resume, cwd=tmp_path), without)
    for command in (("eval", "run", "--tasks", "loss"), ("export", "run", "--out", "x"), ("report", "run")):
        refused(fedtune(*command, cwd=tmp_path), without)
    (tmp_path / "mine.py").write_text(METRIC + "# changed\n")
    refused(fedtune(*resume, *plugin, cwd=tmp_path), "run began with another plugin mine.py: sha256 was ")
    (tmp_path / "mine.py").rename(tmp_path / "other.py")
    refused(fedtune(*resume, "--plugin", "other.py", cwd=tmp_path), without)
    (tmp_path / "other.py").write_text(METRIC)  # the same content, wherever it is
    done = fedtune(*resume, "--plugin", "other.py", cwd=tmp_path)
    assert done.status == 0, done.err
    report = fedtune("report", "run", "--plugin", "other.py", cwd=tmp_path)
    assert report.status == 0, report.err


def test_what_this_process_alone_knows_is_refused_by_the_simulation(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    register_template("mine", summary="as it is")(lambda example: example.instruction)
    document = {**DOCUMENT, "data": {**DOCUMENT["data"], "template": "mine"}}
    document["transport"] = {"name": "flower-simulation"}
    message = (
        "the template mine was registered in this process alone; put it in a file and pass that as a plugin"
    )
    with pytest.raises(InputError, match=message):
        run(parse_config(document, "c.yaml"), tmp_path / "run", Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_client_elsewhere_has_to_bring_the_part_itself(tmp_path: Path) -> None:
    text = json.dumps({"method": {"name": "clip-mean"}})
    with pytest.raises(
        NotAccepted, match=r"cannot read the configuration: .*method.name 'clip-mean' is not known"
    ):
        join(
            {"config": text, "client": 0, "weights": ""},
            data=tmp_path / "x.jsonl",
            fields={},
            model=None,
            device="cpu",
            acceptance=Acceptance(),
        )


# --- packages -----------------------------------------------------------------------------------------------

PACKAGE = '''
from pathlib import Path

from fedtune.data.templates import register_template

Path(__file__).with_name("imported").touch()

@register_template("loud")
def loud(example):
    """In capitals."""
    return example.instruction.upper()

def quiet(example):
    """Not registered."""
    return example.instruction
'''


@dataclass
class Site:
    """A folder of packages, made by hand, that commands find."""

    folder: Path

    def add(
        self, name: str, points: dict[str, dict[str, str]], code: str = PACKAGE, version: str = "1.0"
    ) -> None:
        module = name.replace("-", "_")
        (self.folder / module).mkdir()
        (self.folder / module / "__init__.py").write_text(code)
        about = self.folder / f"{module}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [
            f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items())
            for group, named in points.items()
        ]
        (about / "entry_points.txt").write_text("\n".join(lines))

    def imported(self, name: str) -> bool:
        return (self.folder / name / "imported").exists()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)  # the processes of `fedtune` begin with this process's path
    return Site(folder)


def listed(kind: str, cwd: Path) -> dict[str, dict[str, str]]:
    result = fedtune("ls", kind, "--json", cwd=cwd)
    assert result.status == 0, result.err
    return {row["name"]: row for row in result.json()}


def test_a_package_is_known_without_being_imported(site: Site, tmp_path: Path) -> None:
    site.add("loud-pack", {"fedtune.templates": {"loud": "loud_pack:loud"}})
    write_config(tmp_path / "c.yaml", DOCUMENT)
    assert fedtune("validate", "c.yaml", cwd=tmp_path).status == 0
    refused(fedtune("validate", "c.yaml", "data.template=x", cwd=tmp_path), "data.template=x")
    write_config(tmp_path / "d.yaml", {**DOCUMENT, "data": {**DOCUMENT["data"], "template": "lout"}})
    refused(
        fedtune("validate", "d.yaml", cwd=tmp_path), "known are alpaca, plain, loud.", 'Did you mean "loud"'
    )
    assert not site.imported("loud_pack")
    row = {"name": "loud", "summary": "In capitals.", "origin": "loud-pack 1.0"}
    assert listed("templates", tmp_path)["loud"] == row
    assert site.imported("loud_pack")
    assert "loud    loud-pack 1.0  In capitals." in fedtune("ls", "templates", cwd=tmp_path).out
    done = fedtune("run", "c.yaml", "data.template=loud", "--out", "run", "--quiet", cwd=tmp_path)
    assert done.status == 0, done.err
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert about["parts"] == {"template loud": "loud-pack 1.0"}


@pytest.mark.parametrize(
    ("code", "place", "message"),
    [
        (
            "import nowhere_at_all",
            "bad:loud",
            "its module bad cannot be imported: ModuleNotFoundError: No module named ",
        ),
        (
            PACKAGE + "\n1 / 0",
            "bad:loud",
            "its module bad cannot be imported: ZeroDivisionError: division by zero",
        ),
        ("raise SystemExit(3)", "bad:loud", "its module bad cannot be imported: SystemExit: 3"),
        (
            PACKAGE,
            "bad:laud",
            "its module bad cannot be imported: AttributeError: module 'bad' has no attribute 'laud'",
        ),
        (
            PACKAGE,
            "bad:quiet",
            "bad:quiet is not registered under that name; its author has to put the decorator",
        ),
    ],
)
def test_a_package_that_cannot_be_used(
    code: str, place: str, message: str, site: Site, tmp_path: Path
) -> None:
    site.add("bad", {"fedtune.templates": {"loud": place, "again": place}}, code)
    site.add("good", {"fedtune.templates": {"soft": "good:soft"}}, PACKAGE.replace("loud", "soft"))
    rows = listed("templates", tmp_path)
    assert list(rows) == ["alpaca", "plain", "again", "loud", "soft"]
    for name in ("loud", "again"):
        assert rows[name]["summary"].startswith(
            f"cannot be loaded: bad 1.0 brings the template '{name}', but "
        )
        assert rows[name]["origin"] == "bad 1.0"
    assert message in rows["loud"]["summary"]
    assert rows["soft"]["summary"] == "In capitals."
    for template, status in (("plain", 0), ("soft", 0), ("loud", 2)):
        write_config(tmp_path / "c.yaml", {**DOCUMENT, "data": {**DOCUMENT["data"], "template": template}})
        found = fedtune("validate", "c.yaml", cwd=tmp_path)
        assert found.status == status, found.err
    refused(found, f"c.yaml: data.template: bad 1.0 brings the template 'loud', but {message}")


def test_names_that_two_claim(site: Site, tmp_path: Path) -> None:
    site.add("one", {"fedtune.templates": {"loud": "one:loud", "alpaca": "one:loud"}})
    site.add("two", {"fedtune.templates": {"loud": "two:loud"}, "fedtune.tasks": {"loss": "two:loud"}})
    rows = listed("templates", tmp_path)
    assert rows["loud"]["origin"] == "one 1.0 and two 1.0"
    assert rows["alpaca"]["origin"] == "fedtune and one 1.0"
    assert rows["plain"]["summary"].startswith("instruction")
    assert not site.imported("one") and not site.imported("two")
    for data, evaluation, message in (
        (
            "loud",
            "accuracy",
            "data.template: one 1.0 and two 1.0 each bring a template 'loud'; it can be used when",
        ),
        ("alpaca", "accuracy", "fedtune and one 1.0 each bring a template 'alpaca'"),
        ("plain", "loss", "fedtune and two 1.0 each bring a task 'loss'"),
        ("plain", "accuracy", ""),
    ):
        document = {**DOCUMENT, "data": {**DOCUMENT["data"], "template": data}}
        write_config(tmp_path / "c.yaml", {**document, "evaluation": {"tasks": [evaluation]}})
        found = fedtune("validate", "c.yaml", cwd=tmp_path)
        if message:
            refused(found, message)
        else:
            assert found.status == 0, found.err


def test_a_file_and_a_package_of_one_name(site: Site, tmp_path: Path) -> None:
    site.add("one", {"fedtune.templates": {"loud": "one:loud"}})
    (tmp_path / "mine.py").write_text(TEMPLATE)
    write_config(tmp_path / "c.yaml", {**DOCUMENT, "data": {**DOCUMENT["data"], "template": "loud"}})
    refused(fedtune("validate", "c.yaml", "--plugin", "mine.py", cwd=tmp_path), "one 1.0", "file mine.py")
    (tmp_path / "imports.py").write_text("import one\n")  # then it is the package's own, as without
    assert fedtune("validate", "c.yaml", "--plugin", "imports.py", cwd=tmp_path).status == 0


def test_importing_fedtune_and_asking_its_version_looks_for_no_packages() -> None:
    program = """
import sys
import fedtune
sys.argv = ["fedtune", "--version"]
from fedtune.cli.main import main
try:
    main()
except SystemExit as done:
    assert not done.code
import fedtune.config.file, fedtune.federation.run
import fedtune.registry
assert fedtune.registry._entry_points.cache_info().currsize == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
