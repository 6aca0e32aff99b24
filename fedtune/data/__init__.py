"""Data: examples and their sources, templates, encoding, batches, and which client holds what."""
