"""Log-probs through a head whose vocabulary is split over the ranks of a process group: W_r [V_r, H] on rank r.

X [T, H] and the labels are the same on every rank. With the row kernels of an unsplit head, each rank finds of its own
slice, for each token,

    lse_r = log Σ_{v in slice r} exp z_v      log_prob_r = z_y − lse_r, if the label y lies in its slice
    U_r = D_r W_r,   D_r = 1[y in slice r] onehot(y) − softmax of the slice,   times dz/draw

One exchange of [3, T] numbers, maximum, log-sum and log_prob_r, gives all ranks the share of each slice in the softmax

    w_r = exp(lse_r) / Σ_q exp(lse_q)          log_prob = log_prob_r + log w_r, of the rank r that has the label

and by it the slice's part of ∂log_prob/∂X without a second look at the logits:

    U = Σ_r  w_r ⊙ U_r + 1[y in slice r] (1 − w_r) ⊙ dz/draw ⊙ W_r[y]

where 1 − w_r is the share of the other slices, summed up: nothing cancels where the label is all but certain. The sum
is one all-reduce of [T, H], in fp32, so that it is rounded once. It is made in the forward pass; the backward pass has
none, since every rank computes the same loss. dW_r stays where W_r is. GEMMs of T × V_r × H on each rank: one under
no_grad, two for a frozen head, four for a trainable one.

The exchange is an all-gather: a maximum and a sum at that maximum cannot be reduced in one step, and gathered numbers
are added up in the same order everywhere, so that all ranks hold the same bits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from perpo_kernels import backends, checks
from perpo_kernels.chunks import ChunkedHead, bind_head, chunks, kept_rows, multiply
from perpo_kernels.ops import first_derivative_only, operator
from perpo_kernels.ops.linear import head_gradient, new_head_gradient, new_log_probs, scaled_saved
from perpo_kernels.problem import LogitMap, accumulation_dtype, unpack_numbers
from perpo_kernels.vocab_slices import Slice, unequal

NO_LABEL = -100  # among labels counted from the start of a slice, where `ignore_index` may be any of them
CERTAIN = -(2.0**-8)  # a log-prob from which on 1 − p is the kernels' alone, a sum over the others
SAME_STATE = 2.0**-5  # how far two ranks' projections of a state may lie apart, in multiples of its norm


class SliceRows:
    """The row kernels, for logits [n, V_r] of one slice and labels that count the whole vocabulary from `start`."""

    def __init__(self, kernels: backends.Backend, start: int) -> None:
        self.kernels, self.start = kernels, start

    def local(self, raw: Tensor, labels: Tensor, z: LogitMap) -> "LocalLabels":
        """Where each row's label is, and what it needs of that column before the logits are overwritten."""
        ignored = labels == z.ignore_index
        mine = (labels >= self.start) & (labels < self.start + raw.shape[1]) & ~ignored
        column = (labels - self.start).masked_fill(~mine, 0)
        wide = raw.gather(1, column.unsqueeze(1)).squeeze(1).to(accumulation_dtype(raw.dtype))
        slope = torch.full_like(wide, z.pre * z.post)
        if z.softcap:  # times 1 − tanh², written so that nothing cancels
            decay = (wide * z.pre).abs().mul(-2).exp()
            slope = slope * 4 * decay / (1 + decay).square()
        return LocalLabels(column.masked_fill(ignored, NO_LABEL), column.unsqueeze(1), mine, ignored, slope)

    def log_prob_rows(self, raw: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor, "LocalLabels"]:
        """log softmax of the slice at the label, or at column 0 where another slice has it; lse_r [2, n]."""
        at = self.local(raw, labels, z)
        return *self.kernels.log_prob_rows(raw, at.labels, z._replace(ignore_index=NO_LABEL)), at

    def derivative_rows(
        self, raw: Tensor, labels: Tensor, z: LogitMap, d: Tensor
    ) -> tuple[Tensor, Tensor, "LocalLabels"]:
        """The same, and D_r into `d`."""
        at, z = self.local(raw, labels, z), z._replace(ignore_index=NO_LABEL)
        if d.data_ptr() == raw.data_ptr():
            log_probs, lse = self.kernels.fused_rows_(raw, at.labels, z)
        else:
            log_probs, lse = self.kernels.log_prob_rows(raw, at.labels, z)
            self.kernels.grad_rows_(raw, at.labels, lse, None, z, d)
        own = d.gather(1, at.column).squeeze(1).to(log_probs.dtype)
        at.write(d, torch.where(at.mine, own, -log_probs.exp() * at.slope))
        return log_probs, lse, at

    def grad_rows_(
        self, raw: Tensor, labels: Tensor, stats: Tensor, coefficients: Tensor, z: LogitMap, out: Tensor
    ) -> None:
        """out = coefficients · D, the slice's columns of the D of the whole vocabulary; stats [5, n] as `_finish`."""
        if raw.shape[1] == 0:
            return
        _, _, log_probs, share, rest = stats
        at = self.local(raw, labels, z)
        g = torch.where(coefficients == 0, 0.0, coefficients * share)
        self.kernels.grad_rows_(raw, at.labels, stats[:2], g, z._replace(ignore_index=NO_LABEL), out)
        own = out.gather(1, at.column).squeeze(1).to(g.dtype)  # g (1 − p) dz/draw
        if out.dtype != g.dtype:  # rounded already: made anew where 1 − exp(log_prob) has the digits
            own = torch.where(log_probs < CERTAIN, -g * log_probs.expm1() * at.slope, own)
        own += coefficients * rest * at.slope
        other = torch.where(g == 0, 0.0, -g * log_probs.exp() * at.slope)
        at.write(out, torch.where(at.mine, own, other).masked_fill(coefficients == 0, 0.0))


