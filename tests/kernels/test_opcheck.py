"""torch.library.opcheck on every operator: schema, autograd registration, fake implementation, AOT dispatch."""

import pytest
import torch
from torch import library

import perpo_kernels  # noqa: F401 (registers the operators)
from perpo_kernels import backends, objectives
from perpo_kernels.objectives import Objective
from perpo_kernels.problem import ListProblem, LogitMap

from .problems import ragged_lists, random_head, random_labels

ops = torch.ops.perpo_kernels
MAP = LogitMap(temperature=0.7, softcap=3.0, logit_scale=1.5).numbers()
WARM = LogitMap(temperature=0.7).numbers()
OBJECTIVE = Objective(0.3, 0.5)
WITHOUT_AUTOGRAD = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
LENGTHS = ((3, 1, 4), (2, 5), (6,), (1, 2, 3, 2, 4))
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
    return ragged_lists(LENGTHS, device)


@pytest.fixture
def head(device, lists):
    """Each response has a token: without one its reward comes back as NaN, which opcheck finds unequal to NaN."""
    head = random_head(lists.n_tokens, 5, 17, device, torch.float32, ignored=0.2)
    head.labels[lists.cu_seqlens[:-1].long()] = 3
    return head


@pytest.fixture(params=["floats", "traced"])
def given(request):
    """Numbers as an operator takes them: a list, or as under torch.compile a tensor."""
    if request.param == "floats":
        return lambda *numbers: ([x for part in numbers for x in part], None)
    return lambda *numbers: ([0.0], torch.tensor([x for part in numbers for x in part], dtype=torch.float64))


def leaf(x):
    return x.clone().requires_grad_()


def test_every_operator_is_tested_here():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "perpo_kernels::" in name}
    assert {name.split(".")[0] for name in registered} == {
        "token_log_probs", "token_log_probs_backward", "token_log_probs_backward_", "list_loss", "linear_log_probs",
        "linear_log_probs_head_backward", "scaled", "linear_list_loss", "kept_head_gradient",
        "vocab_parallel_log_probs", "vocab_parallel_head_backward",
    }  # fmt: skip


def test_token_log_probs(rows, backend, given):
    logits, labels, _ = rows
    opcheck(ops.token_log_probs, (leaf(logits), labels, *given(WARM), -100, False, backend))
    opcheck(ops.token_log_probs, (leaf(logits[:, :-1].bfloat16()), labels[:, :-1], *given(WARM), -100, False, backend))


def test_token_log_probs_backward(rows, backend, given):
    logits, labels, lse = rows
    args = (torch.randn(2, 3, device=logits.device), lse, logits, labels, *given(WARM), -100, backend)
    opcheck(ops.token_log_probs_backward, args, test_utils=WITHOUT_AUTOGRAD)
    opcheck(ops.token_log_probs_backward_, args, test_utils=WITHOUT_AUTOGRAD)


def token_problem(head, lists, **more):
    return ListProblem(**lists._asdict(), labels=head.labels, objective=OBJECTIVE, **more)


def every_token_tensor(head, lists):
    """All that a problem of tokens can hold: no None is left in the list of tensors but of what is per candidate."""
    given = torch.rand(len(LENGTHS), 5, 5, device=head.labels.device)
    weights, flips = torch.rand(lists.n_tokens, device=head.labels.device), lists.rewards / 2
    mdpo = objectives.mdpo()
    per_list, delta = torch.rand(len(LENGTHS), device=head.labels.device), lists.rewards[:1] / 2
    return token_problem(
        head, lists, token_weights=weights, pair_weights=given, flip_probs=flips, list_weights=per_list, delta=delta
    )._replace(objective=mdpo)


def test_list_loss_of_tokens(lists, head, backend, device, given):
    tokens = -torch.rand(lists.n_tokens, device=device)
    weighted = token_problem(head, lists, token_weights=torch.rand_like(tokens), flip_probs=lists.rewards / 2)
    for problem in (weighted, every_token_tensor(head, lists)):
        opcheck(ops.list_loss, (leaf(tokens), problem.pack(), *given(problem.objective.numbers()), -100, backend))


