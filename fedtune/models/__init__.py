"""Load models, find their blocks, choose what is trained, save and read results."""

from fedtune.models.guarded import guard

guard()
