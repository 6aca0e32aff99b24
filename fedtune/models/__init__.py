"""Load models, find their blocks, choose what is trained, save and read results."""
