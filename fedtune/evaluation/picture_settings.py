"""What pictures tasks look at, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass

A_CLIP = "a folder of a CLIP model; or bundled, which knows drawn shapes alone"


@dataclass(frozen=True)
class PicturePrompt:
    """What a picture is made of.

    Attributes:
        text: What the pipeline is given.
        says: What CLIP and the pixel check hold the picture to; None: the text.
        subject: Category of the held-out pictures that it should look like; None: all.
    """

    text: str
    says: str | None = None
    subject: str | None = None

    @property
    def wanted(self) -> str:
        """What the picture should show."""
        return self.says or self.text


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are made and compared.

    Attributes:
        prompts: One row of pictures each.
        clip: "bundled" or a folder; needed for CLIP scores.
        steps: Of the scheduler.
        guidance: Weight of the caption's guess over the one without.
        each: Pictures a prompt.
        side: Pixels; None: as the pipeline was trained.
        crop: As `data.pictures.sized` takes it.
    """

    prompts: tuple[PicturePrompt, ...] = ()
    clip: str | None = None
    steps: int = 20
    guidance: float = 3.0
    each: int = 4
    side: int | None = None
    crop: str = "center"
