"""Settings of the rows beside the methods; see references.py."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedtune.core.settings import Settings
from fedtune.methods.objective import Preferring
from fedtune.methods.settings import Training
from fedtune.methods.tuning import Tuning


class ZeroShotConfig(Settings):
    """Settings of `method.name: zero-shot`."""

    float16: ClassVar[bool] = True

    name: Literal["zero-shot"] = "zero-shot"


class StandaloneConfig(Tuning, Preferring, Training):
    """Settings of `method.name: standalone`."""

    name: Literal["standalone"] = "standalone"


class CentralizedConfig(Tuning, Preferring, Training):
    """Settings of `method.name: centralized`."""

    name: Literal["centralized"] = "centralized"
