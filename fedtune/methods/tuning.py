"""What is trained: the settings for full weights, LoRA, adapters and prompts, and how they are attached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from fedtune.core.settings import Settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from fedtune.models.text_to_image import TextToImage


Names = Annotated[list[str], Field(min_length=1)]
LoraTargets = Annotated[
    Literal["auto", "attention", "all-linear"] | Names,
    BeforeValidator(lambda value: "auto" if value is None else value),  # as older configurations have it
]


class Lora(Settings):
    """Low-rank factors: W0 + alpha/rank · B·A."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: LoraTargets = "auto"  # which linear layers of the blocks, or their names; see families.md
    client_ranks: list[int] | None = None  # client i trains rank client_ranks[i mod length], at most `rank`
    use_dora: bool = False  # rows' lengths are trained apart from their directions
    use_rslora: bool = False  # alpha/√rank in place of alpha/rank
    init: Literal["default", "pissa", "olora", "loftq"] = "default"  # what B·A starts as: 0, or parts of W0
    bias: Literal["none", "all", "lora_only"] = "none"  # biases that train too: of all layers, or LoRA's
    modules_to_save: list[str] = Field([])  # modules around the blocks that are trained whole

    @model_validator(mode="after")
    def _ranks(self) -> Self:
        for rank in self.client_ranks if self.client_ranks is not None else [self.rank]:
            if not 1 <= rank <= self.rank:
                raise ValueError(f"client_ranks must lie in 1..rank ({self.rank}), got {rank}")
        if self.client_ranks == []:
            raise ValueError("client_ranks must name at least one rank, or be left out")
        return self

    @model_validator(mode="after")
    def _forms(self) -> Self:
        if self.init == "loftq":
            raise ValueError(
                "init: loftq begins at what quantising took from a weight, and who holds a base in few bits "
                "has no other weight to take that from; take default, or pissa or olora, which begin at "
                "parts of the weight as it is held"
            )
        if self.init != "default" and (self.use_dora or self.client_ranks):
            other = "use_dora" if self.use_dora else "client_ranks"
            why = (
                "the rows' lengths would be those of the whole weight"
                if self.use_dora
                else "a client of a lower rank would begin without a part of the weight"
            )
            raise ValueError(f"init: {self.init} does not go with {other}: {why}; leave one of the two out")
        return self

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def more(self, *, dora: bool = True) -> str:
        """The first setting that is more than plain factors, as it is set; "" where there is none."""
        if self.init != "default":
            return f"init: {self.init}"
        if self.bias != "none":
            return f"bias: {self.bias}"
        if self.modules_to_save:
            return "modules_to_save"
        return "use_dora" if dora and self.use_dora else ""


class Adapter(Settings):
    """A bottleneck after each block's MLP: h + up(gelu(down(h)))."""

    size: int = Field(32, ge=1)


class Ia3(Settings):
    """Factors of keys, values and the inner activations of feed-forward networks."""

    targets: Literal["auto"] | Names = "auto"  # linear layers by name


class Prompt(Settings):
    """Trained vectors in front of the embedded input."""

    tokens: int = Field(20, ge=1)


class PTuning(Settings):
    """Trained vectors in front of the input, reparametrised by an MLP of width `hidden`."""

    tokens: int = Field(20, ge=1)
    hidden: int = Field(128, ge=1)


class Prefix(Settings):
    """Trained keys and values in front of the text, in every block."""

    tokens: int = Field(20, ge=1)  # of the prefix


