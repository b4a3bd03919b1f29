"""Fused list-wise preference losses for vision-language models: from hidden states and rewards to gradients.

import perpo_kernels as pk
out = pk.linear_perpo_loss(hidden, lm_head.weight, labels, rewards, cu_seqlens=..., cu_lists=..., ref_log_probs=...)
out.loss.backward()
"""

from perpo_kernels import layout, objectives, reference
from perpo_kernels.functional import (
    LinearPerPOOutput,
    linear_perpo_loss,
    linear_token_log_probs,
    perpo_loss,
    token_log_probs,
)
from perpo_kernels.modules import LinearPerPOLoss, PerPOLoss
from perpo_kernels.references import combine_references
from perpo_kernels.vocab_slices import VocabSlices

__version__ = "0.1.0"
__all__ = [
    "LinearPerPOLoss",
    "LinearPerPOOutput",
    "PerPOLoss",
    "VocabSlices",
    "combine_references",
    "layout",
    "linear_perpo_loss",
    "linear_token_log_probs",
    "objectives",
    "perpo_loss",
    "reference",
    "token_log_probs",
]
