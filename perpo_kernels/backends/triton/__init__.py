"""The primitives as Triton kernels: CUDA, ROCm, and the CPU under TRITON_INTERPRET=1. One file for each primitive."""

from perpo_kernels.backends.triton.grad_rows import clear_rows_, fused_rows_, grad_rows_
from perpo_kernels.backends.triton.list_loss import list_loss
from perpo_kernels.backends.triton.log_prob_rows import log_prob_rows

__all__ = ["clear_rows_", "fused_rows_", "grad_rows_", "list_loss", "log_prob_rows"]
