"""Image classification: residual networks, data, and the task that joins them."""
