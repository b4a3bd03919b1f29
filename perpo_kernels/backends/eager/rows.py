"""log_prob_rows, fused_rows_ and grad_rows_ in plain PyTorch.

Rows are taken a few at a time, so that the passes over them hit the cache and fp32 copies of low-precision rows stay
small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from perpo_kernels.problem import LogitMap, accumulation_dtype

_CPU_BLOCK_BYTES = 4 << 20  # stays in the last-level cache, where each block is passed over five times
_DEVICE_BLOCK_BYTES = 256 << 20  # a device wants few, large launches


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

    def __init__(
        self, raw: Tensor, labels: Tensor, z: LogitMap, reuse: bool = False, coefficients: Tensor | None = None
    ) -> None:
        self.map = z
        self.n_rows = raw.shape[0]
        self.kept: Tensor | None = None
        ignored = labels == z.ignore_index
        if coefficients is not None:
            ignored |= coefficients == 0
        if raw.device.type == "cpu" and bool(ignored.any()):
            self.kept = (~ignored).nonzero().squeeze(1)
            raw, labels, ignored = raw[self.kept], labels[self.kept], ignored[self.kept]
            reuse = True  # it is a copy already
        logits = raw.to(accumulation_dtype(raw.dtype))
        if logits is raw and not reuse:
            logits = raw.clone()
        if raw.device.type != "cpu":
            logits.masked_fill_(ignored.unsqueeze(-1), 0.0)
        self.ignored = ignored
        self.wrong = ~ignored & ((labels < 0) | (labels >= raw.shape[-1]))
        self.target = labels.masked_fill(ignored | self.wrong, 0).unsqueeze(-1)
        self.slope: Tensor | None = None  # dz/draw beyond the constant factor
        if z.softcap:
            logits.mul_(z.pre).tanh_()
            self.slope = 1 - logits * logits
        self.logits = logits  # u, of which z = scale · u

    def spread(self, values: Tensor, out: Tensor) -> None:
        """Write the values of the rows that were kept into `out`, which has all rows; zero for the others."""
        if self.kept is None:
            if values is not out:
                out.copy_(values)
        else:
            out.zero_()[self.kept] = values.to(out.dtype)

    def exponentiate(self, top: Tensor) -> None:
        """`logits` become exp(scale · (u − m)), 0 at the target; `others` their sum, `total` that with the target's.

        The target is kept apart because 1 − p of a nearly certain one is the others' share, and no difference.
        """
        self.logits.sub_(top)
        if self.map.scale != 1.0:
            self.logits.mul_(self.map.scale)
        own = self.logits.exp_().gather(-1, self.target)
        self.others = self.logits.scatter_(-1, self.target, 0.0).sum(-1, keepdim=True)
        self.total = self.others + own

    def log_probs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log_prob, m, log Σ exp(scale · (u − m)))."""
        target = self.logits.gather(-1, self.target)
        top = self.logits.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        self.exponentiate(top)
        log_total = self.total.log()
        log_prob = ((target - top) * self.map.scale - log_total).squeeze(-1)
        log_prob.masked_fill_(self.ignored, 0.0).masked_fill_(self.wrong, torch.nan)
        return log_prob, top.squeeze(-1), log_total.squeeze(-1)

    def gradient(self, coefficients: Tensor | None) -> Tensor:
        """coefficient · (onehot − softmax) · dz/draw, in place of `logits`; after `exponentiate`."""
        scale = torch.full_like(self.total, self.map.pre * self.map.post)
        if coefficients is not None:
            scale *= coefficients.unsqueeze(-1)
        scale.masked_fill_(self.ignored.unsqueeze(-1), 0.0).masked_fill_(self.wrong.unsqueeze(-1), torch.nan)
        grad = self.logits.mul_(-scale / self.total).scatter_(-1, self.target, scale * (self.others / self.total))
        return grad if self.slope is None else grad.mul_(self.slope)


def log_prob_rows(logits: Tensor, labels: Tensor, z: LogitMap, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    log_probs = labels.new_empty(labels.shape, dtype=accumulation_dtype(logits.dtype))
    lse = log_probs.new_empty(2, len(labels))
    for raw, place in _row_blocks(logits):
        rows = _Rows(raw, labels[place], z, reuse=overwrite)
        for values, out in zip(rows.log_probs(), (log_probs, *lse), strict=True):
            rows.spread(values, out[place])
        if overwrite:
            rows.spread(rows.gradient(None), raw)
    return log_probs, lse


def fused_rows_(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
    return log_prob_rows(logits, labels, z, overwrite=True)


def grad_rows_(
    logits: Tensor, labels: Tensor, lse: Tensor, coefficients: Tensor | None, z: LogitMap, out: Tensor
) -> None:
    in_place = out.data_ptr() == logits.data_ptr()
    for (raw, place), (target, _) in zip(_row_blocks(logits), _row_blocks(out), strict=True):
        c = None if coefficients is None else coefficients[place]
        rows = _Rows(raw, labels[place], z, in_place, c)
        kept = slice(None) if rows.kept is None else rows.kept
        rows.exponentiate(lse[0, place][kept].unsqueeze(-1))
        rows.spread(rows.gradient(None if c is None else c[kept]), target)


def clear_rows_(rows: Tensor, coefficients: Tensor) -> None:
    absent = coefficients == 0
    if rows.device.type != "cpu":
        rows.masked_fill_(absent.unsqueeze(-1), 0.0)
    elif bool(absent.any()):
        rows[absent] = 0.0
