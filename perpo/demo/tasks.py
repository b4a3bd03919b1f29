"""The two tasks as record files: pictures on disk, questions, true answers.

records = write_records(TASKS["ocr"], 512, "test", seed=0, folder=Path("out"), name="held_out")
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from perpo.data.record import ListRecord, write_records
from perpo.demo.digits import Pictures
from perpo.demo.pages import QUESTION, make_pages, transcripts
from perpo.demo.scenes import box_text, make_scenes, question
from perpo.rewards import box_iou, parse_box
from perpo.rewards.ocr import edit_similarity

SEEDS = {"train": 1_000_000, "validation": 500_000_000, "test": 777_000_000}  # of the pictures; SFT has its own


@dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
        name: of its reward too.
        metrics: of `perpo evaluate`, as they are tabled, with their headings.
        max_new_tokens: of the longest right answer, with its end.
    """

    name: str
    metrics: dict[str, str]
    max_new_tokens: int
    pictures: Callable[[int, str, int], Pictures]
    turns: Callable[[Pictures], list[tuple[str, str]]]  # (question, true answer) of each picture


def _scene_turns(scenes: Pictures) -> list[tuple[str, str]]:
    asked, boxes = scenes.digits[:, 0].tolist(), scenes.boxes[:, 0].tolist()
    return [(question(digit), box_text(box)) for digit, box in zip(asked, boxes, strict=True)]


def _page_turns(pages: Pictures) -> list[tuple[str, str]]:
    return [(QUESTION, text) for text in transcripts(pages)]


TASKS = {
    "grounding": Task(
        "grounding", {"ap50": "AP@50", "ap75": "AP@75", "mean_iou": "mean IoU"}, 5, make_scenes, _scene_turns
    ),
    "ocr": Task("ocr", {"edit_similarity": "edit similarity", "exact": "exact"}, 9, make_pages, _page_turns),
}


def reward(task: str, text: str, truth: str) -> float:
    """IoU or edit similarity of an answer; 0 for one that cannot be read."""
    if task == "ocr":
        return edit_similarity(text, truth)
    box, true_box = parse_box(text), parse_box(truth)
    assert true_box is not None
    return 0.0 if box is None else box_iou(box, true_box)


def make_records(task: Task, count: int, split: str, seed: int, folder: Path, name: str) -> Path:
    """Write `count` pictures to folder/name and their records to folder/name.jsonl, whose path is returned.

    Image paths are relative to `folder`; the same arguments write the same files.
    """
    pictures = task.pictures(count, split, SEEDS[split] + seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for i, (prompt, answer) in enumerate(task.turns(pictures)):
        image = f"{name}/{i:05}.png"
        Image.fromarray(pictures.pixels[i].numpy()).save(folder / image)
        records.append(ListRecord(f"{name}-{i}", image, prompt, answer, task.name))
    path = folder / f"{name}.jsonl"
    write_records(records, path)
    return path
