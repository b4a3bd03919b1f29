"""One arm, start to end, with the parts that the commands are made of: sampler, rewards, `PerPOTrainer`, metrics."""

from __future__ import annotations

import inspect
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback

from perpo.data.record import ListRecord
from perpo.demo.model import SHIPPED
from perpo.demo.race.arms import SFT, Arm
from perpo.demo.scenes import box_text
from perpo.demo.tasks import SEEDS, TASKS, reward
from perpo.encoding.encoder import Encoder
from perpo.evaluation.answers import blanked
from perpo.evaluation.metrics import AP_THRESHOLD, STRICT_THRESHOLD
from perpo.rewards import parse_box
from perpo.rewards.scoring import Tally, score_record
from perpo.sampling.sampler import Question, Sampling
from perpo.sampling.with_transformers import TransformersSampler, left_padded
from perpo.storage.atomic import atomic_file
from perpo.training.config import PerPOConfig
from perpo.training.trainer import PerPOTrainer
from perpo_kernels.objectives import PRESETS

BATCH = 16  # lists of an optimizer step
AT_ONCE = 100  # questions that are answered together
GAP_PICTURES, DRIFT_PICTURES = 1000, 500
STEP = 0.01  # by which a side of a copied box is moved

Scores = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Outcome:
    """What came of an arm: metrics after some passes, and the reward of each held-out picture's greedy answer."""

    after: int
    metrics: dict[str, float]
    scores: Scores


@dataclass
class Spent:
    """What an arm has cost, in seconds of one core."""

    sampled_tokens: int = 0
    trained_tokens: int = 0
    sampling: float = 0.0
    training: float = 0.0


@cache
def encoder() -> Encoder:
    """Of the shipped model; it remembers every picture that it has encoded."""
    made = Encoder.for_model(AutoProcessor.from_pretrained(SHIPPED), model())
    encode = made.prompt
    known: dict[Any, tuple[Image.Image | None, dict[str, Tensor]]] = {}

    def remembered(prompt: Any, image: Image.Image | None = None) -> dict[str, Tensor]:
        key = (prompt, id(image))
        if key not in known:
            known[key] = image, encode(prompt, image)  # the image is kept, so that its id is not given to another
        return dict(known[key][1])

    made.prompt = remembered  # type: ignore[method-assign]  # of this object alone
    return made


def model() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32)


@cache
def records(task: str, count: int, split: str, seed: int) -> list[ListRecord]:
    """Pictures with their questions and true answers, the same as the demo's."""
    pictures = TASKS[task].pictures(count, split, SEEDS[split] + seed)
    return [
        ListRecord(f"{split}-{i}", Image.fromarray(pictures.pixels[i].numpy()), prompt, answer, task)
        for i, (prompt, answer) in enumerate(TASKS[task].turns(pictures))
    ]


