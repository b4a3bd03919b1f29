"""What `list_loss` knows of a list before its terms: the scores of its candidates, their ranks and Plackett–Luce
denominators, and the mean and deviation of their rewards."""

import triton
import triton.language as tl


@triton.jit
def candidate_scores(
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
    LENGTH_NORMALIZED: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """(Σ ω log_prob, s, key, 1 / length) of the candidates i [K] that are `here`; what is None is absent."""
    if valid is not None:
        here = here & (tl.load(valid + i, mask=here, other=0) != 0)
    reward = tl.load(rewards + i, mask=here, other=float("nan")).to(tl.float32)
    ok = here & (tl.abs(reward) < float("inf"))
    length = tl.full([K], 1.0, tl.float32)
    if cu_seqlens is not None:
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
            term = tl.load(log_probs + t, mask=inside, other=0.0).to(tl.float32)
            if token_weights is not None:
                weight = tl.load(token_weights + t, mask=inside, other=0.0).to(tl.float32)
                inside = inside & (weight != 0.0)
                term = tl.where(inside, term * weight, 0.0)
            partial += term
            counts += inside.to(tl.int32)
        total = tl.sum(partial, axis=1)
        length = tl.sum(counts, axis=1).to(tl.float32)
        ok = ok & (length > 0)
    else:
        total = tl.load(log_probs + i, mask=here, other=0.0).to(tl.float32)
        if lengths is not None:
            length = tl.load(lengths + i, mask=here, other=0).to(tl.float32)
            ok = ok & (length > 0)
    score = total
    if ref_log_probs is not None:
        score = total - tl.load(ref_log_probs + i, mask=here, other=0.0).to(tl.float32)
    inverse_length = 1.0 / tl.maximum(length, 1.0)
    if LENGTH_NORMALIZED:
        score = score * inverse_length
    return total, score, tl.where(ok, reward, float("nan")), inverse_length


@triton.jit
def ranks_and_denominators(
    scores, keys, ranks, denominators, begin, end, beta, RANKS: tl.constexpr, LUCE: tl.constexpr, K: tl.constexpr
):
    """The rank of i by score, and log Σ_{m: r_m ≤ r_i} exp βs_m of Plackett–Luce; either may be left out."""
    slot = tl.arange(0, K)
    for start in range(begin, end, K):
        i = start + slot
        key_i = tl.load(keys + i, mask=i < end, other=float("nan"))
        z_i = beta * tl.load(scores + i, mask=i < end, other=0.0)
        rank = tl.full([K], 1, tl.int32)
        top = tl.full([K], -float("inf"), tl.float32)
        total = tl.zeros([K], tl.float32)
        for other in range(begin, end, K):
            j = other + slot
            key_j = tl.load(keys + j, mask=j < end, other=float("nan"))
            z_j = beta * tl.load(scores + j, mask=j < end, other=0.0)
            if LUCE:
                in_race = key_j[None, :] <= key_i[:, None]
                z = tl.where(in_race, z_j[None, :], -float("inf"))
                new_top = tl.maximum(top, tl.max(z, axis=1))
                shift = tl.where(new_top == -float("inf"), 0.0, new_top)
                total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
                top = new_top
            if RANKS:
                above = z_j[None, :] > z_i[:, None]
                above = above | ((z_j[None, :] == z_i[:, None]) & (j[None, :] < i[:, None]))
                above = above & (key_j == key_j)[None, :]
                rank += tl.sum(above.to(tl.int32), axis=1)
        if LUCE:
            denominator = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
            tl.store(denominators + i, denominator, mask=i < end)
        if RANKS:
            tl.store(ranks + i, rank.to(tl.float32), mask=i < end)


@triton.jit
def reward_moments(keys, begin, end, lowest, spread, part, STANDARDIZED: tl.constexpr, K: tl.constexpr):
    """(mean, unit, number of members): A = (place − mean) · unit, with a reward's `place` in [0, 1] of the list's."""
    slot = tl.arange(0, K)
    total = 0.0
    n = 0
    for start in range(begin, end, K):
        key = tl.load(keys + start + slot, mask=start + slot < end, other=float("nan"))
        total += tl.sum(tl.where(key == key, reward_place(key, lowest, spread, part), 0.0), axis=0)
        n += tl.sum((key == key).to(tl.int32), axis=0)
    mean = total / tl.maximum(n, 1)
    unit = spread / part
    if STANDARDIZED:
        squares = 0.0
        for start in range(begin, end, K):
            key = tl.load(keys + start + slot, mask=start + slot < end, other=float("nan"))
            off = tl.where(key == key, reward_place(key, lowest, spread, part) - mean, 0.0)
            squares += tl.sum(off * off, axis=0)
        variance = squares / tl.maximum(n - 1, 1)
        unit = tl.where(variance > 0, 1.0 / tl.sqrt(tl.where(variance > 0, variance, 1.0)), 0.0)
    return mean, unit, n


@triton.jit
def reward_place(key, lowest, spread, part):
    """(r − min r) / (max r − min r), of halves where `part` is 0.5: the differences stay finite."""
    return (part * key - part * lowest) / spread
