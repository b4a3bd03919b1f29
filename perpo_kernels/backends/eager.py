"""The primitives in plain PyTorch: any device, fp64 too, and the fast path on CPU.

Rows are taken a few at a time, so that the passes over them hit the cache and fp32 copies of low-precision rows stay
small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.backends import ListProblem, ListResult, LogitMap
from perpo_kernels.objectives import Objective

_CPU_BLOCK_BYTES = 1 << 20  # the L2 of two cores: each block is passed over five times
_DEVICE_BLOCK_BYTES = 256 << 20  # a device wants few, large launches
_PAIRS_AT_ONCE = 1 << 22


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row_blocks(logits: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Views of a few rows [n, V] of `logits` ([N, V] or [B, N, V]), each with its place among all rows."""
    block_bytes = _CPU_BLOCK_BYTES if logits.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    block = max(1, block_bytes // (4 * max(logits.shape[-1], 1)))
    first = 0
    for matrix in (logits,) if logits.dim() == 2 else logits.unbind(0):
        for rows in matrix.split(block):
            yield rows, slice(first, first + rows.shape[0])
            first += rows.shape[0]


class _Rows:
    """A block of rows in accumulation precision; all that is made of it shares one buffer, the rows' own if `reuse`.

    An ignored row may hold anything, NaN too. On the CPU it is left out; on a device, where leaving it out would need a
    synchronisation, it is replaced by zeros. It is never multiplied by a zero.
    """

    def __init__(self, raw: Tensor, labels: Tensor, z: LogitMap, reuse: bool = False) -> None:
        self.map = z
        self.n_rows = raw.shape[0]
        self.kept: Tensor | None = None
        ignored = labels == z.ignore_index
        if raw.device.type == "cpu" and bool(ignored.any()):
            self.kept = (~ignored).nonzero().squeeze(1)
            raw, labels, ignored = raw[self.kept], labels[self.kept], ignored[self.kept]
            reuse = True  # it is a copy already
        logits = raw.to(accumulation_dtype(raw))
        if logits is raw and not reuse:
            logits = raw.clone()
        if raw.device.type != "cpu":
            logits.masked_fill_(ignored.unsqueeze(-1), 0.0)
        self.ignored = ignored
        self.wrong = ~ignored & ((labels < 0) | (labels >= raw.shape[-1]))
        self.target = labels.masked_fill(ignored | self.wrong, 0).unsqueeze(-1)
        if z.pre != 1.0:
            logits.mul_(z.pre)
        self.slope: Tensor | None = None  # dz/draw beyond the constant factor
        if z.softcap:
            logits.tanh_()
            self.slope = 1 - logits * logits
            logits.mul_(z.post)
        self.logits = logits

    def spread(self, values: Tensor, out: Tensor) -> None:
        """Write the values of the rows that were kept into `out`, which has all rows; zero for the others."""
        if self.kept is None:
            if values is not out:
                out.copy_(values)
        else:
            out.zero_()[self.kept] = values.to(out.dtype)

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """(log_prob, lse); `logits` become exp(z − max) on the way, and `total` their sum."""
        target_logit = self.logits.gather(-1, self.target)
        top = self.logits.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        self.total = self.logits.sub_(top).exp_().sum(-1, keepdim=True)
        log_total = self.total.log()
        log_prob = ((target_logit - top) - log_total).squeeze(-1)
        log_prob.masked_fill_(self.ignored, 0.0).masked_fill_(self.wrong, torch.nan)
        return log_prob, (top + log_total).squeeze(-1)

    def gradient(self, exp: Tensor, total: Tensor, coefficients: Tensor | None) -> Tensor:
        """coefficient · (onehot − exp / total) · dz/draw, in place of `exp`."""
        scale = torch.full_like(total, self.map.pre * self.map.post)
        if coefficients is not None:
            scale *= coefficients.unsqueeze(-1)
        scale.masked_fill_(self.ignored.unsqueeze(-1), 0.0).masked_fill_(self.wrong.unsqueeze(-1), torch.nan)
        grad = exp.mul_(-scale / total).scatter_add_(-1, self.target, scale)
        return grad if self.slope is None else grad.mul_(self.slope)


def log_prob_rows(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    log_probs = labels.new_empty(labels.shape, dtype=accumulation_dtype(logits))
    lse = torch.empty_like(log_probs)
    for raw, place in _row_blocks(logits):
        rows = _Rows(raw, labels[place], z)
        for values, out in zip(rows.log_probs(), (log_probs, lse), strict=True):
            rows.spread(values, out[place])
    return log_probs, lse


def fused_rows_(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    log_probs = labels.new_empty(labels.shape, dtype=accumulation_dtype(logits))
    lse = torch.empty_like(log_probs)
    for raw, place in _row_blocks(logits):
        rows = _Rows(raw, labels[place], z, reuse=True)
        for values, out in zip(rows.log_probs(), (log_probs, lse), strict=True):
            rows.spread(values, out[place])
        rows.spread(rows.gradient(rows.logits, rows.total, None), raw)
    return log_probs, lse


def grad_rows_(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficients: Tensor | None, z: LogitMap, out: Tensor
) -> None:
    in_place = out.data_ptr() == logits.data_ptr()
    for (raw, place), (target, _) in zip(_row_blocks(logits), _row_blocks(out), strict=True):
        rows = _Rows(raw, labels[place], z, reuse=in_place)
        kept = slice(None) if rows.kept is None else rows.kept
        exp = rows.logits.sub_(lse[place][kept].unsqueeze(-1)).exp_()
        some = None if coefficients is None else coefficients[place][kept]
        rows.spread(rows.gradient(exp, torch.ones_like(exp[:, :1]), some), target)


def list_loss(problem: ListProblem, result: ListResult) -> None:
    """All pairs of a few lists at a time, as tiles [lists, k, k] padded to the longest list.

    The longest list is read on the host: free on the CPU, one synchronisation on a device.
    """
    p = problem
    score, key = _scores(p, result)
    lengths = p.cu_lists.diff()
    if lengths.numel() == 0:
        return
    k = max(int(lengths.max()), 1)
    gradient = torch.zeros_like(score)
    for block in torch.arange(lengths.numel(), device=score.device).split(max(1, _PAIRS_AT_ONCE // (k * k))):
        slot = torch.arange(k, device=score.device)
        inside = slot < lengths[block, None]
        member = torch.where(inside, p.cu_lists[block, None] + slot, 0).long()
        keys = key[member].masked_fill(~inside, torch.nan)  # [lists, k]
        loss, grad, stats = _pairs(score[member], keys, p.objective)
        result.losses[block] = loss
        result.stats[:, block] = stats
        gradient[member[inside]] = grad[inside]
    if p.cu_seqlens is None:
        result.coefficients.copy_(gradient)
    else:
        first, last = int(p.cu_lists[0]), int(p.cu_lists[-1])
        bounds = p.cu_seqlens[first : last + 1]
        per_token = torch.repeat_interleave(gradient[first:last], bounds.diff())
        result.coefficients[int(bounds[0]) : int(bounds[-1])] = per_token


def _scores(p: ListProblem, result: ListResult) -> tuple[Tensor, Tensor]:
    """(log π − log π_ref, reward or NaN if the candidate takes part in no pair), each [S]."""
    first, last = (int(p.cu_lists[0]), int(p.cu_lists[-1])) if p.cu_lists.numel() > 1 else (0, 0)
    here = slice(first, last)
    dtype = result.losses.dtype
    if p.cu_seqlens is None or p.labels is None:
        sums, valid = p.log_probs[here].to(dtype), torch.ones_like(p.rewards[here], dtype=torch.bool)
    else:
        bounds = p.cu_seqlens[first : last + 1]
        tokens = slice(int(bounds[0]), int(bounds[-1]))
        lengths = bounds.diff().long()
        kept = p.labels[tokens] != p.ignore_index
        log_probs = torch.where(kept, p.log_probs[tokens].to(dtype), 0.0)
        sums = torch.segment_reduce(log_probs, "sum", lengths=lengths, initial=0.0)
        valid = torch.segment_reduce(kept.to(dtype), "sum", lengths=lengths, initial=0.0) > 0
    if p.valid is not None:
        valid &= p.valid[here]
        sums = sums.where(p.valid[here], 0.0)
    score = result.sequence_log_probs.new_zeros(result.sequence_log_probs.shape)
    key = torch.full_like(score, torch.nan)
    result.sequence_log_probs[here] = sums
    score[here] = sums if p.ref_log_probs is None else sums - p.ref_log_probs[here].to(dtype)
    rewards = p.rewards[here].to(dtype)
    key[here] = rewards.masked_fill(~(valid & rewards.isfinite()), torch.nan)
    return score, key


def _pairs(s: Tensor, r: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and rewards [n, k], NaN reward = no candidate -> loss [n], ∂loss/∂s [n, k], statistics [4, n]."""
    beta, gamma = objective.beta, objective.gamma
    better = r.unsqueeze(-1) > r.unsqueeze(-2)  # [n, i, j]: r_i > r_j; false for NaN
    active = better.any(-1).any(-1)
    best = r.nan_to_num(nan=-torch.inf).argmax(-1, keepdim=True)
    worst = r.nan_to_num(nan=torch.inf).argmin(-1, keepdim=True)
    spread = (r.gather(-1, best) - r.gather(-1, worst)).where(active.unsqueeze(-1), 1.0).unsqueeze(-1)
    weight = torch.where(better, (r.unsqueeze(-1) - r.unsqueeze(-2)).div_(spread), 1.0).pow_(gamma)
    weight = weight.masked_fill_(~better, 0.0)
    weight /= weight.sum((-1, -2), keepdim=True).where(active[:, None, None], 1.0)
    margin = torch.where(better, s.unsqueeze(-1) - s.unsqueeze(-2), 0.0)
    loss = -(weight * F.logsigmoid(beta * margin)).sum((-1, -2))
    pull = weight * torch.sigmoid(-beta * margin) * beta  # −β G_ij
    grad = pull.sum(-2) - pull.sum(-1)
    right = (better & (margin > 0)).sum((-1, -2)) / better.sum((-1, -2)).clamp(min=1)
    chosen, rejected = (beta * s.gather(-1, i).squeeze(-1) for i in (best, worst))
    stats = torch.stack([chosen, rejected, right.to(s.dtype), active.to(s.dtype)])
    return loss, grad, stats.where(active, 0.0)