def test_list_loss_of_candidates(lists, backend, device, given):
    problem = ListProblem(
        lists.rewards,
        lists.cu_lists,
        valid=torch.ones_like(lists.rewards, dtype=torch.bool),
        lengths=torch.ones_like(lists.rewards),
        pair_weights=torch.rand(len(LENGTHS), 5, 5, device=device),
        objective=objectives.mdpo(),
    )
    numbers = given(problem.objective.numbers())
    opcheck(ops.list_loss, (leaf(torch.randn_like(lists.rewards)), problem.pack(), *numbers, -100, backend))


def test_a_problem_without_a_missing_tensor(lists, head, device, given):
    """A backward pass returns one None for a list of tensors that holds a None, and a None for each where none does."""
    full = every_token_tensor(head, lists)._replace(
        valid=torch.ones_like(lists.rewards, dtype=torch.bool), lengths=torch.ones_like(lists.rewards)
    )
    data, numbers = full.pack(), full.objective.numbers()
    assert all(x is not None for x in data)
    opcheck(ops.list_loss, (leaf(-torch.rand(lists.n_tokens, device=device)), data, *given(numbers), -100, "eager"))
    leaves = (leaf(head.hidden), leaf(head.weight), None)
    args = (*leaves, data, *given(MAP, numbers), -100, 0, torch.float32, "eager", [True, True, False])
    opcheck(ops.linear_list_loss, args)


@pytest.mark.parametrize("trainable", [False, True])
def test_linear_log_probs(head, backend, trainable, given):
    weight, bias = (leaf(head.weight), leaf(head.bias)) if trainable else (head.weight, None)
    args = (leaf(head.hidden), weight, bias, head.labels, *given(MAP), -100, 0, torch.float32, backend, True)
    opcheck(ops.linear_log_probs, args)


def test_linear_log_probs_without_derivative(head, backend, given):
    args = (head.hidden, head.weight, None, head.labels, *given(MAP), -100, 0, torch.float32, backend, False)
    opcheck(ops.linear_log_probs, args)


def test_linear_log_probs_head_backward(head, backend, given):
    args = (head.hidden, head.weight, head.bias, head.labels, *given(MAP), -100, 0, torch.float32, backend)
    log_probs, lse, _ = ops.linear_log_probs(*args, False)
    args = (torch.randn_like(log_probs), lse, *args, [True, True])
    opcheck(ops.linear_log_probs_head_backward, args, test_utils=WITHOUT_AUTOGRAD)


@pytest.fixture
def one_rank(tmp_path):
    """rows, rank and the name of a group that holds one whole head, as the operators of split ones take them."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield [17], 0, dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_vocab_parallel_log_probs(head, backend, given, one_rank):
    settings = (*given(MAP), -100, 0, torch.float32, backend)
    for leaves in ((leaf(head.hidden), head.weight, None), [leaf(x) for x in head[:3]]):
        opcheck(ops.vocab_parallel_log_probs, (*leaves, head.labels, *settings, *one_rank, True))
    args = (head.hidden, head.weight, head.bias, head.labels, *settings)
    opcheck(ops.vocab_parallel_log_probs, (*args, *one_rank, False))
    log_probs, stats, _ = ops.vocab_parallel_log_probs(*args, *one_rank, False)
    args = (torch.randn_like(log_probs), stats, *args, 0, [True, True])
    opcheck(ops.vocab_parallel_head_backward, args, test_utils=WITHOUT_AUTOGRAD)


def test_scaled(device):
    for dtype in (torch.float32, torch.bfloat16):
        args = (torch.randn(4, 5, device=device).to(dtype), torch.randn(4, device=device), torch.bfloat16)
        opcheck(ops.scaled, args, test_utils=WITHOUT_AUTOGRAD)
        opcheck(ops.scaled, (args[0], args[1][0], torch.bfloat16), test_utils=WITHOUT_AUTOGRAD)


def test_linear_list_loss(head, lists, backend, given):
    problem = token_problem(head, lists, token_weights=torch.rand_like(head.hidden[:, 0]))
    numbers = given(MAP, problem.objective.numbers())
    leaves = (leaf(head.hidden), leaf(head.weight), leaf(head.bias))
    opcheck(
        ops.linear_list_loss, (*leaves, problem.pack(), *numbers, -100, 0, torch.float32, backend, [True, True, True])
    )
