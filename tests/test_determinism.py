"""`run.deterministic` and `run.tf32`: what they set, for how long, and what the bits of a CPU say of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from command import fedtune as command_line
from command import outcome, write_config
from test_api import CONFIG, ROWS

import fedtune
from fedtune.config.computing import Computing
from fedtune.core.faults import faults
from fedtune.errors import InputError, ProgramError
from fedtune.federation.process import told_in_time, torch_settings, torch_told

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def switches() -> dict[str, Any]:
    """All that a run may set of PyTorch; float32's precision as the new switches have it."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            cuda.math_sdp_enabled(),
        ),
        "precision": (
            cuda.matmul.fp32_precision,
            cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        ),
        "environment": {name: os.environ.get(name) for name in (WORKSPACE, "FLASH_ATTENTION_DETERMINISTIC")},
    }


@pytest.fixture(autouse=True)
def _own_workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine has in its environment, and whichever test asked first."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    told_in_time.cache_clear()
    yield
    told_in_time.cache_clear()


def test_strict_on_a_gpu_sets_all_that_its_bits_depend_on() -> None:
    with torch_settings(Computing(deterministic="strict"), CUDA):
        assert switches() == {
            "deterministic": True,
            "warn only": False,
            "fill": False,
            "cudnn": (True, False),
            "attention": (True, True, False, True),  # flash and memory-efficient have such a backward pass
            "precision": ("ieee", "none", "none", "none"),
            "environment": {WORKSPACE: ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"},
        }
        said = torch_told(Computing(), CUDA)
    assert said["attention"] == ["flash", "memory-efficient", "math"]
    assert (said["deterministic"], said["tf32"], said["cublas_workspace"]) == ("strict", False, ":4096:8")


def test_fast_on_a_gpu_leaves_them() -> None:
    before = switches()
    with torch_settings(Computing(deterministic="fast"), CUDA):
        changed = {"deterministic": False, "fill": False, "precision": ("ieee", "none", "none", "none")}
        assert switches() == before | changed


@pytest.mark.parametrize("deterministic", ["strict", "fast"])
def test_tf32_is_for_products_of_matrices_and_for_convolutions(
    deterministic: Literal["strict", "fast"],
) -> None:
    with torch_settings(Computing(deterministic=deterministic, tf32=True), CUDA):
        assert switches()["precision"] == ("tf32", "tf32", "tf32", "none")
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    with torch_settings(Computing(deterministic=deterministic, tf32=False), CUDA):
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_on_a_cpu_nothing_is_set_that_changes_a_product() -> None:
    """Attention's kernels and float32's precision are those of a CPU too."""
    before = switches()
    for deterministic, only in (("strict", False), ("fast", True)):
        with torch_settings(Computing.model_validate({"deterministic": deterministic, "tf32": True}), CPU):
            assert switches() == before | {"deterministic": True, "warn only": only, "fill": False}
        assert torch_told(Computing(), CPU) == {"deterministic": "strict", "tf32": False}


def _old(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def _new(precision: str) -> None:
    backends: Any = torch.backends
    for each in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        each.fp32_precision = precision


HABITS = {
    "none": lambda: None,
    "old tf32": lambda: _old(True),
    "old float32": lambda: _old(False),
    "new tf32": lambda: _new("tf32"),  # contradicts what the old switch says: PyTorch does not read that
    "new float32": lambda: _new("ieee"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "own attention": lambda: torch.backends.cuda.enable_cudnn_sdp(False),
    "own workspace": lambda: os.environ.__setitem__(WORKSPACE, ":16:8"),
    "own cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
}


@pytest.mark.parametrize("habit", HABITS)
def test_what_the_process_had_set_comes_back(habit: str) -> None:
    first = switches()
    try:
        HABITS[habit]()
        before = switches()
        for deterministic in ("strict", "fast"):
            for tf32 in (False, True):
                run = Computing.model_validate({"deterministic": deterministic, "tf32": tf32})
                with pytest.raises(KeyError), torch_settings(run, CUDA):
                    assert switches() != before
                    raise KeyError
                assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        _new("none")
        torch.backends.cudnn.conv.fp32_precision = first["precision"][1]  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn.fp32_precision = first["precision"][2]  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul.fp32_precision = first["precision"][3]  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cudnn.benchmark = False
        os.environ.pop(WORKSPACE, None)
    assert switches() == first


def test_a_process_in_which_cublas_has_begun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = switches()
    refused = r"strict, and this process used a GPU before without CUBLAS_WORKSPACE_CONFIG: .*=fast"
    with pytest.raises(InputError, match=refused), torch_settings(Computing(), CUDA):
        pass
    assert switches() == before
    with torch_settings(Computing(deterministic="fast"), CUDA):
        pass
    monkeypatch.setenv(WORKSPACE, ":16:8")  # as it was started
    with torch_settings(Computing(), CUDA):
        assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(InputError, match="this process has :0:0: cuBLAS"), torch_settings(Computing(), CUDA):
        pass


def test_a_second_run_of_a_process_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_settings(Computing(), CUDA):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert WORKSPACE not in os.environ  # but cuBLAS was told when it began
    with torch_settings(Computing(), CUDA):
        assert os.environ[WORKSPACE] == ":4096:8"


def unordered() -> torch.Tensor:
    """An operation that PyTorch refuses on a CPU too where bits are promised."""
    return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_what_has_no_deterministic_form_is_named_with_what_to_set() -> None:
    said = r"client 3: put_ has no form that gives the same bits each time, .*=fast\. .*test_determinism"
    with (
        torch_settings(Computing(deterministic="strict"), CPU),
        pytest.raises(ProgramError, match=said),
        faults("training of client 3"),
    ):
        unordered()
    with (
        torch_settings(Computing(deterministic="fast"), CPU),
        pytest.warns(UserWarning, match="put_ does not"),
    ):
        unordered()


def test_a_run_on_a_cpu_has_the_same_bits_either_way_and_says_which(tmp_path: Path) -> None:
    found = {}
    for way in ("strict", "fast"):
        run = fedtune.run(
            CONFIG,
            f"run.deterministic={way}",
            "model.device=cpu",
            out=tmp_path / way,
            data=ROWS,
            progress=False,
        )
        found[way] = outcome(run.path)
        told = json.loads((run.path / "environment.json").read_text())["computing"]
        assert told == {"deterministic": way, "tf32": False}
    assert found["strict"] == found["fast"]


WATCHING = """
from pathlib import Path

import torch
from fedtune.core.client import ClientRunner

handle = ClientRunner.handle

def watched(self, client, frame):
    flags = (torch.are_deterministic_algorithms_enabled(),
             torch.is_deterministic_algorithms_warn_only_enabled(),
             torch.utils.deterministic.fill_uninitialized_memory)
    Path(SEEN).write_text(" ".join(map(str, flags)))
    return handle(self, client, frame)

ClientRunner.handle = watched
"""


@pytest.mark.parametrize(("way", "seen"), [("strict", "True False False"), ("fast", "True True False")])
def test_processes_of_clients_are_set_too(tmp_path: Path, way: str, seen: str) -> None:
    (tmp_path / "watching.py").write_text(WATCHING.replace("SEEN", repr(str(tmp_path / "seen"))))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {**CONFIG["data"], "train": "rows.jsonl"}
    method = {**CONFIG["method"], "rounds": 1}
    own = {"run": {"deterministic": way}, "transport": {"workers": 2}}
    write_config(tmp_path / "c.yaml", {**CONFIG, "data": data, "method": method, **own})
    arguments = ("run", "c.yaml", "--plugin", "watching.py", "--quiet", "--out", "run")
    done = command_line(*arguments, cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "seen").read_text() == seen