class LocalLabels(NamedTuple):
    """The labels of n tokens within a slice."""

    labels: Tensor  # [n], from the start of the slice: 0 where another slice has it, NO_LABEL where ignored
    column: Tensor  # [n, 1], the same, and 0 where ignored
    mine: Tensor  # bool [n]: the slice has the label
    ignored: Tensor  # bool [n]
    slope: Tensor  # [n]: dz/draw at that column

    def write(self, d: Tensor, values: Tensor) -> None:
        """Into the column of each row that is not ignored."""
        d.scatter_(1, self.column, values.masked_fill(self.ignored, 0.0).to(d.dtype).unsqueeze(1))


@operator("vocab_parallel_log_probs")
def vocab_parallel_log_probs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V_r, H]
    bias: Tensor | None,  # [V_r]
    labels: Tensor,  # [T], of the whole vocabulary
    numbers: Sequence[float],  # of the map, here
    traced: Tensor | None,  # or here (`pack_numbers`)
    ignore_index: int,
    chunk_bytes: int,
    logits_dtype: torch.dtype,
    backend: str,
    rows: Sequence[int],
    rank: int,
    group: str,
    keep_derivative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log_probs [T], stats [5, T] of this slice, U = ∂log_prob/∂hidden [T, H] (or [0, H]); the first and the last
    are the same on every rank."""
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    head, place = bind_head(weight, bias, z, chunk_bytes, logits_dtype, backend), Slice(list(rows), rank, group)
    local, derivative = _of_slice(head, place.start, hidden, labels, keep_derivative)
    gathered, agree = _exchange(local, hidden, labels, weight, z, place, keep_derivative)
    log_probs, share, rest = _finish(gathered, agree, labels, z, place)
    if keep_derivative:
        # Where this slice has no share at all, its U_r may be 0/0: selected away, not multiplied by 0.
        derivative.mul_(share.unsqueeze(1)).masked_fill_((share == 0).unsqueeze(1), 0.0)
        _add_rows_of_labels(derivative, weight, labels - place.start, rest * local[3], local[4] != 0)
        dist.all_reduce(derivative, group=place.process_group)
    return log_probs, torch.stack([*local[:3], share, rest]), derivative


@vocab_parallel_log_probs.register_fake
def _(hidden: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_probs, _, derivative = new_log_probs(hidden, keep_derivative=settings[-1])
    return log_probs, log_probs.new_empty(5, len(log_probs)), derivative


def _of_slice(
    head: ChunkedHead, start: int, hidden: Tensor, labels: Tensor, keep_derivative: bool
) -> tuple[Tensor, Tensor]:
    """-> [5, T]: m and l of lse_r, log_prob_r, dz/draw at the label, whether the slice has it; and U_r."""
    kept = kept_rows(labels, head.z.ignore_index)
    if kept is not None:
        some, some_derivative = _of_slice(head, start, hidden[kept], labels[kept], keep_derivative)
        local = some.new_zeros(5, len(labels)).index_copy_(1, kept, some)
        derivative = some.new_zeros(len(labels) if keep_derivative else 0, hidden.shape[1])
        return local, derivative.index_copy_(0, kept, some_derivative) if keep_derivative else derivative
    n_tokens = hidden.shape[0]
    log_probs, _, derivative = new_log_probs(hidden, keep_derivative)
    local = log_probs.new_zeros(5, n_tokens)
    if head.weight.shape[0] == 0:
        local[1] = -math.inf
        return local, derivative.zero_()
    kernels, rows = SliceRows(head.kernels, start), head.chunk_rows(n_tokens)
    buffers = head.buffers(rows)
    for c in chunks(0, n_tokens, rows):
        raw = head.logits(hidden[c], buffers)
        if keep_derivative:
            d = head.derivative(len(raw), buffers)
            log_prob, lse, at = kernels.derivative_rows(raw, labels[c], head.z, d)
            multiply(d, head.weight, derivative[c])
        else:
            log_prob, lse, at = kernels.log_prob_rows(raw, labels[c], head.z)
        for out, values in zip(local, (*lse, log_prob, at.slope, at.mine), strict=True):
            out[c] = values
    return local, derivative


def _add_rows_of_labels(u: Tensor, weight: Tensor, at: Tensor, factors: Tensor, mine: Tensor) -> None:
    """u[t] += factors[t] · weight[at[t]] for tokens whose label this rank has."""
    if weight.shape[0] == 0:
        return
    if u.device.type == "cpu":
        found = mine.nonzero().squeeze(1)
        u[found] += factors[found].unsqueeze(1) * weight[at[found]].to(u.dtype)
    else:
        rows = weight[at.masked_fill(~mine, 0)].to(u.dtype)
        u.addcmul_(rows, factors.masked_fill(~mine, 0.0).unsqueeze(1))


# ---------------------------------------------------------------------------------------------- between the ranks


def _exchange(
    local: Tensor, hidden: Tensor, labels: Tensor, weight: Tensor, z: LogitMap, place: Slice, keep_derivative: bool
) -> tuple[Tensor, Tensor]:
    """One all-gather. -> [n, 3, T]: m and l of lse_r, log_prob_r (inf where the rank does not have the label); and
    whether the slices of the ranks make up one vocabulary, a bool [].

    A column beside those of the tokens says which slice this is. Where values are checked, there is more to compare.
    """
    top, log_sum, log_prob, _, mine = local
    target = log_prob.masked_fill(log_sum == -math.inf, -math.inf)  # there it is −inf − −inf
    lines = [top, log_sum, target.masked_fill(mine == 0, math.inf)]
    columns = [(weight.shape[0], place.start, place.n_vocab)]
    if checked := checks.values_are_checked(labels):
        lines += [labels.to(top.dtype), _projection(hidden, labels == z.ignore_index).to(top.dtype)]
        columns += [(weight.shape[1], checks.FLOATS.index(weight.dtype), int(keep_derivative))]
    n_tokens = len(labels)
    sent = top.new_zeros(len(lines), n_tokens + len(columns))
    torch.stack(lines, out=sent[:, :n_tokens])
    for i, values in enumerate(columns):
        for line, value in zip(sent, values, strict=False):
            line[n_tokens + i].fill_(value)
    received = sent.new_empty(len(place.rows), *sent.shape)
    dist.all_gather(list(received), sent, group=place.process_group)
    if checked:
        _check_ranks(received, n_tokens, place)
        checks.label_values(labels, place.n_vocab, z.ignore_index)
    rows, starts, totals = received[:, :3, n_tokens].unbind(1)
    agree = (starts == rows.cumsum(0) - rows).all() & (totals == rows.sum()).all()
    return received[:, :3, :n_tokens], agree


def _projection(hidden: Tensor, ignored: Tensor) -> Tensor:  # [T]
    """Of each state, divided by its length: a number by which different states are known; the same for every rank."""
    wide = hidden.to(accumulation_dtype(hidden.dtype))
    direction = torch.arange(1.0, wide.shape[1] + 1, device=wide.device, dtype=wide.dtype).square().sin()
    return ((wide @ direction) / wide.norm(dim=1)).nan_to_num(0.0, 0.0, 0.0).masked_fill(ignored, 0.0)


def _check_ranks(received: Tensor, n_tokens: int, place: Slice) -> None:
    """Every rank sees what all have sent, so that all raise or none does."""
    rows, starts, totals = received[:, :3, n_tokens].long().unbind(1)
    if not torch.equal(starts, rows.cumsum(0) - rows) or bool((totals != rows.sum()).any()):
        raise unequal(rows.tolist())
    names = "H = weight.shape[1]", "the dtype of weight", "whether a gradient of hidden is needed"
    for name, values in zip(names, received[:, :3, n_tokens + 1].unbind(1), strict=True):
        if bool((values != values[0]).any()):
            shown = [checks.FLOATS[int(v)] if "dtype" in name else int(v) for v in values]
            raise ValueError(f"{name} must be the same on every rank of group, got {shown}")
    labels, states = received[:, 3, :n_tokens], received[:, 4, :n_tokens]
    for name, differs in (
        ("labels", labels != labels[place.rank]),
        ("hidden", (states - states[place.rank]).abs() > SAME_STATE),
    ):
        if bool(differs.any()):
            other, token = differs.nonzero()[0].tolist()
            raise ValueError(
                f"{name} must be the same on every rank of group, whose ranks share a vocabulary and not the data; at "
                f"token {token} ranks {place.rank} and {other} differ. Under data parallelism (FSDP) leave group out"
            )


def _finish(
    gathered: Tensor, agree: Tensor, labels: Tensor, z: LogitMap, place: Slice
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log_prob [T], the share w_r of this slice in the softmax, and that of all others. NaN for what is wrong and
    could not be looked at: a label outside the vocabulary, slices that do not fit."""
    tops, sums, targets = gathered.unbind(1)
    top = tops.masked_fill(sums == -math.inf, -math.inf).amax(0)
    top.masked_fill_(top == -math.inf, 0.0)
    log_sums = (tops - top) * z.scale + sums
    log_shares = log_sums - log_sums.logsumexp(0)
    log_prob = (targets + log_shares).masked_fill(targets == math.inf, 0.0).sum(0)
    shares = log_shares.exp()
    share = shares[place.rank].clone()
    shares[place.rank] = 0.0
    ignored = labels == z.ignore_index
    wrong = (~ignored & ((labels < 0) | (labels >= place.n_vocab))) | ~agree
    log_prob.masked_fill_(ignored, 0.0).masked_fill_(wrong, math.nan)
    return log_prob, share.masked_fill_(ignored, 0.0).masked_fill_(wrong, math.nan), shares.sum(0)


