"""Sweeps: the `get_sweep()` of each file yields the runs of a figure, a table or a comparison."""
