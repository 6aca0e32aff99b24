"""What Python code derives from and is given to follow a run; their module imports PyTorch."""

from __future__ import annotations

from fedtune.federation.callbacks import Callback as Callback
from fedtune.federation.callbacks import ClientReport as ClientReport
from fedtune.federation.callbacks import RoundState as RoundState
