"""The cost of a training step on a TPU, as its compiler reports it."""
