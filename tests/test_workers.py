"""How many processes clients train in, and what each gets of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune, write_config

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.federation import workers
from fedtune.federation.assembly import Assembly
from fedtune.federation.workers import Workers, bytes_of_one, threads_of, workers_of
from fedtune.measure.clock import Clock
from fedtune.models.load import load_model
from fedtune.transport.processes import gpu_of
from fedtune.transport.programs import gpu_share


def config(count: Any, method: dict[str, Any] | None = None, **more: Any) -> Any:
    document = {
        "data": {"clients": 6, "max_examples": 12, "max_length": 64},
        "method": {"name": "fedavg", "batch_size": 2, "lora": {"rank": 2}, **(method or {})},
        "transport": {"workers": count},
        **more,
    }
    return parse_config(document, "test")


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    return Assembly.assemble(config("auto"), Clock())


def chosen(monkeypatch: pytest.MonkeyPatch, given: Any, made: Assembly, cores: int, free: int) -> Workers:
    monkeypatch.setattr(workers, "cores_here", lambda: cores)
    monkeypatch.setattr(workers, "free_bytes", lambda: free)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    return workers_of(given, made)


def test_auto_is_the_least_of_cores_clients_and_memory(
    monkeypatch: pytest.MonkeyPatch, assembly: Assembly
) -> None:
    much = 1 << 40
    assert chosen(monkeypatch, config("auto"), assembly, 4, much) == Workers(
        4, 1, "4 processes train clients, with 1 thread each (4 cores)"
    )
    assert chosen(monkeypatch, config("auto"), assembly, 16, much) == Workers(
        6, 2, "6 processes train clients, with 2 threads each (a round asks 6 clients)"
    )
    some = config("auto", federation={"clients_per_round": 2})
    assert chosen(monkeypatch, some, assembly, 16, much).count == 2
    each = bytes_of_one(config("auto"), assembly)
    tight = chosen(monkeypatch, config("auto"), assembly, 16, 3 * each + 1)
    assert (tight.count, tight.threads) == (3, 5) and "GB of memory are free" in tight.note
    assert chosen(monkeypatch, config("auto"), assembly, 16, 1).count == 1
    assert chosen(monkeypatch, config(1), assembly, 16, much) == Workers(1, 16)
    assert chosen(monkeypatch, config(3), assembly, 16, much) == Workers(
        3, 5, "3 processes train clients, with 5 threads each"
    )


def test_one_client_after_another_has_no_use_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse_config(
        {
            "data": {"clients": 4, "max_examples": 8, "max_length": 64},
            "method": {"name": "fedcybgd"},
            "transport": {"workers": "auto"},
        },
        "test",
    )
    found = chosen(monkeypatch, given, Assembly.assemble(given, Clock()), 8, 1 << 40)
    assert (found.count, found.threads) == (1, 8) and "asks one client after another" in found.note


def test_what_a_process_may_need_is_counted_from_sizes(assembly: Assembly) -> None:
    model = assembly.loaded.model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logits = 2 * 64 * model.config.vocab_size * 4
    assert bytes_of_one(config("auto"), assembly) == 600 * 2**20 + weights + 20 * trained + 3 * logits


def test_threads_of_all_processes_together_are_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [threads_of(n, 8) for n in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # OMP_NUM_THREADS=2: one process's sums
    assert [threads_of(n, 8) for n in (1, 2, 4, 8)] == [2, 2, 2, 1]


def test_each_process_sees_one_gpu_in_turn() -> None:
    assert [gpu_of(n, [0, 1], None) for n in range(5)] == ["0", "1", "0", "1", "0"]
    assert [gpu_of(n, [0, 1], "3, 5") for n in range(3)] == ["3", "5", "3"]
    assert gpu_of(1, [0, 1], "GPU-ab,GPU-cd") == "GPU-cd"
    assert [gpu_of(n, [3, 1], None) for n in range(3)] == ["3", "1", "3"]  # as model.device lists them
    assert gpu_of(0, [1], "GPU-ab,GPU-cd") == "GPU-cd"


def test_every_process_of_flowers_simulation_has_a_place_on_a_gpu() -> None:
    assert [gpu_share(4, 0), gpu_share(1, 1), gpu_share(2, 4)] == [0, 1, 1]
    for gpus in range(1, 9):
        for count in range(1, 65):
            share = gpu_share(count, gpus)
            tenths = round(share * 10_000)  # what Ray counts in
            assert tenths / 10_000 == share and gpus * (10_000 // tenths) >= count
    assert gpu_share(6, 1) == 0.1666  # a sixth, rounded by Ray, is 0.1667: the sixth had no place


@pytest.mark.parametrize(
    ("transport", "message"),
    [
        ({"workers": 0}, "transport.workers"),
        ({"workers": "many"}, "transport.workers"),
        ({"workers": 1.5}, "transport.workers"),
        ({"name": "flower", "workers": "auto"}, "workers are for simulated clients"),
    ],
)
def test_what_workers_may_not_be(transport: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({"transport": transport}, "test")


def test_validate_takes_workers_of_one_machine(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", {"transport": {"workers": "auto"}})
    assert fedtune("validate", "c.yaml", cwd=tmp_path).status == 0
    refused = fedtune("validate", "c.yaml", "transport.name=flower", cwd=tmp_path)
    assert refused.status == 2 and "workers are for simulated clients" in refused.err


@pytest.mark.parametrize(
    ("dtype", "initial"), [("float32", "pretrained"), ("bfloat16", "pretrained"), ("float32", "scratch")]
)
def test_weights_are_mapped_once_whatever_they_are_made_of(dtype: str, initial: str, tmp_path: Path) -> None:
    here = Path(".")
    plain = load_model("bundled", dtype=dtype, initial=initial, seed=3, base=here)
    first = load_model("bundled", dtype=dtype, initial=initial, seed=3, base=here, shared=tmp_path)
    second = load_model("bundled", dtype=dtype, initial=initial, seed=4, base=here, shared=tmp_path)
    wanted = plain.model.state_dict()
    for found in (first, second):
        assert found.weights_sha256 == plain.weights_sha256
        state = found.model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    areas = Path("/proc/self/maps").read_text()
    made = (tmp_path / "model.safetensors").exists()
    assert made == (dtype != "float32" or initial == "scratch")  # else the model's own files are mapped
    assert not made or areas.count(str(tmp_path)) >= 2
    with torch.no_grad():
        next(first.model.parameters()).zero_()  # a process's own from then on
    assert torch.equal(next(second.model.parameters()), next(plain.model.parameters()))


def test_a_head_that_was_drawn_is_drawn_in_every_process(tmp_path: Path, shared_models: Path) -> None:
    name = str(shared_models / "minilm-l6")
    given: dict[str, Any] = {"dtype": "bfloat16", "initial": "pretrained", "task": "classification"}
    first = load_model(name, **given, num_labels=3, seed=3, base=Path("."), shared=tmp_path)
    second = load_model(name, **given, num_labels=3, seed=4, base=Path("."), shared=tmp_path)
    wanted, state = first.model.state_dict(), second.model.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
