"""Plans of text-to-image models: what a run sends to the byte, what it holds nearly, what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from small_pipelines import SIDE, configuration, loaded, save_pictures, save_pipeline

import fedtune
from fedtune.config.file import load_config
from fedtune.errors import InputError
from fedtune.measure.flops import FlopCounter
from fedtune.models.text_to_image import attach_lora
from fedtune.planning.plan import plan

PAPERS = Path(__file__).resolve().parents[1] / "configs" / "papers"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plan")
    pipeline, pictures = (
        save_pipeline(folder / "pipeline"),
        save_pictures(folder / "pictures", {"a": 5, "b": 5}),
    )
    return configuration(pipeline, pictures, batch_size=4)


@pytest.mark.parametrize("change", [{}, {"trainable": "full"}, {"aggregation": "stack"}])
def test_a_plan_is_what_a_run_does(given: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    method = {**given["method"], **change}
    if change.get("trainable") == "full":
        del method["lora"]
    found = fedtune.plan({**given, "method": method})
    run = fedtune.run({**given, "method": method}, out=tmp_path / "run", progress=False)
    payload, made = found["payload_bytes"], run.summary["payload_bytes"]
    assert payload["down"] == made["down"] and payload["up"] == made["up"]
    assert found["trainable_parameters"] == run.summary["trainable_parameters"]
    assert found["local_steps"] == {"least": 1, "most": 1} and found["batch"]["pixels"] == SIDE
    peak = run.summary["peak_memory_bytes"]
    assert found["client_peak_memory_bytes"]["total"] == pytest.approx(peak["client"], rel=0.05)
    assert found["server_peak_memory_bytes"]["total"] == peak["server"]


def test_operations_are_those_of_a_step(given: dict[str, Any]) -> None:
    found = fedtune.plan({**given, "model": {**given["model"], "diffusion": {"draws": 2}}})
    model = loaded(Path(given["model"]["name"]), draws=2)
    pixels = torch.zeros(4, 3, SIDE, SIDE, dtype=torch.uint8)
    draws = model.draws(pixels, torch.Generator().manual_seed(0))
    ids = torch.arange(4)[:, None] + torch.arange(24)
    with FlopCounter() as pictures, torch.no_grad():
        model.moments(pixels[:1], draws["flipped"][:1])
    with FlopCounter() as captions, torch.no_grad():
        model.embed(ids[:1])
    assert found["flops_once_a_picture"] == {
        "autoencoder": pictures.forward,
        "text_encoder": captions.forward,
    }
    wrapped = attach_lora(model, rank=2, alpha=2, dropout=0.0, targets="auto", seed=0)
    wrapped(pixels=pixels, input_ids=ids, **draws)  # latents and embeddings are kept
    with FlopCounter() as step:
        wrapped(pixels=pixels, input_ids=ids, **draws).loss.backward()
    tokens = 4 * 24
    assert found["flops_per_token"] == {
        "forward": round(step.forward / tokens),
        "backward": round(step.backward / tokens),
    }


def test_what_is_not_kept_is_computed_in_every_step(given: dict[str, Any]) -> None:
    kept, not_kept = (
        fedtune.plan({**given, "model": {**given["model"], "diffusion": {"keep": keep}}})
        for keep in (True, False)
    )
    more = not_kept["flops_per_token"]["forward"] - kept["flops_per_token"]["forward"]
    assert more == pytest.approx(sum(kept["flops_once_a_picture"].values()) / 24, abs=1)


def test_stable_diffusion_at_the_papers_settings() -> None:
    shape = f"model.name={PAPERS / 'shapes' / 'stable-diffusion-1.5'}"
    names = ("text_to_image", "text_to_image_multi_round")
    one, five = (plan(load_config(PAPERS / f"{name}.yaml", [shape]), steps=False).document for name in names)
    # UNet 859,520,964, text encoder 123,060,480, autoencoder 83,653,863 and LoRA of rank 4 on 16 x 8 layers
    assert one["total_parameters"] == 859_520_964 + 123_060_480 + 83_653_863 + 797_184
    assert one["payload_bytes"]["down"] == one["payload_bytes"]["up"] == 5 * 797_184 * 4
    assert five["payload_bytes"]["total"] == 5 * one["payload_bytes"]["total"]
    assert one["batch"] == {
        "examples": 1,
        "longest": 77,
        "pixels": 512,
        "padding": None,
        "batching": "random",
    }
    assert "dreambooth is not on this machine" in one["notes"][0]


def test_clients_that_nobody_can_count(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"data\.clients is null and the pictures are not here"):
        fedtune.plan({**given, "data": {**given["data"], "train": "owner/pictures"}})
