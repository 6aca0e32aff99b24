"""Text-to-image models under secure aggregation and differential privacy, each and both together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")

from scipy import stats
from small_pipelines import configuration, save_pictures, save_pipeline

import fedtune
from fedtune.models.picture_results import LORA
from fedtune.protection.noise import epsilon

MASKS = {"secure_aggregation": {"threshold": 2}}
DELTA = 1e-3


def private(noise: float, clip: float = 0.05) -> dict[str, Any]:
    return {"privacy": {"clip": clip, "noise_multiplier": noise, "delta": DELTA}}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    save_pipeline(folder / "pipeline")
    save_pictures(folder / "pictures", {"sks": 4, "zwx": 4})
    return folder


def trained(site: Path, federation: dict[str, Any], **method: Any) -> fedtune.Run:
    """A run of two clients, not made again."""
    out = site / "-".join(map(str, (federation, method))).replace(" ", "")
    if out.exists():
        return fedtune.open(out)
    config = configuration(site / "pipeline", site / "pictures", **method)
    return fedtune.run({**config, "federation": federation}, out=out, progress=False)


def factors(run: fedtune.Run) -> Tensor:
    found = load_file(run.path / "final" / LORA)
    return torch.cat([found[name].reshape(-1) for name in sorted(found)]).double()


@pytest.mark.parametrize(
    "method", [{}, {"proximal": 0.1}, {"server_optimizer": {"name": "adam", "lr": 0.01}}]
)
def test_clipped_sums_have_the_same_bits_under_masks(site: Path, method: dict[str, Any]) -> None:
    plain = trained(site, {}, **method)
    clipped = trained(site, private(0.0), **method)
    both = trained(site, MASKS | private(0.0), **method)
    wanted = (clipped.path / "final" / LORA).read_bytes()
    assert (both.path / "final" / LORA).read_bytes() == wanted
    assert (plain.path / "final" / LORA).read_bytes() != wanted  # the clip does bind
    assert [entry["eval"] for entry in both.rounds] == [entry["eval"] for entry in clipped.rounds]


def test_a_clip_binds_to_its_length(site: Path) -> None:
    """From the same start a mean of two updates that are cut to a hundredth is no longer than that."""
    before = factors(trained(site, private(0.0, clip=1e-9), rounds=1))
    after = factors(trained(site, MASKS | private(0.0, clip=0.01), rounds=1))
    assert 0.001 < (after - before).norm() <= 0.01 * (1 + 1e-6)


@pytest.mark.parametrize("masks", [{}, MASKS])
def test_noise_on_the_sum_is_of_the_size_that_was_asked_for(site: Path, masks: dict[str, Any]) -> None:
    """z · clip / clients on each number of the factors: 0.5 x 0.05 / 2."""
    still, noisy = (factors(trained(site, masks | private(z), rounds=1)) for z in (0.0, 0.5))
    noise = (noisy - still).numpy() / 0.0125
    assert len(noise) > 500
    assert stats.kstest(noise, "norm").pvalue > 1e-8
    assert noise.std() == pytest.approx(1.0, rel=5 / (2 * len(noise)) ** 0.5)


@pytest.mark.parametrize("masks", [{}, MASKS])
def test_the_account_is_of_the_rounds(site: Path, masks: dict[str, Any]) -> None:
    run = trained(site, masks | private(0.5))
    spent = [entry["privacy"] for entry in run.rounds if entry["round"]]
    assert spent == [{"epsilon": epsilon(0.5, rounds, DELTA), "delta": DELTA} for rounds in (1, 2)]
    assert run.summary["privacy"] == spent[-1]
    assert all(entry["train_loss"] is None for entry in run.rounds)  # a mean of losses would tell more
