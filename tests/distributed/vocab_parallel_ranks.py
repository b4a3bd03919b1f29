"""What every rank runs for `test_vocab_parallel`: the cases, and one launch of all of them.

Each rank makes the same whole head from a seed and takes its slice of it. What it gets is compared with the whole head
without a group, in the same dtype, by the error of both against float64.
"""

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import accumulate
from typing import Any

if multiprocessing.parent_process() is not None:  # a rank: kernels are interpreted, where there is a GPU too
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import perpo_kernels as pk
from tests.kernels.accuracy import (
    assert_as_accurate_as_plain,
    assert_equal_to_rounding,
    interpreter_truncation,
    one_more_rounding,
)
from tests.kernels.problems import RAGGED, Head, Lists, ragged_lists, random_head

CPU = torch.device("cpu")
H = 24
MAPS = {"plain": {}, "capped": {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}}
CASES: dict[str, Callable[[], None]] = {}


def case(*parameters: tuple[Any, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function, once for each tuple of its arguments."""

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        for given in parameters or ((),):
            name = "-".join([fn.__name__, *(str(x).removeprefix("torch.") for x in given)])
            CASES[name] = lambda given=given: fn(*given)
        return fn

    return register


def cut(n_vocab: int) -> list[int]:
    """As DTensor does: ⌈V / n⌉ rows while there are any."""
    n = dist.get_world_size()
    return [len(range(n_vocab)[i * -(-n_vocab // n) :][: -(-n_vocab // n)]) for i in range(n)]


def mine(x: Tensor, rows: Sequence[int]) -> Tensor:
    start = [0, *accumulate(rows)][dist.get_rank()]
    return x[start : start + rows[dist.get_rank()]].clone()


def slices(rows: Sequence[int]) -> Any:
    return dist.group.WORLD if len(set(rows)) == 1 else pk.VocabSlices(dist.group.WORLD, rows)


class Results(dict[str, Tensor]):
    """value, hidden, weight, bias: the last three are gradients, of the slice if `rows` were given."""


def run(
    head: Head,
    lists: Lists | None,
    trainable: Sequence[str],
    upstream: Tensor,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> Results:
    """Log-probs, or the loss of lists, and gradients of (value · upstream).sum()."""
    given = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    if rows is not None:
        given |= {name: mine(given[name], rows) for name in ("weight", "bias")}
        options["group"] = slices(rows)
    leaves = {name: x.detach().clone().requires_grad_(name in trainable) for name, x in given.items()}
    if lists is None:
        value = pk.linear_token_log_probs(labels=head.labels, **leaves, **options)
    else:
        value = pk.linear_perpo_loss(labels=head.labels, **leaves, **lists._asdict(), **options).loss
    if trainable:
        (value * upstream.to(value.dtype)).sum().backward()
    return Results(value=value.detach(), **{name: leaves[name].grad for name in trainable})


def compare(
    head: Head, lists: Lists | None, rows: Sequence[int], trainable: Sequence[str], backend: str, **options: Any
) -> None:
    """Value and gradients are no further from float64 than without the split."""
    dtype = head.hidden.dtype
    upstream = torch.randn(()) if lists is not None else torch.randn(len(head.labels))
    split = run(head, lists, trainable, upstream, rows, backend=backend, **options)
    unsplit = run(head, lists, trainable, upstream, backend="eager", **options)
    exact_head = Head(*(x.double() if x.is_floating_point() else x for x in head))
    exact_options = {name: x for name, x in options.items() if name not in ("logits_dtype", "max_chunk_bytes")}
    exact_lists = lists and Lists(*(x.double() if x.is_floating_point() else x for x in lists))
    exact = run(exact_head, exact_lists, trainable, upstream.double(), backend="reference", **exact_options)
    for name in ("value", *trainable):
        ours, plain, truth = split[name], unsplit[name], exact[name]
        if name in ("weight", "bias"):
            plain, truth = mine(plain, rows), mine(truth, rows)
        if truth.numel() == 0:
            assert ours.shape == truth.shape
            continue
        scale = max(truth.abs().max().item(), exact[name].abs().max().item())
        if dtype == torch.float64:
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12 * scale)
            continue
        # One rounding more: D in the units of the slice's softmax, where it is that of the whole one without a split.
        extra = one_more_rounding(dtype) if dtype != torch.float32 and name != "value" else 0.0
        extra += interpreter_truncation(backend, dtype, CPU) if name != "value" else 0.0
        assert_as_accurate_as_plain(ours, plain, truth, extra=extra, scale=scale)
        assert ours.dtype == plain.dtype


EAGER = [
    (dtype, "eager", kind) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) for kind in MAPS
]
TRITON = [(torch.float32, "triton", "capped"), (torch.bfloat16, "triton", "plain"), (torch.float16, "triton", "capped")]


@case(*EAGER, *TRITON)
def log_probs(dtype: torch.dtype, backend: str, kind: str) -> None:
    """Even, uneven, and fewer rows than ranks; a frozen head, a trainable one, and no gradient."""
    n = dist.get_world_size()
    heads = [
        (37, ("hidden", "weight", "bias")),
        (n - 1, ("hidden", "weight", "bias")),
        (16 * n, ("hidden",)),
        (11, ("weight",)),
        (37, ()),
    ]
    n_tokens = 4 if backend == "triton" else 9  # the interpreter takes a tenth of a second a row
    for n_vocab, trainable in heads[: 2 if backend == "triton" else None]:
        head = random_head(n_tokens, H, n_vocab, CPU, dtype, ignored=0.2)
        compare(head, None, cut(n_vocab), trainable, backend, **MAPS[kind])


@case(*EAGER)
def list_losses(dtype: torch.dtype, backend: str, kind: str) -> None:
    lists = ragged_lists(RAGGED, CPU)
    for trainable in (("hidden",), ("hidden", "weight", "bias")):
        head = random_head(lists.n_tokens, H, 41, CPU, dtype, ignored=0.1)
        compare(head, lists, cut(41), trainable, backend, **MAPS[kind])


@case((torch.bfloat16, "eager"), (torch.bfloat16, "triton"), (torch.float16, "eager"))
def wide_logits(dtype: torch.dtype, backend: str) -> None:
    head = random_head(9, H, 37, CPU, dtype, ignored=0.2)
    compare(head, None, cut(37), ("hidden", "weight", "bias"), backend, logits_dtype=torch.float32, softcap=3.0)


@case(("eager",), ("triton",))
def several_chunks(backend: str) -> None:
    """Of other lengths on each rank, since slices are."""
    rows = [1] * (dist.get_world_size() - 1) + [70]
    head = random_head(23 if backend == "eager" else 6, H, sum(rows), CPU, torch.float32, ignored=0.2)
    compare(head, None, rows, ("hidden", "weight", "bias"), backend, max_chunk_bytes=1200)


@case(("eager",))
def any_slices(backend: str) -> None:
    """Also one without a row in the middle."""
    n = dist.get_world_size()
    for rows in ([5, 0, 3, 9][:n], [0, 7, 1, 1][:n]):
        head = random_head(9, H, sum(rows), CPU, torch.float32)
        compare(head, None, rows, ("hidden", "weight", "bias"), backend, softcap=4.0)


@case(("eager",))
def a_label_that_is_ignored_lies_in_the_vocabulary(backend: str) -> None:
    """Counted from the start of a slice, other labels have its number."""
    head = random_head(40, H, 12, CPU, torch.float32)
    compare(head, None, cut(12), ("hidden", "weight", "bias"), backend, ignore_index=2)


@case(("eager",))
def all_but_certain_labels(backend: str) -> None:
    """1 − p of 1e-9 is right to its last digits, whichever slice has the label and whichever the rest.

    The entries of a row cancel to any size, so its error is measured by the largest of them.
    """
    n_vocab = 8 * dist.get_world_size()
    rows, hidden = cut(n_vocab), torch.eye(n_vocab)
    labels = torch.arange(n_vocab)
    weight = torch.randn(n_vocab, n_vocab) + 24 * torch.eye(n_vocab)
    names = ("hidden", "weight")
    head = Head(hidden, weight, torch.zeros(n_vocab), labels)
    wide = Head(hidden.double(), weight.double(), torch.zeros(n_vocab).double(), labels)
    ones = torch.ones(n_vocab)
    split = run(head, None, names, ones, rows, backend=backend)
    exact = run(wide, None, names, ones.double(), backend="reference")
    for name in names:
        truth = mine(exact[name], rows) if name == "weight" else exact[name]
        assert truth.abs().max() < 1e-6
        error = (split[name].double() - truth).abs()
        assert (error <= 3e-5 * truth.abs().amax(1, keepdim=True)).all()


@case(("eager",), ("triton",))
def far_logits(backend: str) -> None:
    """Slices a thousand apart: the share of one is 0, and nothing overflows; and one masked out by a bias of −∞."""
    n = dist.get_world_size()
    for low, labels in ((-1000.0, torch.arange(2 * n)), (-torch.inf, torch.arange(2 * n) % (2 * n - 2))):
        head = random_head(2 * n, H, 2 * n, CPU, torch.float32)
        bias = head.bias.clone()
        bias[-2:] += low
        head = head._replace(bias=bias, labels=labels)
        compare(head, None, [2] * n, ("hidden", "weight", "bias"), backend)


@case()
def no_tokens() -> None:
    head = random_head(0, H, 10, CPU, torch.float32)
    for backend in ("eager", "triton"):
        out = run(head, None, ("hidden", "weight"), torch.zeros(0), cut(10), backend=backend)
        assert out["value"].shape == (0,)
        assert not out["weight"].any()


@case()
def the_definition() -> None:
    """backend="reference" gathers the head; its second derivatives are those of the whole one."""
    rows = cut(11)
    head = random_head(5, H, 11, CPU, torch.float64, ignored=0.2)
    compare(head, None, rows, ("hidden", "weight", "bias"), "reference", softcap=3.0)
    lists = ragged_lists(((2, 3),), CPU)
    compare(head, lists, rows, ("hidden", "weight", "bias"), "reference")


@case(("eager",))
def all_ranks_hold_the_same_bits(backend: str) -> None:
    head = random_head(9, H, 37, CPU, torch.float32, ignored=0.2)
    out = run(head, None, ("hidden",), torch.randn(9), cut(37), backend=backend)
    for x in (out["value"], out["hidden"]):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x)
        assert all(torch.equal(x, other) for other in everyone)


@case((12,), (11,), (3,))
def dtensors(n_vocab: int) -> None:
    """A head as tensor parallelism has it: uneven shards, gradients as DTensors, hidden states plain or replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    head = random_head(9, H, n_vocab, CPU, torch.float32, ignored=0.2)
    upstream = torch.randn(9)
    expected = run(head, None, ("hidden", "weight", "bias"), upstream, softcap=3.0)
    for group in (mesh, dist.group.WORLD, None):
        hidden = head.hidden.clone().requires_grad_()
        weight = torch.nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))
        bias = torch.nn.Parameter(distribute_tensor(head.bias, mesh, [Shard(0)]))
        x = hidden if group is not None else DTensor.from_local(hidden, mesh, [Replicate()])
        out = pk.linear_token_log_probs(x, weight, head.labels, bias, softcap=3.0, group=group)
        (out * upstream).sum().backward()
        assert_equal_to_rounding(out.detach(), expected["value"], scale=8.0)
        assert_equal_to_rounding(hidden.grad, expected["hidden"], scale=8.0)
        for name, parameter in (("weight", weight), ("bias", bias)):
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.placements == (Shard(0),)
            assert_equal_to_rounding(parameter.grad.full_tensor(), expected[name], scale=8.0)


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier",
               "broadcast", "broadcast_object_list", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor",
               "send", "recv", "isend", "irecv", "batch_isend_irecv")  # fmt: skip


