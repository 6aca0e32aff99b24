"""Noise of low rank: entry by entry from its definition, sums exact, one pass, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fedkseed_bench import text, tiny
from toy import Bench

from fedtune.errors import InputError
from fedtune.methods.fedkseed.method import FedKSeed
from fedtune.methods.fedkseed.settings import Config
from fedtune.methods.fedkseed.step import refuse_on_a_gpu
from fedtune.zeroth import (
    SHAPED,
    SeedPool,
    perturb_,
    perturb_all_,
    rebuild_,
    rebuild_all_,
    reference,
    subspace,
)
from fedtune.zeroth.pool import tensor_id


def sign(pool: SeedPool, name: str, group: int, element: int, bit: int) -> int:
    identity, tag = tensor_id(name), {"subzero": 8, "lozo": 9}[pool.noise] << 24 | group
    counter = (element // 4, tag, identity & 0xFFFFFFFF, identity >> 32)
    word = int(reference.philox(counter, (pool.key & 0xFFFFFFFF, pool.key >> 32))[element % 4])
    return 1 if word >> bit & 1 else -1


def by_hand(pool: SeedPool, name: str, m: int, n: int, j: int) -> list[list[float]]:
    """The sums of the module's text, number by number."""
    g, found = j % 16, []
    for p in range(m):
        row = []
        for q in range(n):
            if pool.noise == "subzero":
                total = sum(
                    sign(pool, name, 2 * g, p, s)
                    * sign(pool, name, 32, 16 * j + s, t)
                    * sign(pool, name, 2 * g + 1, q, t)
                    for s in range(16)
                    for t in range(16)
                )
                row.append(total / 16)
            else:
                total = sum(
                    sign(pool, name, 32, j // 8 * m + p, j % 8 * 4 + s) * sign(pool, name, 2 * g + 1, q, s)
                    for s in range(4)
                )
                row.append(total / 2)
        found.append(row)
    return found


@pytest.mark.parametrize("kind", SHAPED)
def test_the_definition_number_by_number(kind: str) -> None:
    for key, size, j in ((5, 40, 0), (2**40 + 3, 40, 21)):
        pool = SeedPool(key, size, kind)
        assert subspace.z(pool, "a.weight", (3, 2), j).tolist() == by_hand(pool, "a.weight", 3, 2, j)


@pytest.mark.parametrize("kind", SHAPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rebuild_is_the_sum_of_its_seeds_and_the_same_with_any_threads(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, draw = SeedPool(11, 50, kind), np.random.default_rng(3)
    a = draw.normal(size=50) * (draw.random(50) < 0.7)
    w0 = torch.from_numpy(draw.normal(size=(70, 33)).astype(np.float32)).to(dtype)
    shift = 40 - int(np.frexp(np.abs(a).sum())[1])
    q = np.rint(np.ldexp(a, shift)).astype(np.int64)  # of integers nothing is lost
    each = [subspace.z(pool, "w", (70, 33), j) / subspace.SCALE[kind] for j in range(50)]
    exact = sum(int(one) * z.astype(np.int64) for one, z in zip(q, each, strict=True))
    delta = (exact * (subspace.SCALE[kind] * 2.0**-shift)).astype(np.float32)
    wanted = (w0.float() + torch.from_numpy(delta)).to(dtype)
    monkeypatch.setattr(subspace, "PIECE", 200)  # several pieces
    for threads in (1, 3):
        w = torch.empty_like(w0)
        rebuild_(w, w0, pool, "w", a, threads=threads)
        assert torch.equal(w, wanted)


@pytest.mark.parametrize("kind", SHAPED)
def test_mean_variance_and_rank(kind: str) -> None:
    pool = SeedPool(7, 64, kind)
    each = np.stack([subspace.z(pool, "w", (96, 80), j) for j in range(64)])
    assert abs(each.mean()) < 0.02 and abs(each.var() - 1) < 0.05
    rank = {"subzero": 16, "lozo": 4}[kind]
    assert all(np.linalg.matrix_rank(one) == rank for one in each[:4])
    products = np.einsum("ipq,jpq->ij", each, each) / each[0].size
    assert np.abs(products - np.eye(64)).max() < (0.35 if kind == "subzero" else 0.4)
    # 0 and 16 are of one subspace: their rows lie in the same space of `rank` dimensions
    assert np.linalg.matrix_rank(np.concatenate([each[0], each[16]])) == rank
    assert np.linalg.matrix_rank(np.concatenate([each[0], each[1]])) == 2 * rank


@pytest.mark.parametrize("kind", SHAPED)
def test_what_is_no_matrix_has_signs_and_more_dimensions_are_a_matrix(kind: str) -> None:
    pool, plain = SeedPool(7, 20, kind), SeedPool(7, 20, "rademacher")
    w, other = torch.zeros(9), torch.zeros(9)
    perturb_(w, pool, "b", 13, 0.5)
    perturb_(other, plain, "b", 13, 0.5)
    assert torch.equal(w, other) and set(w.tolist()) == {0.5, -0.5}
    cube = torch.zeros(4, 3, 2)
    perturb_(cube, pool, "c", 13, 1.0)
    assert torch.equal(cube.view(4, 6), torch.from_numpy(subspace.z(pool, "c", (4, 6), 13)))
    nothing = torch.zeros(0, 3)
    perturb_(nothing, pool, "d", 13, 1.0)


@pytest.mark.parametrize("kind", SHAPED)
def test_all_of_a_model_there_and_back(kind: str) -> None:
    pool = SeedPool(7, 20, kind)
    weights = {"a": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(3)}
    initial = {name: w.clone() for name, w in weights.items()}
    a = np.zeros(20)
    a[3] = 0.25
    rebuild_all_(weights, initial, pool, a)
    moved = {name: w.clone() for name, w in initial.items()}
    perturb_all_(moved, pool, 3, 0.25)
    assert all(torch.equal(weights[name], moved[name]) for name in weights)
    rebuild_all_(weights, initial, pool, np.zeros(20))
    assert all(torch.equal(weights[name], initial[name]) for name in weights)


def test_a_model_on_a_gpu_is_refused_before_anything_is_trained() -> None:
    there: Any = {"w": SimpleNamespace(device=torch.device("cuda:0"))}
    with pytest.raises(InputError, match=r"noise: lozo is made on a CPU, and the model is on cuda:0"):
        refuse_on_a_gpu(there, "lozo")
    refuse_on_a_gpu(there, "rademacher")
    refuse_on_a_gpu({"w": torch.nn.Parameter(torch.zeros(2))}, "lozo")


def test_a_part_of_a_tensor_another_shape_and_half_precision_are_refused() -> None:
    pool = SeedPool(7, 20, "lozo")
    with pytest.raises(InputError, match="lozo noise depends on a matrix's shape, and is for whole tensors"):
        perturb_(torch.zeros(4, 3), pool, "w", 1, 1.0, first=12)
    with pytest.raises(InputError, match="w and w0 must have one shape"):
        rebuild_(torch.zeros(4, 3), torch.zeros(3, 4), pool, "w", np.zeros(20))
    with pytest.raises(InputError, match=r"set model\.dtype=float32, or use noise: hadamard4"):
        Bench(FedKSeed(Config(noise="lozo"), seed=0), tiny(torch.bfloat16), text())
    with pytest.raises(InputError, match=r"noise must be one of .*subzero, lozo, got 'subzer'"):
        SeedPool(7, 20, "subzer")