def run(arm: Arm, folder: Path) -> tuple[list[Outcome], Spent]:
    """Sample, score, train and measure.

    Args:
        folder: keeps what several arms share: answers of the shipped model, log-probs under it.
    """
    aligned, spent = model(), Spent()
    outcomes: list[Outcome] = []
    if arm.objective == SFT:
        return [measure(aligned, arm, 0)], spent
    asked = records(arm.task, arm.pictures, "train", arm.seed)
    for number in range(arm.rounds):
        own = asked[number * arm.pictures // arm.rounds : (number + 1) * arm.pictures // arm.rounds]
        started = time.process_time()
        lists = first_answers(arm, own, folder) if number == 0 else sample(aligned, arm, own, number)
        spent.sampled_tokens += sum(tokens(text) for record in lists for text in record.responses)
        lists = [chosen(scored(record, arm), arm) for record in lists]
        spent.sampling += time.process_time() - started
        train(aligned, arm, lists, number, folder, spent, outcomes)
    if arm.passes not in [one.after for one in outcomes]:
        outcomes.append(measure(aligned, arm, arm.passes))
    return outcomes, spent


# --------------------------------------------------------------------------------------------------------- the answers


def sample(aligned: nn.Module, arm: Arm, asked: Sequence[ListRecord], number: int) -> list[ListRecord]:
    """Lists of k answers as they come, repeats and all."""
    sampling = Sampling(max_new_tokens=TASKS[arm.task].max_new_tokens, seed=arm.seed + 1000 * number)
    sampler = TransformersSampler(aligned, encoder(), sampling)
    answers = sampler.sample([_question(record) for record in asked], arm.k)
    return [
        record.answered([one.text for one in found], complete=[one.complete for one in found])
        for record, found in zip(asked, answers, strict=True)
    ]


def first_answers(arm: Arm, asked: Sequence[ListRecord], folder: Path) -> list[ListRecord]:
    """Of the shipped model: sampled once for all arms, which take the first k of at least 16."""
    k = max(arm.k, 16) if arm.pictures == Arm().pictures else arm.k
    path = folder / "answers" / f"{arm.task}-{arm.seed}-{arm.pictures}-{len(asked)}-{k}.json"
    if not path.exists():
        found = sample(model(), replace(arm, k=k), asked, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps([[r.responses, r.complete or [True] * k] for r in found]).encode())
    kept = json.loads(path.read_text())
    return [
        record.answered(texts[: arm.k], complete=complete[: arm.k])
        for record, (texts, complete) in zip(asked, kept, strict=True)
    ]


def scored(record: ListRecord, arm: Arm) -> ListRecord:
    """With rewards against the truth, or against one that is off."""
    if not arm.noise:
        return score_record(record, arm.task, Tally())
    wrong = score_record(replace(record, answer=moved(str(record.answer), arm)), arm.task, Tally())
    return replace(wrong, answer=record.answer)


def moved(truth: str, arm: Arm) -> str:
    """A box whose sides are each off by `noise` of the box's size, inward or outward as it happens."""
    box = parse_box(truth)
    assert box is not None
    draw = random.Random(f"{arm.seed} {truth}")
    size = (box[2] - box[0], box[3] - box[1]) * 2
    return box_text([min(1, max(0, x + draw.choice((-1, 1)) * arm.noise * w)) for x, w in zip(box, size, strict=True)])


def chosen(record: ListRecord, arm: Arm) -> ListRecord:
    """The list with the answers that the arm trains on."""
    assert record.rewards is not None
    k, rewards = arm.k, record.rewards
    order = sorted(range(k), key=lambda i: -rewards[i])
    if arm.answers == "copies":
        texts = list(record.responses[: k // 2])
        return score_record(record.answered(texts + [_copied(text, arm.seed) for text in texts]), arm.task, Tally())
    part = {
        "all": order,
        "best": order[: k // 2],
        "worst": order[k // 2 :],
        "ends": order[: k // 4] + order[-(k // 4) :],
    }[arm.answers]
    part = sorted(part)
    return record if len(part) == k else record.picked(part)


def _copied(text: str, seed: int) -> str:
    """The same box with one side moved by a hundredth."""
    box = parse_box(text)
    if box is None:
        return text
    draw = random.Random(f"{seed} {text}")
    sides = list(box)
    side = draw.randrange(4)
    sides[side] = min(1.0, max(0.0, sides[side] + draw.choice((-STEP, STEP))))
    return box_text(sides)


def _question(record: ListRecord) -> Question:
    # For the type checker: the race's images are opened.
    return Question(record.id, str(record.prompt), record.image)  # type: ignore[arg-type]


def tokens(answer: str) -> int:
    """Of an answer, with its end."""
    return len(encoder().tokenizer(answer).input_ids) + 1


# -------------------------------------------------------------------------------------------------------- the training


class Measure(TrainerCallback):
    """Measures the model after some passes, outside of the time that training takes."""

    def __init__(self, arm: Arm, outcomes: list[Outcome]) -> None:
        self.arm, self.outcomes, self.seconds = arm, outcomes, 0.0

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if (after := round(state.epoch)) in self.arm.measured:
            started = time.process_time()
            self.outcomes.append(measure(model, self.arm, after))
            self.seconds += time.process_time() - started


def train(
    aligned: nn.Module,
    arm: Arm,
    lists: list[ListRecord],
    number: int,
    folder: Path,
    spent: Spent,
    outcomes: list[Outcome],
) -> None:
    """A round of `passes` over the lists; the reference is the model that the round begins with."""
    settings = ("learning_rate", *inspect.signature(PRESETS[arm.objective]).parameters)
    given: dict[str, Any] = {
        name: value
        for name in ("learning_rate", "beta", "gamma")
        if (value := getattr(arm, name)) is not None and name in settings
    }
    started = time.process_time()
    measuring = Measure(arm, outcomes)
    with TemporaryDirectory() as output:
        args = PerPOConfig(
            output_dir=output,
            reference="start",
            reference_cache_dir=str(folder / "reference" / f"{arm.task}-{arm.seed}") if number == 0 else None,
            objective=arm.objective,
            lr_scheduler_type="cosine" if arm.passes == 1 else "constant",
            num_train_epochs=arm.passes,
            per_device_train_batch_size=BATCH,
            degree_weight=arm.degree_weight,
            seed=arm.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            log_level="error",
            **given,
        )
        trainer = PerPOTrainer(aligned, args, lists, AutoProcessor.from_pretrained(SHIPPED), callbacks=[measuring])
        trainer.train()
    # For the type checker: the race's images are opened.
    prompt = encoder().prompt(str(lists[0].prompt), lists[0].image)["input_ids"].shape[1]  # type: ignore[arg-type]
    once = sum(prompt + sum(tokens(text) for text in record.responses) for record in lists)
    spent.trained_tokens += arm.passes * once
    spent.training += time.process_time() - started - measuring.seconds


# --------------------------------------------------------------------------------------------------------- the measure


def measure(aligned: nn.Module, arm: Arm, after: int) -> Outcome:
    """Greedy answers to held-out pictures."""
    held_out = records(arm.task, arm.held_out, arm.split, arm.seed)
    texts = greedy(aligned, arm.task, held_out)
    scores = rewards(arm.task, held_out, texts)
    metrics = summary(arm.task, scores)
    if arm.probes:
        few = blank_records(arm.task, arm.held_out, arm.split, arm.seed)
        blank = rewards(arm.task, few, greedy(aligned, arm.task, few))
        first = next(iter(metrics))
        metrics["gap"] = summary(arm.task, scores[: len(few)])[first] - summary(arm.task, blank)[first]
        metrics["drift"] = drift(aligned, held_out[:DRIFT_PICTURES], texts)
    return Outcome(after, metrics, scores)


@cache
def blank_records(task: str, count: int, split: str, seed: int) -> list[ListRecord]:
    """The first held-out pictures of an arm, each in its mean colour."""
    few = records(task, count, split, seed)[:GAP_PICTURES]
    # For the type checker: the race's images are opened.
    return [replace(record, image=blanked(record.image)) for record in few]  # type: ignore[arg-type]


def greedy(aligned: nn.Module, task: str, asked: Sequence[ListRecord]) -> list[str]:
    sampling = Sampling(temperature=0, max_new_tokens=TASKS[task].max_new_tokens)
    sampler = TransformersSampler(aligned, encoder(), sampling, answers_at_once=AT_ONCE)
    texts: list[str] = []
    for start in range(0, len(asked), AT_ONCE):
        batch = [_question(record) for record in asked[start : start + AT_ONCE]]
        texts += [answers[0].text for answers in sampler.sample(batch, 1)]
    return texts


def rewards(task: str, asked: Sequence[ListRecord], texts: Sequence[str]) -> Scores:
    return np.array([reward(task, text, str(r.answer)) for r, text in zip(asked, texts, strict=True)], np.float32)


def summary(task: str, scores: Scores) -> dict[str, float]:
    """Metrics of rewards [N]; the first is what learning rates are chosen by."""
    return {name: float(np.mean(of(scores), dtype=np.float64)) for name, of in METRICS[task].items()}


METRICS: dict[str, dict[str, Callable[[Scores], Any]]] = {
    "grounding": {
        "ap50": lambda iou: iou > AP_THRESHOLD,
        "ap75": lambda iou: iou > STRICT_THRESHOLD,
        "ap95": lambda iou: iou > 0.95,
        "mean_iou": lambda iou: iou,
    },
    "ocr": {"edit_similarity": lambda similarity: similarity, "exact": lambda similarity: similarity == 1},
}


@torch.no_grad()
def drift(aligned: nn.Module, asked: Sequence[ListRecord], texts: Sequence[str]) -> float:
    """Σ_t KL(π(· | y_<t) ‖ π_SFT(· | y_<t)) along the model's own greedy answer y, in nats; the mean over pictures."""
    first, total = model().eval(), 0.0
    training = aligned.training
    aligned.eval()
    end = encoder().end_ids[0]
    for start in range(0, len(asked), AT_ONCE):
        rows = []
        for record, text in zip(asked[start : start + AT_ONCE], texts[start : start + AT_ONCE], strict=False):
            # For the type checker: the race's images are opened.
            inputs = encoder().prompt(str(record.prompt), record.image)  # type: ignore[arg-type]
            answer = torch.tensor([[*encoder().tokenizer(text).input_ids, end]])
            rows.append((inputs, answer))
        prompt = rows[0][0]["input_ids"].shape[1]  # of all of a task's questions
        longest = max(answer.shape[1] for _, answer in rows)
        padded = [nn.functional.pad(answer, (0, longest - answer.shape[1]), value=end) for _, answer in rows]
        there = torch.stack([torch.arange(longest) < answer.shape[1] for _, answer in rows])
        batch = left_padded([inputs for inputs, _ in rows], encoder().pad_id)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.cat(padded)], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        ours, theirs = (
            one(**batch).logits[:, prompt - 1 : -1].log_softmax(-1) for one in (aligned, first)
        )  # [B, R, V]
        total += float((((ours.exp() * (ours - theirs)).sum(-1)) * there).sum())
    aligned.train(training)
    return total / len(asked)
