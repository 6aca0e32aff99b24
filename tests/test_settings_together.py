"""Which settings of a method go together: what is refused says why, and what is not refused is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedtune.core.types import ServerEnv, SumMethod
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.methods.settings import Training

SGD = {"optimizer": "sgd", "trainable": "full"}
ASYNC = {"rounds": 1, "arrival": "asynchronous"}
STACK = {"aggregation": "stack"}
FRESH = "aggregation: stack starts fresh factors every round"

BACKWARD = {"optimizer_in_backward": True}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fedavg", {**STACK, "optimizer": "sgd", "control_variates": True}, FRESH),
    ("fedavg", {**STACK, **ASYNC}, FRESH),
    ("fedavg", {**STACK, "server_optimizer": {"name": "momentum"}}, FRESH),
    ("fedavg", {"aggregation": "freeze-a", "trainable": "full"}, "freeze-a is for trainable: lora, got full"),
    ("fedavg", {"aggregation": "stack", "trainable": "prompt"}, "stack is for trainable: lora, got prompt"),
    ("fedavg", {**ASYNC, "rounds": 2}, "set rounds: 1 .got 2"),
    ("fedavg", {**ASYNC, **SGD, "control_variates": True}, "no control_variates"),
    ("fedavg", {**ASYNC, "server_optimizer": {"name": "adam"}}, "it goes with server_optimizer mean"),
    ("fedavg", {"control_variates": True}, "set optimizer: sgd, momentum: 0"),
    ("fedavg", {**SGD, "momentum": 0.5, "control_variates": True}, "set optimizer: sgd, momentum: 0"),
    (
        "fedavg",
        {"optimizer": "sgd", "control_variates": True, "lora": {"rank": 2, "client_ranks": [1, 2]}},
        "clients of one rank",
    ),
    ("fedavg", {"lora": {"rank": 2, "client_ranks": [3]}}, r"must lie in 1..rank \(2\), got 3"),
    ("fedavg", {"lora": {"rank": 2, "client_ranks": [1, 0]}}, r"must lie in 1..rank \(2\), got 0"),
    ("fedavg", {"lora": {"rank": 2, "client_ranks": []}}, "at least one rank"),
    ("fedavg", {"lora": {"init": "loftq"}}, "begins at what quantising took from a weight"),
    ("fedavg", {"lora": {"init": "pissa", "use_dora": True}}, "init: pissa does not go with use_dora"),
    (
        "fedavg",
        {"lora": {"init": "olora", "rank": 2, "client_ranks": [1, 2]}},
        "init: olora does not go with client_ranks: a client of a lower rank",
    ),
    ("fedavg", {**STACK, "lora": {"use_dora": True}}, "no part of the product; .* not go with lora.use_dora"),
    ("fedavg", {**STACK, "lora": {"init": "pissa"}}, "which are drawn; it does not go with lora.init: pissa"),
    ("fedavg", {"lora": {"targets": "attn"}}, "'auto', 'attention' or 'all-linear'"),
    ("fedbiot", {"lora": {"use_dora": True}}, "use_dora is for fedavg, standalone and centralized"),
    ("fedot", {"lora": {"init": "olora"}}, "init: olora is for fedavg"),
    ("offsite-tuning", {"lora": {"bias": "all"}}, "bias: all is for fedavg"),
    (
        "fedcybgd",
        {"trainable": "lora", "lora": {"modules_to_save": ["norm"]}},
        "lora.modules_to_save is for fedavg, standalone and centralized; a turn trains",
    ),
    ("fedbavg", {"trainable": "lora", "lora": {"init": "pissa"}}, "lora.init: pissa is for fedavg"),
    (
        "fedavg",
        {"trainable": "prefix", "gradient_checkpointing": "full"},
        "stand there twice; set it to none",
    ),
    ("fedavg", {"trainable": "ia3", "aggregation": "stack"}, "stack is for trainable: lora, got ia3"),
    ("fedcybgd", {"trainable": "ia3"}, "'full', 'lora' or 'adapter'"),
    ("fedavg", {"trainable": "prompt", "lora": {}}, "`lora` is set but trainable is prompt"),
    ("fedavg", {"trainable": "full", "p_tuning": {}}, "`p_tuning` is set.* or set trainable: p-tuning"),
    ("fedavg", {**SGD, "betas": [0.9, 0.95]}, "betas belong to optimizer: adamw"),
    ("fedavg", {"betas": [0.9, 1.0]}, r"betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
    ("fedavg", {"betas": [-0.1, 0.9]}, r"betas must lie in \[0, 1\)"),
    ("fedavg", {"server_optimizer": {"momentum": 0.5}}, "momentum has no effect with name: mean"),
    (
        "fedavg",
        {"server_optimizer": {"name": "momentum", "beta2": 0.5}},
        "beta2 has no effect.* belongs to adam",
    ),
    (
        "fedcybgd",
        {"trainable": "lora", "compression": "hybrid"},
        "hybrid prunes blocks that were trained whole",
    ),
    ("fedcybgd", {"trainable": "adapter", "extra_blocks": ["norm"]}, "do not go with trainable: adapter"),
    ("fedcybgd", {"extra_blocks": ["head", "norm", "head"]}, "each part once"),
    ("fedbavg", {"compression": "hybrid"}, "fedbavg has no cycle"),
    ("fedkseed", {"trim": 0.2}, "belongs to trimmed-mean"),
    ("fedkseed", {"aggregation": "trimmed-mean", "groups": 3}, "belongs to median-of-means"),
    ("fedbiot", {"lora": {"dropout": 0.5}}, "dropout is for fedavg"),
    (
        "fedavg",
        {"optimizer": "adamw-8bit", "momentum": 0.5},
        "momentum belongs to optimizer: sgd; adamw-8bit",
    ),
    ("fedavg", {**BACKWARD, "max_grad_norm": 1.0}, "does not go with max_grad_norm: 1.0"),
    ("badam", {**BACKWARD, "gradient_accumulation": 2}, "does not go with gradient_accumulation: 2"),
    ("fedbiot", {**BACKWARD, "proximal": 0.1}, "proximal .0.1. adds a penalty"),
    ("fedcybgd", {**BACKWARD, "powersgd": {}}, "powersgd .* does not go with optimizer_in_backward"),
    ("fedbavg", {"masters": "kahan", "powersgd": {}}, "powersgd .* does not go with masters: kahan"),
    ("fedot", {"masters": "stochastic"}, "fedot trains LoRA"),
    ("fedbiot", {"optimizer": "sgd", "betas": [0.9, 0.95]}, "betas belong to optimizer: adamw"),
]

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {**STACK, "lora": {"rank": 3, "client_ranks": [1, 2, 3]}, "proximal": 0.1}),
    ("fedavg", {"aggregation": "freeze-a", **ASYNC}),
    ("fedavg", {"aggregation": "freeze-a", "optimizer": "sgd", "control_variates": True}),
    (
        "fedavg",
        {"aggregation": "freeze-a", "server_optimizer": {"name": "adam", "momentum": 0.5, "beta2": 0.5}},
    ),
    ("fedavg", {**ASYNC, "server_optimizer": {"lr": 0.5}, "proximal": 1.0}),
    ("fedavg", {"optimizer": "sgd", "control_variates": True, "lora": {"rank": 2}}),
    ("fedavg", {**SGD, "control_variates": True, "server_optimizer": {"name": "momentum"}}),
    ("fedavg", {**SGD, "momentum": 0.9}),
    ("fedavg", {"betas": [0.0, 0.5], "lora": {"rank": 1, "client_ranks": [1]}}),
    ("fedavg", {"trainable": "p-tuning", "p_tuning": {"tokens": 1, "hidden": 1}}),
    ("fedcybgd", {"trainable": "lora", "compression": "layer-drop", "blocks_per_client": 2}),
    ("fedcybgd", {"extra_blocks": ["head", "norm"], "compression": "hybrid"}),
    ("fedbavg", {"trainable": "adapter", "compression": "layer-drop"}),
    ("fedkseed", {"aggregation": "trimmed-mean", "trim": 0.0, "clip": 1.0, "scalar_limit": 2.0}),
    ("fedkseed-pro", {"aggregation": "median-of-means", "groups": 1}),
    ("fedbiot", {"optimizer": "sgd", "momentum": 0.5, "layer_dropout": 0.0}),
    ("fedot", {"alignment": {"steps": 3}}),
    ("badam", {"block_order": "descending", "extra_blocks": ["norm"]}),
    ("fedbiot", {**BACKWARD, "optimizer": "adamw-8bit"}),
    ("fedavg", {**BACKWARD, "trainable": "full", "masters": "stochastic", "proximal": 0.1}),
    ("standalone", {"trainable": "full", "masters": "kahan", "max_grad_norm": 1.0}),
]


@pytest.mark.parametrize(("name", "settings", "says"), REFUSED)
def test_what_does_not_go_together_is_refused(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        registry.config_class(name).model_validate(settings)


@pytest.mark.parametrize(("name", "settings"), TAKEN)
def test_what_goes_together_is_taken_and_reads_back(name: str, settings: dict[str, Any]) -> None:
    config = registry.config_class(name).model_validate(settings)
    assert {key: getattr(config, key) for key in settings if not isinstance(settings[key], dict)} == {
        key: value for key, value in settings.items() if not isinstance(value, dict)
    }
    assert type(config).model_validate(config.model_dump()) == config


def test_a_form_that_is_chosen_gets_its_block_and_the_others_none() -> None:
    config = registry.config_class("fedavg").model_validate
    assert config({}).lora == config({"lora": {}}).lora and config({}).adapter is None
    assert (
        config({"trainable": "adapter"}).adapter.size == 32 and config({"trainable": "adapter"}).lora is None
    )
    chosen = config({"trainable": "p-tuning"})
    assert chosen.p_tuning.hidden == 128 and chosen.prompt is None
    assert registry.config_class("fedcybgd").model_validate({}).lora is None
    assert registry.config_class("fedot").model_validate({}).alignment.steps == 0
    assert registry.config_class("fedot").model_validate({"alignment": {"steps": 3}}).alignment.steps == 3
    assert registry.config_class("fedbiot").model_validate({"local_epochs": 2}).local_steps is None
    assert registry.config_class("fedbiot").model_validate({"optimizer": "sgd"}).betas == [0.9, 0.999]


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({}, 1, 1),
        ({}, 8, 1),
        ({}, 9, 2),
        ({"local_epochs": 2, "batch_size": 2}, 5, 6),
        ({"local_epochs": 2, "batch_size": 2, "gradient_accumulation": 2}, 5, 4),
        ({"local_epochs": 3, "batch_size": 2, "gradient_accumulation": 3}, 6, 3),
        ({"local_steps": 7, "batch_size": 2, "gradient_accumulation": 3}, 5, 7),
    ],
)
def test_steps_of_a_round(settings: dict[str, Any], examples: int, steps: int) -> None:
    assert Training(**settings).steps(examples) == steps


@pytest.mark.parametrize(
    ("name", "settings", "privacy", "why"),
    [
        ("fedavg", {}, True, None),
        ("fedavg", {"aggregation": "stack"}, False, "each client's factors"),
        ("fedavg", {**SGD, "control_variates": True}, False, None),
        ("fedavg", {**SGD, "control_variates": True}, True, "a second update"),
        ("fedkseed", {}, True, None),
        ("fedkseed", {"clip": 1.0}, False, "clip looks at each client's scalars"),
        ("fedkseed", {"scalar_limit": 1.0}, False, "scalar_limit looks at each client's scalars"),
        ("fedkseed", {"aggregation": "trimmed-mean"}, False, "compares the clients' scalars"),
        ("fedkseed-pro", {}, False, "take fedkseed"),
    ],
)
def test_what_can_be_summed_without_being_seen(
    name: str, settings: dict[str, Any], privacy: bool, why: str | None
) -> None:
    method = registry.build(registry.config_class(name).model_validate(settings), 0)
    assert isinstance(method, SumMethod)
    refusal = method.sum_refusal(privacy=privacy)
    assert refusal is None if why is None else why in str(refusal)


PUBLIC = ServerEnv((Encoded((3, 4), (3, 4)),), 0, torch.device("cpu"))
NOBODYS = ServerEnv((), 0, torch.device("cpu"))


@pytest.mark.parametrize("name", list(registry.METHODS))
def test_public_examples_are_refused_where_nothing_uses_them_and_needed_where_something_does(
    name: str,
) -> None:
    config = registry.config_class(name)
    aligns = name in ("fedbiot", "fedot", "offsite-tuning")
    with pytest.raises(
        InputError, match="there is none; set data.public" if aligns else f"but {name} trains nothing"
    ):
        registry.build(config(), 0).prepare(NOBODYS if aligns else PUBLIC)
    registry.build(config(), 0).prepare(PUBLIC if aligns else NOBODYS)
    if not aligns:
        return
    for settings, public in (
        ({"layer_dropout": 0.0}, False),
        ({"alignment": {"steps_before": 0, "steps": 0}}, False),
        ({"alignment": {"steps_before": 1, "steps": 0}}, True),
        ({"alignment": {"steps_before": 0, "steps": 1}}, True),
    ):
        method = registry.build(config.model_validate(settings), 0)
        method.prepare(PUBLIC if public else NOBODYS)
        with pytest.raises(
            InputError, match="data.public" if public else f"{name} without alignment trains nothing"
        ):
            method.prepare(NOBODYS if public else PUBLIC)


NEVER_SENT = {"badam", "standalone", "centralized", "zero-shot"}
SENT_THE_MODEL = {"fedbiot", "fedot", "offsite-tuning", "fedcybgd", "fedbavg"}
IN_ONE_PLACE = {"badam", "centralized", "offsite-tuning"}


@pytest.mark.parametrize("name", list(registry.METHODS))
def test_what_a_method_says_of_itself(name: str) -> None:
    method = registry.build(registry.config_class(name)(), 0)
    assert method.uses_wire == (name not in NEVER_SENT)
    assert method.sends_model == (name in SENT_THE_MODEL)
    assert method.pools_data == (name in IN_ONE_PLACE)
    assert not method.saves_merged
    once = {"badam": 1, "standalone": 1, "centralized": 1, "zero-shot": 0}
    assert method.rounds == once.get(name, getattr(method.config, "rounds", None)) is not None
