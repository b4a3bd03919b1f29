"""The shapes of a real head, and batches of them."""

from typing import NamedTuple

import torch
from torch import Tensor

import perpo_kernels as pk
from tests.kernels.problems import Head, Lists, ragged_lists, random_head

N_VOCAB = 152_064  # Qwen2.5-VL-7B
N_HIDDEN = 3_584
N_NARROW = 512  # where the hidden size does not matter
N_RESPONSE = 25  # tokens of a grounding answer, on average
BIG = 1 << 31  # elements


class Batch(NamedTuple):
    """Everything `linear_perpo_loss` takes."""

    head: Head
    lists: Lists

    def loss(self, hidden: Tensor, weight: Tensor, **options: object) -> pk.LinearPerPOOutput:
        layout = {"cu_seqlens": self.lists.cu_seqlens, "cu_lists": self.lists.cu_lists, **options}
        return pk.linear_perpo_loss(
            hidden, weight, self.head.labels, self.lists.rewards, ref_log_probs=self.lists.ref_log_probs, **layout
        )


def batch(
    device: torch.device, n_hidden: int = N_NARROW, dtype: torch.dtype = torch.bfloat16, n_lists: int = 2, k: int = 20
) -> Batch:
    """Ragged answers, a few ignored tokens, rewards without ties."""
    lengths = [[N_RESPONSE - 10 + (7 * i + g) % 21 for i in range(k)] for g in range(n_lists)]
    lists = ragged_lists(lengths, device)
    return Batch(random_head(lists.n_tokens, n_hidden, N_VOCAB, device, dtype, ignored=0.05), lists)
