"""Image classification: networks, data, and the task that joins them."""
