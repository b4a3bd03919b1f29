"""Under torchrun: gradients through FSDP2 equal those without it. Exits with an error if they do not."""

import copy
import os
from functools import partial
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from perpo.data.record import ListRecord
from perpo.encoding.batch import ListBatch
from perpo.encoding.collator import ListCollator
from perpo.encoding.encoder import Encoder
from perpo.model import sharing
from perpo.model.language_head import accept_rows, perpo_output
from tests.perpo import tiny_models


def backward(model: Any, batch: ListBatch) -> torch.Tensor:
    call = partial(perpo_output, batch=batch)
    loss = model(**batch.keywords, head_call=call).loss
    loss.backward()
    return loss


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model)
    image = tiny_models.picture((40, 28), dist.get_rank())  # every rank has a list of its own
    record = ListRecord("r", image, "Where?", responses=("[1]", "[2, 3]"), rewards=(1.0, 0.0))
    accept_rows(model)
    positions = sharing.prepare(model, "on")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for head_apart in (False, True):
        batch = ListCollator(encoder, positions=positions if head_apart else None)([record])
        plain, sharded = copy.deepcopy(model), copy.deepcopy(model)
        for layer in sharded.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        if head_apart:
            fully_shard(sharded.lm_head, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        torch.testing.assert_close(backward(sharded, batch), backward(plain, batch))
        for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            dist.all_reduce(expected)
            got = torch.zeros_like(theirs) if ours.grad is None else ours.grad.full_tensor()
            torch.testing.assert_close(got, expected / dist.get_world_size(), rtol=1e-4, atol=1e-6, msg=name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
