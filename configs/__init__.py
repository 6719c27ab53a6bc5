"""One file an experiment; each defines get_config(variant)."""
