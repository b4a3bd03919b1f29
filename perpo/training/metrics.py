"""What a training run shows: sums kept on the device, averaged over ranks when something is logged.

Names are TRL's where TRL has one, and mean what they mean there: "chosen" and "rejected" are the candidates of highest
and of lowest reward of a list, rewards/accuracies is the share of lists whose best candidate scores higher than their
worst. lists/pair_accuracy is the share of all pairs with r_i > r_j that have s_i > s_j. These and Kendall's τ are means
over active lists (those with any preference). prefix/token_ratio is how many times more tokens a row for every
candidate would feed; rewards/* are β·score of the objective. Candidates that were added to a list (mDPO's, under a
corrupted image) are in its loss and in no other number; lists that only fill up the last batch
(`perpo.encoding.batch.ListBatch.counting_first`) are in none.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor

from perpo.encoding.batch import ListBatch
from perpo_kernels import LinearPerPOOutput
from perpo_kernels.objectives import Objective

OVER_ACTIVE = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "lists/pair_accuracy",
    "logps/chosen",
    "logps/rejected",
    "lists/kendall_tau",
)
OVER_LISTS = ("lists/active", "lists/reward_mean", "lists/reward_spread", "loss")


class ListMetrics:
    """Running sums since the last report. Adding costs no synchronisation; a report costs one."""

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective or Objective()
        self.reset()

    def reset(self) -> None:
        self.sums: Tensor | None = None
        self.n_tokens = 0
        self.n_separate = 0
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, batch: ListBatch, output: LinearPerPOOutput) -> None:
        """Take in one batch, with `output.loss` summed over its lists."""
        sums = torch.cat([_list_sums(batch, output, self.objective), output.loss.detach().float().reshape(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.n_tokens += batch.n_tokens
        self.n_separate += batch.n_separate

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Averages over all ranks since the last reset, and speed. Every rank must call it."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        sums = torch.zeros(1 + len(OVER_ACTIVE) + len(OVER_LISTS)) if self.sums is None else self.sums
        counts = [self.n_tokens, self.n_separate, peak_memory()]
        mine = torch.cat([sums.double().cpu(), torch.tensor(counts).double()])
        everyone = accelerator.gather(mine.to(accelerator.device, torch.float32).unsqueeze(0)).double().cpu()
        totals = everyone.sum(0).tolist()
        n_lists, *of_lists, n_tokens, n_separate, _ = totals
        values = dict(zip((*OVER_ACTIVE, *OVER_LISTS), of_lists, strict=True))
        n_active = values["lists/active"]
        out = {name: values[name] / max(n_active, 1) for name in OVER_ACTIVE}
        out |= {name: values[name] / max(n_lists, 1) for name in OVER_LISTS}
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        out["tokens_per_second"] = n_tokens / seconds
        out["prefix/token_ratio"] = n_separate / max(n_tokens, 1)
        out["peak_memory_gib"] = everyone[:, -1].max().item() / 2**30
        return out


def peak_memory() -> float:
    """Bytes: the most that torch held on this GPU, or that this process held in RAM where there is no GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def kendall_tau(
    scores: Tensor,  # [G, k]
    rewards: Tensor,  # [G, k]
    valid: Tensor,  # bool [G, k]
) -> Tensor:  # [G]
    """τ-b of each list: 1 where scores order candidates as rewards do, −1 where reversed, 0 where either is constant.

    τ-b = Σ sgn(Δs) sgn(Δr) / √(Σ |sgn Δs| · Σ |sgn Δr|) over pairs, which takes ties in either into account.
    """
    s, r = _signs(scores, valid), _signs(rewards, valid)
    untied = s.abs().sum((1, 2)) * r.abs().sum((1, 2))
    return (s * r).sum((1, 2)) / untied.clamp(min=1).sqrt()


def pair_accuracy(
    scores: Tensor,  # [G, k]
    rewards: Tensor,  # [G, k]
    valid: Tensor,  # bool [G, k]
) -> Tensor:  # [G]
    """Share of the pairs of unequal rewards that the scores put in the same order; equal scores are not."""
    s, r = _signs(scores, valid), _signs(rewards, valid)
    return (s * r > 0).sum((1, 2)) / (r != 0).sum((1, 2)).clamp(min=1)


def _signs(x: Tensor, valid: Tensor) -> Tensor:  # [G, k, k]
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
    return torch.where(pairs, torch.sign(x.unsqueeze(2) - x.unsqueeze(1)), 0.0)


def _list_sums(batch: ListBatch, output: LinearPerPOOutput, objective: Objective) -> Tensor:
    """Number of lists and Σ over them, in the order of OVER_ACTIVE and OVER_LISTS without the loss."""
    device = output.log_probs.device
    sizes, lengths = batch.cu_lists.diff().long(), batch.cu_seqlens.diff()  # on the CPU, as all of the layout
    columns = torch.arange(int(sizes.max()) if sizes.numel() else 0)
    present = columns < sizes[:, None]  # [G, k]
    index = (batch.cu_lists[:-1, None].long() + columns).where(present, 0)
    answered = present & (lengths > 0)[index]
    index, valid = index.to(device, non_blocking=True), answered.to(device, non_blocking=True)
    finite = batch.rewards.isfinite()[index]
    counted, valid = finite[:, 0], valid & finite
    if batch.added is not None:
        valid = valid & ~batch.added[index]

    scores = output.log_probs.float()
    if batch.ref_log_probs is not None:
        scores = scores - batch.ref_log_probs.float()
    if objective.length_normalized:
        scores = scores / lengths.clamp(min=1).to(device, non_blocking=True)
    scores, log_probs, rewards = scores[index], output.log_probs.float()[index], batch.rewards.float()[index]
    high = rewards.masked_fill(~valid, -torch.inf)
    low = rewards.masked_fill(~valid, torch.inf)
    best, worst = high.argmax(1, keepdim=True), low.argmin(1, keepdim=True)
    n_valid = valid.sum(1)
    some = n_valid > 0
    active = output.list_stats[3].float()
    chosen, rejected = scores.gather(1, best).squeeze(1), scores.gather(1, worst).squeeze(1)
    per_list = (
        counted,
        objective.beta * chosen * active,
        objective.beta * rejected * active,
        (chosen > rejected) * active,
        pair_accuracy(scores, rewards, valid) * active,
        log_probs.gather(1, best).squeeze(1) * active,
        log_probs.gather(1, worst).squeeze(1) * active,
        kendall_tau(scores, rewards, valid) * active,
        active,
        rewards.where(valid, 0).sum(1) / n_valid.clamp(min=1),
        torch.where(some, high.amax(1) - low.amin(1), 0.0),
    )
    return torch.stack(per_list).sum(1)
