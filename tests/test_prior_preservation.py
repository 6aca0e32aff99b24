"""Prior preservation: pictures of the class, given or made by the base model; and sizes by aspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from PIL import Image
from small_pipelines import SIDE, configuration, loaded, save_pictures, save_pipeline
from test_text_to_image import batch, by_hand

import fedtune
from fedtune.config.file import parse_config
from fedtune.core.seeds import derive_seed
from fedtune.core.store import Store
from fedtune.core.types import ClientEnv
from fedtune.data.pictures import Frame, PictureList, encode_pictures, load_pictures
from fedtune.data.reading import Reading
from fedtune.errors import InputError
from fedtune.federation.class_pictures import beside_class
from fedtune.measure.memory import MemoryMeter
from fedtune.methods.step_loss import add_gradient, drawn
from fedtune.models.load import Loaded
from fedtune.models.picture_results import LORA
from fedtune.models.pipelines import Drawing, draw_pictures, load_pipeline
from fedtune.models.text_to_image import PRIOR, Learning, attach_lora

CPU = torch.device("cpu")
MADE = {"caption": "a {folder} on a red background", "count": 3, "steps": 2, "weight": 0.5}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), {"square": 4, "circle": 4})


def with_prior(pipeline: Path, pictures: Path, prior: dict[str, Any], **method: Any) -> dict[str, Any]:
    found = configuration(pipeline, pictures, **method)
    found["model"]["diffusion"] = {"prior": prior}
    return found


def test_the_loss_is_that_of_the_batch_and_the_weight_times_that_of_the_class() -> None:
    # of the batch 9 and 9, of the class 25 and 25; 9 + 0.5 * 25 = 21.5
    beside = {f"{PRIOR}{name}": tensor for name, tensor in batch([[1, 0]], noise=5.0).items()}
    found = by_hand("epsilon", prior=0.5)(**batch([[0, 1]], noise=3.0), **beside)
    assert found.each.tolist() == [21.5, 21.5] and found.loss.item() == 21.5


def made(pipeline: Path, pictures: Path, client: int, attach: bool = False) -> tuple[Any, Loaded]:
    config = load_config_of(with_prior(pipeline, pictures, MADE))
    found = load_pipeline(str(pipeline), dtype="float32", base=Path("."), learning=Learning())
    examples = load_pictures(str(pictures), "train", None, Reading())[client * 4 : client * 4 + 4]
    frame = Frame(SIDE)
    encoded = encode_pictures(examples, found.tokenizer, frame=frame, tokens=24)
    items = beside_class(encoded, config, client, examples, found, frame=frame, tokens=24).items
    if attach:
        model = attach_lora(found.model, rank=2, alpha=2, dropout=0.0, targets="auto", seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.3)
        model.train()
    return items, found


def load_config_of(document: dict[str, Any]) -> Any:
    return parse_config(document, "c.yaml")


def test_each_client_has_the_base_model_make_its_own(pipeline: Path, pictures: Path) -> None:
    """What LoRA has learned by then changes nothing, and neither does who asks first."""
    first, found = made(pipeline, pictures, 1)
    seeds = [derive_seed(0, "class pictures", 1, number) % 2**32 for number in range(3)]
    texts = ["a square on a red background"] * 3
    wanted = draw_pictures(found.model, found.tokenizer, texts, seeds, Drawing(2, 3.0, SIDE))
    assert torch.equal(torch.stack([one.pixels for one in first.of_class]), wanted)
    again, trained = made(pipeline, pictures, 1, attach=True)
    assert torch.equal(torch.stack([one.pixels for one in again.of_class]), wanted)
    assert trained.model.unet.training and not again.of_class[0].pixels.is_floating_point()
    other, _ = made(pipeline, pictures, 0)
    assert not torch.equal(torch.stack([one.pixels for one in other.of_class]), wanted)
    layers = [m for m in trained.model.modules() if hasattr(m, "disable_adapters") and hasattr(m, "lora_A")]
    assert layers and not any(layer.disable_adapters for layer in layers)


def test_given_pictures_of_the_class(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    given = save_pictures(tmp_path / "class", {"any": 2}, caption=False)
    prior = {"caption": "a square", "source": str(given)}
    config = load_config_of(with_prior(pipeline, pictures, prior))
    found = load_pipeline(str(pipeline), dtype="float32", base=Path("."), learning=Learning())
    examples = load_pictures(str(pictures), "train", None, Reading())
    frame = Frame(SIDE, "bucket", 4)
    encoded = encode_pictures(examples, found.tokenizer, frame=frame, tokens=24)
    items = beside_class(encoded, config, 0, examples, found, frame=frame, tokens=24).items
    assert isinstance(items, PictureList)
    assert [one.pixels.shape for one in items.of_class if one.pixels is not None] == [(3, SIDE, SIDE)] * 2
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    plain = fedtune.run(configuration(pipeline, pictures), out=tmp_path / "plain", progress=False)
    assert (run.path / "final" / LORA).read_bytes() != (plain.path / "final" / LORA).read_bytes()
    losses = [[entry["train_loss"] for entry in one.rounds][1:] for one in (run, plain)]
    assert all(with_it > without for with_it, without in zip(*losses, strict=True))
    with pytest.raises(InputError, match=r"prior\.source: .*none is no folder"):
        fedtune.run(
            config, f"model.diffusion.prior.source={tmp_path / 'none'}", out=tmp_path / "x", progress=False
        )
    assert not (tmp_path / "x").exists()


def test_the_same_bits_from_two_workers_with_a_prior(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    config = with_prior(pipeline, pictures, MADE)
    one = fedtune.run(config, out=tmp_path / "one", progress=False)
    two = fedtune.run({**config, "transport": {"workers": 2}}, out=tmp_path / "two", progress=False)
    assert (one.path / "final" / LORA).read_bytes() == (two.path / "final" / LORA).read_bytes()


@pytest.mark.parametrize(
    "method", [{"trainable": "full"}, {"aggregation": "stack"}, {"aggregation": "residual"}]
)
def test_a_base_that_moves_makes_no_pictures(pipeline: Path, pictures: Path, method: dict[str, Any]) -> None:
    config = with_prior(pipeline, pictures, MADE, **method)
    if method.get("trainable") == "full":
        del config["method"]["lora"]
    with pytest.raises(
        InputError, match=r"give a folder of such pictures in model\.diffusion\.prior\.source"
    ):
        load_config_of(config)
    config["model"]["diffusion"]["prior"] = {"caption": "a square", "source": "folder"}
    assert load_config_of(config).model.diffusion.prior.weight == 1.0


def test_a_plan_knows_that_clients_make_pictures(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    without = fedtune.plan(configuration(pipeline, pictures))
    config = with_prior(pipeline, pictures, MADE)
    found, run = fedtune.plan(config), fedtune.run(config, out=tmp_path / "run", progress=False)
    assert found["payload_bytes"] == without["payload_bytes"]
    backward = without["flops_per_token"]["backward"]
    assert found["flops_per_token"]["backward"] == pytest.approx(2 * backward, abs=1)  # each is rounded
    planned = found["client_peak_memory_bytes"]["total"]
    assert planned > without["client_peak_memory_bytes"]["total"]
    assert planned >= run.summary["peak_memory_bytes"]["client"]


def wide_and_high(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    for number, size in enumerate([(20, 12), (12, 20), (16, 16), (40, 24)]):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        (folder / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "a" / f"{number}.png")
    return folder


def test_a_step_on_pictures_of_several_sizes_is_their_mean(pipeline: Path, tmp_path: Path) -> None:
    """Four pictures of three sizes are a batch: three parts, whose gradient is the mean over the pictures."""
    found = load_pipeline(str(pipeline), dtype="float32", base=Path("."), learning=Learning())
    examples = load_pictures(str(wide_and_high(tmp_path)), "train", "a red square", Reading())
    items = encode_pictures(examples, found.tokenizer, frame=Frame(SIDE, "bucket", 4), tokens=24).items
    model = attach_lora(loaded(pipeline), rank=2, alpha=2, dropout=0.0, targets="auto", seed=0)
    env = ClientEnv(0, 1, 5, model, items, 0, None, MemoryMeter("cpu"), CPU, Store())
    step = drawn(env, [[0, 1, 2, 3]], 0)
    assert [tuple(part["pixels"].shape) for part in step.batches] == [
        (2, 3, 12, 20),
        (1, 3, 20, 12),
        (1, 3, 16, 16),
    ]
    assert step.tokens == [2, 1, 1]
    loss = add_gradient(model, step, CPU)
    together = gradients(model)
    each = torch.cat([model(**part).each for part in step.batches])
    each.mean().backward()
    assert loss.value == pytest.approx(each.mean().item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of all that is trained, taken off."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_a_run_in_buckets(pipeline: Path, tmp_path: Path) -> None:
    """The same bits with and without what is kept: a picture of 20 x 12 is not one of 12 x 20."""
    wide_and_high(tmp_path / "pictures")
    for number, size in enumerate([(20, 12), (12, 20)], 4):
        Image.new("RGB", size, "white").save(tmp_path / "pictures" / "a" / f"{number}.png")
    config = configuration(pipeline, tmp_path / "pictures", batch_size=3)
    config["data"] |= {
        "pictures": {"crop": "bucket", "caption": "a red {folder}"},
        "holdout": {"fraction": 0.2},
    }
    runs = [
        fedtune.run(
            {**config, "model": {**config["model"], "diffusion": {"keep": keep}}},
            out=tmp_path / str(keep),
            progress=False,
        )
        for keep in (True, False)
    ]
    assert (runs[0].path / "final" / LORA).read_bytes() == (runs[1].path / "final" / LORA).read_bytes()
    assert runs[0].scores == runs[1].scores
