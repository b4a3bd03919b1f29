"""The primitives in plain PyTorch: any device, fp64 too, and the fast path on CPU."""

from perpo_kernels.backends.eager.lists import list_loss
from perpo_kernels.backends.eager.rows import clear_rows_, fused_rows_, grad_rows_, log_prob_rows

__all__ = ["clear_rows_", "fused_rows_", "grad_rows_", "list_loss", "log_prob_rows"]
