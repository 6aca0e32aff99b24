"""Configuration files: what is refused and how, overrides, and that what is saved is read back."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.file import apply_overrides, dump_config, load_config, parse_config
from fedtune.config.other_names import OTHER_NAMES
from fedtune.config.schema import RunConfig
from fedtune.errors import InputError
from fedtune.methods import registry

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


UNKNOWN = {
    "sed: 1": 'sed is not a known setting; here are known: checkpoints, data.* mean "seed"',
    "model: {nam: x}": 'model.nam is not .* mean "name"',
    "data: {cliens: 3}": 'data.cliens is not .* mean "clients"',
    "data: {fields: {outptu: x}}": "data.fields.*'outptu'.* mean \"output\"",
    "data: {partition: {name: dirichlet, alfa: 1}}": 'data.partition.alfa is not .* mean "alpha"',
    "data: {partition: {name: iid, alpha: 1}}": "data.partition.alpha is not a known .* known: name",
    "data: {partition: {name: dirichle}}": 'partition.name .dirichle. is not known.* mean "dirichlet"',
    "data: {holdout: {fracton: 0.1}}": 'data.holdout.fracton is not .* mean "fraction"',
    "data: {template: alpca}": "data.template.*'alpca'.* mean \"alpaca\"",
    "method: {name: fedavg, lrr: 1}": 'method.lrr is not .* mean "lr"',
    "method: {name: fedvag}": 'method.name .fedvag. is not known.* mean "fedavg"',
    "method: {name: fedavg, lora: {rnk: 1}}": 'method.lora.rnk is not .* mean "rank"',
    "method: {name: fedavg, server_optimizer: {nme: adam}}": 'server_optimizer.nme is not .* mean "name"',
    "federation: {simulate: {drop_out: 0.1}}": 'federation.simulate.drop_out is not .* mean "dropout"',
    "evaluation: {tasks: [acuracy]}": "task 'acuracy' is not known.* mean \"accuracy\"",
    "transport: {name: in-proces}": 'transport.name.* mean "in-process"',
    "checkpoints: {kep: 1}": 'checkpoints.kep is not .* mean "keep"',
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_names_suggest_the_nearest(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=UNKNOWN[text]) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: ")
    assert "\n" not in str(error.value)


WRONG = {
    "seed: '1'": "seed: input should be a valid integer, got '1'",
    "seed: 1.0": "seed: .*integer",
    "seed: true": "seed: .*integer",
    "seed: -1": "seed: .*greater than or equal to 0, got -1",
    "model: bundled": "model: .*got 'bundled'",
    "model:": "model: .*got None",
    "data: {clients: 3.5}": "data.clients: .*integer or .files., got 3.5",
    "data: {clients: null}": "data: clients must be a number with partition iid",
    "data: {partition: iid}": "data.partition must be a block of settings with a name, got 'iid'",
    "data: {partition: {alpha: 1}}": "data.partition.name is missing; known are iid, dirichlet",
    "data: {partition: {name: quantity, alpha: 1.0, fractions: [1.0]}}": "alpha and fractions are both set",
    "data: {holdout: {fraction: 0.1, category: x}}": "exactly one of fraction, client_fraction, category",
    "data: {holdout: {fraction: 0.1, split: x}}": "split belongs to source",
    "method: fedavg": "method must be a block of settings with a name, got 'fedavg'",
    "method: {rounds: 3}": "method.name is missing; known are fedavg",
    "method: {name: fedavg, lr: 0}": "method.lr: input should be greater than 0, got 0",
    "method: {name: fedavg, lr: .nan}": "method.lr: .*finite",
    "method: {name: fedavg, lr: fast}": "method.lr: .*number, got 'fast'",
    "method: {name: fedavg, lr: 2024-01-01}": "method.lr: ",
    "method: {name: fedavg, local_epochs: 1, local_steps: 1}": "local_epochs and local_steps are both set",
    "method: {name: fedavg, trainable: full, lora: {rank: 2}}": "`lora` is set but trainable is full",
    "federation: {quorum: 1.5}": "federation.quorum: ",
    "federation: {clients_per_round: 0}": "federation.clients_per_round: ",
    "federation: {simulate: {dropout: 1.0}}": "federation.simulate.dropout: .*less than 1",
    "evaluation: {tasks: []}": "evaluation.tasks: .*at least 1",
    "evaluation: {arrivals: true}": "evaluation.arrivals needs method.arrival: asynchronous",
    "{model: {task: classification}, evaluation: {tasks: [rouge-l]}}": "rouge-l needs generated text",
    "- seed": "must map setting names to values, got list",
    "1: 2": "1",
    "seed: [1": "not valid YAML",
    "seed: 1\nseed: 2": "key 'seed' stands twice.*line 2",
    "data: {clients: 2, clients: 3}": "key 'clients' stands twice",
    "? [a, b]\n: 1": "a key must be a name",
    "a: &a [*a]": "blocks inside each other",
    "seed: !!python/object/apply:os.getcwd []": "not valid YAML",
    "\x00": "not valid YAML",
}


def test_a_rule_about_several_settings_names_its_source_once() -> None:
    wrong = {"model": {"quantization": "nf4"}, "method": {"name": "fedavg", "trainable": "full"}}
    with pytest.raises(InputError, match=r"^the configuration: model.quantization: nf4 does not go with"):
        parse_config(wrong, "the configuration")
    with pytest.raises(InputError, match=r"^mine.yaml: the configuration: model.quantization: nf4"):
        parse_config(wrong, "mine.yaml")


@pytest.mark.parametrize("text", WRONG)
def test_wrong_values_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=WRONG[text]):
        load(tmp_path, text)


def test_settings_that_do_not_go_together_are_not_named_beside_a_block_with_problems() -> None:
    """What they were compared with stands in for the method: here its arrival is none of the file's."""
    method = {"name": "fedavg", "arrival": "asynchronous", "rounds": 2}
    with pytest.raises(InputError) as error:
        parse_config({"method": method, "evaluation": {"arrivals": True}, "seed": -1}, "a.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("a.yaml: method: arrival: asynchronous is one-shot")
    assert lines[1].startswith("a.yaml: seed: ")


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, "{sed: 1, data: {clients: x}, method: {name: fedavg, lrr: 1, rounds: 0}}")
    names = sorted(line.split(": ")[1].split(" ")[0] for line in str(error.value).splitlines())
    assert names == ["data.clients", "method.lrr", "method.rounds", "sed"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == parse_config({"method": {"name": "fedavg"}}, "test")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("+2.5e+1", 25.0), (".5e-1", 0.05), ("3", 3.0), ("0.001", 1e-3)],
)
def test_numbers_as_people_write_them(text: str, value: float, tmp_path: Path) -> None:
    assert load(tmp_path, f"method: {{name: fedavg, lr: {text}}}").method.lr == value  # type: ignore[attr-defined]
    config = load(tmp_path, "", f"method.lr={text}", "method.name=fedavg")
    assert config.method.lr == value  # type: ignore[attr-defined]


