"""`perpo coco`: from a COCO-style file (detection or referring expressions) to grounding records.

perpo coco --annotations instances.json --images images/ --format qwen2.5-vl --output train.jsonl --held_out test.jsonl

Without refs, a record asks for every object of one category in one image, and its answer is the list of their boxes:
the reward matches them with the boxes of a response one to one. With refs, a record asks for the one object that a
sentence describes. What the files look like: `perpo.data.coco`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

from perpo.data.coco import AnnotationError, CocoFile, divide
from perpo.data.documents import load_json
from perpo.data.record import write_records
from perpo.rewards.formats import FORMATS, box_format

# The questions that a family was trained to answer with boxes: for one object, and for all of a kind.
_JSON = (
    "Locate {label}, output its bbox coordinates using JSON format.",
    "Locate every {label} in the image, output all bbox coordinates in JSON format.",
)
_SENTENCE = (
    "Please provide the bounding box coordinate of the region this sentence describes: {label}",
    "Please provide the bounding box coordinates of every {label} in the image.",
)
_DETECT = ("detect {label}", "detect {label}")
PROMPTS = {"llava": _SENTENCE, "llava-pad": _SENTENCE, "qwen2.5-vl": _JSON, "qwen3-vl": _JSON, "paligemma": _DETECT}
SHOWN_ERRORS = 20
HELD_OUT_SHARE = 0.1
MAX_BOXES = 8


@dataclass
class CocoConfig:
    """A COCO-style file, its images, and the records that are made of them."""

    annotations: str = field(metadata={"help": "JSON with images, annotations and categories."})
    images: str = field(metadata={"help": "Folder that the file_names are under."})
    format: str = field(metadata={"help": "How the model writes boxes.", "choices": list(FORMATS)})
    output: str = field(metadata={"help": "Records: .jsonl or .parquet."})
    held_out: str | None = field(
        default=None, metadata={"help": "Records of other images, for `perpo evaluate`; default: none."}
    )
    held_out_share: float | None = field(
        default=None, metadata={"help": f"Share of the images that held_out gets; default: {HELD_OUT_SHARE}."}
    )
    refs: str | None = field(
        default=None,
        metadata={"help": "JSON with referring expressions: an array of {ann_id, sentences, split}; default: none."},
    )
    split: str | None = field(default=None, metadata={"help": "Take refs of this split only; default: all."})
    prompt: str | None = field(
        default=None,
        metadata={"help": "The question, with {label} in it; default: one that these models know."},
    )
    max_boxes: int | None = field(
        default=None, metadata={"help": f"Leave out questions with more boxes; default: {MAX_BOXES}."}
    )
    skip_bad: bool = field(default=False, metadata={"help": "Leave out bad annotations and count them."})

    def __post_init__(self) -> None:
        if self.prompt is not None and "{label}" not in self.prompt:
            raise ValueError(f"--prompt must hold {{label}}, where the object's name goes; got {self.prompt!r}")
        for name, value, needed in (
            ("held_out_share", self.held_out_share, "held_out"),
            ("split", self.split, "refs"),
        ):
            if value is not None and getattr(self, needed) is None:
                raise ValueError(f"{name} has no effect without {needed}: give {needed} too, or leave {name} out")
        if self.held_out_share is not None and not 0 <= self.held_out_share <= 1:
            raise ValueError(f"held_out_share must be in [0, 1], got {self.held_out_share}")
        if self.max_boxes is not None and self.refs is not None:
            raise ValueError("max_boxes has no effect with refs, each of which has one box: leave it out")
        if self.max_boxes is not None and self.max_boxes < 1:
            raise ValueError(f"max_boxes must be ≥ 1, got {self.max_boxes}")
        if self.held_out == self.output:
            raise ValueError(f"output and held_out must be two files, got {self.output!r} for both")


SETTINGS = (CocoConfig,)


def prompts(form: str) -> tuple[str, str]:
    """The questions for one object and for all of a kind, as models of a box format expect them, with {label}."""
    box = f"{{label}}? Answer with boxes only, written as {box_format(form).example}"
    return PROMPTS.get(form, (f"Where is {box}", f"Where is every {box}"))


def run(config: CocoConfig) -> None:
    file = CocoFile(config.annotations, config.images, f"grounding/{config.format}", skip_bad=config.skip_bad)
    of_one, of_all = prompts(config.format)
    if config.refs is None:
        records = list(file.detection(config.prompt or of_all, config.max_boxes or MAX_BOXES))
    else:
        refs = load_json(config.refs)
        if not isinstance(refs, list):
            raise AnnotationError(f"{config.refs}: expected an array of refs")
        records = list(file.referring(refs, config.prompt or of_one, config.split))
    share = HELD_OUT_SHARE if config.held_out_share is None else config.held_out_share
    train, held_out = divide(records, share if config.held_out else 0)
    parts = [(part, path) for part, path in ((train, config.output), (held_out, config.held_out)) if path]
    for part, path in parts:
        if not part:
            raise ValueError(f"no record is left for {path}: {file.counts.summary()}")
    print(file.counts.summary())
    for error in file.counts.errors[:SHOWN_ERRORS]:
        print(f"  skipped: {error}", file=sys.stderr)
    for part, path in parts:
        write_records(part, path)
        images = Counter(record.image for record in part)
        print(f"{path}: {len(part)} records on {len(images)} images")
