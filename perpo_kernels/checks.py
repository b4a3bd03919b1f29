"""Argument checks: each error names the argument, what was expected and what came.

The public functions check what the host knows (types, shapes, dtypes, devices), and never wait for a device. The
operators check values, at the end of this file: on the CPU always, on a device only with PERPO_CHECK=1.
"""

import math
import os

import torch
from torch import Tensor

from perpo_kernels.backends import BACKENDS
from perpo_kernels.objectives import Objective
from perpo_kernels.problem import PERPO, ListProblem, LogitMap

LARGEST = (1 << 63) - 1  # integer that an operator takes
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape(x: Tensor) -> str:
    return f"{list(x.shape)}"


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a tensor that is whole on this device, got a DTensor (as FSDP2 has it "
            f"outside the module's forward); use perpo.list_loss, which calls the model as a whole, compute the loss "
            f"inside forward, or pass {name}.full_tensor(). A head whose rows tensor parallelism has split, over ranks "
            f"with the same hidden states, goes with group=weight.device_mesh"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a tensor of layout {x.layout} (sparse); use {name}.to_dense()")


def floating(name: str, x: Tensor) -> None:
    tensor(name, x)
    if x.dtype not in FLOATS:
        hint = "" if x.dtype.is_floating_point or x.dtype.is_complex else f"; use {name}.float()"
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}{hint}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")


