"""Training with topkast_jax: one loop for every task."""
