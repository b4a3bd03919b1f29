"""torch.library.opcheck on every operator: schema, autograd registration, fake implementation, AOT dispatch."""

import pytest
import torch
from torch import library

import perpo_kernels  # noqa: F401 (registers the operators)
from perpo_kernels import backends, objectives
from perpo_kernels.backends import LogitMap
from perpo_kernels.objectives import Objective

from .problems import RAGGED, ragged_lists, random_head, random_labels

ops = torch.ops.perpo_kernels
MAP = (0.7, 3.0, 1.5, -100)  # temperature, softcap, logit_scale, ignore_index
OBJECTIVE = Objective(0.3, 0.5).numbers()
WITHOUT_AUTOGRAD = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(operator, args, test_utils=EVERYTHING):
    """Under Triton's interpreter only what depends on the backend: that nothing undeclared is written or aliased."""
    interpreted = "triton" in args and args[0].device.type == "cpu"
    library.opcheck(operator, args, test_utils="test_schema" if interpreted else test_utils)


@pytest.fixture
def rows(device, backend):
    logits, labels = torch.randn(2, 3, 17, device=device), random_labels(17, 2, 3, device=device, ignored=0.2)
    _, lse = backends.load(backend).log_prob_rows(logits, labels.view(-1), LogitMap(0.7))
    return logits, labels, lse


@pytest.fixture
def lists(device):
    return ragged_lists(RAGGED, device)


@pytest.fixture
def head(device, lists):
    return random_head(lists.n_tokens, 5, 17, device, torch.float32, ignored=0.2)


def leaf(x):
    return x.clone().requires_grad_()


def test_every_operator_is_tested_here():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "perpo_kernels::" in name}
    assert {name.split(".")[0] for name in registered} == {
        "token_log_probs", "token_log_probs_backward", "token_log_probs_backward_", "list_loss", "linear_log_probs",
        "linear_log_probs_head_backward", "scaled", "linear_list_loss",
    }  # fmt: skip


def test_token_log_probs(rows, backend):
    logits, labels, _ = rows
    opcheck(ops.token_log_probs, (leaf(logits), labels, 0.7, -100, False, backend))
    opcheck(ops.token_log_probs, (leaf(logits[:, :-1].bfloat16()), labels[:, :-1], 1.0, -100, False, backend))


def test_token_log_probs_backward(rows, backend):
    logits, labels, lse = rows
    args = (torch.randn(2, 3, device=logits.device), logits, labels, lse, 0.7, -100, backend)
    opcheck(ops.token_log_probs_backward, args, test_utils=WITHOUT_AUTOGRAD)
    opcheck(ops.token_log_probs_backward_, args, test_utils=WITHOUT_AUTOGRAD)


def test_list_loss(lists, head, backend, device):
    tokens = -torch.rand(lists.n_tokens, device=device)
    layout = (lists.cu_lists, OBJECTIVE, lists.cu_seqlens, head.labels, -100)
    weights, flips = torch.rand_like(tokens), lists.rewards / 2
    opcheck(
        ops.list_loss,
        (leaf(tokens), lists.rewards, *layout, lists.ref_log_probs, None, None, weights, None, flips, backend),
    )
    scores, valid, lengths = torch.randn_like(lists.rewards), lists.rewards > 0.3, torch.ones_like(lists.rewards)
    given = torch.rand(len(RAGGED), 5, 5, device=device)
    layout = (lists.cu_lists, objectives.mdpo().numbers(), None, None, -100)
    opcheck(ops.list_loss, (leaf(scores), lists.rewards, *layout, None, valid, lengths, None, given, None, backend))


@pytest.mark.parametrize("trainable", [False, True])
def test_linear_log_probs(head, backend, trainable):
    weight, bias = (leaf(head.weight), leaf(head.bias)) if trainable else (head.weight, None)
    opcheck(ops.linear_log_probs, (leaf(head.hidden), weight, head.labels, bias, *MAP, 0, backend, True))


def test_linear_log_probs_without_derivative(head, backend):
    args = (head.hidden, head.weight, head.labels, None, *MAP, 0, backend, False)
    opcheck(ops.linear_log_probs, args)


def test_linear_log_probs_head_backward(head, backend):
    log_probs, lse, _ = ops.linear_log_probs(*head[:2], head.labels, head.bias, *MAP, 0, backend, False)
    args = (torch.randn_like(log_probs), *head[:2], head.labels, lse, head.bias, *MAP, 0, backend, True, True)
    opcheck(ops.linear_log_probs_head_backward, args, test_utils=WITHOUT_AUTOGRAD)


def test_scaled(device):
    for dtype in (torch.float32, torch.bfloat16):
        args = (torch.randn(4, 5, device=device).to(dtype), torch.randn(4, 1, device=device), torch.bfloat16)
        opcheck(ops.scaled, args, test_utils=WITHOUT_AUTOGRAD)


def test_linear_list_loss(head, lists, backend):
    token_weights = torch.rand(len(head.labels), device=head.labels.device)
    args = (
        leaf(head.hidden), leaf(head.weight), head.labels, leaf(head.bias), lists.rewards, lists.cu_seqlens,
        lists.cu_lists, lists.ref_log_probs, token_weights, None, None, *MAP, 0, backend, OBJECTIVE, True, True, True,
    )  # fmt: skip
    opcheck(ops.linear_list_loss, args)
