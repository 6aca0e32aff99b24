"""The files of reproduce/, which is not a package: they find one another by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1] / "reproduce"


def load(name: str) -> ModuleType:
    """A file of reproduce/ by its name without the ending."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).parent == FOLDER, f"{name} is {module.__file__}"
    return module
