"""Builders of tensorflow_datasets for the paper's texts; preparing them needs no TensorFlow."""
