"""A Stable Diffusion pipeline as one module that is trained and saved as any other model here is.

What is trained is the UNet: it guesses the noise that was mixed into a picture's latents, given the caption
(Ho et al. 2020, eq. 14; Rombach et al. 2022, eq. 3), or the velocity √ᾱ ε − √(1−ᾱ) z (Salimans and Ho 2022,
appendix D), as the pipeline's scheduler says. Autoencoder and text encoder are frozen. What they make of a
picture and of a caption is computed alone and not in a batch, so that keeping it changes no bit.

All that is random (noise, time steps, which pictures are mirrored) comes with the batch, drawn by
`TextToImage.draws` from the client's own stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from fedtune.errors import InputError, nearest
from fedtune.models.wrapping import attach

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what `auto` and `attention` of LoRA stand for, in the UNet
PRIOR = "prior_"  # begins the names of a batch's tensors that are of pictures of the class
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Learning:
    """How the loss is taken.

    Attributes:
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, eq. 8); None: all time steps weigh the same.
        draws: Noises and time steps a picture and step; their mean is its loss.
        flip: Whether each picture is mirrored, or not, by chance.
        keep: Whether latents and embeddings are kept once they were computed.
        prior: Weight of the loss of pictures of the class, where a batch has some.
    """

    snr_gamma: float | None = None
    draws: int = 1
    flip: bool = False
    keep: bool = True
    prior: float = 1.0


@dataclass(frozen=True)
class Loss:
    """What the forward pass gives: the mean over pictures, a scalar, and of each picture, (batch,)."""

    loss: Tensor
    each: Tensor


class TextToImage(nn.Module):
    """UNet, autoencoder, text encoder and scheduler of a pipeline.

    Args:
        unet: `UNet2DConditionModel`.
        vae: `AutoencoderKL` or `AutoencoderTiny`.
        text_encoder: `CLIPTextModel`.
        scheduler: Makes pictures; says what the UNet predicts.
        noising: `DDPMScheduler` of the same settings.
        name: Of the pipeline, as the configuration gave it.
        learning: How the loss is taken.
    """

    base_model_prefix = ""  # PEFT asks where tied embeddings would be: nowhere but in the module itself

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        *,
        scheduler: Any,
        noising: Any,
        name: str,
        learning: Learning,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.scheduler, self.noising, self.learning = scheduler, noising, learning
        self.name_or_path = name
        self.config = cast(Any, text_encoder).config  # of the captions: how many tokens one may have
        self._latents: dict[tuple[Any, ...], Tensor] = {}
        self._embedded: dict[tuple[int, ...], Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    @property
    def side(self) -> int:
        """Pixels a side of the pictures that it was trained for."""
        return int(cast(Any, self.unet).config.sample_size) * self.scale

    @property
    def scale(self) -> int:
        """Pixels a side of one latent."""
        return int(2 ** (len(cast(Any, self.vae).config.block_out_channels) - 1))

    @property
    def unit(self) -> int:
        """What a picture's side must be a multiple of: the UNet halves latents between its levels."""
        return self.scale * int(2 ** (len(cast(Any, self.unet).config.block_out_channels) - 1))

    @property
    def spreads(self) -> bool:
        """Whether the autoencoder gives a mean and a spread, of which latents are drawn."""
        return bool(hasattr(self.vae, "quant_conv"))

    def draws(self, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What is random of one batch, on the CPU.

        Args:
            pixels: uint8 (batch, 3, height, width).
            generator: A CPU generator.

        Returns:
            `noise`, float32 (draws, batch, channels, height / scale, width / scale), `times`, int64 (draws,
            batch), `flipped`, bool (batch,), and for an autoencoder that spreads `spread`, as a noise.
        """
        batch, _, height, width = pixels.shape
        channels = int(cast(Any, self.unet).config.in_channels)
        shape = (self.learning.draws, batch, channels, height // self.scale, width // self.scale)
        found = {
            "times": torch.randint(
                int(self.noising.config.num_train_timesteps), shape[:2], generator=generator
            ),
            "noise": torch.randn(shape, generator=generator),
            "flipped": torch.rand(batch, generator=generator) < (0.5 if self.learning.flip else 0.0),
        }
        if self.spreads:
            found["spread"] = torch.randn(shape, generator=generator)
        return found

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        noise: Tensor,
        times: Tensor,
        flipped: Tensor,
        spread: Tensor | None = None,
        **more: Tensor,
    ) -> Loss:
        """The loss of a batch: the mean over pictures and draws of the mean squared error of the guess.

        Args:
            pixels: uint8 (batch, 3, height, width).
            input_ids: int64 (batch, tokens), captions at their full length.
            noise, times, flipped, spread: As `draws` gives them.
            more: The same of as many pictures of the class, by names with `PRIOR` in front; others count not.

        Raises:
            InputError: The autoencoder gives no numbers in this dtype.
        """
        captions = self.embed(input_ids)
        moments = self.moments(pixels, flipped)  # (batch, 1 or 2, channels, height, width)
        losses = list[Tensor]()
        for draw in range(noise.shape[0]):
            clean = moments[:, 0]
            if spread is not None:
                clean = clean + moments[:, 1] * spread[draw].to(clean)
            clean = self._scaled(clean)
            mixed = noise[draw].to(clean)
            noisy = self.noising.add_noise(clean, mixed, times[draw])
            guess = self.unet(noisy, times[draw], captions).sample
            velocity = self.predicts == "v_prediction"
            wanted = self.noising.get_velocity(clean, mixed, times[draw]) if velocity else mixed
            error = (guess.float() - wanted.float()).pow(2).flatten(1).mean(1)  # (batch,)
            losses.append(error * self.weights(times[draw]))
        each = torch.stack(losses).mean(0)
        of_class = {n.removeprefix(PRIOR): tensor for n, tensor in more.items() if n.startswith(PRIOR)}
        if of_class:
            each = each + self.learning.prior * self(**of_class).each
        return Loss(each.mean(), each)

    @property
    def predicts(self) -> str:
        """What the UNet guesses: epsilon or v_prediction."""
        return str(self.noising.config.prediction_type)

    def weights(self, times: Tensor) -> Tensor:
        """What each time step's error weighs, (batch,): 1 without min-SNR weighting.

        With it min(SNR, γ) / SNR of a UNet that guesses the noise, and min(SNR, γ) / (SNR + 1) of one that
        guesses the velocity, where SNR = ᾱ / (1 − ᾱ). Where ᾱ is 0 the first is its limit, 1.
        """
        if self.learning.snr_gamma is None:
            return torch.ones(times.shape, device=times.device)
        kept = self.noising.alphas_cumprod.to(times.device)[times].float()
        ratio = kept / (1 - kept)
        least = ratio.clamp(max=self.learning.snr_gamma)
        if self.predicts == "v_prediction":
            return least / (ratio + 1)
        return torch.where(ratio > 0, least / ratio, torch.ones_like(ratio))

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the text encoder makes of captions, (batch, tokens, width)."""
        if any(parameter.requires_grad for parameter in self.text_encoder.parameters()):
            return cast(Tensor, self.text_encoder(input_ids)[0])
        return torch.stack([self._embed(ids) for ids in input_ids])

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> Tensor:
        return _kept(
            self._embedded if self.learning.keep else None,
            tuple(ids.tolist()),
            lambda: self.text_encoder(ids[None])[0][0],
        )

    @torch.no_grad()
    def moments(self, pixels: Tensor, flipped: Tensor) -> Tensor:
        """What the autoencoder makes of pictures before scaling: (batch, 1, ...), or mean and spread."""
        return torch.stack([self._moments(*one) for one in zip(pixels, flipped.tolist(), strict=True)])

    def _moments(self, pixels: Tensor, flipped: bool) -> Tensor:
        def computed() -> Tensor:
            turned = pixels.flip(-1) if flipped else pixels
            picture = (turned[None].to(self.dtype) / 127.5 - 1).contiguous()
            coded = cast(Any, self.vae).encode(picture)
            if self.spreads:
                found = torch.cat([coded.latent_dist.mean, coded.latent_dist.std])
            else:
                found = coded.latents
            if not bool(found.isfinite().all()):
                dtype = str(self.dtype).removeprefix("torch.")
                raise InputError(
                    f"model {self.name_or_path}: its autoencoder gives NaN or infinity in {dtype}; set "
                    "model.dtype to float32 or bfloat16"
                )
            return found

        if not self.learning.keep:
            return computed()
        digest = hashlib.sha256(pixels.cpu().numpy().tobytes()).digest()
        return _kept(self._latents, (digest, pixels.shape, flipped), computed)

    def _scaled(self, latents: Tensor) -> Tensor:
        about = cast(Any, self.vae).config
        shift = getattr(about, "shift_factor", None) or 0.0
        return (latents - shift) * about.scaling_factor


def _kept(held: dict[Any, Tensor] | None, key: Any, compute: Callable[[], Tensor]) -> Tensor:
    if held is None:
        return compute()
    if key not in held:
        held[key] = compute()
    return held[key]


def text_to_image(model: nn.Module) -> TextToImage | None:
    """The pipeline itself where PEFT has wrapped it or not; None of any other model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base if isinstance(base, TextToImage) else None


def train_unet(model: TextToImage) -> TextToImage:
    """Makes all weights of the UNet trainable, and no others."""
    model.requires_grad_(False)
    model.unet.requires_grad_(True)
    return model


def attach_lora(
    model: TextToImage,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str],
    seed: int,
) -> PeftModel:
    """Adds low-rank updates to linear layers of the UNet, or of the text encoder where they are named.

    Args:
        model: Not wrapped by PEFT.
        rank, alpha, dropout: As `lora.attach_lora`.
        targets: auto and attention: query, key, value and output of the UNet's attention; all-linear: all
            linear layers of the UNet; or ends of paths, also of the text encoder's layers (`q_proj`).
        seed: What A is drawn from.

    Raises:
        InputError: A name matches no linear layer.
    """
    linears = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(("unet.", "text_encoder."))
    ]
    of_unet = [path for path in linears if path.startswith("unet.")]
    if targets == "all-linear":
        chosen = of_unet
    elif isinstance(targets, str):
        chosen = [path for path in of_unet if path.endswith(tuple(f".{name}" for name in ATTENTION))]
    else:
        chosen = [path for path in linears if any(f".{path}".endswith(f".{name}") for name in targets)]
        for name in targets:
            if not any(f".{path}".endswith(f".{name}") for path in linears):
                ends = sorted({path.rpartition(".")[2] for path in linears} - {"0"} | {"to_out.0"})
                raise InputError(
                    f'method.lora.targets: no linear layer of UNet or text encoder is named "{name}".'
                    f"{nearest(name, ends)} There are {', '.join(ends)}."
                )
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=dropout,
        target_modules=chosen,
    )
    return attach(cast(Any, model), config, seed)


def lora_tensors(model: PeftModel) -> Mapping[str, Tensor]:
    """The factors by diffusers' names: `unet.down_blocks.1....to_q.lora_A.weight`."""
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        name.removeprefix("base_model.model."): tensor.detach().cpu().contiguous()
        for name, tensor in found.items()
    }
