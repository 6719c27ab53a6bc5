"""What the bench scripts share: the device's clock, the tuner of kernels, the rows of a record."""
