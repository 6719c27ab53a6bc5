"""One file a table or figure; each defines get_sweep()."""
