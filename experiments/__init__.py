"""Training with topkast_jax: one loop for all tasks."""
