"""list_loss: from token log-probs and rewards to the loss of each list and its gradient on each token, in one launch.

Formulas: `perpo_kernels.objectives`; for PerPO, with key_i = r_i, or NaN (which no comparison finds larger or
smaller) for an invalid candidate:

    s_i  = Σ_t log_prob_it − ref_i
    p_ij = ((r_i − r_j) / (max r − min r))^γ                       where r_i > r_j, else 0
    L    = Σ_ij p_ij softplus(−β (s_i − s_j)) / Σ_ij p_ij
    c_i  = β (Σ_j p_ji σ(−β (s_j − s_i)) − Σ_j p_ij σ(−β (s_i − s_j))) / Σ_ij p_ij,     written to every token of i

Each list is one program, of stages with barriers between them: scores (segment sums, [K, R] tiles); for
objectives with ranks or Plackett–Luce denominators, those (counting comparisons in [K, K] tiles, no sort); pairs ([K,
K] tiles, every pair seen once from either side, the normaliser summed along); coefficients (spread over the tokens).
Lists of any length are looped over in tiles of K candidates; what one stage leaves for the next goes through
`scratch`, which stays in L1. Nothing depends on a length that only the device knows, so there is no synchronisation,
and no atomics. Bytes moved: 16 per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from perpo_kernels.backends.triton.common import launch, register_limit
from perpo_kernels.backends.triton.list_scores import (
    candidate_scores,
    ranks_and_denominators,
    reward_moments,
    reward_place,
)
from perpo_kernels.backends.triton.list_terms import (
    bco_term,
    clipped_term,
    in_pair_set,
    link_and_slope,
    ranked_weight,
    softplus_and_sigmoid,
    target_share,
)
from perpo_kernels.problem import ListProblem, ListResult

MAX_TILE = 64  # candidates per step
PAIR_TILE = 1024  # pairs per step: four per thread
TOKEN_TILE = 2048  # tokens per step, of all candidates of the tile together
NUM_WARPS = 8
REGISTERS = 128  # of a thread, at most: all that two programs on a multiprocessor can have
SCRATCH_ROWS = 5  # slopes of the pair term, 1 / lengths, ranks, Plackett–Luce denominators and slopes


@triton.jit
def list_loss_kernel(
    log_probs,
    labels,
    rewards,
    ref_log_probs,
    valid,
    lengths,
    token_weights,
    pair_weights,
    flip_probs,
    list_weights,
    delta,
    cu_seqlens,
    cu_lists,
    losses,
    coefficients,
    candidates,
    is_active,
    scratch,
    n_candidates,
    given_k,
    numbers,
    ignore_index,
    PAIRS: tl.constexpr,
    WEIGHT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LINK: tl.constexpr,
    LIST_TERM: tl.constexpr,
    POINTWISE: tl.constexpr,
    ADVANTAGE: tl.constexpr,
    LOG_MARGIN: tl.constexpr,
    TEMPERED: tl.constexpr,
    NLL: tl.constexpr,
    LENGTH_NORMALIZED: tl.constexpr,
    SOFT: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
):
    # One tuple is bound faster than twelve arguments.
    (
        beta,
        gamma,
        soft_flip,
        offset,
        log_margin,
        inverse_temperature,
        nll,
        pair_scale,
        list_scale,
        pointwise_scale,
        clip_low,
        clip_high,
    ) = numbers
    g = tl.program_id(0)
    begin = tl.load(cu_lists + g)
    end = tl.load(cu_lists + g + 1)
    sequence_log_probs = candidates
    scores = candidates + n_candidates
    keys = scores + n_candidates
    slopes = scratch
    inverse_lengths = slopes + n_candidates
    ranks = inverse_lengths + n_candidates
    denominators = ranks + n_candidates
    luce_slopes = denominators + n_candidates
    RANKS: tl.constexpr = (PAIRS != "none") and (WEIGHT == "lambda")
    LUCE: tl.constexpr = LIST_TERM == "plackett_luce"
    ANCHORED: tl.constexpr = (POINTWISE == "nca") or (POINTWISE == "anchor")
    ADVANTAGES: tl.constexpr = (POINTWISE == "policy_gradient") or (POINTWISE == "clipped")
    slot = tl.arange(0, K)

    highest = -float("inf")
    lowest = float("inf")
    for start in range(begin, end, K):
        i = start + slot
        here = i < end
        total, score, key, inverse_length = candidate_scores(
            i,
            here,
            log_probs,
            labels,
            rewards,
            ref_log_probs,
            valid,
            lengths,
            token_weights,
            cu_seqlens,
            ignore_index,
            LENGTH_NORMALIZED,
            K,
            R,
        )
        tl.store(sequence_log_probs + i, total, mask=here)
        tl.store(scores + i, score, mask=here)
        tl.store(keys + i, key, mask=here)
        if LENGTH_NORMALIZED or (NLL == "per_token"):
            tl.store(inverse_lengths + i, inverse_length, mask=here)
        is_number = key == key
        highest = tl.maximum(highest, tl.max(tl.where(is_number, key, -float("inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(is_number, key, float("inf")), axis=0))
    tl.debug_barrier()

    if RANKS or LUCE:
        ranks_and_denominators(scores, keys, ranks, denominators, begin, end, beta, RANKS, LUCE, K)
        tl.debug_barrier()

    # Differences of halves stay finite for the greatest rewards, those of the smallest are exact as they are; and a
    # correctly rounded quotient of equals is 1.
    part = tl.where(tl.maximum(highest, -lowest) < 1e38, 1.0, 0.5)
    spread = tl.where(highest > lowest, part * highest - part * lowest, 1.0)
    # Sums are kept apart for each lane until the list ends: no thread waits for another between tiles.
    norms = tl.zeros([K, J], tl.float32)
    link_sums = tl.zeros([K, J], tl.float32)
    pairs = tl.zeros([K, J], tl.int32)
    other_loss = 0.0
    n_best = 0
    n_worst = 0
    n_members = 0
    target_total = 0.0
    z_top = -float("inf")
    z_total = 0.0
    for start in range(begin, end, K):
        i = start + slot
        key_i = tl.load(keys + i, mask=i < end, other=float("nan"))
        z_i = beta * tl.load(scores + i, mask=i < end, other=0.0)
        if (LIST_TERM == "softmax") or (POINTWISE != "none") or (NLL != "none"):
            member = key_i == key_i
            n_best += tl.sum((key_i == highest).to(tl.int32), axis=0)
            if POINTWISE == "bco":
                n_worst += tl.sum((key_i == lowest).to(tl.int32), axis=0)
            n_members += tl.sum(member.to(tl.int32), axis=0)
            if TEMPERED:
                exp = tl.exp((key_i - highest) * inverse_temperature)
                target_total += tl.sum(tl.where(member, exp, 0.0), axis=0)
        if LIST_TERM == "softmax":
            z = tl.where(key_i == key_i, z_i, -float("inf"))
            new_top = tl.maximum(z_top, tl.max(z, axis=0))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            z_total = z_total * tl.exp(z_top - shift) + tl.sum(tl.exp(z - shift), axis=0)
            z_top = new_top
        slope = tl.zeros([K, J], tl.float32)
        luce_slope = tl.zeros([K, J], tl.float32)
        has_worse = key_i > lowest
        for other in range(begin, end, J):
            j = other + tl.arange(0, J)
            key_j = tl.load(keys + j, mask=j < end, other=float("nan"))
            z_j = beta * tl.load(scores + j, mask=j < end, other=0.0)
            ahead = z_i[:, None] - z_j[None, :]
            if PAIRS == "given":
                row = i - begin
                column = j - begin
                both = (key_i == key_i)[:, None] & (key_j == key_j)[None, :]
                both = both & (row < given_k)[:, None] & (column < given_k)[None, :]
                matrix = pair_weights + g.to(tl.int64) * given_k * given_k
                w_win = tl.load(matrix + row[:, None] * given_k + column[None, :], mask=both, other=0.0).to(tl.float32)
                w_lose = tl.load(matrix + column[None, :] * given_k + row[:, None], mask=both, other=0.0).to(tl.float32)
                flip_win = soft_flip
                flip_lose = soft_flip
                if flip_probs is not None:
                    flip_win = tl.load(flip_probs + j, mask=j < end, other=0.0).to(tl.float32)[None, :]
                    flip_lose = tl.load(flip_probs + i, mask=i < end, other=0.0).to(tl.float32)[:, None]
                w_win = tl.where(w_win > 0, w_win, 0.0)
                w_lose = tl.where(w_lose > 0, w_lose, 0.0)
                d = tl.where(both, ahead, 0.0)
                link, slope_win = link_and_slope(d - offset, flip_win, beta, LINK, SOFT)
                _, slope_lose = link_and_slope(-d - offset, flip_lose, beta, LINK, SOFT)
                norms += w_win
                pairs += (w_win > 0).to(tl.int32)
                # A candidate without edges may have any score; its product with a weight of 0 is not taken.
                link_sums += tl.where(w_win > 0, w_win * link, 0.0)
                slope += tl.where(w_win > 0, w_win * slope_win, 0.0) - tl.where(w_lose > 0, w_lose * slope_lose, 0.0)
            elif PAIRS != "none":
                better = in_pair_set(key_i[:, None], key_j[None, :], highest, lowest, PAIRS)
                worse = in_pair_set(key_j[None, :], key_i[:, None], highest, lowest, PAIRS)
                pair = better | worse
                distance = tl.where(pair, tl.abs(part * key_i[:, None] - part * key_j[None, :]), spread)
                gap = tl.div_rn(distance, tl.zeros([K, J], tl.float32) + spread)
                d = tl.where(better, ahead, tl.where(worse, -ahead, 0.0)) - offset  # the better minus the worse
                if LOG_MARGIN:
                    d -= log_margin * tl.log(distance * (1.0 / part))
                rank_i = 0.0
                rank_j = 0.0
                if RANKS:
                    rank_i = tl.load(ranks + i, mask=i < end, other=1.0)[:, None]
                    rank_j = tl.load(ranks + j, mask=j < end, other=1.0)[None, :]
                weight = ranked_weight(gap, key_i[:, None], key_j[None, :], rank_i, rank_j, gamma, WEIGHT)
                flip = soft_flip
                if flip_probs is not None:
                    flip_i = tl.load(flip_probs + i, mask=i < end, other=0.0).to(tl.float32)[:, None]
                    flip_j = tl.load(flip_probs + j, mask=j < end, other=0.0).to(tl.float32)[None, :]
                    flip = tl.where(better, flip_j, flip_i)  # of the worse
                link, pull = link_and_slope(d, flip, beta, LINK, SOFT)
                winning = tl.where(better, weight, 0.0)
                norms += winning
                if NORMALIZE == "pairs":
                    pairs += better.to(tl.int32)
                link_sums += winning * link
                slope += (winning - tl.where(worse, weight, 0.0)) * pull
            if LUCE:
                denominator = tl.load(denominators + j, mask=j < end, other=0.0)[None, :]
                chosen_from = (key_i[:, None] <= key_j[None, :]) & (key_j > lowest)[None, :]
                chance = tl.exp(tl.where(chosen_from, z_i[:, None] - denominator, -float("inf")))
                luce_slope += chance
        tl.store(slopes + i, tl.sum(slope, axis=1), mask=i < end)
        if LUCE:
            own = tl.load(denominators + i, mask=i < end, other=0.0)
            other_loss += list_scale * tl.sum(tl.where(has_worse, own - z_i, 0.0), axis=0)
            chances = tl.sum(luce_slope, axis=1)
            tl.store(luce_slopes + i, chances - tl.where(has_worse, 1.0, 0.0), mask=i < end)
    norm = tl.sum(tl.sum(norms, axis=1), axis=0)
    pair_loss = tl.sum(tl.sum(link_sums, axis=1), axis=0)
    n_pairs = tl.sum(tl.sum(pairs, axis=1), axis=0)
    tl.debug_barrier()

    active = highest > lowest
    if PAIRS == "given":
        active = n_pairs > 0
    if NORMALIZE == "list":
        scale = 1.0 / tl.where(norm > 0, norm, 1.0)
    else:
        scale = 1.0
        if (WEIGHT == "power") and (PAIRS != "given"):
            scale = tl.exp2(gamma * tl.log2(spread / part))  # weights were powers of gaps in multiples of the range
        if NORMALIZE == "pairs":
            scale = scale / tl.maximum(n_pairs, 1)

    scale *= pair_scale
    if ADVANTAGES:
        mean, unit, n_members = reward_moments(keys, begin, end, lowest, spread, part, ADVANTAGE == "standardized", K)
    reward_shift = 0.0
    if delta is not None:
        reward_shift = tl.load(delta).to(tl.float32)
    weight_of_list = 1.0
    if list_weights is not None:
        weight_of_list = tl.load(list_weights + g).to(tl.float32)
    counts = active & (weight_of_list > 0)

    log_normaliser = z_top + tl.log(tl.where(z_total > 0, z_total, 1.0))
    for start in range(begin, end, K):
        i = start + slot
        here = i < end
        c = tl.load(slopes + i, mask=here, other=0.0) * scale
        likelihood = tl.zeros([K], tl.float32)
        if (LIST_TERM != "none") or (POINTWISE != "none") or (NLL != "none"):
            key = tl.load(keys + i, mask=here, other=float("nan"))
            member = key == key
            z = tl.where(member, beta * tl.load(scores + i, mask=here, other=0.0), 0.0)
            if LUCE:
                c += list_scale * tl.load(luce_slopes + i, mask=here, other=0.0)
            if (LIST_TERM == "softmax") or ANCHORED:
                p = target_share(key, highest, inverse_temperature, target_total, n_best, TEMPERED)
            if LIST_TERM == "softmax":
                other_loss += list_scale * tl.sum(p * (log_normaliser - z), axis=0)
                c += list_scale * (tl.exp(z - log_normaliser) - p)
            if ANCHORED:
                down, keep = softplus_and_sigmoid(-z)
                other_loss += pointwise_scale * tl.sum(p * down, axis=0)
                c -= pointwise_scale * (p * keep)
            if POINTWISE == "nca":
                up, push = softplus_and_sigmoid(z)
                other_loss += pointwise_scale * (tl.sum(tl.where(member, up, 0.0), axis=0) / tl.maximum(n_members, 1))
                c += pointwise_scale * (push / tl.maximum(n_members, 1))
            if POINTWISE == "bco":
                best = tl.where(key == highest, 1.0 / n_best, 0.0)
                worst = tl.where(key == lowest, 1.0 / n_worst, 0.0)
                term, pull = bco_term(z - reward_shift, best, worst)
                other_loss += pointwise_scale * tl.sum(term, axis=0)
                c += pointwise_scale * pull
            if ADVANTAGES:
                per_member = pointwise_scale / tl.maximum(n_members, 1)
                advantage = tl.where(member, (reward_place(key, lowest, spread, part) - mean) * unit, 0.0)
                if POINTWISE == "clipped":
                    score = tl.where(member, tl.load(scores + i, mask=here, other=0.0), 0.0)
                    gain, pull = clipped_term(score, advantage, clip_low, clip_high)
                    other_loss -= beta * per_member * tl.sum(gain, axis=0)
                    c -= per_member * pull
                else:
                    other_loss -= per_member * tl.sum(tl.where(advantage != 0, advantage * z, 0.0), axis=0)
                    c -= per_member * advantage
            if NLL != "none":
                share = tl.where(key == highest, nll / n_best, 0.0)
                if NLL == "per_token":
                    share *= tl.load(inverse_lengths + i, mask=here, other=0.0)
                likelihood -= share
                total = tl.load(sequence_log_probs + i, mask=here, other=0.0)
                other_loss -= tl.sum(tl.where(share > 0, share * total, 0.0), axis=0)
            c = tl.where(member, c, 0.0)
        c = c * beta
        if LENGTH_NORMALIZED:
            c *= tl.load(inverse_lengths + i, mask=here, other=0.0)
        c = tl.where(counts, weight_of_list * (c + likelihood), 0.0)
        if cu_seqlens is not None:
            first = tl.load(cu_seqlens + i, mask=here, other=0)
            last = tl.load(cu_seqlens + i + 1, mask=here, other=0)
            step = tl.arange(0, R)
            longest = tl.max(last - first, axis=0)
            for r in range(0, longest, R):
                t = first[:, None] + (r + step)[None, :]
                inside = t < last[:, None]
                spread_c = tl.broadcast_to(c[:, None], [K, R])
                if token_weights is not None:  # those of ignored tokens may be anything
                    kept = inside & (tl.load(labels + t, mask=inside, other=0) != ignore_index)
                    spread_c *= tl.load(token_weights + t, mask=kept, other=0.0).to(tl.float32)
                tl.store(coefficients + t, spread_c, mask=inside)
        else:
            tl.store(coefficients + i, c, mask=here)
    tl.store(losses + g, tl.where(counts, weight_of_list * (pair_loss * scale + other_loss), 0.0))
    tl.store(is_active + g, tl.where(active, 1.0, 0.0))


def list_loss(log_probs: Tensor, problem: ListProblem, result: ListResult) -> None:
    p, o = problem, problem.objective
    n_lists, n_candidates = p.cu_lists.numel() - 1, p.rewards.numel()
    if n_lists == 0:
        return
    tile = min(MAX_TILE, max(16, triton.next_power_of_2(triton.cdiv(n_candidates, n_lists))))
    scratch = torch.empty(SCRATCH_ROWS, n_candidates, dtype=torch.float32, device=p.rewards.device)
    launch(
        list_loss_kernel,
        n_lists,
        log_probs.device,
        log_probs,
        p.labels,
        p.rewards,
        p.ref_log_probs,
        None if p.valid is None else p.valid.view(torch.uint8),
        p.lengths,
        p.token_weights,
        p.pair_weights,
        p.flip_probs,
        p.list_weights,
        p.delta,
        p.cu_seqlens,
        p.cu_lists,
        *result,
        scratch,
        n_candidates,
        0 if p.pair_weights is None else p.pair_weights.shape[-1],
        (
            o.beta,
            o.gamma,
            1.0 - o.soft_target,
            o.offset,
            o.log_margin,
            1.0 / o.target_temperature if o.target_temperature else 0.0,
            o.nll,
            o.pair_scale,
            o.list_scale,
            o.pointwise_scale,
            o.clip_low,
            o.clip_high,
        ),
        p.ignore_index,
        PAIRS=o.pairs,
        WEIGHT=o.weight,
        NORMALIZE=o.normalize,
        LINK=o.link,
        LIST_TERM=o.list_term,
        POINTWISE=o.pointwise,
        ADVANTAGE=o.advantage,
        LOG_MARGIN=o.log_margin != 0,
        TEMPERED=o.target_temperature > 0,
        NLL="none" if o.nll == 0 else "per_token" if o.nll_per_token else "sum",
        LENGTH_NORMALIZED=o.length_normalized,
        SOFT=p.flip_probs is not None or o.soft_target != 1,
        K=tile,
        J=min(tile, PAIR_TILE // tile),
        R=1 if p.cu_seqlens is None else TOKEN_TILE // tile,
        num_warps=NUM_WARPS,
        **register_limit(REGISTERS),
    )