def positive(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def index(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if abs(value) > LARGEST:
        raise ValueError(f"{name} must lie within ±2^63, got {value}")


def backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def same_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, where the other tensors are, got {x.device}")


def labels(x: Tensor, shape: torch.Size, of: str, device: torch.device) -> None:
    tensor("labels", x)
    if x.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {x.dtype}; use labels.long()")
    if x.shape != shape:
        raise ValueError(
            f"labels must have the shape {of} = {list(shape)}, got {_shape(x)}; "
            "labels[t] is the target of position t, nothing is shifted here"
        )
    same_device("labels", x, device)


def padded_labels(x: Tensor) -> None:
    tensor("labels", x)
    if x.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {x.dtype}; use labels.long()")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"labels must be [B, L], a row for every answer, got {_shape(x)}")


# Kinds of devices that have an autocast; asking the others whether it is on is an error. Asked for here, since before
# torch 2.13 a compiler cannot follow the call.
WITH_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(kind)
)


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check them against each other and apply autocast, as torch.nn.functional.linear would."""
    floating("hidden", hidden)
    floating("weight", weight)
    if weight.shape == (0,):
        raise ValueError(
            "weight must be [V, H], got [0]: a weight that is sharded (ZeRO-3 leaves an empty one on every rank); "
            "use perpo.list_loss, which calls the model as a whole, or compute the loss inside the module's forward, "
            "or under deepspeed.zero.GatheredParameters(weight)"
        )
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V, H], got {_shape(weight)}")
    if packed and hidden.dim() != 2:
        raise ValueError(f"hidden must be packed [T, H], got {_shape(hidden)}; gather the response positions first")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be [V, H] with H = hidden.shape[-1] = {hidden.shape[-1]}, got {_shape(weight)}")
    same_device("weight", weight, hidden.device)
    if bias is not None:
        floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {_shape(bias)}")
        same_device("bias", bias, hidden.device)
    device = hidden.device.type
    if device in WITH_AUTOCAST and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {x.dtype}; "
                "cast one of them or use torch.autocast"
            )
    return hidden, weight, bias


def logit_map(temperature: float, softcap: float | None, logit_scale: float, ignore_index: int) -> LogitMap:
    positive("temperature", temperature)
    positive("logit_scale", logit_scale)
    if softcap is not None:
        positive("softcap", softcap)
    index("ignore_index", ignore_index)
    return LogitMap(float(temperature), None if softcap is None else float(softcap), float(logit_scale), ignore_index)


def chunk_bytes(value: int | None) -> int:
    """0 stands for the default of the device."""
    if value is None:
        return 0
    if isinstance(value, bool):
        raise TypeError("max_chunk_bytes must be a positive integer or None, got a bool")
    if not isinstance(value, int) or not 0 < value <= LARGEST:
        raise ValueError(f"max_chunk_bytes must be a positive integer or None, below 2^63, got {value!r}")
    return value


def logits_dtype(value: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """None stands for the dtype of the head."""
    if value is None or value == dtype:
        return dtype
    if value != torch.float32 or dtype == torch.float64:
        raise ValueError(f"logits_dtype must be torch.float32 or None for a head of {dtype}, got {value!r}")
    return value


def reduction(value: str) -> None:
    if value not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {value!r}")


def objective(given: Objective | None, beta: float | None, gamma: float | None) -> Objective:
    """The objective that a call asks for; beta and gamma are PerPO's, with the published defaults."""
    if given is None and beta is gamma is None:
        return PERPO
    if given is None:
        return Objective(Objective.beta if beta is None else beta, Objective.gamma if gamma is None else gamma)
    if not isinstance(given, Objective):
        hint = "; call the preset: objectives.dpo()" if callable(given) or isinstance(given, str) else ""
        raise TypeError(f"objective must be a perpo_kernels.objectives.Objective, got {type(given).__name__}{hint}")
    for name, value in (("beta", beta), ("gamma", gamma)):
        if value is not None:
            raise ValueError(f"{name} and objective are both given: an Objective holds its own {name}, set it there")
    return given


def objective_data(p: ListProblem) -> None:
    """What the objective takes and what was given fit together."""
    target = p.objective
    if p.ref_log_probs is not None and not target.reference:
        raise ValueError("ref_log_probs must be None: this objective is defined without a reference model")
    if (target.pairs == "given") != (p.pair_weights is not None):
        raise ValueError(
            f"pair_weights go with pairs='given' and nothing else; the objective has pairs={target.pairs!r} and "
            f"pair_weights {'is None' if p.pair_weights is None else 'were given'}"
        )
    if target.pointwise == "clipped" and p.ref_log_probs is None:
        raise ValueError(
            "ref_log_probs must be given: this objective takes ratios to the policy that sampled the answers, so its "
            "log-probs; right after sampling, when all ratios are 1, grpo with length_normalized=True has its gradient"
        )
    if p.delta is not None:
        _delta(p.delta, p.rewards.device)
        if target.pointwise != "bco":
            raise ValueError(f"delta is of pointwise='bco' alone, and the objective has pointwise={target.pointwise!r}")
    if p.list_weights is not None:
        _list_weights(p.list_weights, p.cu_lists.numel() - 1, p.rewards.device)
    if target.flips and p.flip_probs is None:
        raise ValueError("flip_probs must be given: this objective takes the probability of a flip of each candidate")
    if p.flip_probs is not None and (target.link != "logistic" or target.pairs == "none"):
        raise ValueError("flip_probs soften the logistic link of pairs, which this objective does not have")


def _delta(x: Tensor, device: torch.device) -> None:
    tensor("delta", x)
    if x.dtype not in FLOATS or x.numel() != 1 or x.dim() > 1:
        raise ValueError(f"delta must be one float, of shape [] or [1], got {x.dtype} of shape {_shape(x)}")
    _constant("delta", x)
    same_device("delta", x, device)


def _list_weights(x: Tensor, n_lists: int, device: torch.device) -> None:
    floating("list_weights", x)
    _constant("list_weights", x)
    if x.shape != (n_lists,):
        raise ValueError(f"list_weights must be [G] = [{n_lists}], one number a list, got {_shape(x)}")
    same_device("list_weights", x, device)


def pair_weights(x: Tensor | None, cu_lists: Tensor, device: torch.device, k: int = 0) -> None:
    if x is None:
        return
    floating("pair_weights", x)
    _constant("pair_weights", x)
    same_device("pair_weights", x, device)
    n_lists = cu_lists.numel() - 1
    if x.dim() != 3 or x.shape[0] != n_lists or x.shape[1] != x.shape[2]:
        raise ValueError(f"pair_weights must be [G, k, k] with G = {n_lists} lists, got {_shape(x)}")
    if x.shape[1] < k:
        raise ValueError(f"pair_weights must be [G, k, k] with k at least {k}, the longest list, got {_shape(x)}")


def token_weights(x: Tensor | None, labels: Tensor) -> None:
    if x is None:
        return
    floating("token_weights", x)
    _constant("token_weights", x)
    if x.shape != labels.shape:
        raise ValueError(f"token_weights must have the shape of labels, {_shape(labels)}, got {_shape(x)}")
    same_device("token_weights", x, labels.device)


def _constant(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: the loss takes it as a constant; pass {name}.detach()")


def layout(name: str, x: Tensor, device: torch.device) -> None:
    """A layout lies on the CPU, or on the device of the other tensors."""
    tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {x.dtype}")
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"{name} must be one-dimensional with at least the element 0, got {_shape(x)}")
    if x.device.type != "cpu":
        same_device(name, x, device)
    elif device.type == "cuda" and not torch.compiler.is_compiling() and _is_capturing():
        raise ValueError(
            f"{name} must be on {device} while a CUDA graph is captured, got one on the CPU: the graph would read the "
            f"same address at every replay; use {name}.to({str(device)!r})"
        )


def _is_capturing() -> bool:
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # fake tensors of a GPU, by a PyTorch built without
        return False


def sequences(log_probs: Tensor, cu_lists: Tensor | None) -> None:
    """Log-probs of whole responses are padded, or packed with a layout."""
    floating("log_probs", log_probs)
    if cu_lists is None:
        if log_probs.dim() != 2:
            raise ValueError(
                f"log_probs must be [G, k], or [S] together with cu_lists; got {_shape(log_probs)} without cu_lists"
            )
        return
    layout("cu_lists", cu_lists, log_probs.device)
    if log_probs.dim() != 1:
        raise ValueError(f"log_probs must be packed [S] when cu_lists is given, got {_shape(log_probs)}")


def candidates(p: ListProblem, shape: torch.Size, expected: str, device: torch.device) -> None:
    """What a problem holds for each candidate has this shape; `expected` says so."""
    tensor("rewards", p.rewards)
    constants = {"rewards": p.rewards, "ref_log_probs": p.ref_log_probs, "flip_probs": p.flip_probs}
    for name, x in constants.items():
        if x is not None:
            floating(name, x)
            _constant(name, x)
    for name, x in {**constants, "valid": p.valid, "lengths": p.lengths}.items():
        if x is not None:
            tensor(name, x)
            if x.shape != shape:
                raise ValueError(f"{name} must {expected}, got {_shape(x)}")
            same_device(name, x, device)
    if p.lengths is not None:
        _constant("lengths", p.lengths)
        if p.lengths.dtype == torch.bool or p.lengths.dtype.is_complex:
            raise TypeError(f"lengths must be numbers of tokens, got {p.lengths.dtype}")
    if p.valid is not None and p.valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {p.valid.dtype}")


# ---------------------------------------------------------------------------------------------------- checks of values


def values_are_checked(x: Tensor) -> bool:
    """Whether the values of x may be looked at: on the CPU always; on a device, which it would stall, on request."""
    return x.device.type == "cpu" or os.environ.get("PERPO_CHECK", "0") not in ("", "0")


def label_values(labels: Tensor, n_vocab: int, ignore_index: int) -> None:
    if not values_are_checked(labels):
        return
    wrong = ((labels < 0) | (labels >= n_vocab)) & (labels != ignore_index)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels must lie in [0, {n_vocab}) or be ignore_index={ignore_index}; "
            f"{int(wrong.sum())} do not, the first is {int(labels[tuple(at)])} at {at}"
        )


