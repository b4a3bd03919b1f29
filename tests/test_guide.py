"""The guide's commands and code run: in order, in one folder, each section's Python in one scope.

What is replaced, as the guide says: the model by a tiny Qwen2.5-VL, the data by a few pictures, torchrun's eight
processes by two or one, hundreds of new tokens by a few, charts by none, bf16 where there is no GPU. Every step is
logged. A tiny model says nothing readable, so between sampling and training its answers become boxes, texts and dates
near the true ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import perpo.model.load
from perpo.cli import main as cli
from perpo.data.images import open_image
from perpo.data.read import read_records
from perpo.data.record import ListRecord, write_records
from perpo.encoding.encoder import Encoder
from perpo.rewards.formats import write_boxes
from perpo.rewards.scoring import UnreadableAnswers, find_task, score_records

from .perpo import tiny_models, tiny_qwen
from .processes import ranks

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
NAME = "Qwen/Qwen2.5-VL-7B-Instruct"
EIGHT = "torchrun --nproc-per-node 8 -m perpo"
ONE = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1 -m tests.perpo.tiny_qwen"
pytestmark = pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")


class Block(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that it is, by its first line."""
        named = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def sections() -> dict[str, list[Block]]:
    """The number of each section and its fenced blocks."""
    parts = re.split(r"^## (\d)\..*$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return {
        number: [Block(*found) for found in fenced.findall(text)]
        for number, text in zip("01234", parts[::2], strict=True)
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model and the data that the guide's reader has."""
    folder = tmp_path_factory.mktemp("guide")
    tiny_qwen.save(folder / NAME)
    for name in ("images", "pages"):
        (folder / name).mkdir()
    save_coco(folder)
    for i in range(4):
        tiny_models.picture((40, 28), i).save(folder / "pages" / f"p{i}.png")
        (folder / "pages" / f"p{i}.txt").write_text(f"Page {i}", encoding="utf-8")
    dates = [
        {"id": f"r{i}", "image": f"{i:06}.png", "prompt": "When?", "answer": f"2024-05-{i + 10}"} for i in range(2)
    ]
    (folder / "dates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dates))
    answers = [{"id": f"r{i % 2}", "response": f"2024-05-{i + 10}"} for i in range(6)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    before, path, threads = Path.cwd(), list(sys.path), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perpo.model.load, "AutoProcessor", tiny_qwen.Processor)
        yield folder
    os.chdir(before)
    torch.set_num_threads(threads)
    sys.path[:] = path


def save_coco(folder: Path) -> None:
    """Five pictures with one dog and two cups each, and a crowd in one of them."""
    images, annotations = [], []
    for i in range(5):
        size = (40, 28) if i % 2 else (28, 40)
        tiny_models.picture(size, i).save(folder / "images" / f"{i:06}.png")
        images.append({"id": i, "file_name": f"{i:06}.png", "width": size[0], "height": size[1]})
        for j, category in enumerate((1, 2, 2)):
            box = [2 + 8 * j, 3 + i % 4, 7, 9]
            annotations.append({"id": 3 * i + j, "image_id": i, "category_id": category, "bbox": box, "iscrowd": 0})
    annotations.append({"id": 99, "image_id": 0, "category_id": 2, "bbox": [0, 0, 28, 28], "iscrowd": 1})
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cup"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    refs = [{"ref_id": 5, "ann_id": 3, "split": "train", "sentences": [{"sent": "the left dog"}, "dog"]}]
    (folder / "refs.json").write_text(json.dumps([*refs, {"ann_id": 6, "split": "val", "sentences": ["x"]}]))


def run_section(number: str, project: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[list[str], str]]:
    """Every command with what it printed, after it ran; Python blocks in between."""
    scope: dict[str, Any] = {}
    for block in sections()[number]:
        if block.file:
            (project / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"{GUIDE.name}, section {number}", "exec"), scope)
        elif block.language == "bash":
            for line in filter(None, block.text.splitlines()):
                if not line.startswith("pip "):
                    yield run(line, capsys)


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """One command of the guide, on the tiny model."""
    line = re.sub(r"--max_new_tokens \d+", "--max_new_tokens 6", line)
    line = line.replace("--report_to tensorboard", "--report_to none")
    if re.search(r"perpo(\.cli)? train ", line):
        line += " --logging_steps 1"
    if not torch.cuda.is_available():
        line = line.replace("--bf16 true", "--use_cpu true")
    words = shlex.split(line)
    capsys.readouterr()
    if words[0] == "perpo":
        try:
            code: Any = cli.main(words[1:])
        except SystemExit as stop:
            code = stop.code
        shown = "".join(capsys.readouterr())
    elif line.startswith(f"{EIGHT} generate "):
        both = ranks(2, "-m", "tests.perpo.tiny_qwen", *shlex.split(line.removeprefix(EIGHT)))
        shown = "".join("".join(one.communicate()) for one in both)
        code = [one.returncode for one in both if one.returncode] or 0
    else:
        line = line.replace(EIGHT, ONE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        done = subprocess.run(line, shell=True, env=environment, **options)
        code, shown = done.returncode, done.stdout + done.stderr
    assert code == 0, f"{line}\n{shown[-3000:]}"
    return words, shown


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def make_readable(path: Path) -> None:
    """Answers such as a large model gives: boxes near the true ones, in pixels of the resized image, with rewards."""
    draw = random.Random(0)
    size_of = Encoder(tiny_qwen.Processor.from_pretrained(NAME, max_pixels=802816)).seen_size

    def columns(record: ListRecord) -> dict[str, Any]:
        return {"image_size": size_of(open_image(record.image, "images").size)}

    def say(record: ListRecord) -> str:
        boxes = [_near(box, draw) for box in record.answer]
        return write_boxes(boxes, "qwen2.5-vl", columns(record)["image_size"])

    answer_anew(path, say, columns=columns)


def answer_anew(path: Path, say: Callable[[ListRecord], str], **options: Any) -> None:
    """Every response of a file's lists becomes what `say` gives for its record, scored again."""
    records = read_records(path)[0]
    answered = [replace(record, responses=tuple(say(record) for _ in range(record.k))) for record in records]
    write_records(score_records(answered, **options), path)


def _near(box: list[float], draw: random.Random) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (min(max(side + draw.uniform(-0.1, 0.1), 0), 1) for side in box)
    return min(x1, x2), min(y1, y2), max(x1, x2) + 0.05, max(y1, y2) + 0.05


def test_grounding(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for words, printed in run_section("1", project, capsys):
            if words[0] == "head":
                continue
            produced = option(words, "--output" if "--output" in words else "--output_dir")
            shown[produced] = printed
            if produced == "lists_of_eight.jsonl":
                assert (project / produced).read_bytes() == (project / "lists.jsonl").read_bytes()
                for lists in ("lists.jsonl", "few_lists.jsonl"):
                    make_readable(project / lists)
    framed = [str(one.message) for one in warned if issubclass(one.category, UnreadableAnswers)]
    assert all("answers could not be read" in message and "bbox_2d" in message for message in framed)
    assert len(framed) == 4  # both runs of `generate` in this process, and each model in `evaluate`
    records, _ = read_records("train.jsonl", require=("answer",))
    held_out, _ = read_records("held_out.jsonl", require=("answer",))
    assert not {record.image for record in records} & {record.image for record in held_out}
    assert "1 crowd annotations skipped; 1 questions left out" in shown["train.jsonl"]
    assert [record.prompt for record in read_records("refs.jsonl", require=("answer",))[0]] == [
        f"Locate {text}, output its bbox coordinates using JSON format." for text in ("the left dog", "dog")
    ]
    assert "100.0% of the answers could not be read" in shown["lists.jsonl"]
    assert "0.0% of the lists hold a preference" in shown["lists.jsonl"]
    for folder in ("runs/boxes", "runs/boxes_of_eight"):
        log = json.loads((project / folder / "trainer_state.json").read_text())["log_history"]
        assert log[0]["lists/active"] > 0.9
        assert 0.6 < log[0]["loss"] < 0.7  # near ln 2
        adapter = load_file(project / folder / "adapter_model.safetensors")
        ends = [value for name, value in adapter.items() if "lora_B" in name]  # 0 before training
        assert ends
        assert all(value.any() for value in ends)
    log = json.loads((project / "runs/watched/trainer_state.json").read_text())["log_history"]
    assert any("eval_rewards/accuracies" in entry for entry in log)
    evaluation = json.loads((project / "runs/boxes/evaluation/evaluation.json").read_text())
    assert [model["name"] for model in evaluation["models"]] == ["base", "aligned"]
    assert evaluation["tasks"][0]["task"] == "grounding/qwen2.5-vl"
    assert "could not be read" in evaluation["notices"][0]
    assert (project / "runs/boxes/merged/model.safetensors").exists()


def test_reading_text(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    for words, _shown in run_section("2", project, capsys):
        if words[1] == "generate":
            answer_anew(project / "page_lists.jsonl", lambda record: record.answer[: draw.randint(1, 6)])
    assert len(read_records("page_lists.jsonl")[0]) == 3
    figures = json.loads((project / "runs/pages/evaluation/evaluation.json").read_text())["tasks"][0]
    assert set(figures["metrics"]) >= {"edit_distance", "f1", "precision", "recall", "bleu"}


def test_a_reward_of_one_s_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    for words, shown in run_section("3", project, capsys):
        if words[1] == "score":
            assert re.search(r"my_rewards:days_apart +2 +6 +0.511 +1.000 +0.0% +0.0% +100.0%", shown)
        if words[1] == "generate":
            lists = project / "date_lists.jsonl"
            answer_anew(lists, lambda _: f"On 2024-05-{draw.randint(10, 29)}.", reward=option(words, "--reward"))
    scope: dict[str, Any] = {}
    exec((project / "my_rewards.py").read_text(), scope)
    texts = ["It was 2024-05-30.", "2024-05-31", "May", "2024-02-31"]
    assert scope["days_apart"]([""] * 4, texts, answer=["2024-05-31"] * 4) == [0.5, 1.0, None, None]
    figures = json.loads((project / "runs/dates/evaluation/evaluation.json").read_text())["tasks"][0]
    assert figures["task"] == "my_rewards:days_apart"
    first, second = read_records("scored.jsonl")[0]
    assert first.rewards == pytest.approx((1, 1 / 3, 1 / 5))
    assert second.rewards == pytest.approx((1, 1 / 3, 1 / 5))


def test_a_trainer_of_one_s_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (project / "lists.jsonl").exists():  # this test alone: section 1 makes them
        for line in ("coco --annotations instances.json --images images --format qwen2.5-vl --output train.jsonl",
                     f"generate --model {NAME} --records train.jsonl --output lists.jsonl --image_root images --k 3 "
                     "--max_new_tokens 6"):  # fmt: skip
            run(f"perpo {line}", capsys)
        make_readable(project / "lists.jsonl")
    capsys.readouterr()
    for _words, _shown in run_section("4", project, capsys):
        pass
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"^loss (\d\.\d+), margin", printed, re.MULTILINE)]
    assert len(losses) == len(read_records("lists.jsonl")[0])
    assert losses[0] == pytest.approx(0.693, abs=2e-3)
    assert printed.count("'train_runtime'") == 3  # transformers.Trainer, and the two in place of TRL's
    assert "[0.25]" in printed
    (iou,) = re.findall(r"^\[(\d\.\d+)\]$", printed, re.MULTILINE)[:1]
    assert float(iou) > 0.9


# Options of torchrun, TensorBoard, pip and vLLM's server.
OF_OTHERS = {"nproc-per-node", "logdir", "extra-index-url"}
OF_OTHERS |= {"mm-processor-kwargs", "max-model-len", "reasoning-parser", "chat-template"}


def test_the_guide_shows_records_and_messages_as_they_are() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for block in (block for blocks in sections().values() for block in blocks):
        assert block.language in ("bash", "python", "yaml", "json", "text"), f"```{block.language} is not run"
        if block.language == "json":
            if "rejected_response" in block.text:
                (record,), report = read_records([json.loads(block.text)])
                assert record.rewards == (1, 0)
                continue
            (record,), report = read_records([json.loads(block.text)], require=("answer",))
            assert find_task(record.task).reward([""], ["none"], answer=[record.answer], image_size=[(28, 28)]) == [0]
            assert not report.ignored
            assert not report.further
    used = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - OF_OTHERS
    known = "".join(help_of(command) for command in cli.COMMANDS)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {name for name in used - inherited if f"--{name} " not in known} == set()


def help_of(command: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return shown.getvalue()
