"""list_loss: from token log-probs and rewards to the loss of each list and its gradient on each token, in one launch.

For the candidates i of list g, with key_i = r_i, or NaN (which no comparison finds larger or smaller) for an
invalid candidate:

    s_i  = Σ_t log_prob_it − ref_i
    p_ij = ((r_i − r_j) / (max r − min r))^γ                       where r_i > r_j, else 0
    L    = Σ_ij p_ij softplus(−β (s_i − s_j)) / Σ_ij p_ij
    c_i  = β (Σ_j p_ji σ(−β (s_j − s_i)) − Σ_j p_ij σ(−β (s_i − s_j))) / Σ_ij p_ij,     written to every token of i

Each list is one program and goes through three stages, with a barrier between: scores (segment sums, [K, R]
tiles), pairs ([K, J] tiles, every pair seen once from either side, the normaliser summed along), coefficients
(spread over the tokens). Lists of any length are looped over in tiles of K candidates; what one stage leaves
for the next goes through `scratch` [3, S], which stays in L1. Sums are kept a lane each while a loop runs;
threads exchange them once, when it ends. Nothing depends on a length that only the device knows, so there is no
synchronisation, and no atomics. Bytes moved: 16 a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perpo_kernels.backends import ListProblem, ListResult

MAX_TILE = 64  # candidates a step
PAIR_TILE = 1024  # pairs a step: four a thread; with eight, registers spill
TOKEN_TILE = 2048  # tokens a step, of all its candidates together
NUM_WARPS = 8


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative, without overflow."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    # log1p(e): log(one) · e / (one − 1) is exact to rounding where 1 + e loses digits
    log1p = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0, 1.0, e) / one


@triton.jit
def candidate_scores(
    i,
    here,
    log_probs,
    labels,
    rewards,
    ref_log_probs,
    valid,
    cu_seqlens,
    ignore_index,
    TOKENS: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_VALID: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """(Σ log_prob, s, key) of the candidates i [K] that are `here`."""
    if HAS_VALID:
        here = here & (tl.load(valid + i, mask=here, other=0) != 0)
    reward = tl.load(rewards + i, mask=here, other=float("nan")).to(tl.float32)
    ok = here & (tl.abs(reward) < float("inf"))
    if TOKENS:
        first = tl.load(cu_seqlens + i, mask=here, other=0)
        last = tl.load(cu_seqlens + i + 1, mask=here, other=0)
        partial = tl.zeros([K, R], tl.float32)
        counts = tl.zeros([K, R], tl.int32)
        step = tl.arange(0, R)
        longest = tl.max(last - first, axis=0)
        for r in range(0, longest, R):
            t = first[:, None] + (r + step)[None, :]
            inside = t < last[:, None]
            inside = inside & (tl.load(labels + t, mask=inside, other=0) != ignore_index)
            partial += tl.load(log_probs + t, mask=inside, other=0.0).to(tl.float32)
            counts += inside.to(tl.int32)
        total = tl.sum(partial, axis=1)
        ok = ok & (tl.sum(counts, axis=1) > 0)
    else:
        total = tl.load(log_probs + i, mask=here, other=0.0).to(tl.float32)
    score = total
    if HAS_REF:
        score = total - tl.load(ref_log_probs + i, mask=here, other=0.0).to(tl.float32)
    return total, score, tl.where(ok, reward, float("nan"))


@triton.jit
def list_loss_kernel(
    log_probs,
    labels,
    rewards,
    ref_log_probs,
    valid,
    cu_seqlens,
    cu_lists,
    losses,
    coefficients,
    sequence_log_probs,
    stats,
    scratch,
    n_lists,
    n_candidates,
    stats_stride,
    beta,
    gamma,
    ignore_index,
    TOKENS: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_VALID: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
):
    g = tl.program_id(0)
    begin = tl.load(cu_lists + g)
    end = tl.load(cu_lists + g + 1)
    scores = scratch
    keys = scratch + n_candidates
    slopes = keys + n_candidates
    slot = tl.arange(0, K)

    highest = -float("inf")
    lowest = float("inf")
    for start in range(begin, end, K):
        i = start + slot
        here = i < end
        total, score, key = candidate_scores(
            i,
            here,
            log_probs,
            labels,
            rewards,
            ref_log_probs,
            valid,
            cu_seqlens,
            ignore_index,
            TOKENS,
            HAS_REF,
            HAS_VALID,
            K,
            R,
        )
        tl.store(sequence_log_probs + i, total, mask=here)
        tl.store(scores + i, score, mask=here)
        tl.store(keys + i, key, mask=here)
        is_number = key == key
        highest = tl.maximum(highest, tl.max(tl.where(is_number, key, -float("inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(is_number, key, float("inf")), axis=0))
    tl.debug_barrier()

    active = highest > lowest
    inverse_range = 1.0 / tl.where(active, highest - lowest, 1.0)
    norms = tl.zeros([K, J], tl.float32)
    link_sums = tl.zeros([K, J], tl.float32)
    pairs = tl.zeros([K, J], tl.int32)
    right = tl.zeros([K, J], tl.int32)
    best = end
    worst = end
    for start in range(begin, end, K):
        i = start + slot
        key_i = tl.load(keys + i, mask=i < end, other=float("nan"))
        score_i = tl.load(scores + i, mask=i < end, other=0.0)
        best = tl.minimum(best, tl.min(tl.where(key_i == highest, i, end), axis=0))
        worst = tl.minimum(worst, tl.min(tl.where(key_i == lowest, i, end), axis=0))
        slope = tl.zeros([K, J], tl.float32)
        for other in range(begin, end, J):
            j = other + tl.arange(0, J)
            key_j = tl.load(keys + j, mask=j < end, other=float("nan"))
            score_j = tl.load(scores + j, mask=j < end, other=0.0)
            better = key_i[:, None] > key_j[None, :]
            worse = key_i[:, None] < key_j[None, :]
            pair = better | worse
            gap = tl.where(pair, tl.abs(key_i[:, None] - key_j[None, :]) * inverse_range, 1.0)
            power = tl.where(pair, tl.exp2(gamma * tl.log2(tl.maximum(gap, 1e-37))), 0.0)
            margin = score_i[:, None] - score_j[None, :]
            margin = tl.where(better, margin, tl.where(worse, -margin, 0.0))  # the better minus the worse
            link, pull = softplus_and_sigmoid(-beta * margin)
            weighted = tl.where(better, power, 0.0)
            norms += weighted
            link_sums += weighted * link
            slope += tl.where(worse, power, -power) * pull
            pairs += better.to(tl.int32)
            right += (better & (margin > 0)).to(tl.int32)
        tl.store(slopes + i, tl.sum(slope, axis=1), mask=i < end)
    norm = tl.sum(tl.sum(norms, axis=1), axis=0)
    loss = tl.sum(tl.sum(link_sums, axis=1), axis=0)
    n_pairs = tl.sum(tl.sum(pairs, axis=1), axis=0)
    n_right = tl.sum(tl.sum(right, axis=1), axis=0)
    tl.debug_barrier()

    inverse_norm = tl.where(active, 1.0 / tl.where(active, norm, 1.0), 0.0)
    tl.store(losses + g, loss * inverse_norm)
    chosen = tl.load(scores + best, mask=active, other=0.0)
    rejected = tl.load(scores + worst, mask=active, other=0.0)
    tl.store(stats + g, beta * chosen)
    tl.store(stats + stats_stride + g, beta * rejected)
    tl.store(stats + 2 * stats_stride + g, n_right / tl.maximum(n_pairs, 1))
    tl.store(stats + 3 * stats_stride + g, tl.where(active, 1.0, 0.0))
    for start in range(begin, end, K):
        i = start + slot
        here = i < end
        c = tl.load(slopes + i, mask=here, other=0.0) * (beta * inverse_norm)
        if TOKENS:
            first = tl.load(cu_seqlens + i, mask=here, other=0)
            last = tl.load(cu_seqlens + i + 1, mask=here, other=0)
            step = tl.arange(0, R)
            longest = tl.max(last - first, axis=0)
            for r in range(0, longest, R):
                t = first[:, None] + (r + step)[None, :]
                tl.store(coefficients + t, tl.broadcast_to(c[:, None], [K, R]), mask=t < last[:, None])
        else:
            tl.store(coefficients + i, c, mask=here)


def list_loss(problem: ListProblem, result: ListResult) -> None:
    p = problem
    n_lists, n_candidates = p.cu_lists.numel() - 1, p.rewards.numel()
    if n_lists == 0:
        return
    tokens = p.cu_seqlens is not None
    tile = min(MAX_TILE, max(16, triton.next_power_of_2(triton.cdiv(n_candidates, n_lists))))
    scratch = torch.empty(3, n_candidates, dtype=torch.float32, device=p.rewards.device)

    def or_dummy(x: Tensor | None) -> Tensor:
        return p.rewards if x is None else x

    list_loss_kernel[(n_lists,)](
        p.log_probs,
        or_dummy(p.labels),
        p.rewards,
        or_dummy(p.ref_log_probs),
        p.rewards if p.valid is None else p.valid.view(torch.uint8),
        or_dummy(p.cu_seqlens),
        p.cu_lists,
        *result,
        scratch,
        n_lists,
        n_candidates,
        result.stats.stride(0),
        p.objective.beta,
        p.objective.gamma,
        p.ignore_index,
        TOKENS=tokens,
        HAS_REF=p.ref_log_probs is not None,
        HAS_VALID=p.valid is not None,
        K=tile,
        J=min(tile, PAIR_TILE // tile),
        R=TOKEN_TILE // tile if tokens else 1,
        num_warps=NUM_WARPS,
    )
