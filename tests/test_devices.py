"""`model.device` on machines with no, one or several GPUs, which are pretended here by their number alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_workers import assembly, chosen, config  # noqa: F401  # a fixture

from fedtune.api.network import take_part
from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.federation import connect
from fedtune.federation.assembly import Assembly
from fedtune.federation.devices import cards_of, device_of
from fedtune.measure.clock import Clock
from fedtune.transport.messages import Message
from fedtune.transport.processes import gpu_of


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    count = int(request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


def on(*counts: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("gpus", counts, indirect=True)


@on(0)
def test_without_a_gpu_auto_is_the_cpu_and_all_else_is_refused(gpus: int) -> None:
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    assert cards_of("auto") == cards_of("cpu") == []
    for name in ("cuda", "cuda:0", "cuda:1"):
        said = f"model.device is {name}, but PyTorch sees no GPU here; set it to auto or cpu"
        with pytest.raises(InputError, match=said):
            device_of(name)
    with pytest.raises(InputError, match=r"model\.device is cuda:0, but"):
        cards_of(["cuda:0", "cuda:1"])


@on(2)
def test_a_gpu_has_to_be_among_those_that_are_seen(gpus: int) -> None:
    assert [str(device_of(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda",
        "cuda",
        "cuda:1",
        "cpu",
    ]
    assert [cards_of(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [[0, 1], [0, 1], [1], []]
    assert str(device_of(["cuda:1", "cuda:0"])) == "cuda:1"
    assert cards_of(["cuda:1", "cuda:0"]) == [1, 0]
    said = (
        r"is cuda:2, but PyTorch sees only cuda:0, cuda:1 here; set it to cuda:0, cuda:1, cuda, auto or cpu"
    )
    for given in ("cuda:2", ["cuda:0", "cuda:2"]):
        with pytest.raises(InputError, match=said):
            device_of(given)


@on(4)
def test_as_many_processes_as_gpus_are_named(
    gpus: int,
    assembly: Assembly,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device, count, why in (
        (["cuda:3", "cuda:1"], 2, "2 GPUs"),
        (["cuda:0", "cuda:1", "cuda:2"], 3, "3 GPUs"),
        ("cuda:2", 1, "1 GPUs"),
        ("cuda", 4, "4 GPUs"),
    ):
        found = chosen(monkeypatch, config("auto", model={"device": device}), assembly, 8, 10**12)
        assert (found.count, why in found.note) == (count, True)


@pytest.mark.parametrize(
    ("device", "transport", "said"),
    [
        ("gpu", {}, "device must be auto, cpu, cuda, one GPU as cuda:1"),
        ("cuda:x", {}, "device must be"),
        ("balanced", {}, r"got balanced\. A model lies on one GPU: .*device_map, FSDP\) is not there.*nf4"),
        ("cuda:-1", {}, "device must be"),
        ([], {}, "a list that names each once"),
        (["cuda:0", "cuda:0"], {"workers": 2}, "a list that names each once"),
        (["cpu", "cuda:0"], {"workers": 2}, "device must be"),
        (["cuda:0", "cuda:1"], {}, "to as many, or name one GPU. A model lies on one GPU"),
        ("cuda:1", {"name": "flower-simulation"}, "Ray hands GPUs out"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_configuration(
    device: Any, transport: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        parse_config(
            {"model": {"device": device}, "method": {"name": "fedavg"}, "transport": transport}, "c.yaml"
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_memory", "20GB"),
        ("max_memory", {0: "20GB"}),
        ("device_map", "auto"),
        ("fsdp", "full_shard"),
        ("fsdp_config", {}),
    ],
)
def test_what_divides_a_model_is_refused_with_what_there_is(setting: str, value: Any) -> None:
    said = (
        rf"{setting} is how accelerate divides a model over devices; leave it out\. A model lies on one GPU: "
        r".*with transport\.workers: auto\)\. What is too large .*nf4, .*offload_params: disk or "
        r"method\.name: fedkseed, and fedtune plan says which "
        r"\(memory_by_device in its --json\) before anything is loaded"
    )
    with pytest.raises(InputError, match=said):
        parse_config({"model": {setting: value}, "method": {"name": "fedavg"}}, "c.yaml")


def test_a_client_of_a_network_names_one() -> None:
    for device in ("gpu", "cuda:x", "[cuda:0]"):
        with pytest.raises(InputError, match="device must be auto, cpu, cuda or a GPU's name as cuda:1, got"):
            take_part("host:1", keys="nowhere", data="nothing", device=device)


@on(4)
def test_each_process_of_clients_gets_one_of_the_gpus_that_are_named(
    gpus: int,
    assembly: Assembly,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It sees no other, and so it is told `cuda`, whatever its number is here."""
    started: dict[str, Any] = {}

    @contextmanager
    def started_with(module: str, start: Message, **how: Any) -> Iterator[Mock]:
        started.update(how, config=json.loads(json.loads(bytes(start.body))["config"]))
        yield Mock()

    monkeypatch.setattr(connect, "processes", started_with)
    monkeypatch.setattr(connect, "Simulated", lambda channel, **how: channel)
    given = config(3, model={"device": ["cuda:3", "cuda:1"]})
    with connect.connected(given, assembly, tmp_path, Clock(), None):
        assert (started["workers"], started["cards"]) == (3, [3, 1])
        assert started["config"]["model"]["device"] == "cuda"
        seen = [gpu_of(worker, started["cards"], None) for worker in range(3)]
        assert seen == ["3", "1", "3"]
