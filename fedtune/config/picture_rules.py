"""What of a configuration does not go with text-to-image models, or with no others."""

from __future__ import annotations

from fedtune.config.data import DataSettings
from fedtune.config.evaluation import Evaluation
from fedtune.config.model import ModelSettings
from fedtune.config.pictures import TASK
from fedtune.core.settings import Settings
from fedtune.evaluation.picture_settings import A_CLIP
from fedtune.evaluation.registry import certain

METHODS = ("fedavg", "standalone", "centralized", "zero-shot")


def refusal(model: ModelSettings, data: DataSettings, evaluation: Evaluation, method: Settings) -> str | None:
    """The first thing of a configuration that is not there for text-to-image, or only there; None of none."""
    name = str(method.name)  # type: ignore[attr-defined]
    own = {
        "model.diffusion": model.diffusion,
        "data.pictures": data.pictures,
        "evaluation.pictures": evaluation.pictures,
    }
    if model.task != TASK:
        named = next((setting for setting, block in own.items() if block is not None), "")
        return f"{named} is for model.task: {TASK}, got {model.task}" if named else None
    lora = getattr(method, "lora", None)
    trainable = getattr(method, "trainable", "lora")
    others = {
        f"method.name: {name}": name not in METHODS,
        f"method.trainable: {trainable}": trainable not in ("lora", "full"),
        f"method.lora.{lora.more() if lora else ''}": bool(lora and lora.more()),
        "method.lora.use_rslora": bool(lora and lora.use_rslora),
        "method.compile": getattr(method, "compile", False),
        "method.offload_params": getattr(method, "offload_params", "none") != "none",
        f"model.quantization: {model.quantization}": model.quantization != "none",
        f"model.attention: {model.attention}": model.attention != "auto",
        "model.initial: scratch": model.initial != "pretrained",
        "model.adapter": model.adapter is not None,
        f"data.batching: {data.batching}": data.batching != "random",
        f"data.format: {data.format}": data.format != "auto",
        "data.fields": bool(data.fields),
        "data.public": data.public is not None,
        "data.streaming": data.streaming,
        f"data.train: {data.train}": data.train in ("objects",),
    }
    for what, there in others.items():
        if there:
            instead = {
                f"method.name: {name}": f"; take {', '.join(METHODS)}",
                f"method.trainable: {trainable}": "; take lora or full",
            }.get(what, "")
            return f"{what} is not there for model.task: {TASK}{instead}"
    prior = model.diffusion.prior if model.diffusion else None
    moving = trainable == "full" or getattr(method, "aggregation", "") in ("stack", "residual")
    if prior is not None and prior.source is None and moving:
        return (
            "model.diffusion.prior has the base model make pictures, and this method changes the base's own "
            "weights; give a folder of such pictures in model.diffusion.prior.source, or take "
            "method.trainable: lora with method.aggregation: mean"
        )
    makes = [task for task in certain(evaluation.tasks) if task in ("clip-score", "pixel-check")]
    drawn = evaluation.pictures
    if drawn is not None and makes and not drawn.prompts and data.train != "bundled":
        return f"task {makes[0]} needs evaluation.pictures.prompts: what pictures are made of"
    if drawn is not None and "clip-score" in makes and drawn.clip is None:
        return f"task clip-score needs evaluation.pictures.clip: {A_CLIP}"
    return None
