"""The PyTorch operators: log-probs, the list loss, and the linear losses."""
