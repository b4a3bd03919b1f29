"""PerPOLoss and LinearPerPOLoss: the functions with their numbers held in a module."""

import pytest
import torch

import perpo_kernels as pk

from .problems import RAGGED, ragged_lists, random_head


def test_perpo_loss_module_equals_the_function(backend, device):
    scores, rewards = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    valid = torch.rand(3, 4, device=device) < 0.8
    module = pk.PerPOLoss(beta=0.3, gamma=1.0, reduction="sum", backend=backend)
    expected = pk.perpo_loss(
        scores, rewards, -scores, valid=valid, beta=0.3, gamma=1.0, reduction="sum", backend=backend
    )
    assert torch.equal(module(scores, rewards, -scores, valid=valid), expected)


def test_linear_perpo_loss_module_equals_the_function(backend, device):
    lists = ragged_lists(RAGGED, device)
    head = random_head(lists.n_tokens, 5, 17, device, torch.float32)
    layout = {"cu_seqlens": lists.cu_seqlens, "cu_lists": lists.cu_lists, "ref_log_probs": lists.ref_log_probs}
    module = pk.LinearPerPOLoss(beta=0.3, gamma=1.0, temperature=0.7, softcap=4.0, backend=backend)
    got = module(head.hidden, head.weight, head.labels, lists.rewards, bias=head.bias, **layout)
    expected = pk.linear_perpo_loss(
        head.hidden, head.weight, head.labels, lists.rewards, bias=head.bias, **layout,
        beta=0.3, gamma=1.0, temperature=0.7, softcap=4.0, backend=backend,
    )  # fmt: skip
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=0, equal_nan=True, msg=name)


def test_an_objective_takes_the_place_of_beta_and_gamma(device):
    scores, rewards = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    objective = pk.objectives.uniform_pairs(beta=0.5)
    expected = pk.perpo_loss(scores, rewards, beta=0.5, gamma=0.0)
    assert torch.equal(pk.PerPOLoss(objective=objective)(scores, rewards), expected)
    assert torch.equal(pk.perpo_loss(scores, rewards, objective=objective), expected)


def test_modules_say_what_they_compute():
    assert "beta=0.3" in repr(pk.PerPOLoss(beta=0.3))
    assert "temperature=0.7" in repr(pk.LinearPerPOLoss(temperature=0.7))


@pytest.mark.parametrize("module", [pk.PerPOLoss, pk.LinearPerPOLoss])
def test_an_option_that_the_function_does_not_have_is_refused_at_once(module):
    with pytest.raises(TypeError, match="temprature"):
        module(temprature=0.7)


def test_modules_hold_no_parameters():
    assert not list(pk.PerPOLoss().parameters())
    assert not list(pk.LinearPerPOLoss().state_dict())
