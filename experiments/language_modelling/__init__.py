"""Language modelling: Transformer-XL, adaptive softmax, data, task, generation."""
