"""Training on lists: configuration, reference log-probs, metrics, checkpoints, the trainer."""
