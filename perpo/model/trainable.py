"""Which parameters are trained, and in which type: LoRA on the language model, or the model itself without what stays
frozen; trained numbers in fp32, products in 16 bits where the model's weights are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from perpo.model.adapters import adapted_layers, merge_adapters
from perpo.model.language_head import causal_lm
from perpo.storage.atomic import atomic_folder

logger = logging.get_logger(__name__)

LORA_R, LORA_ALPHA = 128, 256  # as published
# What some families (Qwen-VL, GLM-V) call the projector that is part of their vision tower.
_INNER_PROJECTORS = ("merger", "deepstack_merger_list", "downsample")


class Prepared(NamedTuple):
    """What `TrainableConfig.apply` makes of a model."""

    model: nn.Module
    peft_config: LoraConfig | None  # adapters to put on it
    remark: str  # what became of adapters that it came with; "" if it had none


@dataclass
class TrainableConfig:
    """What is trained: adapters on the language model, or with `lora` off the model's own weights."""

    lora: bool = field(
        default=True,
        metadata={
            "help": "Train adapters (LoRA) instead of the model's own weights. What is trained takes 16 bytes a number "
            "(weight, gradient and two moments, in fp32), what is not 2 in bf16."
        },
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": f"Rank of the adapters; default: {LORA_R}, or that of the adapters in the model's folder."},
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={
            "help": f"Scale of the adapters: alpha / r; default: {LORA_ALPHA}, or that of the adapters in the model's "
            "folder."
        },
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout before the adapters; default: 0, or that of the adapters in the model's folder."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers with adapters, by name inside the language model (q_proj) or by full path "
            "(model.vision_tower.…); default: all linear layers of the language model."
        },
    )
    train_projector: bool = field(default=False, metadata={"help": "Train what joins vision tower and language model."})
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower; only with lora off."})
    train_lm_head: bool = field(default=False, metadata={"help": "Train the language head; only with lora off."})

    def __post_init__(self) -> None:
        if self.lora:
            for name in ("train_vision_tower", "train_lm_head"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} needs --lora false; for adapters there, name its layers with lora_target_modules"
                    )

    def apply(
        self, model: nn.Module, *, folder: str | os.PathLike[str] = ".", dtype: torch.dtype | str | None = None
    ) -> Prepared:
        """The model to train and the adapters to put on it; what is not trained is frozen.

        A model that comes with adapters trains those further if these settings ask for no others. Otherwise they are
        merged into its weights first, so that nothing they learnt is lost.

        Args:
            folder: of the run; adapters on a merged model need that model saved, in `folder`/base.
            dtype: of merged weights, see `merge_adapters`.
        """
        remark = ""
        if isinstance(model, PeftModel):
            different = self._different(model)
            if self.lora and not different:
                model.set_adapter(model.active_adapter)
                remark = (
                    f"training continues with the adapters that the model comes with, r={_own(model).r}; the reference "
                    "of adapter_off and precomputed is their base model, that of start the model with them"
                )
                return Prepared(model, None, remark)
            model = merge_adapters(model, dtype)
            remark = "the adapters that the model comes with are merged into its weights"
            if self.lora:
                base = Path(folder) / "base"
                _save_base(model, base)
                remark += f", saved in {base}, since other adapters are asked for ({different})"
        if not self.lora:
            freeze(
                model,
                vision_tower=not self.train_vision_tower,
                projector=not self.train_projector,
                head=not self.train_lm_head,
            )
            return Prepared(model, None, remark)
        config = language_lora(
            model,
            r=LORA_R if self.lora_r is None else self.lora_r,
            alpha=LORA_ALPHA if self.lora_alpha is None else self.lora_alpha,
            dropout=self.lora_dropout or 0.0,
            train_projector=self.train_projector,
            target_modules=self.lora_target_modules,
        )
        return Prepared(model, config, remark)

    def _different(self, model: PeftModel) -> str:
        """In what the settings given ask for other adapters than the model has."""
        config, found = _own(model), []
        for name, there in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
            given, own = getattr(self, name), getattr(config, there, None)
            if given is not None and given != own:
                found.append(f"{name}={given}, not {own}")
        if self.lora_target_modules:
            has = {name.rpartition(".")[2] for name in adapted_layers(model)}
            if has != {name.rpartition(".")[2] for name in self.lora_target_modules}:
                asked = " ".join(self.lora_target_modules)
                found.append(f"lora_target_modules={asked}, not {' '.join(sorted(has))}")
        if self.train_projector and not getattr(config, "modules_to_save", None):
            found.append("train_projector")
        return ", ".join(found)


