"""What one writes without this package: plain PyTorch and autograd. Peers of the accuracy criterion, not the oracle."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def token_log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    """log_softmax in fp32, as a careful trainer upcasts; fp64 stays fp64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        wide = wide / temperature
    ignored = labels == ignore_index
    log_probs = F.log_softmax(wide, -1).gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return log_probs.masked_fill(ignored, 0.0)


def map_logits(logits: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if logit_scale != 1.0:
        wide = wide * logit_scale
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    logits = map_logits(F.linear(hidden, weight, bias), softcap, logit_scale)
    return token_log_probs(logits, labels, temperature, ignore_index)


def pair_loss(
    scores: Tensor, rewards: Tensor, bounds: list[int], valid: Tensor, beta: float, gamma: float
) -> Tensor:  # [G]
    """The list loss vectorised over pairs, in the dtype of `scores`."""
    losses = []
    for a, b in pairwise(bounds):
        keep = valid[a:b] & rewards[a:b].isfinite()
        s, r = scores[a:b][keep], rewards[a:b][keep].to(scores.dtype)
        i, j = (r[:, None] > r[None, :]).nonzero(as_tuple=True)
        power = (r[i] - r[j]) ** gamma
        losses.append((power / power.sum() * F.softplus(-beta * (s[i] - s[j]))).sum() if len(i) else s.sum() * 0)
    return torch.stack(losses) if losses else scores.new_zeros(0)


def linear_perpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_lists: Tensor,
    ref_log_probs: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    gamma: float = 0.5,
    ignore_index: int = -100,
    **map_options: float,
) -> Tensor:  # [G]
    tokens = linear_token_log_probs(hidden, weight, labels, bias, ignore_index=ignore_index, **map_options)
    spans = cu_seqlens.tolist()
    parts = [slice(a, b) for a, b in pairwise(spans)]
    scores = torch.stack([tokens[p].sum() for p in parts])
    valid = torch.tensor([bool((labels[p] != ignore_index).any()) for p in parts], device=hidden.device)
    if ref_log_probs is not None:
        scores = scores - ref_log_probs.to(scores.dtype)
    return pair_loss(scores, rewards, cu_lists.tolist(), valid, beta, gamma)


def authors_loss(scores: Tensor, rewards: Tensor, beta: float, gamma: float) -> Tensor:
    """The formula as the authors apply it to one list [k]: pairs by list position, log(1 + exp) as written."""
    k = scores.shape[0]
    i, j = torch.triu_indices(k, k, offset=1, device=scores.device)
    weight = (rewards[i] - rewards[j]) ** gamma
    return (weight / weight.sum() * torch.log(1 + torch.exp(-beta * (scores[i] - scores[j])))).sum()