def test_overrides(tmp_path: Path) -> None:
    text = "method: {name: fedavg, rounds: 2, lora: {rank: 4}}\ndata: {clients: 3}"
    config = load(
        tmp_path,
        text,
        "method.lora.alpha=8",
        "method.rounds=5",
        "data.partition={name: dirichlet, alpha: 0.3}",
        "evaluation.tasks=[loss, accuracy]",
        "federation.clients_per_round=0.5",
        "method.max_grad_norm=null",
        "seed=1",
        "seed=2",
    )
    method = config.resolved()["method"]
    assert (method["lora"]["rank"], method["lora"]["alpha"], method["rounds"]) == (4, 8.0, 5)
    assert config.resolved()["data"]["partition"] == {
        "name": "dirichlet",
        "alpha": 0.3,
        "minimum": 10,
        "by": "category",
    }
    assert config.evaluation.tasks == ["loss", "accuracy"]
    assert config.federation.clients_per_round == 0.5
    assert (config.data.clients, config.seed) == (3, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "'lr' is not an override; write key=value"),
        ("=1", "is not an override"),
        ("method..lr=1", "is not an override"),
        ("seed.a=1", "seed is 0, not a block of settings"),
        ("seed=[1", "override 'seed=.1': not valid YAML"),
        ("method.lr=", "method.lr: "),
        ("data.client=3", 'mean "clients"'),
        ("method=fedavg", "must be a block of settings"),
    ],
)
def test_wrong_overrides(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, "{seed: 0, method: {name: fedavg}}", override)


def test_overrides_do_not_leak_into_a_shared_default() -> None:
    first: dict[str, Any] = {}
    apply_overrides(first, ["data.clients=3"])
    assert parse_config({}, "test").data.clients == 10


