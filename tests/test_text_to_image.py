"""Text-to-image models: the loss by hand, training in all forms, the same bits however a run goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

from PIL import Image
from small_pipelines import SIDE, configuration, loaded, save_clip, save_pictures, save_pipeline

import fedtune
from fedtune.data.pictures import Frame, encode_pictures, load_pictures
from fedtune.data.reading import Reading
from fedtune.errors import InputError
from fedtune.federation import scoring
from fedtune.models.picture_results import LORA
from fedtune.models.pipelines import load_pipeline
from fedtune.models.text_to_image import Learning, TextToImage, attach_lora


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), {"sks": 4, "zwx": 4})


@pytest.fixture(scope="module")
def done(pipeline: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    out = tmp_path_factory.mktemp("run") / "run"
    return fedtune.run(configuration(pipeline, pictures), out=out, progress=False)


class Silent(nn.Module):
    """A UNet that always guesses 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(in_channels=1, sample_size=2, block_out_channels=(1,))

    def forward(self, noisy: Tensor, times: Tensor, captions: Tensor) -> Any:
        return SimpleNamespace(sample=noisy * 0 + self.weight)


class Grey(nn.Module):
    """An autoencoder whose latents are a picture's first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=2.0, shift_factor=0.25, block_out_channels=(1,))

    def encode(self, picture: Tensor) -> Any:
        return SimpleNamespace(latents=picture[:, :1])


class Noising:
    """Two time steps, with ᾱ = 0.64 and 0.36."""

    def __init__(self, prediction: str) -> None:
        self.config = SimpleNamespace(prediction_type=prediction, num_train_timesteps=2)
        self.alphas_cumprod = torch.tensor([0.64, 0.36])

    def _roots(self, times: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[times].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        a, b = self._roots(times)
        return a * clean + b * noise

    def get_velocity(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        a, b = self._roots(times)
        return a * noise - b * clean


def by_hand(prediction: str, **learning: Any) -> TextToImage:
    text = nn.Module()
    text.config = SimpleNamespace(max_position_embeddings=2)  # type: ignore[assignment]
    text.forward = lambda ids: (torch.zeros(1, 2, 1),)  # type: ignore[method-assign,assignment]
    return TextToImage(
        Silent(),
        Grey(),
        text,
        scheduler=None,
        noising=Noising(prediction),
        name="",
        learning=Learning(**learning),
    )


def batch(times: list[list[int]], noise: float) -> dict[str, Tensor]:
    pixels = torch.full((2, 3, 2, 2), 255, dtype=torch.uint8)  # latents (1 - 0.25) x 2 = 1.5
    return {
        "pixels": pixels,
        "input_ids": torch.zeros(2, 2, dtype=torch.long),
        "times": torch.tensor(times),
        "noise": torch.full((len(times), 2, 1, 2, 2), noise),
        "flipped": torch.tensor([False, True]),
    }


def test_the_loss_of_a_guess_of_noise() -> None:
    found = by_hand("epsilon")(**batch([[0, 1], [1, 1]], noise=3.0))
    assert found.loss.item() == 9.0
    assert found.each.tolist() == [9.0, 9.0]


def test_the_loss_of_a_guess_of_velocity() -> None:
    found = by_hand("v_prediction")(**batch([[0, 1]], noise=3.0))
    # 0.8 * 3 - 0.6 * 1.5 = 1.5; 0.6 * 3 - 0.8 * 1.5 = 0.6
    torch.testing.assert_close(found.each, torch.tensor([2.25, 0.36]))
    torch.testing.assert_close(found.loss, torch.tensor(1.305))


def test_min_snr_weights() -> None:
    # SNR 0.64 / 0.36 = 16/9 and 0.36 / 0.64 = 9/16; gamma 1
    times = torch.tensor([0, 1])
    torch.testing.assert_close(by_hand("epsilon", snr_gamma=1.0).weights(times), torch.tensor([9 / 16, 1.0]))
    found = by_hand("v_prediction", snr_gamma=1.0).weights(times)
    torch.testing.assert_close(found, torch.tensor([1 / (25 / 9), (9 / 16) / (25 / 16)]))


def test_draws_are_of_their_generator_alone(pipeline: Path) -> None:
    model, pixels = loaded(pipeline, draws=3, flip=True), torch.zeros(5, 3, SIDE, SIDE, dtype=torch.uint8)
    torch.manual_seed(1)
    one = model.draws(pixels, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    two = model.draws(pixels, torch.Generator().manual_seed(7))
    assert one.keys() == two.keys() == {"times", "noise", "flipped"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["noise"].shape == (3, 5, 4, SIDE // 2, SIDE // 2) and one["times"].shape == (3, 5)
    assert one["times"].max() < 100


@pytest.mark.parametrize("spreads", [False, True])
def test_what_is_kept_changes_no_bit(tmp_path: Path, pictures: Path, spreads: bool) -> None:
    folder = save_pipeline(tmp_path, spreads=spreads, prediction="v_prediction")
    found = load_pipeline(str(folder), dtype="float32", base=Path("."), learning=Learning())
    examples = load_pictures(str(pictures), "train", None, Reading())
    items = encode_pictures(examples, found.tokenizer, frame=Frame(SIDE), tokens=24).items
    pixels = torch.stack([item.pixels for item in cast(Any, items)])
    ids = torch.tensor([item.input_ids for item in items])
    losses = list[Tensor]()
    for keep in (True, False):
        model = loaded(folder, keep=keep, flip=True)
        draws = model.draws(pixels, torch.Generator().manual_seed(3))
        assert ("spread" in draws) == spreads
        for _ in range(2):
            losses.append(model(pixels=pixels, input_ids=ids, **draws).each)
    assert all(torch.equal(losses[0], other) for other in losses[1:])
    assert len(set(losses[0].tolist())) == len(pixels)


def test_a_run_trains_lora_on_attention_alone(done: fedtune.Run) -> None:
    factors = load_file(done.path / "final" / LORA)
    kinds = {name.split(".lora_")[0].rpartition(".attn")[2][2:] for name in factors}
    assert kinds == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(name.startswith("unet.") for name in factors)
    assert any(tensor.abs().max() > 0 for name, tensor in factors.items() if "lora_B" in name)
    rounds = list(done.rounds)
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert all("denoising_loss" in entry["eval"]["denoising-loss"] for entry in rounds)
    sent = sum(tensor.nbytes for tensor in factors.values())
    assert done.summary["payload_bytes"] == {"down": 2 * 2 * sent, "up": 2 * 2 * sent}


def test_the_same_bits_from_two_workers_and_from_a_resumed_run(
    done: fedtune.Run, pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    config = configuration(pipeline, pictures)
    others = fedtune.run({**config, "transport": {"workers": 2}}, out=tmp_path / "workers", progress=False)

    def stop(round: int, scores: Any, state: Any) -> None:
        if round == 1:
            raise KeyboardInterrupt

    class Stopping(fedtune.Callback):
        def on_round(self, round: int, scores: Any, state: Any) -> None:
            stop(round, scores, state)

    with pytest.raises(KeyboardInterrupt):
        fedtune.run(config, out=tmp_path / "cut", progress=False, callbacks=[Stopping()])
    resumed = fedtune.open(tmp_path / "cut").resume(progress=False)
    expected = (done.path / "final" / LORA).read_bytes()
    assert (others.path / "final" / LORA).read_bytes() == expected
    assert (resumed.path / "final" / LORA).read_bytes() == expected
    assert [r["eval"] for r in resumed.rounds] == [r["eval"] for r in done.rounds]


@pytest.mark.parametrize(
    "method",
    [
        {"rounds": 1, "arrival": "asynchronous"},
        *({"aggregation": how} for how in ("stack", "freeze-a", "svd", "residual", "refine", "alternate")),
        {"proximal": 0.1},
        {"server_optimizer": {"name": "adam", "lr": 0.01}},
        {"federation": {"wire": {"dtype": "int8", "error_feedback": True}}},
        {"federation": {"privacy": {"clip": 0.5, "noise_multiplier": 0.5, "delta": 1e-3}}},
    ],
)
def test_fedavg_in_its_forms(pipeline: Path, pictures: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    own = {key: value for key, value in method.items() if key != "federation"}
    config = configuration(pipeline, pictures, **own) | {"federation": method.get("federation", {})}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    first, *_, last = run.rounds
    private = "privacy" in method.get("federation", {})  # then clients do not say how large their loss is
    assert last["train_loss"] is None if private else last["train_loss"] > 0
    assert first["eval"] != last["eval"]


@pytest.mark.parametrize("name", ["standalone", "centralized", "zero-shot"])
def test_references(pipeline: Path, pictures: Path, tmp_path: Path, name: str) -> None:
    config = configuration(pipeline, pictures)
    own = (
        {}
        if name == "zero-shot"
        else {k: v for k, v in config["method"].items() if k not in ("name", "rounds")}
    )
    run = fedtune.run({**config, "method": {"name": name, **own}}, out=tmp_path / "run", progress=False)
    assert run.scores["denoising-loss"]["denoising_loss"] > 0


def test_targets_by_name_reach_the_text_encoder(pipeline: Path) -> None:
    model = attach_lora(loaded(pipeline), rank=2, alpha=2, dropout=0.0, targets=["q_proj", "to_k"], seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".text_encoder." in name for name in trained) and any(".unet." in name for name in trained)
    assert all(".q_proj." in name or ".to_k." in name for name in trained)
    with pytest.raises(InputError, match='named "to_z"'):
        attach_lora(loaded(pipeline), rank=2, alpha=2, dropout=0.0, targets=["to_z"], seed=0)


def test_diagnose_follows_the_run_on_the_denoising_loss(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    """The whole run in both schemes: the multi-round one is the run, whose scores it has."""
    config = configuration(pipeline, pictures, local_epochs=6, lr=3e-2)
    found = fedtune.diagnose(config, whole=True, progress=False)
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    losses = [entry["eval"]["denoising-loss"]["denoising_loss"] for entry in run.rounds]
    assert [found["losses"]["start"], *found["losses"]["multi_round"]] == pytest.approx(losses, abs=1e-7)
    assert found["measured_on"]["whole_run"] and found["measured_on"]["steps"] == 24  # 2 x 6 x 2 batches
    said = found["quantities"]
    assert said["gamma"] == pytest.approx(said["smoothness"] * said["relative_update"] * 24)
    assert said["bound"] == pytest.approx(said["gamma"] * said["norm"])
    assert 0 < said["error"] < said["bound_of_clients"]


def test_pictures_of_rounds_and_arrivals(
    pipeline: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, evaluate = list[str](), scoring.evaluate

    def counted(models: Any, *rest: Any) -> Any:
        scored.append("once")
        return evaluate(models, *rest)

    monkeypatch.setattr(scoring, "evaluate", counted)
    config = configuration(pipeline, pictures, rounds=1, arrival="asynchronous")
    prompts = [
        "a red circle on a blue background",
        {"text": "a sks square", "says": "two red stars on a blue background"},
    ]
    drawn = {"prompts": prompts, "steps": 2, "each": 3}
    config["evaluation"] = {"tasks": ["pixel-check"], "pictures": drawn, "arrivals": True}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    files = sorted(file.name for file in (run.path / "pictures").iterdir())
    assert files == [
        "round-0000.png",
        "round-0001-arrival-0001.png",
        "round-0001-arrival-0002.png",
        "round-0001.png",
    ]
    with Image.open(run.path / "pictures" / "round-0001.png") as image:
        assert image.size == (3 * (96 + 4) + 4, 2 * (96 + 4) + 4)
    last = (run.path / "pictures" / "round-0001-arrival-0002.png").read_bytes()
    assert last == (run.path / "pictures" / "round-0001.png").read_bytes()
    assert len(scored) == 3  # before, and after each arrival: the last one's model is the round's
    assert set(run.scores["pixel-check"]) >= {"shown", "shown/background", "shown/colour", "shown/shape"}
    page = run.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4


def test_the_same_bits_in_a_simulation_with_a_sum_that_nobody_sees(
    pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    config = configuration(pipeline, pictures, rounds=1)
    plain = fedtune.run(config, out=tmp_path / "plain", progress=False)
    federation = {"secure_aggregation": {"threshold": 2}}
    summed = fedtune.run({**config, "federation": federation}, out=tmp_path / "summed", progress=False)
    assert (plain.path / "final" / LORA).read_bytes() == (summed.path / "final" / LORA).read_bytes()


def test_real_pictures_from_loading_to_a_result(shared_data: Path, pipeline: Path, tmp_path: Path) -> None:
    for subject in ("dog", "backpack", "teapot"):
        shutil.copytree(shared_data / "dreambooth" / subject, tmp_path / "pictures" / subject)
    config = configuration(pipeline, tmp_path / "pictures", rounds=1)
    config["data"]["pictures"] = {"caption": "a photo of sks {folder}", "flip": True}
    config["data"]["partition"], config["data"]["clients"] = {"name": "iid"}, 3
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    partition = json.loads((run.path / "partition.json").read_text())
    assert len(partition["clients"]) == 3
    assert sum(client["examples"] for client in partition["clients"]) + partition["held_out"] >= 12
    assert load_file(run.path / "final" / LORA)


def test_the_same_bits_in_flowers_simulation(
    done: fedtune.Run, pipeline: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("flwr")
    config = {**configuration(pipeline, pictures), "transport": {"name": "flower-simulation"}}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    assert (run.path / "final" / LORA).read_bytes() == (done.path / "final" / LORA).read_bytes()


def test_the_clip_score_is_that_of_transformers(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    clip = save_clip(tmp_path / "clip")
    long = "a small white heart on a black background with a toy in the background"  # 15 tokens, of 8
    prompts = [{"text": "a sks square", "says": "two red stars", "subject": "sks"}, {"text": long}]
    config = configuration(pipeline, pictures)
    config["method"] = {"name": "zero-shot"}
    drawn = {"prompts": prompts, "steps": 2, "each": 2, "clip": str(clip)}
    config["evaluation"] = {"tasks": ["clip-score"], "pictures": drawn}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    with Image.open(run.path / "pictures" / "round-0000.png") as sheet:
        grid = np.asarray(sheet)
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip)
    cosines = []
    for row, text in enumerate(("two red stars", long)):
        shown = [
            grid[4 + row * 100 : 100 + row * 100 : 6, 4 + at * 100 : 100 + at * 100 : 6].copy()
            for at in (0, 1)
        ]
        given = processor(
            text=text, images=shown, return_tensors="pt", padding="max_length", truncation=True, max_length=8
        )
        with torch.no_grad():
            found = model(**given)
            cosines.append(float((found.logits_per_image / model.logit_scale.exp()).mean()))
    scores = run.scores["clip-score"]
    assert scores["clip_score"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert scores["cut"] == 1 and -1 <= scores["clip_image_score"] <= 1
    (first, *_) = run.rounds
    assert first["eval_notes"]["clip-score"] == ["1 of 2 texts are cut to 8 tokens"]
    with pytest.raises(InputError, match="holds no CLIP model"):
        fedtune.run(
            config, f"evaluation.pictures.clip={tmp_path / 'none'}", out=tmp_path / "no", progress=False
        )
    assert not (tmp_path / "no").exists()


def test_bfloat16_weights_and_float32_factors(pictures: Path, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "pipeline", spreads=True, prediction="v_prediction")
    config = configuration(folder, pictures, rounds=1)
    config["model"] |= {"dtype": "bfloat16", "diffusion": {"snr_gamma": 5.0, "draws": 2}}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    factors = load_file(run.path / "final" / LORA)
    assert {tensor.dtype for tensor in factors.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in factors.items() if "lora_B" in name)
    assert run.scores["denoising-loss"]["denoising_loss"] > 0


def test_an_autoencoder_without_numbers_is_named(pipeline: Path, pictures: Path) -> None:
    model = loaded(pipeline)
    with torch.no_grad():
        next(model.vae.parameters()).fill_(torch.nan)
    pixels = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"autoencoder gives NaN or infinity in float32; set model\.dtype"):
        model.moments(pixels, torch.tensor([False]))


def test_a_side_that_the_unet_cannot_halve(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    config = configuration(pipeline, pictures)
    config["data"]["pictures"] = {"side": 18}
    with pytest.raises(InputError, match=r"data\.pictures\.side must be a multiple of 4 .* got 18"):
        fedtune.run(config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_stable_diffusion_from_its_settings_alone(tmp_path: Path) -> None:
    import diffusers
    from transformers import CLIPTextConfig

    from fedtune.planning.modules import trained_modules

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    unet.save_config(tmp_path / "unet")
    vae.save_config(tmp_path / "vae")
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    CLIPTextConfig(**size).save_pretrained(tmp_path / "text_encoder")
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= {
        name: ["transformers", kind]
        for name, kind in (("text_encoder", "CLIPTextModel"), ("tokenizer", "CLIPTokenizer"))
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = configuration(tmp_path, tmp_path, lora={"rank": 4, "alpha": 4}, rounds=5)
    # UNet 859,520,964, text encoder 123,060,480, autoencoder 83,653,863 and the factors of 16 x 8 layers
    assert trained_modules(fedtune.load(config)) == [
        "trained: LoRA on 128 linear layers; 797,184 of 1,067,032,491 parameters",
        "sent: 3,188,736 bytes a client, round and way; 5 rounds",
    ]
