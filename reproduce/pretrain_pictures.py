"""Pre-train a small text-to-image pipeline and a CLIP from nothing, on drawn shapes, on a CPU.

    nice -n 19 python reproduce/pretrain_pictures.py --out FOLDER [--part all] [--steps 5000]
    python reproduce/pretrain_pictures.py --out FOLDER --part scores   # what its weights can do

An autoencoder, a CLIP and a UNet with its text encoder are trained one after another, each from --seed. The
UNet's weights are averaged over the last tenth of its steps or so (Karras et al., "Analyzing and Improving
the Training Dynamics of Diffusion Models", 2024, section 3.1), at a constant rate, so that any step can be
the last: what is kept after N steps is what a run of N steps gives.
The same machine and thread count give the same weights; another CPU may round otherwise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from score_pictures import TOKENS, chosen, decibels, drawn, encoded, note, scores, show_scores
from shape_tokenizer import tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from fedtune.data import shapes
from fedtune.data.shapes import Figure, Floats

WIDTH = 64  # of both text encoders and of CLIP's pictures
LATENTS = 6  # channels of a latent, at half a picture's side
BATCH = 32  # pictures of one UNet step
TRAINED = 16_000  # pictures that the UNet sees
SHOWN = 48_000  # pictures that CLIP sees
PAIRS = 32  # of CLIP's batch: a figure and one with an attribute changed
NEARLY = 2  # captions a picture that are one attribute off, in that batch; they have no picture there
MOMENTUM = 7.94  # of the average of the UNet's weights: step s counts as s to this power, less one


def captions(figures: Sequence[Figure], rng: np.random.Generator) -> list[str]:
    """Of each figure; 15 % say nothing of the background."""
    return [figure.caption(background=bool(rng.random() < 0.85)) for figure in figures]


def train_autoencoder(steps: int, seed: int) -> AutoencoderTiny:
    """Two levels of 32 channels; noise on the latents, so that small errors in them are not seen."""
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(32, 32),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=LATENTS,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)
    rng = np.random.default_rng([seed, 1])
    pictures = torch.cat(
        [drawn([shapes.any_figure(rng, wide=True) for _ in range(4000)], rng), clutter(2500, rng)]
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        batch = pictures[torch.randint(0, len(pictures), (16,), generator=generator)]
        latents = model.encode(batch.to(memory_format=torch.channels_last)).latents
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        error = model.decode(noisy).sample - batch
        off = latents.mean((0, 2, 3)) ** 2 + (latents.var((0, 2, 3)) - 1) ** 2
        loss = (error**2).mean() + 0.5 * error.abs().mean() + 0.01 * off.mean()
        descend(loss, list(model.parameters()), optimizer)
        schedule.step()
        progress("autoencoder", step, steps, loss, began)
    with torch.no_grad():
        spread = model.eval().encode(pictures[:1000]).latents.std()
    model.register_to_config(scaling_factor=float(1 / spread))
    return model


def clutter(count: int, rng: np.random.Generator) -> Tensor:
    """Shapes of any colour anywhere, so that the autoencoder can carry what nobody has drawn yet."""
    every = (*shapes.SHAPES, *shapes.OTHERS)
    pictures = list[Floats]()
    for _ in range(count):
        placed = [
            shapes.Placed(
                str(rng.choice(every)),
                rng.uniform(-1, 1, 3).astype(np.float32),
                rng.uniform(4, 28),
                rng.uniform(4, 28),
                rng.uniform(3, 13),
                str(rng.choice(("", *shapes.PATTERNS))),
                rng.uniform(-1, 1, 3).astype(np.float32),
            )
            for _ in range(rng.integers(1, 4))
        ]
        pictures.append(shapes.draw(rng.uniform(-1, 1, 3).astype(np.float32), placed, rng))
    return torch.from_numpy(np.stack(pictures))


def train_clip(tokens: CLIPTokenizer, steps: int, seed: int, every: int) -> CLIPModel:
    """Half of each batch are the other half's figures with one attribute changed: negatives that are hard.

    So are captions that are nearly right, of which each picture has some beside its own.
    """
    torch.manual_seed(seed)
    model = new_clip(tokens)
    rng = np.random.default_rng([seed, 2])
    figures = [shapes.any_figure(rng, wide=True) for _ in range(SHOWN // 2)]
    figures += [nearly(figure, rng) for figure in figures]
    pictures, texts = drawn(figures, rng), captions(figures, rng)
    texts += [nearly(figure, rng).caption() for _ in range(2 * NEARLY) for figure in figures]
    inputs, number = encoded(tokens, texts), {text: at for at, text in enumerate(sorted(set(texts)))}
    same_text = torch.tensor([number[text] for text in texts])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    model.train()
    for step in range(steps):
        first = torch.randint(0, SHOWN // 2, (PAIRS,), generator=generator)
        shown = torch.cat([first, first + SHOWN // 2])
        which = torch.randint(1, 2 * NEARLY + 1, (NEARLY, len(shown)), generator=generator)
        said = torch.cat([shown, (shown + which * SHOWN).flatten()])
        longest = int(inputs.attention_mask[said].sum(1).max())
        found = model(
            pixel_values=pictures[shown],
            input_ids=inputs.input_ids[said, :longest],
            attention_mask=inputs.attention_mask[said, :longest],
        ).logits_per_image
        own = torch.arange(len(shown))
        alike = same_text[shown][:, None] == same_text[said][None]
        alike[own, own] = False
        found = found.masked_fill(alike, -1e4)
        loss = (F.cross_entropy(found, own) + F.cross_entropy(found.T[: len(shown)], own)) / 2
        descend(loss, list(model.parameters()), optimizer)
        schedule.step()
        model.logit_scale.data.clamp_(max=4.6)
        progress("clip", step, steps, loss, began)
        if (step + 1) % every == 0 and step + 1 < steps:
            print(f"clip {step + 1}: {chosen(model, tokens, hard=True)} hard", flush=True)
    return model.eval()


def nearly(figure: Figure, rng: np.random.Generator) -> Figure:
    """A figure with one attribute changed, half the time its shape, which is hardest to see."""
    if rng.random() < 0.5:
        others = [shape for shape in (*shapes.SHAPES, *shapes.OTHERS) if shape != figure.shape]
        return replace(figure, shape=str(rng.choice(others)))
    return shapes.like(figure, rng)


def new_clip(tokens: CLIPTokenizer) -> CLIPModel:
    """Untrained: two layers for texts, three for pictures of 4 x 4 pixels a patch."""
    ends = {
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    text = (
        size | ends | {"vocab_size": len(tokens), "num_hidden_layers": 2, "max_position_embeddings": TOKENS}
    )
    vision = size | {"num_hidden_layers": 3, "image_size": shapes.SIZE, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def new_generator(tokens: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The UNet and its text encoder, untrained."""
    unet = UNet2DConditionModel(
        sample_size=shapes.SIZE // 2,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        projection_dim=WIDTH,
    )
    return unet.to(memory_format=torch.channels_last), CLIPTextModel(text)


