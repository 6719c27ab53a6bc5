"""Labelled images, and batches of them."""
