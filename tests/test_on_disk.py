"""Parameters kept in a temporary file while they are changed where they lie."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune.errors import InputError
from fedtune.models.on_disk import kept_on_disk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=5),
    st.integers(0, 9),
)
def test_copies_and_restores_every_bit(shapes: list[tuple[list[int], torch.dtype]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        f"w{i}": nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for i, (shape, dtype) in enumerate(shapes)
    }
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with kept_on_disk(parameters) as copies:
        for p in parameters.values():
            p.data.fill_(7)
        assert copies.keys() == before.keys()
        for name, copy in copies.items():
            assert copy.dtype == before[name].dtype and torch.equal(copy, before[name])
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert not copies  # each went, with its pages, as soon as its parameter had its values again


def test_bits_that_no_comparison_sees_and_tensors_that_lie_transposed() -> None:
    odd = torch.tensor([[float("nan"), -0.0, float("inf")], [1e-45, 1.0, 2.0]])
    w = nn.Parameter(odd.clone().t())
    with kept_on_disk({"w": w}):
        w.data.zero_()
    assert torch.equal(w.detach().t().contiguous().view(torch.int32), odd.view(torch.int32))


def test_an_error_inside_restores_too_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    w = nn.Parameter(torch.ones(3))
    with (
        pytest.raises(OSError, match="mine"),
        kept_on_disk({"w": w}),
    ):  # an OSError of the caller's is its own
        w.data.zero_()
        raise OSError("mine")
    assert w.tolist() == [1, 1, 1] and list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, torch
from fedtune.models.on_disk import kept_on_disk
with kept_on_disk({"w": torch.nn.Parameter(torch.ones(1000))}):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False
    )
    assert done.returncode == -9 and list(tmp_path.iterdir()) == []


FULL = """
import resource, signal, torch
from fedtune.errors import InputError
from fedtune.models.on_disk import kept_on_disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write beyond fails, as on a full disk
w = torch.nn.Parameter(torch.ones(1000))
try:
    with kept_on_disk({"w": w}):
        w.data.zero_()
except InputError as error:
    print(error, float(w.detach().sum()))
"""


def test_a_disk_that_takes_no_more_is_named_with_the_bytes_needed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in done.stdout and "4,032 bytes" in done.stdout and "TMPDIR" in done.stdout
    assert done.stdout.strip().endswith("1000.0") and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_an_input_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone"), kept_on_disk({"w": nn.Parameter(torch.ones(3))}):
        pass
