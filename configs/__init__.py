"""The configs of experiments; each file defines get_config(variant)."""
