"""One federation from configuration to summary."""