class InBlocks(Settings):
    """What is trained of each block: all its weights, or what LoRA or an adapter adds to them."""

    trainable: Literal["full", "lora", "adapter"] = "full"  # of each block
    lora: Lora | None = None  # with trainable: lora
    adapter: Adapter | None = None  # with trainable: adapter

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        """The block of the chosen form gets its defaults, so that the saved configuration is complete."""
        if isinstance(values, dict):
            chosen = values.get("trainable", cls.model_fields["trainable"].default)
            key = chosen.replace("-", "_") if isinstance(chosen, str) else ""
            if key in _FORMS and key in cls.model_fields and values.get(key) is None:
                return {**values, key: {}}
        return values

    @model_validator(mode="after")
    def _only_the_chosen(self) -> Self:
        for key in _FORMS:
            name = key.replace("_", "-")
            if name != self.trainable and getattr(self, key, None) is not None:
                raise ValueError(
                    f"`{key}` is set but trainable is {self.trainable}; "
                    f"remove the block or set trainable: {name}"
                )
        return self

    @property
    def quantized_refusal(self) -> str:
        """Nothing takes a step where weights are kept in few bits."""
        if self.trainable != "full":
            return ""
        forms = [form for form in type(self).model_fields["trainable"].annotation.__args__ if form != "full"]  # type: ignore[union-attr]
        return f"trainable: full moves the weights that are kept in few bits; take {' or '.join(forms)}"

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Makes `model` trainable as configured, in place; new parameters are drawn from `seed`."""
        from fedtune.models import lora  # here, so that settings are read without torch
        from fedtune.models import text_to_image as pictures
        from fedtune.models import tuning as attach
        from fedtune.models.boundary import usable

        base = cast("PreTrainedModel", model)
        with usable(f"method.trainable {self.trainable} on a {type(model).__name__}"):
            if isinstance(model, pictures.TextToImage):
                return self._attach_to_pipeline(model, seed)
            if self.lora:
                return lora.attach_lora(
                    base,
                    rank=self.lora.rank,
                    alpha=self.lora.alpha,
                    dropout=self.lora.dropout,
                    targets=self.lora.targets,
                    seed=seed,
                    form=lora.LoraForm(
                        dora=self.lora.use_dora,
                        rslora=self.lora.use_rslora,
                        start=cast(lora.Start, self.lora.init),
                        whole=tuple(self.lora.modules_to_save),
                        bias=self.lora.bias,
                    ),
                )
            if self.adapter:
                return attach.attach_adapter(base, size=self.adapter.size, seed=seed)
            return attach.train_all(base)

    def _attach_to_pipeline(self, model: TextToImage, seed: int) -> nn.Module:
        from fedtune.models import text_to_image as pictures

        if self.lora is None:
            return pictures.train_unet(model)
        return pictures.attach_lora(
            model,
            rank=self.lora.rank,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            targets=self.lora.targets,
            seed=seed,
        )


_FORMS = (
    "lora",
    "adapter",
    "ia3",
    "prompt",
    "p_tuning",
    "prefix",
)  # settings, each for the value of `trainable` of its name


class Tuning(InBlocks):
    """What each client trains and what therefore crosses the wire."""

    trainable: Literal["full", "lora", "adapter", "ia3", "prompt", "p-tuning", "prefix"] = "lora"  # type: ignore[assignment]  # of the model
    ia3: Ia3 | None = None  # with trainable: ia3
    prompt: Prompt | None = None  # with trainable: prompt
    p_tuning: PTuning | None = None  # with trainable: p-tuning
    prefix: Prefix | None = None  # with trainable: prefix

    @model_validator(mode="before")
    @classmethod
    def _computed_once(cls, values: object) -> object:
        """Activations that are computed again would look at the prefix and at themselves."""
        if isinstance(values, dict) and values.get("trainable") == "prefix":
            return {"gradient_checkpointing": "none", **values}
        return values

    @model_validator(mode="after")
    def _kept(self) -> Self:
        again = getattr(self, "gradient_checkpointing", "none")
        if self.trainable == "prefix" and again != "none":
            raise ValueError(
                f"gradient_checkpointing: {again} computes keys and values again behind a prefix, which then "
                "stand there twice; set it to none"
            )
        return self

    @property
    def adapter_refusal(self) -> str:
        """What is saved of P-tuning are its vectors, without what makes them."""
        if self.trainable == "full":
            return "trainable: full trains no adapter; merge the adapter and give that as model.name"
        if self.trainable == "p-tuning":
            return "a saved prompt has no P-tuning encoder to go on with; train it anew"
        return ""

    @model_validator(mode="after")
    def _something_frozen(self) -> Self:
        where = getattr(self, "offload_params", "none")
        if self.trainable == "full" and where != "none":
            raise ValueError(
                f"offload_params: {where} is for frozen weights, and trainable: full freezes none; "
                "set it to none"
            )
        return self

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """As `InBlocks.attach`, and prompts too."""
        from fedtune.models import tuning as attach
        from fedtune.models.boundary import usable
        from fedtune.models.ia3 import attach_ia3
        from fedtune.models.prefix import attach_prefix

        base = cast("PreTrainedModel", model)
        with usable(f"method.trainable {self.trainable} on a {type(model).__name__}"):
            if self.ia3:
                named = None if self.ia3.targets == "auto" else self.ia3.targets
                return attach_ia3(base, targets=named, seed=seed)
            if self.prompt:
                return attach.attach_prompt(base, tokens=self.prompt.tokens, seed=seed)
            if self.prefix:
                return attach_prefix(base, tokens=self.prefix.tokens, seed=seed)
            if self.p_tuning:
                return attach.attach_p_tuning(
                    base, tokens=self.p_tuning.tokens, hidden=self.p_tuning.hidden, seed=seed
                )
        return super().attach(model, seed)
