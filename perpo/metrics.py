"""What a training run shows: sums kept on the device, averaged over ranks when something is logged.

Names are TRL's where TRL has one. "chosen" and "rejected" are the candidates of highest and of lowest reward of a list;
their numbers, the accuracy and Kendall's τ are means over active lists (those with any preference).
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor

from perpo.collate import ListBatch
from perpo_kernels import LinearPerPOOutput

OVER_ACTIVE = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lists/kendall_tau",
)
OVER_LISTS = ("loss", "lists/active", "lists/reward_mean", "lists/reward_spread")


class ListMetrics:
    """Running sums since the last report. Adding costs no synchronisation; a report costs one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: Tensor | None = None
        self.n_lists = 0
        self.n_tokens = 0
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, batch: ListBatch, output: LinearPerPOOutput) -> None:
        """Take in one batch, with `output.loss` summed over its lists."""
        sums = torch.cat([_list_sums(batch, output), output.loss.detach().float().reshape(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.n_lists += batch.n_lists
        self.n_tokens += batch.n_tokens

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Averages over all ranks since the last reset, and speed. Every rank must call it."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        sums = torch.zeros(len(OVER_ACTIVE) + len(OVER_LISTS)) if self.sums is None else self.sums
        mine = torch.cat([sums.double().cpu(), torch.tensor([self.n_lists, self.n_tokens, peak_memory()]).double()])
        everyone = accelerator.gather(mine.to(accelerator.device, torch.float32).unsqueeze(0)).double().cpu()
        totals = everyone.sum(0).tolist()
        n_lists, n_tokens = totals[-3], totals[-2]
        values = dict(zip((*OVER_ACTIVE, *OVER_LISTS[1:], "loss"), totals, strict=False))
        n_active = values["lists/active"]
        out = {name: values[name] / max(n_active, 1) for name in OVER_ACTIVE}
        out |= {name: values[name] / max(n_lists, 1) for name in OVER_LISTS}
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        out["tokens_per_second"] = n_tokens / seconds
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
    pairs = valid.unsqueeze(2) & valid.unsqueeze(1)

    def sign(x: Tensor) -> Tensor:
        return torch.where(pairs, torch.sign(x.unsqueeze(2) - x.unsqueeze(1)), 0.0)

    s, r = sign(scores), sign(rewards)
    untied = s.abs().sum((1, 2)) * r.abs().sum((1, 2))
    return (s * r).sum((1, 2)) / untied.clamp(min=1).sqrt()


def _list_sums(batch: ListBatch, output: LinearPerPOOutput) -> Tensor:
    """Σ over the lists of a batch, in the order of OVER_ACTIVE and OVER_LISTS without the loss."""
    device = output.log_probs.device
    sizes = batch.cu_lists.diff().long()  # on the CPU, as all of the layout
    columns = torch.arange(int(sizes.max()) if sizes.numel() else 0)
    present = columns < sizes[:, None]  # [G, k]
    index = (batch.cu_lists[:-1, None].long() + columns).where(present, 0)
    answered = present & (batch.cu_seqlens.diff() > 0)[index]
    index, valid = index.to(device, non_blocking=True), answered.to(device, non_blocking=True)

    log_probs, rewards = output.log_probs.float()[index], batch.rewards.float()[index]
    reference = 0.0 if batch.ref_log_probs is None else batch.ref_log_probs.float()[index]
    scores = log_probs - reference
    chosen, rejected, accuracy, active = output.list_stats.float()
    high = rewards.masked_fill(~valid, -torch.inf)
    low = rewards.masked_fill(~valid, torch.inf)
    best, worst = high.argmax(1, keepdim=True), low.argmin(1, keepdim=True)
    n_valid = valid.sum(1)
    some = n_valid > 0
    per_list = (
        chosen,
        rejected,
        accuracy,
        log_probs.gather(1, best).squeeze(1) * active,
        log_probs.gather(1, worst).squeeze(1) * active,
        kendall_tau(scores, rewards, valid) * active,
        active,
        rewards.where(valid, 0).sum(1) / n_valid.clamp(min=1),
        torch.where(some, high.amax(1) - low.amin(1), 0.0),
    )
    return torch.stack(per_list).sum(1)
