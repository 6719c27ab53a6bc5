"""The sweeps behind tables and figures; each file defines get_sweep()."""
