"""A label outside [0, V) never reads out of bounds: NaN on a device, a ValueError where checking was asked for."""

import pytest
import torch

import perpo_kernels as pk
from tests.gpu import shapes

WRONG = [-1, shapes.N_VOCAB, 1 << 40, -(1 << 40)]


@pytest.fixture
def head(device):
    head = shapes.batch(device).head
    head.labels[: len(WRONG)] = torch.tensor(WRONG, device=device)
    return head


def test_gives_nan_in_its_row_alone(head):
    hidden = head.hidden.requires_grad_()
    log_probs = pk.linear_token_log_probs(hidden, head.weight, head.labels)
    assert log_probs[: len(WRONG)].isnan().all()
    assert log_probs[len(WRONG) :].isfinite().all()
    (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
    assert gradient[: len(WRONG)].isnan().all()
    assert gradient[len(WRONG) :].isfinite().all()


def test_from_logits_too(head):
    logits = (head.hidden[:64] @ head.weight.t()).requires_grad_()
    log_probs = pk.token_log_probs(logits, head.labels[:64])
    assert log_probs[: len(WRONG)].isnan().all()
    assert log_probs[len(WRONG) :].isfinite().all()
    (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
    assert gradient[: len(WRONG)].isnan().all()
    assert gradient[len(WRONG) :].isfinite().all()


def test_is_a_value_error_with_the_check_turned_on(head, monkeypatch):
    monkeypatch.setenv("PERPO_CHECK", "1")
    with pytest.raises(ValueError, match="labels"):
        pk.linear_token_log_probs(head.hidden, head.weight, head.labels)
    with pytest.raises(ValueError, match="labels"):
        pk.token_log_probs(head.hidden[:64] @ head.weight.t(), head.labels[:64])
