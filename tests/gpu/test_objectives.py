"""Objectives other than PerPO on a device: long lists against float64, no synchronisation, CUDA graphs."""

import pytest
import torch

import perpo_kernels as pk
from perpo_kernels import objectives
from tests.gpu.test_cuda_graph import assert_replays
from tests.gpu.test_no_synchronisation import no_synchronisation, twice

__all__ = ["no_synchronisation"]  # a fixture

NAMES = ["lipo", "plackett_luce", "sdpo", "nca", "ipo", "mdpo", "rosepo", "grpo", "gspo", "mpo"]


def problem(name: str, n_lists: int, k: int, device: torch.device):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    objective = objectives.PRESETS[name]()
    options = {}
    if objective.flips:
        options["flip_probs"] = 0.4 * draw(n_lists, k)
    if objective.pairs == "given":
        options["pair_weights"] = (draw(n_lists, k, k) > 0.9).float()
    if objective.pointwise == "clipped":
        options["ref_log_probs"] = 4 * draw(n_lists, k)
    if objective.pointwise == "bco":
        options["delta"] = draw(1)
    if objective.length_normalized or objective.nll_per_token:
        options["lengths"] = (1 + 20 * draw(n_lists, k)).round()
    scores, rewards = 4 * draw(n_lists, k), draw(n_lists, k).mul(20).round() / 20  # with ties
    return scores, rewards, {"objective": objective, "list_weights": 3 * draw(n_lists), **options}


@pytest.mark.parametrize(("n_lists", "k"), [(3, 20), (2, 1024)])
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(device, name, n_lists, k):
    scores, rewards, options = problem(name, n_lists, k, device)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "eager")):
        leaf = scores.to(dtype).requires_grad_()
        cast = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        loss = pk.perpo_loss(leaf, rewards.to(dtype), backend=backend, **cast)
        loss.backward()
        results.append((loss.detach().double(), leaf.grad.double()))
    (loss, gradient), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits(device, no_synchronisation, name):
    scores, rewards, options = problem(name, 64, 20, device)
    scores.requires_grad_()
    twice(lambda: torch.autograd.grad(pk.perpo_loss(scores, rewards, **options), scores), no_synchronisation)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays(device, name):
    scores, rewards, options = problem(name, 64, 20, device)
    scores.requires_grad_()

    def step():
        loss = pk.perpo_loss(scores, rewards, **options)
        return [loss.detach(), *torch.autograd.grad(loss, scores)]

    assert_replays(step, [scores])
