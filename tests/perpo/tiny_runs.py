"""Small records and trainers that the training tests share."""

from pathlib import Path
from typing import Any

import torch
import yaml

from perpo.data.record import ListRecord, write_records
from perpo.model.trainable import language_lora
from perpo.training.config import PerPOConfig
from perpo.training.trainer import PerPOTrainer

from . import tiny_models

ANSWERS = ("[0.1]", "[0.25, 0.5]", "no", "[0.9, 0.2]", "[1]")


def records(n: int = 4, k: int = 3, seed: int = 0) -> list[ListRecord]:
    """Lists of ragged size with pictures of their own; the second has no preference."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        size = k - (i % 2) if k > 2 else k
        rewards = (0.5,) * size if i == 1 else tuple(torch.rand(size, generator=generator).tolist())
        picture = tiny_models.picture((40, 28) if i % 2 else (28, 40), i)
        made.append(ListRecord(f"r{i}", picture, f"Where is {i}?", "", "", ANSWERS[i % 2 :][:size], rewards))
    return made


def save_run(folder: Path, **settings: Any) -> Path:
    """Write what a user of `perpo train` has into a folder: a tiny LLaVA, four pictures, their lists, `run.yaml`."""
    model, processor = tiny_models.build("llava")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    lists = []
    for record in records():
        record.image.save(folder / f"{record.id}.png")
        lists.append(ListRecord(record.id, f"{record.id}.png", record.prompt, "", "", record.responses, record.rewards))
    write_records(lists, folder / "lists.jsonl")
    defaults: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "lists.jsonl"),
        "image_root": str(folder),
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "lora_r": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(defaults | settings))
    return folder


def config(folder: Path, **options: Any) -> PerPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "seed": 0,
    }
    return PerPOConfig(**(defaults | options))


def trainer(
    family: str, folder: Path, *, lora: bool = True, data: Any = None, dropout: float = 0.0, **options: Any
) -> PerPOTrainer:
    """A trainer of a tiny model; `options` go to the config."""
    model, processor = tiny_models.build(family)
    peft_config = None
    torch.manual_seed(1)
    if lora:
        peft_config = language_lora(model, r=4, alpha=8, dropout=dropout)
        peft_config.init_lora_weights = False  # B not 0: every adapter matters at once
    return PerPOTrainer(
        model, config(folder, **options), records() if data is None else data, processor, peft_config=peft_config
    )


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