# -------------------------------------------------------------------------------------------------------- gradients


@operator("vocab_parallel_head_backward")
def vocab_parallel_head_backward(
    grad: Tensor,  # [T]
    stats: Tensor,  # [5, T]
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V_r, H]
    bias: Tensor | None,  # [V_r]
    labels: Tensor,  # [T]
    numbers: Sequence[float],
    traced: Tensor | None,
    ignore_index: int,
    chunk_bytes: int,
    logits_dtype: torch.dtype,
    backend: str,
    start: int,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """-> dW_r [V_r, H] and db_r [V_r], or empty, as `need` says; nothing is exchanged."""
    z = LogitMap.from_numbers(unpack_numbers(numbers, traced), ignore_index)
    head = bind_head(weight, bias, z, chunk_bytes, logits_dtype, backend)
    rows: Any = SliceRows(head.kernels, start)  # of the primitives, the one that this takes
    return head_gradient(head._replace(kernels=rows), grad, stats, hidden, labels, need)


@vocab_parallel_head_backward.register_fake
def _(grad: Any, stats: Any, hidden: Any, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return new_head_gradient(weight, settings[-1], weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, ctx.numbers, traced, *ctx.settings, rows, rank, _, _ = inputs
    _, stats, derivative = output
    need_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.hidden_dtype, ctx.start = hidden.dtype, sum(rows[:rank])
    ctx.save_for_backward(derivative, labels, traced, *((stats, hidden, weight, bias) if need_head else (None,) * 4))
    ctx.mark_non_differentiable(stats, derivative)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    first_derivative_only("linear_token_log_probs")
    need_hidden, *need = ctx.needs_input_grad[:3]
    d_hidden = d_weight = d_bias = None
    if grad is not None:
        derivative, labels, traced, *saved = ctx.saved_tensors
        grad = grad.masked_fill(labels == ctx.settings[0], 0.0)
        if need_hidden:
            d_hidden = scaled_saved(ctx, derivative, grad, ctx.hidden_dtype)
        if any(need):
            gradients = vocab_parallel_head_backward(
                grad, *saved, labels, ctx.numbers, traced, *ctx.settings, ctx.start, need
            )
            d_weight, d_bias = (x if needed else None for x, needed in zip(gradients, need, strict=True))
    return d_hidden, d_weight, d_bias, *(None,) * 11


vocab_parallel_log_probs.register_autograd(_backward, setup_context=_setup)