def _own(model: PeftModel) -> Any:
    return model.peft_config[model.active_adapters[0]]


def _save_base(model: Any, folder: Path) -> None:
    """Once a machine, and written to its end or not at all."""
    state = PartialState()
    if state.is_local_main_process:
        with atomic_folder(folder, "output_dir", replace=True) as draft:
            model.save_pretrained(draft)
    state.wait_for_everyone()
    model.name_or_path = model.config._name_or_path = str(folder)


def language_lora(
    model: nn.Module,
    *,
    r: int = LORA_R,
    alpha: int = LORA_ALPHA,
    dropout: float = 0.0,
    train_projector: bool = False,
    target_modules: Sequence[str] | None = None,
) -> LoraConfig:
    """LoRA on every linear layer of the language model: not on its head, the vision tower or the projector.

    Args:
        target_modules: these layers alone: by name inside the language model, or anywhere by the end of their path
            ("vision_tower.encoder.layers.0.self_attn.q_proj").

    Raises:
        ValueError: a name of target_modules that the language model has no layer of; without target_modules, a model
            without linear layers in its language model, or with experts that are tensors instead.
    """
    decoder = causal_lm(model).get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    head = causal_lm(model).get_output_embeddings()
    kinds = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not kinds:
        raise ValueError(
            f"model: no linear layer found in the language model of {type(model).__name__}; name the layers with "
            "lora_target_modules"
        )
    if not target_modules:
        _check_experts(model, decoder)
    pattern: Any = _pattern(model, prefix, target_modules or sorted(kinds), kinds)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        modules_to_save=projector_names(model) if train_projector else None,
        task_type="CAUSAL_LM",
    )


def _pattern(model: nn.Module, prefix: str, names: Sequence[str], kinds: set[str]) -> Any:
    """What of `LoraConfig.target_modules` means these layers, and none of the same name in the vision tower."""
    paths = [name for name in names if "." in name]
    inside = [name for name in names if "." not in name]
    everywhere = [name for name, _ in model.named_modules()]
    for path in paths:
        if not any(name == path or name.endswith(f".{path}") for name in everywhere):
            raise ValueError(f"lora_target_modules: {type(model).__name__} has no layer {path!r}")
    for kind in inside:
        if kind not in kinds:
            other = next((name for name in everywhere if name.rpartition(".")[2] == kind), None)
            hint = "" if other is None else f"; for one elsewhere give its path, as {other!r}"
            raise ValueError(
                f"lora_target_modules: the language model of {type(model).__name__} has no linear layer {kind!r}, but "
                f"{', '.join(sorted(kinds))}{hint}"
            )
    if not prefix and not paths:
        return inside
    parts = [rf"(?:.+\.)?{re.escape(path)}" for path in paths]
    if inside:
        below = rf"{re.escape(prefix)}\." if prefix else ""
        parts.append(rf"{below}(?:.+\.)?(?:{'|'.join(inside)})")
    return parts[0] if len(parts) == 1 else "|".join(f"(?:{part})" for part in parts)


def _check_experts(model: nn.Module, decoder: nn.Module) -> None:
    experts = {
        f"{name}.{own}": p
        for name, module in decoder.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and p.is_floating_point() and not isinstance(module, nn.Conv1d)
    }
    if experts:
        n, total = (sum(p.numel() for p in each) for each in (experts.values(), decoder.parameters()))
        raise ValueError(
            f"lora: {n:,} of the {total:,} parameters of {type(causal_lm(model)).__name__}'s language model are "
            f"experts ({next(iter(experts))}, …), which are no linear layers and would get no adapter. Name the layers "
            "to adapt with lora_target_modules (q_proj k_proj v_proj o_proj: attention alone), or set lora to false"
        )


def projector_names(model: nn.Module) -> list[str]:
    """What joins vision tower and language model, by name below `base_model`: what is neither of them nor the head,
    or the last modules of a tower that ends with it (Qwen-VL, GLM-V).

    Raises:
        ValueError: there is none.
    """
    core = causal_lm(model)
    tower, base = core.get_encoder(modality="image"), core.base_model
    names: list[str] = []
    if tower is not core:
        apart = [tower, core.get_decoder(), core.get_output_embeddings()]
        names = [name for name, child in base.named_children() if all(child is not x for x in apart)]
        names = [name for name in names if any(True for _ in base.get_submodule(name).parameters())]
    if not names:
        inner = next((name for name, module in base.named_modules() if module is tower), None)
        children = [] if inner is None else [(n, c) for n, c in tower.named_children() if n in _INNER_PROJECTORS]
        for name, child in children:  # a list is no module to peft, but each of its items is
            items = [f".{i}" for i in range(len(child))] if isinstance(child, nn.ModuleList) else [""]
            names += [f"{inner}.{name}{item}" for item in items]
    if not names:
        raise ValueError(f"train_projector: {type(core).__name__} has no projector that is known here")
    return names