def scheduler() -> DDIMScheduler:
    """v-prediction whose last step is noise alone, so that a background's brightness is free."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def train_unet(parts: Parts, steps: int, seed: int, every: int, out: Path) -> None:
    """Trains UNet and text encoder; their average is kept in `out` every so many steps."""
    torch.manual_seed(seed)
    tokens, vae = parts.tokenizer, parts.vae
    rng = np.random.default_rng([seed, 3])
    figures = [shapes.any_figure(rng) for _ in range(TRAINED)]
    pictures, ids = drawn(figures, rng), encoded(tokens, captions(figures, rng)).input_ids
    empty = encoded(tokens, [""]).input_ids[0]
    with torch.no_grad():
        latents = (
            torch.cat([vae.encode(some).latents for some in pictures.split(200)]) * vae.config.scaling_factor
        )
    unet, text = new_generator(tokens)
    noising = DDPMScheduler.from_config(scheduler().config)
    trained = [*unet.parameters(), *text.parameters()]
    average = [parameter.detach().clone() for parameter in trained]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(trained, lr=1.2e-3, weight_decay=0.01, betas=(0.9, 0.99))
    began = time.monotonic()
    unet.train(), text.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.2e-3 * min(1, (step + 1) / 100)
        batch = torch.randint(0, TRAINED, (BATCH,), generator=generator)
        prompts = ids[batch].clone()
        prompts[torch.rand(BATCH, generator=generator) < 0.1] = empty
        clean = latents[batch]
        noise = torch.randn(clean.shape, generator=generator)
        share = torch.rand(BATCH, generator=generator)  # more of the noisy steps, at which shapes are settled
        times = (1000 * 2.5 * share / (1 + 1.5 * share)).long().clamp(max=999)
        noisy = noising.add_noise(clean, noise, times).to(memory_format=torch.channels_last)
        guess = unet(noisy, times, text(prompts)[0]).sample
        loss = F.mse_loss(guess, noising.get_velocity(clean, noise, times))
        descend(loss, trained, optimizer)
        kept = (1 - 1 / (step + 1)) ** MOMENTUM
        torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 1 - kept)
        progress("unet", step, steps, loss, began)
        if (step + 1) % every == 0 or step + 1 == steps:
            moving = [parameter.detach().clone() for parameter in trained]
            for parameter, value in zip(trained, average, strict=True):
                parameter.data.copy_(value)
            unet.eval(), text.eval()
            pipeline = assembled(parts, unet, text)
            print(f"unet {step + 1}: {scores(pipeline, held_out=False)}", flush=True)
            save(pipeline, out)
            note(out, "unet", step + 1, seed)
            for parameter, value in zip(trained, moving, strict=True):
                parameter.data.copy_(value)
            unet.float().train(), text.float().train()


@dataclass(frozen=True)
class Parts:
    """What a pipeline has beside what is trained last."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderTiny


