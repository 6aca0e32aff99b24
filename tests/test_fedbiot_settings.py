"""What FedBiOT refuses: replies that are not what was asked, and settings that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune, write_config
from fedbiot_bench import ALIGNED, SMALL, Run
from pydantic import ValidationError
from torch import Tensor

from fedtune.core.types import Payload
from fedtune.core.wire import Content, decode, encode
from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.methods.fedbiot.settings import Alignment, OffsiteConfig


def altered(change: Callable[[dict[str, Tensor]], None]) -> Callable[[int, bytes], bytes]:
    """Client 1's replies, changed."""

    def alter(client: int, frame: bytes) -> bytes:
        if client != 1:
            return frame
        message = decode(frame)
        tensors = dict(message.payload.tensors)
        change(tensors)
        return encode(Content(Payload(tensors), message.meta))

    return alter


def _emulator(tensors: dict[str, Tensor]) -> None:
    tensors["emulator.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)


def _other_layer(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.7.self_attn.q_proj.lora_A.weight"] = tensors.pop(
        "adapter.0.self_attn.q_proj.lora_A.weight"
    )


def _shape(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 32)


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.0.self_attn.v_proj.lora_B.weight"] = torch.full((16, 2), float("nan"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_emulator, "not asked for emulator.0.self_attn.q_proj.lora_A.weight"),
        (_other_layer, "missing adapter.0.self_attn.q_proj.lora_A.weight; not asked for adapter.7"),
        (_shape, "adapter.0.self_attn.q_proj.lora_A.weight is torch.float32 of shape (3, 32)"),
        (_nan, "adapter.0.self_attn.v_proj.lora_B.weight holds NaN"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_is_refused_and_named(change: Any, says: str) -> None:
    run, alone = Run(**ALIGNED), Run(**ALIGNED)
    run.alter, alone.absent = altered(change), {1}
    outcome = run.round(1)
    assert outcome.clients == [0] and says in outcome.left_out[1]
    alone.round(1)
    for name, tensor in alone.state.adapter.items():  # as if the client had not been there
        assert torch.equal(run.state.adapter[name], tensor)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter_layers": 5}, "5 of the model's 6 blocks leave 1 for the emulator; it needs at least 2"),
        ({"adapter_layers": 7}, "leave 0 for the emulator"),
        (
            {"layer_dropout": 0.8},
            r"method.layer_dropout: 0.8 of 5 blocks leaves 1; an emulator needs at least 2",
        ),
        ({"adapter_layers": 3, "both_ends": True}, "both ends get half of it; got 3, not even"),
        *(
            (
                {"emulator": "channel-pruning", "lora": {"targets": targets}},
                "leave mlp.gate_proj, mlp.up_proj, mlp.down_proj out of method.lora.targets",
            )
            for targets in (["q_proj", "up_proj"], ["gate_proj"], ["down_proj"], ["down_proj", "o_proj"])
        ),
        ({"lora": {"targets": ["nonsense"]}}, 'no linear layer of the blocks is named "nonsense"'),
    ],
)
def test_settings_that_do_not_go_with_the_model(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Run(**settings)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_model_that_classifies_is_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"that generates text, got .*ForSequenceClassification"):
        Run(family=family)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layer_dropout": 1.0}, "less than 1"),
        ({"lora": {"rank": 2, "client_ranks": [1, 2]}}, "client_ranks"),
        ({"lora": {"dropout": 0.1}}, "dropout is for fedavg"),
        ({"emulator": "nonsense"}, "layer-dropout"),
        ({"local_steps": 3, "local_epochs": 1}, "both set"),
    ],
)
def test_settings_that_never_go(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        registry.config_class("fedbiot").model_validate({**settings})


def test_defaults_are_the_papers_but_for_the_alignments_weights() -> None:
    config = registry.config_class("fedbiot").model_validate({})
    assert (config.local_steps, config.batch_size, config.betas) == (30, 10, [0.9, 0.95])
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16.0, "auto")
    assert (config.alignment.steps_before, config.alignment.steps, config.alignment.form) == (
        500,
        10,
        "mean",
    )
    # the paper prints no λ, and its rates are for 7 B; these win most of the gap back (fedbiot.md)
    assert (config.distill_weight, config.alignment.lr) == (100.0, 3e-3)
    for name in ("fedot", "offsite-tuning"):
        offsite = registry.config_class(name).model_validate({"alignment": {"steps_before": 7}})
        assert isinstance(offsite, OffsiteConfig) and offsite.alignment == Alignment(steps_before=7, steps=0)
        assert offsite.both_ends and offsite.adapter_layers == 4 and not offsite.aligns
        assert type(offsite).model_validate(offsite.model_dump()) == offsite
    assert registry.build(registry.config_class("offsite-tuning")(), 0).pools_data


@pytest.mark.parametrize(
    ("public", "says"),
    [
        (None, "aligns its emulator on public data and there is none; set data.public.source"),
        ("missing.jsonl", "missing.jsonl"),
        ("empty.jsonl", "empty.jsonl"),
    ],
)
def test_public_data_missing_or_empty_ends_with_status_2(
    public: str | None, says: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    data: dict[str, Any] = {"clients": 2, "max_examples": 8, "max_length": 64}
    if public:
        data["public"] = {"source": public}
    method = {**SMALL, "name": "fedbiot", **ALIGNED}
    evaluation = {"tasks": ["loss"], "max_examples": 4}
    write_config(tmp_path / "c.yaml", {"data": data, "method": method, "evaluation": evaluation})
    done = fedtune("run", "c.yaml", "--out", "r", "--quiet", cwd=tmp_path)
    assert done.status == 2 and says in done.err.replace("\n", "") and "Traceback" not in done.err
    assert not (tmp_path / "r").exists()