def projectors(core: Any) -> list[nn.Module]:
    """The modules of `projector_names`; none in a model that has none."""
    try:
        return [core.base_model.get_submodule(name) for name in projector_names(core)]
    except ValueError:
        return []


def freeze(model: nn.Module, *, vision_tower: bool = True, projector: bool = True, head: bool = True) -> None:
    """Take gradients off parts of a model that is trained without adapters. Tied embeddings freeze with their head.

    Raises:
        ValueError: a projector that is not to be frozen, in a model that has none.
    """
    core = causal_lm(model)
    if not projector:
        projector_names(model)
    tower = core.get_encoder(modality="image")
    joins = _ids(p for module in projectors(core) for p in module.parameters())
    in_tower = set() if tower is core else _ids(tower.parameters())
    in_head = _ids(core.get_output_embeddings().parameters())
    for parameter in core.parameters():
        key = id(parameter)
        of_projector, of_tower = key in joins, key in in_tower and key not in joins
        if (of_projector and projector) or (of_tower and vision_tower) or (key in in_head and head):
            parameter.requires_grad_(False)


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


def n_elements(parameter: nn.Parameter) -> int:
    """Also of one that DeepSpeed ZeRO-3 has spread over processes, which looks empty."""
    return getattr(parameter, "ds_numel", parameter.numel())


def trained_parts(model: nn.Module) -> str:
    """One line: how many parameters are trained, of how many, in each part of a model."""
    core = causal_lm(model)
    tower = core.get_encoder(modality="image")
    parts = {
        "projector": _ids(p for module in projectors(core) for p in module.parameters()),
        "vision tower": set() if tower is core else _ids(tower.parameters()),
        "language head": _ids(core.get_output_embeddings().parameters()),
        "language model": _ids(core.get_decoder().parameters()),
    }
    trained, total = dict.fromkeys([*parts, "other"], 0), dict.fromkeys([*parts, "other"], 0)
    for parameter in model.parameters():
        part = next((name for name, ids in parts.items() if id(parameter) in ids), "other")
        total[part] += n_elements(parameter)
        trained[part] += n_elements(parameter) * parameter.requires_grad
    layers = len(adapted_layers(model))
    words = [f"{name} {trained[name]:,} of {total[name]:,}" for name in total if total[name]]
    adapters = f" (adapters on {layers} layers)" if layers else ""
    return f"trained: {sum(trained.values()):,} of {sum(total.values()):,} parameters{adapters}: {'; '.join(words)}"


def keep_in_fp32(model: nn.Module) -> None:
    """Convert what is trained to fp32 (peft does so for adapters), and leave what is frozen in its type.

    A bf16 number has 8 bits: a step of less than 1/512 of a weight is rounded away, and at a learning rate of 5e-6
    nearly all steps are. States keep the type that the model computes them in: some models (SmolVLM) cannot put
    16-bit states of an image among 32-bit states of a text.
    """
    embeddings = causal_lm(model).get_input_embeddings()
    of_states = embeddings.weight.dtype
    if of_states != torch.float32 and embeddings.weight.requires_grad:
        embeddings.register_forward_hook(lambda module, args, output: output.to(of_states))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def set_precision(model: nn.Module, args: TrainingArguments) -> None:
    """Train a model with 16-bit weights in mixed precision, even if `args` do not ask for it.

    Without it fp32 weights would meet 16-bit activations. DeepSpeed does this itself.

    Raises:
        ValueError: the model's type does not go with this device or without a scaled loss; says what to set.
    """
    types = {parameter.dtype for parameter in model.parameters()}
    if args.mixed_precision != "no" or args.deepspeed_plugin is not None:
        return
    if torch.bfloat16 in types:
        if args.device.type == "cuda" and not is_torch_bf16_gpu_available():
            raise ValueError("model: its weights are bfloat16, which this GPU cannot do; set dtype='float32'")
        args.bf16, args.mixed_precision = True, "bf16"
        logger.info("bf16=True, since the model's weights are bfloat16; dtype='float32' trains in fp32")
    elif torch.float16 in types:
        raise ValueError(
            "model: its weights are float16, whose gradients need a scaled loss; set fp16=True, or load it with "
            "dtype='bfloat16' or 'float32'"
        )
