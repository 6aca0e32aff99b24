"""What a run costs: memory, seconds, and the software and machine it ran on."""