def assembled(parts: Parts, unet: UNet2DConditionModel, text: CLIPTextModel) -> StableDiffusionPipeline:
    """The pipeline of its parts."""
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=parts.vae,
        text_encoder=text,
        tokenizer=parts.tokenizer,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Writes what is new, in float16; the pipeline's own weights stay as they are."""
    for name, part in pipeline.components.items():
        if isinstance(part, UNet2DConditionModel | CLIPTextModel):
            held = {key: value.clone() for key, value in part.state_dict().items()}
            part.half()
            cast(Any, part).save_pretrained(out / name)
            part.float().load_state_dict(held)
        elif isinstance(part, DDIMScheduler):
            part.save_pretrained(out / name)
    pipeline.save_config(out)


def descend(loss: Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One step with clipped gradients."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def progress(what: str, step: int, steps: int, loss: Tensor, began: float) -> None:
    """A line every 200 steps."""
    if (step + 1) % 200 == 0 or step + 1 == steps:
        seconds = time.monotonic() - began
        print(f"{what} {step + 1}/{steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train a small text-to-image pipeline.")
    parser.add_argument("--part", choices=("all", "autoencoder", "clip", "unet", "scores"), default="all")
    parser.add_argument("--steps", type=int, default=5000, help="of the UNet")
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--clip-steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=500, help="steps between two scores of the UNet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out, part = arguments.out, arguments.part
    if part == "scores":
        return show_scores(out)
    if part in ("all", "autoencoder"):
        vae = train_autoencoder(arguments.autoencoder_steps, arguments.seed)
        print(f"autoencoder: {decibels(vae):.1f} dB", flush=True)
        vae.half().save_pretrained(out / "vae")
        note(out, "autoencoder", arguments.autoencoder_steps, arguments.seed)
    tokens = tokenizer(out / "tokenizer")
    if part in ("all", "clip"):
        clip = train_clip(tokens, arguments.clip_steps, arguments.seed, arguments.every)
        right = [chosen(clip, tokens, hard=hard) for hard in (False, True)]
        print(f"clip: {right[0]} easy, {right[1]} hard", flush=True)
        clip.half().save_pretrained(out / "clip")
        note(out, "clip", arguments.clip_steps, arguments.seed)
        tokens.save_pretrained(out / "clip")
        side = {"height": shapes.SIZE, "width": shapes.SIZE}
        CLIPImageProcessorPil(
            size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(out / "clip")
    if part in ("all", "unet"):
        vae = AutoencoderTiny.from_pretrained(out / "vae", dtype=torch.float32).eval()
        train_unet(Parts(tokens, vae), arguments.steps, arguments.seed, arguments.every, out)
        show_scores(out)


if __name__ == "__main__":
    main()
