"""Training: one loop, its state, checkpoints and metrics."""
