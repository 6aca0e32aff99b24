from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# no deadline for one example: on a busy machine the first takes long, which says nothing about the code
settings.register_profile("fedtune", deadline=None)
settings.load_profile("fedtune")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which only the project's own machines have."""
    return _present(SHARED / "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of small real models, which only the project's own machines have."""
    return _present(SHARED / "models")


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"the real {folder.name} of ../shared are not on this machine")
    return folder
