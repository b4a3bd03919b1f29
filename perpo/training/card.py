"""The model card, README.md beside the saved weights: what was trained on what, how, with which result, by which
versions, and whom to cite."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel
from torch import nn

from perpo.data.fingerprints import record_fingerprint
from perpo.data.hub import hub_data
from perpo.data.record import ListRecord
from perpo.model.language_head import causal_lm
from perpo.model.settings import HUB_NAME
from perpo.model.trainable import n_elements
from perpo.storage.fingerprints import fingerprint
from perpo.training.config import PerPOConfig
from perpo_kernels.objectives import Objective

CARD = "README.md"
MARK = "<!-- Written by perpo with the weights, and anew with them; without this line it is left as it is. -->"
EVALUATION = ("<!-- perpo evaluate -->", "<!-- /perpo evaluate -->")  # what stands between is `perpo evaluate`'s
_UNFILLED = "# Model Card for Model ID"  # the title of the card that peft writes where there is none
_PACKAGES = ("perpo", "torch", "triton", "transformers", "peft", "accelerate")
_LOGGED = ("loss", "rewards/accuracies", "rewards/margins", "lists/pair_accuracy", "lists/kendall_tau", "eval_loss")
_SAMPLING = ("scored", "engine", "k", "max_samples", "temperature", "top_p", "max_new_tokens", "seed", "reward")

CITATION = """@article{zhu2025perpo,
  title   = {PerPO: Perceptual Preference Optimization via Discriminative Rewarding},
  author  = {Zhu, Zining and Zhao, Liang and Lin, Kangheng and Yang, Jinze and Yu, En and Liu, Chenglong and Wei, Haoran
             and Sun, Jianjian and Ge, Zheng and Zhang, Xiangyu},
  journal = {arXiv preprint arXiv:2502.04371},
  year    = {2025}
}"""


@dataclass(frozen=True)
class Provenance:
    """What a trainer cannot see by itself: where its lists come from.

    Attributes:
        data: file or data set of the training lists; "" for records that a program gave.
        command: that repeats the run; "" for a run from Python.
        sampled: how the answers were sampled, as `perpo generate` keeps it: {"temperature": "1.0", …}.
    """

    data: str = ""
    command: str = ""
    sampled: Mapping[str, str] = field(default_factory=dict)


def is_own(card: Path) -> bool:
    """Whether a card may be written here: there is none, or one of ours, or an unfilled one of peft's."""
    if not card.exists():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return MARK in text or _UNFILLED in text


def card_text(
    model: nn.Module,
    args: PerPOConfig,
    records: Iterable[ListRecord],
    *,
    name: str,
    sees_images: bool,
    log: Sequence[Mapping[str, Any]] = (),
    steps: int = 0,
    provenance: Provenance | None = None,
    **metadata: Any,
) -> str:
    """The whole card.

    Args:
        records: that the run trains on.
        name: of the trained model. metadata: further fields of `huggingface_hub.ModelCardData`: license, language, …
        sees_images: the model takes images.
        log: `trainer.state.log_history`. steps: taken.
    """
    origin = provenance or Provenance()
    data_set = hub_data(origin.data)
    base = base_name(model)
    loss = args.list_objective
    adapted = isinstance(model, PeftModel)
    data = ModelCardData(
        base_model=base if _on_the_hub(base) else None,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="image-text-to-text" if sees_images else "text-generation",
        datasets=[data_set.name] if data_set is not None and _on_the_hub(data_set.name) else None,
        model_name=name,
        **{**metadata, "tags": sorted({"perpo", *(["lora"] if adapted else []), *(metadata.get("tags") or [])})},
    )
    shown = base if _on_the_hub(base) else f"a model in a local folder `{Path(base).name}`" if base else "a model"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n{MARK}\n",
        f"# {name}\n",
        f"{'Adapters for ' if adapted else ''}{shown}, aligned by perpo with lists of scored answers: "
        f"{_objective_words(args)}.\n",
        _table("Data", _data_rows(ListCounts.of(records), origin)),
        _table("Training", _training_rows(model, args, loss, steps)),
        _table("At the end of training", _log_rows(log)),
        "## Evaluation\n",
        "\n".join([EVALUATION[0], "Not evaluated yet; `perpo evaluate` writes here what it finds.", EVALUATION[1], ""]),
    ]
    if origin.command:
        parts.append(f"## The command\n\n```bash\n{origin.command}\n```\n")
    parts += [_table("Versions", _versions()), f"## Citation\n\nThe method:\n\n```bibtex\n{CITATION}\n```\n"]
    return "\n".join(part for part in parts if part)


def base_name(model: nn.Module) -> str:
    """Of the model that adapters are for, or that training began with; "" if it does not say."""
    if isinstance(model, PeftModel):
        return str(model.peft_config[model.active_adapters[0]].base_model_name_or_path or "")
    return str(getattr(causal_lm(model).config, "_name_or_path", "") or "")


def with_evaluation(card: str, text: str) -> str | None:
    """The card with this text as its evaluation; None if it has no place for one."""
    before, opened, rest = card.partition(EVALUATION[0])
    _, closed, after = rest.partition(EVALUATION[1])
    return f"{before}{opened}\n{text.strip()}\n{closed}{after}" if opened and closed else None