def _config_files() -> list[Path]:
    return sorted([*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.yml")])


def test_there_are_configurations() -> None:
    assert CONFIGS / "demo.yaml" in _config_files()


@pytest.mark.parametrize("path", _config_files(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_configuration_in_the_tree_is_valid(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    registry.build(config.method, config.seed)
    assert load(tmp_path, dump_config(config)) == config


@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
    | st.sampled_from(
        ["1e-4", "1e5", "null", "yes", "~", "1_0", "2024-01-01", "0x1", ".inf", "-", "'", "a: b"]
    ),
    lr=st.floats(1e-12, 1e6),
    alpha=st.none() | st.floats(1e-6, 1e3),
    share=st.none() | st.floats(0.001, 1) | st.integers(1, 10**6),
)
def test_what_is_saved_is_read_back_equal(
    text: str, lr: float, alpha: float | None, share: float | int | None
) -> None:
    partition = {"name": "quantity", "alpha": alpha} if alpha else {"name": "by-field"}
    config = parse_config(
        {
            "data": {"train": text, "fields": {"output": text}, "partition": partition},
            "method": {"name": "fedavg", "lr": lr, "lora": {"targets": [text]}},
            "federation": {"clients_per_round": share},
        },
        "test",
    )
    with tempfile.TemporaryDirectory() as folder:
        again = load(Path(folder), dump_config(config))
    assert again == config
    assert again.sha256() == config.sha256()
    assert type(again.federation.clients_per_round) is type(config.federation.clients_per_round)


def test_an_alias_bomb_costs_no_more_than_its_text(tmp_path: Path) -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]  # 9^8 values and more
    (tmp_path / "bomb.yaml").write_text("l0: &l0 [lol]\n" + "\n".join(levels))
    with pytest.raises(InputError, match=r"bomb\.yaml: stands for more than 100,000 values, each alias"):
        load_config(tmp_path / "bomb.yaml")
    with pytest.raises(InputError, match=r"more than 100,000 values"):
        apply_overrides({}, ["seed={a: &a [" + "1," * 400 + "], b: [" + "*a," * 400 + "]}"])


HOSTILE = {
    "a number of 5,000 digits": ("seed: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
    "a day that is none": ("seed: 2024-13-45", "not valid YAML: month must be in 1..12"),
    "a number that is none": ('seed: !!int "x"', "not valid YAML: invalid literal"),
    "a flag that is none": ('seed: !!bool "x"', "not valid YAML: 'x'"),
    "a block inside itself": ("a: &a [*a]", "more than 50 blocks inside each other, or one inside itself"),
    "deep blocks": ("[" * 200_000, "more than 50 blocks inside each other"),
    "blocks just too deep": ("a: " + "[" * 51 + "]" * 51, "more than 50 blocks inside each other"),
    "a long text": ("a: " + "x" * 300_000, "longer than the 262,144 characters"),
    "a Python object": ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
}


@pytest.mark.parametrize(("text", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_in_a_short_sentence(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml")
    assert says in str(caught.value) and len(str(caught.value)) < 500


def test_a_wrong_value_is_shown_in_short(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: [" + "1, " * 50_000 + "]\nmethod: " + "y" * 100_000)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml")
    assert "yyy ... yyy" in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(InputError) as caught:
        parse_config({"seed": ["1"] * 50_000}, "c")
    assert "c: seed: input should be a valid integer" in str(caught.value) and len(str(caught.value)) < 500


def test_an_anchor_used_twice_is_fine(tmp_path: Path) -> None:
    text = "method: {name: fedavg, lr: &rate 1e-3}\nfederation: {quorum: *rate}"
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml").federation.quorum == 1e-3


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_other_tools_call_a_setting_is_answered_with_ours(name: str) -> None:
    ours, _, value = OTHER_NAMES[name].partition(": ")
    block = ours.split(".")[0]
    document: dict[str, Any] = {"method": {"name": "fedavg"}}
    document.setdefault(block, {})[name] = 1
    with pytest.raises(InputError, match=re.escape(f"Here that is {OTHER_NAMES[name]}.")):
        parse_config(document, "mine.yaml")
    document = {"method": {"name": "fedavg"}}
    apply_overrides(document, [f"{ours}={value or '{}'}"])
    try:  # ours is a setting: if anything is wrong, it is the value
        parse_config(document, "mine.yaml")
    except InputError as error:
        assert "not a known setting" not in str(error)
