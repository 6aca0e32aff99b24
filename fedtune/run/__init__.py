"""Configurations, run folders and checkpoints."""
