"""How good a model is on held-out examples: loss, exact answers, Rouge-L."""