def _on_the_hub(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _objective_words(args: PerPOConfig) -> str:
    named = args.objective if isinstance(args.objective, str) and not args.objective.lstrip().startswith("{") else ""
    words = f"`{named}`" if named else "an objective of its own"
    return f"the objective is {words} ({', '.join(f'{name} {value}' for name, value in _numbers(args.list_objective))})"


def _numbers(loss: Objective) -> list[tuple[str, Any]]:
    """The fields of an objective that say something."""
    silent = {"reference"} | (set() if loss.weight == "power" else {"gamma"})
    if loss.pairs == "none":
        silent |= {"weight", "normalize", "link", "gamma"}
    neutral = {"soft_target": 1.0}
    return [
        (name, value)
        for name, value in asdict(loss).items()
        if name not in silent and value not in (False, "none") and value != neutral.get(name, 0.0)
    ]


@dataclass
class ListCounts:
    """What a card says of lists, counted in one pass."""

    n: int = 0
    n_images: int = 0
    n_active: int = 0  # with a preference
    n_tied: int = 0  # answers with the reward of another of their list
    reward_sum: float = 0.0
    best_sum: float = 0.0
    sizes: Counter[int] = field(default_factory=Counter)  # k -> lists
    tasks: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""  # of ids, prompts, responses and rewards, in their order

    @classmethod
    def of(cls, records: Iterable[ListRecord]) -> ListCounts:
        found = cls()
        for record in records:
            rewards = record.rewards or (0.0,)
            found.n += 1
            found.n_images += record.image is not None
            found.n_active += record.has_preference
            found.n_tied += sum(n for n in Counter(record.rewards).values() if n > 1)
            found.reward_sum += sum(rewards)
            found.best_sum += max(rewards)
            found.sizes[record.k] += 1
            found.tasks[record.task or "not named"] += 1
            own = record_fingerprint(record, ("id", "prompt", "responses", "rewards"))
            found.fingerprint = fingerprint(found.fingerprint + own)
        return found


def _data_rows(lists: ListCounts, origin: Provenance) -> Iterable[tuple[str, str]]:
    answers = sum(k * n for k, n in lists.sizes.items())
    if not answers:
        return
    data_set = hub_data(origin.data)
    file = Path(origin.data).name or "records given in Python"
    yield "lists", file if data_set is None else f"{data_set.name}, {data_set.split}"
    yield "fingerprint (ids, prompts, responses, rewards)", lists.fingerprint
    least, most = min(lists.sizes), max(lists.sizes)
    yield "number", f"{lists.n} lists of {least if least == most else f'{least} to {most}'} answers"
    yield "tasks", ", ".join(f"{task} ({n})" for task, n in lists.tasks.most_common())
    yield "with an image", str(lists.n_images)
    yield "reward before training, mean of all answers", f"{lists.reward_sum / answers:.4g}"
    yield "reward before training, mean of the best in a list", f"{lists.best_sum / lists.n:.4g}"
    yield "lists with a preference", f"{lists.n_active / lists.n:.1%}"
    yield "answers tied with another of their list", f"{lists.n_tied / answers:.1%}"
    sampled = [f"{name} {origin.sampled[name]}" for name in _SAMPLING if name in origin.sampled]
    if sampled:
        yield "answers", ", ".join(sampled)


def _training_rows(model: nn.Module, args: PerPOConfig, loss: Objective, steps: int) -> Iterable[tuple[str, str]]:
    for name, value in _numbers(loss):
        yield f"objective: {name}", str(value)
    n_models = len(args.ref_model_weights or args.ref_model_name_or_path or ())
    together = f", {n_models} as one, weights {args.ref_model_weights or 'equal'}" if n_models > 1 else ""
    yield "reference", f"{args.reference}{together}"
    if args.degree_weight:
        yield "awareness of degree (SPO)", f"weight {args.degree_weight:g}, {args.degree_levels} levels"
    if isinstance(model, PeftModel):
        config: Any = model.peft_config[model.active_adapters[0]]
        values = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
        yield "adapters", ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    trained = [n_elements(p) for p in model.parameters() if p.requires_grad]
    yield "trained parameters", f"{sum(trained):,} of {sum(map(n_elements, model.parameters())):,}"
    a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    yield "steps", f"{steps}, of {a_step} lists" if args.max_tokens_per_row is None else str(steps)
    yield "learning rate", f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"
    yield "optimizer", f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}"
    precision = args.mixed_precision if args.mixed_precision != "no" else "as the weights are"
    yield "precision", f"{precision}; trained weights in fp32"
    yield "seed", str(args.seed)
    for name in ("max_candidates", "max_response_length", "image_corruption"):
        if getattr(args, name) is not None:
            yield name, str(getattr(args, name))


def _log_rows(log: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    for name in _LOGGED:
        values = [(entry.get("step"), entry[name]) for entry in log if isinstance(entry.get(name), int | float)]
        if values:
            (first, begin), (last, end) = values[0], values[-1]
            yield name, f"{end:.4g} at step {last}" + (f" ({begin:.4g} at step {first})" if last != first else "")


def _versions() -> Iterable[tuple[str, str]]:
    yield "Python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *cells, ""]) if cells else ""
