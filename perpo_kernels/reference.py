"""The definition: plain PyTorch, differentiable by autograd, one loop a sum, nothing fused. The oracle of every test.

Works in the dtype that it is given, so float64 in means float64 throughout. Slow on purpose: read it to learn what is
computed.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def token_log_probs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:  # [...]
    """log softmax(logits / temperature)[label], 0 where the label is `ignore_index`."""
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0)
    log_probs = F.log_softmax(logits / temperature, dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return torch.where(ignored, 0.0, log_probs)


def head_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:  # [..., V]
    """logit_scale · (hidden · weightᵀ + bias), then softcap · tanh(· / softcap)."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sequence_log_probs(
    log_probs: Tensor,  # [T], 0 at ignored tokens
    labels: Tensor,  # [T]
    cu_seqlens: Tensor,  # int [S + 1]
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # [S], bool [S]
    """Sum of a candidate's valid token log-probs, and whether it has any."""
    bounds = cu_seqlens.tolist()
    spans = list(pairwise(bounds))
    sums = [log_probs[a:b].sum() for a, b in spans]
    nonempty = [bool((labels[a:b] != ignore_index).any()) for a, b in spans]
    valid = torch.tensor(nonempty, dtype=torch.bool, device=log_probs.device)
    return (torch.stack(sums) if sums else log_probs.new_zeros(0)), valid


def list_losses(
    scores: Tensor,  # [S]: log π − log π_ref
    rewards: Tensor,  # [S]
    cu_lists: Tensor,  # int [G + 1]
    valid: Tensor,  # bool [S]
    beta: float,
    gamma: float,
) -> Tensor:  # [G]
    """L of each list: Σ over pairs r_i > r_j of w_ij softplus(−β (s_i − s_j)); 0 for a list without such a pair."""
    bounds = cu_lists.tolist()
    losses = []
    for start, end in pairwise(bounds):
        members = [i for i in range(start, end) if valid[i] and torch.isfinite(rewards[i])]
        pairs = [(i, j) for i in members for j in members if rewards[i] > rewards[j]]
        if not pairs:
            losses.append(scores[start:end].new_zeros(()))
            continue
        spread = max(float(rewards[i] - rewards[j]) for i, j in pairs)  # cancels in w; avoids overflow at large gamma
        powers = torch.stack([((rewards[i] - rewards[j]) / spread) ** gamma for i, j in pairs]).to(scores.dtype)
        margins = torch.stack([scores[i] - scores[j] for i, j in pairs])
        losses.append((powers / powers.sum() * -F.logsigmoid(beta * margins)).sum())
    return torch.stack(losses) if losses else scores.new_zeros(0)


def list_stats(
    scores: Tensor,  # [S]
    rewards: Tensor,  # [S]
    cu_lists: Tensor,  # int [G + 1]
    valid: Tensor,  # bool [S]
    beta: float,
) -> Tensor:  # [4, G]
    """Rows: β·score of best and of worst candidate, share of preferred pairs ranked right, 1 if there is a pair."""
    bounds = cu_lists.tolist()
    stats = scores.new_zeros(4, len(bounds) - 1)
    for g, (start, end) in enumerate(pairwise(bounds)):
        members = [i for i in range(start, end) if valid[i] and torch.isfinite(rewards[i])]
        pairs = [(i, j) for i in members for j in members if rewards[i] > rewards[j]]
        if pairs:
            best = max(members, key=lambda i: float(rewards[i]))  # the first of equals
            worst = min(members, key=lambda i: float(rewards[i]))
            right = sum(bool(scores[i] > scores[j]) for i, j in pairs) / len(pairs)
            stats[:, g] = torch.stack(
                [beta * scores[best], beta * scores[worst], scores.new_tensor(right), scores.new_ones(())]
            )
    return stats
