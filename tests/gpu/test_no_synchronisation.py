"""The host never waits for the device: torch raises at any synchronising call while these run."""

import pytest
import torch

import perpo_kernels as pk
from tests.gpu import shapes


@pytest.fixture
def no_synchronisation():
    """Call it after a first run: compiling and loading a kernel may synchronise."""

    def forbid() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


def twice(step, forbid):
    step()
    forbid()
    step()


def test_the_check_itself_works(device, no_synchronisation):
    no_synchronisation()
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=device).item()


@pytest.mark.parametrize("layout", ["cuda", "cpu"])
@pytest.mark.parametrize("mode", ["reference", "frozen", "trainable", "trainable in small chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fused_loss(device, no_synchronisation, mode, layout, reduction):
    batch = shapes.batch(device)
    options = {name: getattr(batch.lists, name).to(layout) for name in ("cu_seqlens", "cu_lists")}
    options["reduction"] = reduction
    if mode.endswith("small chunks"):
        options["max_chunk_bytes"] = 200 * 2 * shapes.N_VOCAB
    hidden = batch.head.hidden.requires_grad_()
    weight = batch.head.weight.requires_grad_(mode.startswith("trainable"))
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def step():
        with torch.set_grad_enabled(mode != "reference"):
            out = batch.loss(hidden, weight, **options)
            if mode != "reference":
                torch.autograd.grad(out.loss.sum(), leaves)
            return out.metrics

    twice(step, no_synchronisation)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_list_loss(device, no_synchronisation, reduction):
    log_probs = torch.randn(64, 20, device=device).requires_grad_()
    rewards, ref = torch.rand(64, 20, device=device), torch.randn(64, 20, device=device)
    valid = torch.rand(64, 20, device=device) > 0.1

    def step():
        loss = pk.perpo_loss(log_probs, rewards, ref, valid=valid, reduction=reduction)
        torch.autograd.grad(loss.sum(), log_probs)

    twice(step, no_synchronisation)


@pytest.mark.parametrize("inplace", [False, True])
def test_log_probs_from_logits(device, no_synchronisation, inplace):
    logits = torch.randn(2, 9, shapes.N_VOCAB, device=device, dtype=torch.bfloat16)
    labels = torch.randint(shapes.N_VOCAB, (2, 8), device=device)

    def step():
        leaf = logits.clone().requires_grad_()
        torch.autograd.grad(pk.token_log_probs(leaf[:, :-1], labels, inplace_backward=inplace).sum(), leaf)

    twice(step, no_synchronisation)


def test_linear_log_probs(device, no_synchronisation):
    head = shapes.batch(device).head
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()

    def step():
        torch.autograd.grad(pk.linear_token_log_probs(hidden, weight, head.labels).sum(), [hidden, weight])

    twice(step, no_synchronisation)
