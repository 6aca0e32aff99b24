"""Pipelines of other families, as diffusers saves them, are refused in a sentence that says what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
from small_pipelines import configuration, loaded, save_pictures, save_pipeline

import fedtune
from fedtune.errors import InputError
from fedtune.models.load import seeded

SMALL: dict[str, Any] = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}


def sdxl(folder: Path) -> None:
    """Two text encoders, and a UNet that is also told sizes and the second one's summary."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(save_pipeline(folder / "base") / "tokenizer")
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = CLIPTextConfig(**size, num_hidden_layers=1, vocab_size=len(tokenizer), projection_dim=16)
    diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=40,
        ),
        scheduler=diffusers.DDIMScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)


def sd3(folder: Path) -> None:
    """A transformer, and a scheduler of flows."""
    transformer = diffusers.SD3Transformer2DModel(
        **SMALL,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=16,
    )
    save_parts(folder, diffusers.StableDiffusion3Pipeline, transformer, 3)


def flux(folder: Path) -> None:
    """A transformer of two kinds of blocks, and a scheduler of flows."""
    transformer = diffusers.FluxTransformer2DModel(
        **SMALL, in_channels=16, num_single_layers=1, joint_attention_dim=32, axes_dims_rope=(2, 2, 4)
    )
    save_parts(folder, diffusers.FluxPipeline, transformer, 2)


def autoencoder() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)


def save_parts(folder: Path, kind: Any, transformer: Any, encoders: int) -> None:
    """A pipeline without its text encoders, which are what is large of it."""
    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")[:encoders]]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts: dict[str, Any] = dict.fromkeys(names)
    kind(transformer=transformer, vae=autoencoder(), scheduler=scheduler, **parts).save_pretrained(folder)


def inpainting(folder: Path) -> None:
    """A UNet of Stable Diffusion that also takes a mask and what is behind it."""
    save_pipeline(folder, channels=9)


FAMILIES: list[tuple[Callable[[Path], None], str]] = [
    (sdxl, "StableDiffusionXLPipeline is not there for text-to-image (SDXL, SD3 and FLUX have other parts)"),
    (sd3, "StableDiffusion3Pipeline is not there for text-to-image (SDXL, SD3 and FLUX have other parts)"),
    (flux, "FluxPipeline is not there for text-to-image (SDXL, SD3 and FLUX have other parts)"),
    (inpainting, "its UNet takes 9 channels and its autoencoder gives 4; pipelines for inpainting"),
]


@pytest.mark.parametrize("save,said", FAMILIES, ids=[save.__name__ for save, _ in FAMILIES])
def test_other_families_are_refused_and_told_what_is_read(
    save: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    with seeded(0):
        save(tmp_path / "model")
    with pytest.raises(InputError) as error:
        loaded(tmp_path / "model")
    assert said in str(error.value) and "\n" not in str(error.value)
    if save is not inpainting:
        assert "Stable Diffusion 1.x and 2.x: a UNet2DConditionModel" in str(error.value)
        pictures = save_pictures(tmp_path / "pictures", {"a": 3, "b": 3})
        for command in (fedtune.plan, fedtune.data_report):
            with pytest.raises(InputError, match="is not there for text-to-image"):
                command(configuration(tmp_path / "model", pictures))
        with pytest.raises(InputError, match="is not there for text-to-image"):
            fedtune.run(configuration(tmp_path / "model", pictures), out=tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()
