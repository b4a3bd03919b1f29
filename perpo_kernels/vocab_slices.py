"""Which rows of a head's weight each rank of a process group holds, from what a caller has: a group, or a DTensor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class VocabSlices(NamedTuple):
    """The `group` of the linear losses where ranks hold different numbers of rows; a group alone stands for equal ones.

    Rank r of the group holds rows[r] rows of the weight [V, H] (and of the bias), those after the rows of ranks before
    it; 0 is a number too. `rows` is the same on every rank.
    """

    group: "ProcessGroup | DeviceMesh"
    rows: Sequence[int]


Group = Union["ProcessGroup", "DeviceMesh", VocabSlices, None]


class Slice(NamedTuple):
    """This rank's place in the vocabulary, as an operator takes it."""

    rows: list[int]  # of all ranks
    rank: int
    group: str  # its name

    @property
    def start(self) -> int:
        return sum(self.rows[: self.rank])

    @property
    def n_vocab(self) -> int:
        return sum(self.rows)

    @property
    def process_group(self) -> "ProcessGroup":
        name: Any = self.group  # a GroupName, which is a str
        return dist.distributed_c10d._resolve_process_group(name)


def take_slice(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group
) -> tuple[Tensor, Tensor, Tensor | None, Slice | None]:
    """hidden, weight and bias as plain tensors of this rank, and the slice; None where the weight is whole.

    A DTensor with Shard(0) is such a slice if its mesh is one of tensor parallelism, over which hidden states are the
    same. FSDP2 shards a weight in the same way over ranks that have different data, and nothing about the weight tells.
    So one has to be told: by `group`, or by `hidden`, a DTensor that is replicated over the same mesh.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
    """
    if group is None and not (_is_dtensor(weight) and _is_dtensor(hidden)):
        return hidden, weight, bias, None
    rows = None
    if isinstance(group, VocabSlices):
        rows = [int(n) for n in group.rows]
        group = group.group
    process_group = None if group is None else _process_group("group", group)
    if _is_dtensor(weight):
        process_group, rows = _sharded(weight, process_group, rows)
        hidden, bias = _replicated(hidden, weight), _with_the_weight(bias, weight)
        weight = weight.to_local()  # type: ignore[attr-defined]  # a DTensor
    assert process_group is not None
    rank, n_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ValueError("group must be one that this rank is a member of")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return hidden, weight, bias, None  # what is wrong with it is said by `checks.head`
    rows = [weight.shape[0]] * n_ranks if rows is None else rows
    if len(rows) != n_ranks or min(rows) < 0 or rows[rank] != weight.shape[0]:
        raise ValueError(
            f"group.rows must be the number of rows of weight on each of {n_ranks} ranks, with "
            f"{weight.shape[0]} at rank {rank}, got {rows}"
        )
    place = Slice(rows, rank, process_group.group_name)
    return hidden, weight, bias, None if n_ranks == 1 else place


def unequal(rows: Sequence[int]) -> ValueError:
    """The error of ranks that see the vocabulary cut in different ways."""
    return ValueError(
        f"weight must be [V_r, H] with as many rows as group says, equally many on every rank if it says nothing; the "
        f"ranks hold {list(rows)}: use group=VocabSlices(group, rows={list(rows)}) on every rank"
    )


# ---------------------------------------------------------------------------------------------------------- details


def _is_dtensor(x: object) -> bool:
    return type(x).__name__ == "DTensor"


def _process_group(name: str, group: Any) -> "ProcessGroup":
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{name} needs torch.distributed.init_process_group on every rank before this call")
    if isinstance(group, dist.ProcessGroup):
        return group
    if not isinstance(group, dist.DeviceMesh):
        raise TypeError(f"{name} must be a ProcessGroup, a DeviceMesh, VocabSlices or None, got {type(group).__name__}")
    if group.ndim != 1:
        raise ValueError(
            f"{name} must be a mesh of one dimension, that of tensor parallelism (mesh['tp']), got {group}"
        )
    return group.get_group()


def _sharded(weight: Any, group: "ProcessGroup | None", rows: list[int] | None) -> tuple["ProcessGroup", list[int]]:
    """Group and rows of a DTensor: ⌈V / n⌉ rows on each rank while there are any."""
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"weight must be a DTensor with the placement Shard(0) on a mesh of one dimension, got {placements} on "
            f"{mesh}; use weight.redistribute(placements=[Shard(0)]) or weight.full_tensor()"
        )
    of_mesh = _process_group("weight.device_mesh", mesh)
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(of_mesh):
        raise ValueError(
            f"group must have the ranks of weight.device_mesh, {dist.get_process_group_ranks(of_mesh)}, got "
            f"{dist.get_process_group_ranks(group)}; use group=weight.device_mesh"
        )
    n_vocab, n = weight.shape[0], mesh.size()
    most = -(-n_vocab // n)
    held = [min(most, max(n_vocab - r * most, 0)) for r in range(n)]
    if rows is not None and rows != held:
        raise ValueError(f"group.rows must be left out for a DTensor, which has {held} rows on the ranks, got {rows}")
    return of_mesh, held


def _replicated(hidden: Any, weight: Any) -> Tensor:
    if not _is_dtensor(hidden):
        return hidden
    if hidden.device_mesh != weight.device_mesh or not hidden.placements[0].is_replicate():
        raise ValueError(
            f"hidden must be a plain tensor, the same on every rank, or a DTensor with the placement Replicate() on "
            f"the mesh of weight, {weight.device_mesh}; got {hidden.placements} on {hidden.device_mesh}"
        )
    return hidden.to_local()


def _with_the_weight(bias: Any, weight: Any) -> Tensor | None:
    if not _is_dtensor(bias):
        return bias
    if bias.device_mesh != weight.device_mesh or not bias.placements[0].is_shard(0):
        raise ValueError(
            f"bias must be sharded as weight is, Shard(0) on {weight.device_mesh}, got {bias.placements} on "
            f"{bias.device_mesh}"
        )
    return bias.to_local()


# ------------------------------------------------------------------------------------------------------ the definition


class _Whole(torch.autograd.Function):
    """The rows of all ranks; backward, of a gradient that all ranks have, this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Slice) -> Tensor:
        ctx.place = place
        most = max(place.rows)
        sent = x.new_zeros(most, *x.shape[1:])
        sent[: len(x)] = x
        received = [torch.empty_like(sent) for _ in place.rows]
        dist.all_gather(received, sent, group=place.process_group)
        return torch.cat([part[:n] for part, n in zip(received, place.rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        place = ctx.place
        return grads[0][place.start : place.start + place.rows[place.rank]], None


def whole(x: Tensor, place: Slice) -> Tensor:
    """The weight [V, H] or bias [V] of which each rank holds a slice: what backend="reference" takes."""
    held = torch.zeros(len(place.rows), 1, dtype=torch.int64, device=x.device)
    dist.all_gather(list(held), held.new_full((1,), len(x)), group=place.process_group)
    if held.flatten().tolist() != place.rows:
        raise unequal(held.flatten().tolist())
    result: Tensor = _Whole.apply(x, place)
    return result
