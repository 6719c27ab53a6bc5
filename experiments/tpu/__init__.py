"""What a training step costs on a TPU, from the TPU compiler alone: no TPU is needed."""
