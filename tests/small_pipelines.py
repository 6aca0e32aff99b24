"""Pipelines with random weights, a few kilobytes each, and pictures to train them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproduced import load

from fedtune.models.load import seeded
from fedtune.models.pipelines import load_pipeline
from fedtune.models.text_to_image import Learning, TextToImage, text_to_image

SIDE = 16  # pixels: 8 x 8 latents
PROMPTS = ["a sks square on a red background", "two blue circles"]


def save_pipeline(
    folder: Path, *, prediction: str = "epsilon", spreads: bool = False, channels: int = 4
) -> Path:
    """Writes a Stable Diffusion pipeline of two levels.

    Args:
        folder: Where.
        prediction: What its scheduler says.
        spreads: Its autoencoder gives mean and spread.
        channels: That its UNet takes; more than 4 are those of inpainting.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = load("shape_tokenizer").tokenizer(folder / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text |= {"num_hidden_layers": 1, "max_position_embeddings": 24, "vocab_size": len(tokenizer)}
    with seeded(0):
        unet = diffusers.UNet2DConditionModel(
            sample_size=SIDE // 2,
            in_channels=channels,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = (
            diffusers.AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
                scaling_factor=0.5,
            )
            if spreads
            else diffusers.AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
                latent_channels=4,
                scaling_factor=0.5,
            )
        )
        encoder = CLIPTextModel(CLIPTextConfig(**text, **ends, pad_token_id=tokenizer.pad_token_id))
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=100,
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """Writes a CLIP with random weights, for pictures of 16 pixels and captions of 8 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = load("shape_tokenizer").tokenizer(folder)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 1, "projection_dim": 8}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 8}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = size | {"image_size": SIDE, "patch_size": 8}
    with seeded(1):
        model = CLIPModel(CLIPConfig(text_config=size | text | ends, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=side, crop_size=side).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, subjects: dict[str, int], *, caption: bool = True) -> Path:
    """Writes so many pictures of each subject, in a folder each, captions in metadata.jsonl."""
    from PIL import Image

    rng, lines = np.random.default_rng(0), list[str]()
    for subject, count in subjects.items():
        (folder / subject).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / subject / f"{number}.png")
            text = f"a {subject} square on a red background"
            lines.append(json.dumps({"file_name": f"{subject}/{number}.png", "text": text}))
    if caption:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def configuration(model: Path, data: Path, **method: Any) -> dict[str, Any]:
    """A run of two rounds, with two folders of pictures as clients."""
    return {
        "model": {"name": str(model), "task": "text-to-image"},
        "data": {
            "train": str(data),
            "partition": {"name": "by-field"},
            "clients": None,
            "holdout": {"client_fraction": 0.2},
        },
        "method": {
            "name": "fedavg",
            "rounds": 2,
            "local_epochs": 1,
            "batch_size": 2,
            "lr": 1e-2,
            "lora": {"rank": 2, "alpha": 2},
            **method,
        },
    }


def digest(model: torch.nn.Module) -> list[bytes]:
    """The bits of all weights, in order of their names."""
    return [tensor.cpu().numpy().tobytes() for _, tensor in sorted(model.state_dict().items())]


def loaded(folder: Path, **learning: Any) -> TextToImage:
    """A pipeline as a run has it."""
    found = load_pipeline(str(folder), dtype="float32", base=Path("."), learning=Learning(**learning))
    model = text_to_image(found.model)
    assert model is not None
    return model


def drawn_plainly(pipeline: Path, lora: Path | None) -> Any:
    """Pictures of `PROMPTS` as a user of diffusers makes them, uint8 (2, 3, side, side)."""
    from diffusers import StableDiffusionPipeline

    plain: Any = StableDiffusionPipeline.from_pretrained(
        pipeline, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    if lora is not None:
        plain.load_lora_weights(lora)
    images = plain(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
