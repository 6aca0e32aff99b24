"""Fine-tune one foundation model on data that stays with many owners."""

from fedtune.version import __version__ as __version__