@contextmanager
def counted() -> Any:
    """Names and shapes of what is exchanged."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            shape = tuple(x.shape) if isinstance(x, Tensor) else (len(x), *x[0].shape)
            seen.append((name, shape))
            return plain[name](x, *args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield seen
    finally:
        for name, fn in plain.items():
            setattr(dist, name, fn)


@case()
def two_exchanges() -> None:
    """One without a gradient; two with, whatever is trained, and however many chunks; none in the backward pass."""
    rows, n = cut(37), dist.get_world_size()
    lists = ragged_lists(RAGGED, CPU)
    head = random_head(lists.n_tokens, H, 37, CPU, torch.float32, ignored=0.2)
    for trainable in ((), ("hidden",), ("hidden", "weight", "bias")):
        for options in ({}, {"max_chunk_bytes": 1000}):
            with counted() as seen, nullcontext() if trainable else torch.no_grad():
                run(head, lists, trainable, torch.ones(()), rows, **options)
            exchange = ("all_gather", (n, 5, lists.n_tokens + 2))  # 3 of them where values are not checked
            assert seen == [exchange, ("all_reduce", (lists.n_tokens, H))][: 2 if trainable else 1], seen


@case()
def on_a_device() -> None:
    """Where values are not looked at, three numbers a token are exchanged, and what does not fit is NaN."""
    from unittest import mock

    n = dist.get_world_size()
    head = random_head(9, H, 12, CPU, torch.float32, ignored=0.2)
    with mock.patch.object(pk.checks, "values_are_checked", return_value=False):
        with counted() as seen:
            compare(head, None, cut(12), ("hidden",), "eager")
        assert seen[0] == ("all_gather", (n, 3, 10))
        labels = head.labels.clone()
        labels[3], labels[4] = 12, -7
        for trainable in (("hidden",), ("hidden", "weight")):
            out = run(head._replace(labels=labels), None, trainable, torch.ones(9), cut(12))
            assert out["value"].isnan().tolist() == [i in (3, 4) for i in range(9)]
            assert out["hidden"][3:5].isnan().all()
        unfit = head.weight[: 3 + (dist.get_rank() == 1)]
        assert (
            pk.linear_token_log_probs(head.hidden, unfit, head.labels.clamp(max=0), group=dist.group.WORLD)[
                head.labels >= 0
            ]
            .isnan()
            .all()
        )


def refused(kind: type[Exception], *words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


@case(("eager",), ("reference",))
def errors(backend: str) -> None:
    """On every rank, so that none waits for another."""
    world, rank, n = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    head = random_head(9, H, 4 * n, CPU, torch.float32)
    weight, odd = mine(head.weight, [4] * n), rank == 1

    def call(**changes: Any) -> Tensor:
        given = {"hidden": head.hidden, "weight": weight, "labels": head.labels, "group": world, "backend": backend}
        return pk.linear_token_log_probs(**given | changes)

    call()
    held = [4, 3, *[4] * (n - 2)]
    refused(ValueError, "weight", str(held), "VocabSlices", call=lambda: call(weight=weight[: 3 if odd else 4]))
    refused(ValueError, "labels", f"[0, {4 * n})", call=lambda: call(labels=head.labels + 4 * n))
    refused(ValueError, "group.rows", "4 at rank", call=lambda: call(group=pk.VocabSlices(world, [5] * n)))
    refused(ValueError, "group.rows", call=lambda: call(group=pk.VocabSlices(world, [4] * (n + 1))))
    refused(TypeError, "group", "ProcessGroup", "got str", call=lambda: call(group="tp"))
    refused(ValueError, "bias", "[4]", call=lambda: call(bias=head.bias))
    if backend == "reference":
        return
    noise = torch.randn(9, H) if odd else head.hidden
    refused(ValueError, "hidden", "same on every rank", "FSDP", call=lambda: call(hidden=noise))
    shifted = head.labels.roll(1) if odd else head.labels
    refused(ValueError, "labels", "same on every rank", call=lambda: call(labels=shifted))
    one_wrong = head.labels.masked_fill(torch.arange(9) == 4, 4 * n) if odd else head.labels
    refused(ValueError, "labels", call=lambda: call(labels=one_wrong))
    width = H - odd
    refused(ValueError, "H = ", call=lambda: call(hidden=head.hidden[:, :width], weight=weight[:, :width]))
    dtype = torch.bfloat16 if odd else torch.float32
    refused(ValueError, "dtype", "bfloat16", call=lambda: call(hidden=head.hidden.to(dtype), weight=weight.to(dtype)))
    asks = head.hidden.clone().requires_grad_(odd)
    refused(ValueError, "gradient of hidden", call=lambda: call(hidden=asks))
    call()


@case()
def errors_of_dtensors() -> None:
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    head = random_head(9, H, 4 * n, CPU, torch.float32)
    weight = distribute_tensor(head.weight, mesh, [Shard(0)])

    def call(**changes: Any) -> Tensor:
        return pk.linear_token_log_probs(**{"hidden": head.hidden, "weight": weight, "labels": head.labels} | changes)

    refused(TypeError, "weight", "DTensor", "forward", "group=weight.device_mesh", call=call)
    for placement in (Shard(1), Replicate()):
        other = distribute_tensor(head.weight, mesh, [placement])
        refused(ValueError, "weight", "Shard(0)", call=lambda other=other: call(weight=other, group=mesh))
    sharded = distribute_tensor(head.hidden, mesh, [Shard(0)])
    refused(ValueError, "hidden", "Replicate()", call=lambda: call(hidden=sharded))
    replicated = distribute_tensor(head.bias, mesh, [Replicate()])
    refused(ValueError, "bias", "Shard(0)", call=lambda: call(bias=replicated, group=mesh))
    rows = pk.VocabSlices(mesh, [n * 4] + [0] * (n - 1))
    refused(ValueError, "group.rows", "left out", call=lambda: call(group=rows))
    grid = DeviceMesh("cpu", torch.arange(n).view(1, n))
    refused(ValueError, "group", "one dimension", call=lambda: call(group=grid))
    few = dist.new_group([0])
    if dist.get_rank() == 0:
        refused(ValueError, "group", "ranks", call=lambda: call(group=few))
    else:
        refused(TypeError, "group", call=lambda: call(group=few))


@case()
def modules_and_reductions() -> None:
    lists = ragged_lists(RAGGED, CPU)
    head = random_head(lists.n_tokens, H, 10, CPU, torch.float32)
    for reduction in ("mean", "sum", "none"):
        upstream = torch.randn(len(RAGGED)) if reduction == "none" else torch.randn(())
        ours, whole = (
            run(head, lists, ("hidden", "weight"), upstream, rows, reduction=reduction) for rows in (cut(10), None)
        )
        assert_equal_to_rounding(ours["value"], whole["value"])
        assert_equal_to_rounding(ours["weight"], mine(whole["weight"], cut(10)))
    loss = pk.LinearPerPOLoss(reduction="sum", group=slices(cut(10)))
    packed = {"labels": head.labels, **lists._asdict()}
    out = loss(head.hidden, mine(head.weight, cut(10)), **packed)
    expected = pk.linear_perpo_loss(head.hidden, head.weight, reduction="sum", **packed)
    assert_equal_to_rounding(out.loss, expected.loss)
    assert_equal_to_rounding(out.log_probs, expected.log_probs, scale=16.0)
    assert out.metrics.keys() == expected.metrics.keys()


@case()
def autocast_and_accumulation() -> None:
    rows = cut(10)
    head = random_head(9, H, 10, CPU, torch.float32)
    hidden, weight = head.hidden.clone().requires_grad_(), mine(head.weight, rows).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = pk.linear_token_log_probs(hidden, weight, head.labels, group=slices(rows)).sum()
        whole = pk.linear_token_log_probs(head.hidden, head.weight, head.labels).sum()
    assert_equal_to_rounding(out.detach(), whole, scale=32.0)
    out.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    out.backward()
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


@case()
def compiled() -> None:
    """With fullgraph, whatever says which slice this is; a gradient of every tensor."""
    mesh = init_device_mesh("cpu", (2,))
    head = random_head(9, H, 10, CPU, torch.float32, ignored=0.2)
    for group, rows in ((pk.VocabSlices(dist.group.WORLD, [6, 4]), [6, 4]), (dist.group.WORLD, [5, 5]), (mesh, [5, 5])):

        def value(hidden: Tensor, weight: Tensor, group: Any = group) -> Tensor:
            log_probs = pk.linear_token_log_probs(2 * hidden, weight, head.labels, softcap=3.0, group=group)
            return log_probs.square().sum()

        grads = []
        for fn in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
            leaves = head.hidden.clone().requires_grad_(), mine(head.weight, rows).requires_grad_()
            fn(*leaves).backward()
            grads.append([x.grad for x in leaves])
        for ours, plain in zip(*grads, strict=True):
            torch.testing.assert_close(ours, plain)


@case()
def a_model_of_transformers() -> None:
    """Loaded under its tp_plan, whose head is a DTensor: the loss and every gradient are those of the whole model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    import perpo

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    whole = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    whole.save_pretrained(folder[0])  # the first rank's
    dist.barrier()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    rank, n = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n})  # as torchrun does
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    split = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=plan, device_mesh=mesh)
    assert isinstance(split.lm_head.weight, DTensor)
    ids = torch.randint(50, (4, 12))
    ids[:, :7] = ids[0, :7]
    labels = ids.masked_fill(torch.arange(12) < 7, -100)
    results = []
    for model in (split, whole):
        with torch.no_grad():
            ref = perpo.sequence_log_probs(model, {"input_ids": ids}, labels)
        rewards = torch.tensor([0.9, 0.1, 0.5, 0.2])
        given = {"num_candidates": 4, "ref_log_probs": ref - torch.arange(4.0)}
        out = perpo.list_loss(model, {"input_ids": ids}, labels, rewards, **given)
        out.loss.backward()
        results.append((ref, out.loss.detach(), out.log_probs))
    torch.testing.assert_close(*results)
    for (name, ours), theirs in zip(split.named_parameters(), whole.parameters(), strict=True):
        grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=1e-4, atol=1e-6 * theirs.grad.abs().max().item(), msg=name)


def names(n_ranks: int) -> list[str]:
    """The cases of so many ranks: the two slow ones on two."""
    return [name for name in CASES if n_ranks == 2 or name not in ("compiled", "a_model_of_transformers")]


def _rank(rank: int, n_ranks: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks, timeout=timedelta(minutes=2)
    )
    for name in names(n_ranks):
        torch.manual_seed(0)
        error = ""
        try:
            CASES[name]()
        except Exception:
            error = traceback.format_exc()
        results.put((name, rank, error))
        if error and "gloo" in error.lower():
            break  # ranks are no longer in step
    dist.destroy_process_group()


def launch(n_ranks: int, store: str) -> dict[str, list[str]]:
    """Run all cases on n ranks. -> the errors of each case, "" for none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by each rank
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, n_ranks, store, results), daemon=True) for r in range(n_ranks)]
    for process in ranks:
        process.start()
    outcome: dict[str, list[str]] = {}
    while any(process.is_alive() for process in ranks) or not results.empty():
        try:
            name, rank, error = results.get(timeout=0.5)
        except queue.Empty:
            continue
        outcome.setdefault(name, []).append(error and f"rank {rank}: {error}")
    return outcome
