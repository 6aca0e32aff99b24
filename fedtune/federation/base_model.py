"""The base model of a configuration, as every side of its federation loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config.pictures import Diffusion, Pictures
from fedtune.config.schema import RunConfig
from fedtune.core.seeds import derive_seed
from fedtune.errors import InputError
from fedtune.models.load import Loaded, load_model
from fedtune.models.quantize import held_by_others

if TYPE_CHECKING:
    from fedtune.models.text_to_image import Learning


def load_base(
    config: RunConfig,
    labels: Sequence[str],
    *,
    place: str = "",
    whole: bool = False,
    shared: Path | None = None,
) -> Loaded:
    """Loads it.

    Args:
        config: Says which model, and how it is held.
        labels: Of a classifier, its classes.
        place: Where it is on this machine; empty: where the configuration says.
        whole: It is the result of a run, all weights of which are there as they are to be used.
        shared: As `load_model` takes it.

    Raises:
        InputError: As `load_model`.
    """
    model = config.model
    if model.diffusion is not None and config.data.pictures is not None:
        from fedtune.models.pipelines import load_pipeline  # diffusers only where it is used

        learning = learning_of(model.diffusion, config.data.pictures)
        return load_pipeline(place or model.place, dtype=model.dtype, base=Path("."), learning=learning)
    loaded = load_model(
        place or model.place,
        dtype=model.dtype,
        initial="pretrained" if whole else model.initial,
        task=model.task,
        num_labels=len(labels) or None,
        seed=derive_seed(config.seed, "model"),
        base=Path("."),
        shared=shared,
        quantization="none" if whole else model.quantization,
        attention=model.attention,
    )
    if not whole:
        refuse_quantized(config, loaded.quantization)
        if getattr(config.method, "offload_params", "none") != "none" and held_by_others(loaded.model):
            raise InputError(
                f"model {config.model.name} came quantised ({loaded.quantization}), in forms that only "
                "the package that made them can put on disk; set method.offload_params to none, or take "
                "the model that it was made from, with model.quantization: nf4 or int8"
            )
    return loaded


def learning_of(own: Diffusion, pictures: Pictures) -> Learning:
    """How a text-to-image model's loss is taken."""
    from fedtune.models.text_to_image import Learning

    weight = own.prior.weight if own.prior else Learning.prior
    return Learning(own.snr_gamma, own.draws, pictures.flip, own.keep, weight)


def refuse_quantized(config: RunConfig, quantization: str) -> None:
    """Raises InputError if a base model that is quantised, maybe as it came, does not go with the method."""
    if quantization != "none" and (reason := config.method.quantized_refusal):
        raise InputError(
            f"model {config.model.name} is quantised ({quantization}), which does not go with "
            f"{config.method_name}: {reason}"
        )
