"""Fine-tune one foundation model on data that stays with many owners."""

__version__ = "0.1.0"
