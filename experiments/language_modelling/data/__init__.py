"""Texts as numbers, and segments of them."""
