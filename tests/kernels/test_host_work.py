"""What the host does for a small batch: how many operations, through which layers, and what it refuses in a graph."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import perpo_kernels as pk
from perpo_kernels import checks
from perpo_kernels.chunks import kept_rows

from .problems import RAGGED, ragged_lists, random_head


def events(run) -> list[str]:
    """Names of all operations of PyTorch in `run`, those inside of others too."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return [e.name for e in profiler.events() if e.name.startswith(("aten::", "perpo_kernels::"))]


class Seen(TorchDispatchMode):
    """The operators that a dispatch mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def step(device, trainable, **options):
    lists = ragged_lists(RAGGED, device)
    head = random_head(lists.n_tokens, 5, 17, device, torch.float32)
    leaves = [head.hidden.requires_grad_(), head.weight.requires_grad_(trainable)]

    def run():
        loss = pk.linear_perpo_loss(*leaves, head.labels, **lists._asdict(), backend="eager", **options).loss
        return torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])

    return run


@pytest.mark.parametrize("trainable", [False, True])
def test_operators_are_shown_to_who_looks_and_skipped_otherwise(device, trainable):
    """The dispatcher's way to a custom operator takes longer than a small batch; the numbers are the same."""
    run = step(device, trainable)
    assert not [name for name in events(run) if name.startswith("perpo_kernels::")]
    with Seen() as seen:
        looked_at = run()
    names = {name.split(".")[0] for name in seen.names if name.startswith("perpo_kernels::")}
    assert f"perpo_kernels::{'linear_list_loss' if trainable else 'linear_log_probs'}" in names
    for a, b in zip(run(), looked_at, strict=True):
        assert torch.equal(a, b)


def test_results_of_a_single_chunk_are_not_copied(device):
    """Two copies of a few numbers for each chunk, of 13 launches."""
    hidden, weight = torch.randn(6, 5, device=device, requires_grad=True), torch.randn(17, 5, device=device)
    labels = torch.randint(17, (6,), device=device)

    def copies(**options):
        names = events(lambda: pk.linear_token_log_probs(hidden, weight, labels, backend="eager", **options))
        return names.count("aten::copy_")

    assert copies(max_chunk_bytes=2 * 128) == 3 * (copies() + 2)


def test_rows_that_are_kept_are_not_looked_for_on_a_device():
    with Seen() as seen:
        assert kept_rows(torch.empty(4, dtype=torch.int64, device="meta"), -100) is None
    assert seen.names == ["aten::empty.memory_format"]


def test_an_ordinary_list_loss_is_a_few_operations(device):
    """Of finite numbers nothing has to be selected away. Forward and backward, with those inside of others."""
    log_probs, rewards = torch.randn(2, 20, device=device, requires_grad=True), torch.rand(2, 20, device=device)

    def count(rewards):
        return len(
            events(lambda: torch.autograd.grad(pk.perpo_loss(log_probs, rewards, rewards, backend="eager"), log_probs))
        )

    assert count(rewards) <= 130  # 288 with all selections
    rewards[0, 0] = torch.nan
    assert count(rewards) > 170


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_lists"])
def test_a_layout_on_the_cpu_is_refused_while_a_graph_is_captured(monkeypatch, name):
    """The graph would copy from the host's address of a tensor that is long gone."""
    counts, cpu, gpu = torch.zeros(2, dtype=torch.int32), torch.device("cpu"), torch.device("cuda", 0)
    checks.layout(name, counts, gpu)  # a build without a GPU can't be asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    checks.layout(name, counts, gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    checks.layout(name, counts, cpu)
    with pytest.raises(ValueError, match=rf"{name} must be on cuda:0 while a CUDA graph is captured"):
        checks.layout(name, counts, gpu)
