"""Argument checks of the public functions: each error names the argument, what was expected and what came.

Only what the host knows is looked at here (types, shapes, dtypes, devices), so a check never waits for a device.
"""

import math

import torch
from torch import Tensor

from perpo_kernels.backends import BACKENDS, LogitMap
from perpo_kernels.objectives import Objective

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape(x: Tensor) -> str:
    return f"{list(x.shape)}"


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def floating(name: str, x: Tensor) -> None:
    tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
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


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check them against each other and apply autocast, as torch.nn.functional.linear would."""
    floating("hidden", hidden)
    floating("weight", weight)
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
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
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
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"max_chunk_bytes must be a positive integer or None, got {value!r}")
    return value


def reduction(value: str) -> None:
    if value not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {value!r}")


def objective(given: Objective | None, beta: float | None, gamma: float | None) -> Objective:
    """The objective that a call asks for; beta and gamma are PerPO's, with the published defaults."""
    if given is None:
        return Objective(0.1 if beta is None else beta, 0.5 if gamma is None else gamma)
    if not isinstance(given, Objective):
        hint = "; call the preset: objectives.dpo()" if callable(given) or isinstance(given, str) else ""
        raise TypeError(f"objective must be a perpo_kernels.objectives.Objective, got {type(given).__name__}{hint}")
    for name, value in (("beta", beta), ("gamma", gamma)):
        if value is not None:
            raise ValueError(f"{name} and objective are both given: an Objective holds its own {name}, set it there")
    return given


def needs(
    target: Objective, ref_log_probs: Tensor | None, pair_weights: Tensor | None, flip_probs: Tensor | None
) -> None:
    """What the objective takes and what was given fit together."""
    if ref_log_probs is not None and not target.reference:
        raise ValueError("ref_log_probs must be None: this objective is defined without a reference model")
    if (target.pairs == "given") != (pair_weights is not None):
        raise ValueError(
            f"pair_weights go with pairs='given' and nothing else; the objective has pairs={target.pairs!r} and "
            f"pair_weights {'is None' if pair_weights is None else 'were given'}"
        )
    if target.flips and flip_probs is None:
        raise ValueError("flip_probs must be given: this objective takes the probability of a flip of each candidate")
    if flip_probs is not None and (target.link != "logistic" or target.pairs == "none"):
        raise ValueError("flip_probs soften the logistic link of pairs, which this objective does not have")


def pair_weights(x: Tensor | None, cu_lists: Tensor, k: int = 0) -> None:
    if x is None:
        return
    floating("pair_weights", x)
    _constant("pair_weights", x)
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


def _cumulative(name: str, x: Tensor) -> None:
    tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {x.dtype}")
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"{name} must be one-dimensional with at least the element 0, got {_shape(x)}")


def lists(
    log_probs: Tensor,
    rewards: Tensor,
    ref_log_probs: Tensor | None,
    cu_lists: Tensor | None,
    valid: Tensor | None,
    lengths: Tensor | None,
    flip_probs: Tensor | None,
) -> None:
    if cu_lists is None and log_probs.dim() != 2:
        raise ValueError(
            f"log_probs must be [G, k], or [S] together with cu_lists; got {_shape(log_probs)} without cu_lists"
        )
    if cu_lists is not None:
        _cumulative("cu_lists", cu_lists)
        if log_probs.dim() != 1:
            raise ValueError(f"log_probs must be packed [S] when cu_lists is given, got {_shape(log_probs)}")
    constants = {"rewards": rewards, "ref_log_probs": ref_log_probs, "flip_probs": flip_probs}
    for name, x in constants.items():
        if x is not None:
            floating(name, x)
            _constant(name, x)
    for name, x in {**constants, "valid": valid, "lengths": lengths}.items():
        if x is not None:
            tensor(name, x)
            if x.shape != log_probs.shape:
                raise ValueError(f"{name} must have the shape of log_probs, {_shape(log_probs)}, got {_shape(x)}")
            same_device(name, x, log_probs.device)
    if lengths is not None:
        _constant("lengths", lengths)
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")


def packed(
    rewards: Tensor,
    cu_seqlens: Tensor,
    cu_lists: Tensor,
    ref_log_probs: Tensor | None,
    flip_probs: Tensor | None,
    device: torch.device,
) -> None:
    _cumulative("cu_seqlens", cu_seqlens)
    _cumulative("cu_lists", cu_lists)
    n_candidates = cu_seqlens.numel() - 1
    for name, x in (("rewards", rewards), ("ref_log_probs", ref_log_probs), ("flip_probs", flip_probs)):
        if x is None:
            continue
        floating(name, x)
        _constant(name, x)
        if x.shape != (n_candidates,):
            raise ValueError(f"{name} must be [S] = [{n_candidates}], as cu_seqlens says, got {_shape(x)}")
        same_device(name, x, device)
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_lists", cu_lists)):
        if x.device.type != "cpu":
            same_device(name, x, device)
