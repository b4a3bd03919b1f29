"""torch.library.opcheck on every operator: schema, autograd registration, fake implementation, AOT dispatch."""

import pytest
import torch
from torch.library import opcheck

import perpo_kernels  # noqa: F401 (registers the operators)
from perpo_kernels import backends
from perpo_kernels.backends import LogitMap

from .problems import RAGGED, ragged_lists, random_head, random_labels

ops = torch.ops.perpo_kernels
MAP = (0.7, 3.0, 1.5, -100)  # temperature, softcap, logit_scale, ignore_index
OBJECTIVE = [0.3, 0.5]
WITHOUT_AUTOGRAD = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def rows(device, backend):
    logits, labels = torch.randn(2, 3, 17, device=device), random_labels(17, 2, 3, device=device, ignored=0.2)
    _, lse = backends.load(backend).log_prob_rows(logits, labels.view(-1), LogitMap(0.7))
    return logits, labels, lse.view(2, 3)


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
        "linear_log_probs_head_backward", "scale_rows", "linear_list_loss",
    }  # fmt: skip


def test_token_log_probs(rows, backend):
    logits, labels, _ = rows
    opcheck(ops.token_log_probs, (leaf(logits), labels, 0.7, -100, False, backend))
    opcheck(ops.token_log_probs, (leaf(logits[:, :-1].bfloat16()), labels[:, :-1], 1.0, -100, False, backend))


def test_token_log_probs_backward(rows, backend):
    logits, labels, lse = rows
    args = (torch.randn_like(lse), logits, labels, lse, 0.7, -100, backend)
    opcheck(ops.token_log_probs_backward, args, test_utils=WITHOUT_AUTOGRAD)
    opcheck(ops.token_log_probs_backward_, args, test_utils=WITHOUT_AUTOGRAD)


def test_list_loss(lists, head, backend, device):
    tokens = -torch.rand(lists.n_tokens, device=device)
    layout = (lists.cu_lists, lists.cu_seqlens, head.labels)
    opcheck(ops.list_loss, (leaf(tokens), lists.rewards, *layout, lists.ref_log_probs, None, OBJECTIVE, -100, backend))
    scores, valid = torch.randn_like(lists.rewards), lists.rewards > 0.3
    opcheck(
        ops.list_loss, (leaf(scores), lists.rewards, lists.cu_lists, None, None, None, valid, OBJECTIVE, -100, backend)
    )


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


def test_scale_rows(device):
    for dtype in (torch.float32, torch.bfloat16):
        args = (torch.randn(4, 5, device=device).to(dtype), torch.randn(4, device=device))
        opcheck(ops.scale_rows, args, test_utils=WITHOUT_AUTOGRAD)


def test_linear_list_loss(head, lists, backend):
    args = (
        leaf(head.hidden), leaf(head.weight), head.labels, leaf(head.bias), lists.rewards, lists.cu_seqlens,
        lists.cu_lists, lists.ref_log_probs, *MAP, 0, backend, OBJECTIVE, True, True, True,
    )  # fmt: skip
    opcheck(ops.linear_list_loss, args)
