"""Parts of one's own, registered in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from command import fedtune, outcome, write_config
from model_families import tokenizer
from plugin_parts import DOCUMENT, METRIC, TEMPLATE, config, refused

from fedtune.config.file import parse_config
from fedtune.core.settings import Settings
from fedtune.data.encode import encode_causal
from fedtune.data.examples import Example
from fedtune.data.partition import PARTITIONERS, register_partitioner
from fedtune.data.templates import TEMPLATES, prompt, register_template, response
from fedtune.errors import InputError
from fedtune.evaluation.registry import TASKS
from fedtune.evaluation.tasks import register_metric, register_task
from fedtune.evaluation.types import EvalEnv, Outcome, Scored
from fedtune.federation.data import prepare_data
from fedtune.methods import registry as methods
from fedtune.methods.references import Nothing, ZeroShot
from fedtune.registry import Registry

pytestmark = pytest.mark.usefixtures("parts_as_before")


KINDS: tuple[Registry[Any], ...] = (methods.METHODS, PARTITIONERS, TASKS, TEMPLATES)


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


class OfItself(Settings):
    name: Literal["of-itself"] = "of-itself"


class Says(ZeroShot):
    """The model as it is; its annotations name its classes."""

    def __init__(self, config: OfItself, seed: int) -> None:
        super().__init__(config, seed)  # type: ignore[arg-type]


def test_annotations_name_the_classes_of_a_method() -> None:
    methods.register_method("of-itself")(Says)
    assert methods.config_class("of-itself") is OfItself and methods.state_class("of-itself") is Nothing
    assert isinstance(methods.build(OfItself(), 0), Says)

    class Bare(Whole):
        """Annotates nothing."""

        def __init__(self, config, seed) -> None:  # type: ignore[no-untyped-def]
            pass

        def init(self, model):  # type: ignore[no-untyped-def]
            pass

    with pytest.raises(
        InputError, match=r"got None; give config=\.\.\., or annotate config in __init__ of Bare"
    ):
        methods.register_method("mine", state=Nothing)(Bare)
    with pytest.raises(
        InputError, match=r"got None; give state=\.\.\., or annotate what init of Bare returns"
    ):
        methods.register_method("mine", config=Mine)(Bare)


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

    env: Any = SimpleNamespace(
        answers=["ab", "b", "cd", "x"], examples=[Example("", output=text) for text in ("a", "bb", "d", "xy")]
    )
    task = TASKS["first-letter"]
    found = task.function(env)
    assert (task.metric, task.examples, task.scorer()) == ("first_letter", True, "this process")
    assert found.metrics["first_letter"].value == 0.75
    assert found.metrics["first_letter"].lower_is_better
    register_metric("broken", summary="gives NaN")(lambda answer, reference: float("nan"))
    with pytest.raises(
        InputError, match="metric broken must give a finite number, got nan for the answer 'ab'"
    ):
        TASKS["broken"].function(env)


def test_a_task_gives_an_outcome_with_its_metric() -> None:
    given: list[Any] = [Outcome({"size": Scored([1, 2])}), Outcome({"other": Scored([1])}), {"size": 1}]

    @register_task("size", metric="size")
    def size(env: EvalEnv) -> Outcome:
        """What the test says."""
        return given.pop(0)  # type: ignore[no-any-return]

    assert TASKS["size"].function(None).metrics["size"].value == 1.5  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(InputError, match="task size must give an Outcome with the metric size, got "):
            TASKS["size"].function(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"task size needs generated text; model.task is classification"):
        parse_config({"model": {"task": "classification"}, "evaluation": {"tasks": ["size"]}}, "c.yaml")


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