def list_values(p: ListProblem, n_log_probs: int) -> None:
    """The values of a problem whose log-probs have this length."""
    cumulative_values("cu_lists", p.cu_lists, p.rewards.numel(), "candidates")
    if p.cu_seqlens is not None:
        cumulative_values("cu_seqlens", p.cu_seqlens, n_log_probs, "tokens")
    if p.pair_weights is not None and p.cu_lists.numel() > 1 and values_are_checked(p.cu_lists):
        pair_weights(p.pair_weights, p.cu_lists, p.pair_weights.device, int(p.cu_lists.diff().max()))
    if p.lengths is not None and values_are_checked(p.lengths):
        _values("lengths", p.lengths, (p.lengths >= 0) & (p.lengths < math.inf), "be finite numbers of tokens >= 0")
    if p.flip_probs is not None and values_are_checked(p.flip_probs):
        right = (p.flip_probs >= 0) & (p.flip_probs <= 1)
        _values("flip_probs", p.flip_probs, right, "be probabilities in [0, 1]")
    if p.list_weights is not None and values_are_checked(p.list_weights):
        right = (p.list_weights >= 0) & (p.list_weights < math.inf)
        _values("list_weights", p.list_weights, right, "be finite and >= 0")
    if p.delta is not None and values_are_checked(p.delta):
        _values("delta", p.delta, p.delta.isfinite(), "be finite")


def _values(name: str, x: Tensor, right: Tensor, expected: str) -> None:
    wrong = ~right.flatten()
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must {expected}, got {x.flatten()[at].item()} at {at}")


def cumulative_values(name: str, counts: Tensor, total: int, of: str) -> None:
    if not values_are_checked(counts):
        return
    values = counts.tolist()
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the number of {of}, {total}; got "
            f"{values if len(values) <= 16 else f'{values[:8]} … {values[-4:]}'}"
        )
