"""Under torchrun: `perpo.list_loss` through DDP, FSDP2 or ZeRO-3 equals the loss through logits of a whole model.

Every rank has lists of its own, so gradients are compared with their mean over the ranks. Exits with an error if they
are not equal.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import perpo

from .padded_batches import CU_LISTS, batch, plain_log_probs, plain_loss
from .test_list_loss import model_of


def mean_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(found[name])
            found[name] /= dist.get_world_size()
    return found


def check(kind: str, wrapping: str) -> None:
    whole, data = model_of(kind), batch(seed=dist.get_rank())
    model = copy.deepcopy(whole)
    if wrapping == "ddp":
        called: Any = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in core.model.layers:
            fully_shard(layer, mesh=mesh)
        if wrapping == "fsdp2, head apart":
            fully_shard(core.lm_head, mesh=mesh)
        called = fully_shard(model, mesh=mesh)
    out = perpo.list_loss(called, **data, cu_lists=CU_LISTS)
    out.loss.backward()
    log_probs = plain_log_probs(whole, data["inputs"], data["labels"])
    loss = plain_loss(log_probs, data["rewards"])
    torch.testing.assert_close(out.loss, loss, rtol=1e-7, atol=1e-7)  # rewards are fp32
    torch.testing.assert_close(out.log_probs, log_probs.detach(), rtol=1e-11, atol=1e-11)
    plain = mean_gradients(whole, loss)
    for name, p in model.named_parameters():
        if p.requires_grad:
            ours = torch.zeros_like(p) if p.grad is None else p.grad
            ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
            torch.testing.assert_close(ours, plain[name], rtol=1e-6, atol=1e-7, msg=f"{kind} {wrapping} {name}")
    with torch.no_grad():
        refs = perpo.sequence_log_probs(called, data["inputs"], data["labels"])
    torch.testing.assert_close(refs, out.log_probs)
    print("equal", kind, wrapping, flush=True)


def check_dtypes() -> None:
    """What accelerate sets for FSDP2 under mixed precision turns outputs into bf16."""
    model = model_of("llama").float()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    data = batch()
    assert model(**data["inputs"]).logits.dtype == torch.bfloat16
    log_probs = perpo.sequence_log_probs(model, data["inputs"], data["labels"])
    out = perpo.list_loss(model, **data, cu_lists=CU_LISTS, ref_log_probs=log_probs.detach())
    (out.loss + log_probs.sum()).backward()
    assert out.loss.dtype == out.log_probs.dtype == log_probs.dtype == torch.float32
    assert not torch.equal(log_probs, log_probs.bfloat16())
    assert out.scores.abs().max() < 1e-4
    assert all(p.grad is not None for p in model.parameters())
    print("equal dtypes", flush=True)


def check_zero_3() -> None:
    import deepspeed

    # It would compile C++ for collectives in shared memory.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    whole, data = model_of("llama").float(), batch(seed=dist.get_rank())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model = copy.deepcopy(whole)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=settings
    )
    out = perpo.list_loss(engine, **data, cu_lists=CU_LISTS)
    engine.backward(out.loss)
    loss = plain_loss(plain_log_probs(whole, data["inputs"], data["labels"]), data["rewards"])
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    plain = mean_gradients(whole, loss)
    for name, p in model.named_parameters():
        ours = deepspeed.utils.safe_get_full_grad(p)
        torch.testing.assert_close(ours, plain[name], rtol=1e-4, atol=1e-5, msg=name)
    print("equal zero3", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo")
    if sys.argv[1:] == ["zero3"]:
        check_zero_3()
    else:
        check("llama", "ddp")
        check("lora on the head", "ddp")
        check("soft cap", "fsdp2")
        check("tied", "fsdp2")
        check("modules_to_save", "fsdp2, head apart")
        check_dtypes()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
