"""COCO-style files become grounding records: boxes where they were, nothing lost without being counted."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perpo.cli import main as cli
from perpo.cli.coco import prompts
from perpo.data.coco import AnnotationError, CocoFile, divide
from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.rewards.formats import FORMATS, write_boxes
from perpo.rewards.scoring import find_task

from ..data.test_images import png_of_size

CONTENT: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}, {"id": 8, "file_name": "b.png"}],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dining table"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 10]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0.0, 0, 4, 4], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [30, 10, 20, 30]},
        {"id": 4, "image_id": 8, "category_id": 2, "bbox": [1, 1, 2, 2]},
        {"id": 5, "image_id": 8, "category_id": 2, "bbox": [0, 0, 10, 10], "iscrowd": 1, "segmentation": {}},
    ],
}


ALL = prompts("llava")[1]


def file(
    folder: Path, change: Callable[[Any], object] = lambda content: None, form: str = "llava", **options: Any
) -> CocoFile:
    Image.new("RGB", (40, 20)).save(folder / "a.png")
    Image.new("RGB", (10, 10)).save(folder / "b.png")
    (folder / "bomb.png").write_bytes(png_of_size(20_000, 20_000))
    (folder / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 2\n%%EndComments\n%%EOF")
    content = copy.deepcopy(CONTENT)
    change(content)
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoFile(folder / "instances.json", folder, f"grounding/{form}", **options)


def test_a_record_asks_for_all_objects_of_a_category(tmp_path: Path) -> None:
    coco = file(tmp_path, form="qwen2.5-vl")
    dogs, table = coco.detection(prompts("qwen2.5-vl")[1], 8)
    assert (dogs.id, dogs.image, dogs.task) == ("7-1", "a.png", "grounding/qwen2.5-vl")
    assert dogs.prompt == "Locate every dog in the image, output all bbox coordinates in JSON format."
    assert dogs.answer == [[0.25, 0.25, 0.75, 0.75], [0, 0, 0.1, 0.2]]
    assert table.answer == [[0.75, 0.5, 1, 1]]  # the part inside the image
    assert (coco.counts.records, coco.counts.boxes, coco.counts.crowds, coco.counts.incomplete) == (2, 3, 1, 1)
    assert coco.counts.summary().startswith("2 records with 3 boxes; 1 crowd annotations skipped; 1 questions left out")


def test_questions_with_too_many_boxes_are_left_out_and_counted(tmp_path: Path) -> None:
    coco = file(tmp_path)
    assert [record.id for record in coco.detection(ALL, 1)] == ["7-2"]
    assert coco.counts.crowded == 1


@pytest.mark.parametrize("form", FORMATS)
def test_the_true_boxes_as_any_family_writes_them_score_one(form: str, tmp_path: Path) -> None:
    """The size of the resized image is what counts, not that of the file."""
    seen = (1400, 700)
    for record in file(tmp_path, form=form).detection(ALL, 8):
        text = write_boxes(record.answer, form, seen)
        (reward,) = find_task(record.task).reward([""], [text], answer=[record.answer], image_size=[seen])
        assert reward == pytest.approx(1, abs=0.06)  # llava writes two decimals
        (surplus,) = find_task(record.task).reward(
            [""], [write_boxes([*record.answer, (0, 0, 1, 1)], form, seen)], answer=[record.answer], image_size=[seen]
        )
        assert surplus < reward


def test_a_sentence_asks_for_its_one_object(tmp_path: Path) -> None:
    refs = [
        {
            "ref_id": 3,
            "ann_id": 2,
            "split": "train",
            "sentences": [{"sent": "left dog", "raw": "Left dog!"}, "the dog "],
        },
        {"ref_id": 4, "ann_id": 1, "split": "val", "sentences": [{"raw": "a {curly} one"}]},
    ]
    train = list(file(tmp_path).referring(refs, prompts("llava")[0], "train"))
    assert [record.id for record in train] == ["ref-3-0", "ref-3-1"]
    assert [record.answer for record in train] == [
        [0, 0, 0.1, 0.2]
    ] * 2  # one box: compared with the first of an answer
    assert str(train[1].prompt).endswith("this sentence describes: the dog")
    both = list(file(tmp_path).referring(refs, 'Where is {label}? As {"bbox_2d": …}'))
    assert both[-1].prompt == 'Where is a {curly} one? As {"bbox_2d": …}'


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ({"sentences": {"sent": "x"}}, r"ref 1: sentences must be a list .* got {'sent': 'x'} \(ref_id 3, ann_id 2\)"),
        ({"sentences": "abc"}, r"ref 1: sentences must be a list .* got 'abc' \(ref_id 3, ann_id 2\)"),
        ({}, "ref 1: sentences must be a list .* got None"),
        ({"sentences": [" "]}, "ref 1: a sentence must be a text"),
        ({"sentences": ["x"], "ann_id": 9}, "ref 1: no annotation has its ann_id 9"),
        ({"sentences": ["x"], "ann_id": 4}, "ref 1: two annotations have its ann_id 4"),
    ],
)
def test_bad_refs_are_named_with_their_ids_or_counted(ref: dict[str, Any], message: str, tmp_path: Path) -> None:
    refs = [{"ref_id": 3, "ann_id": 2} | ref, {"ann_id": 1, "sentences": ["good"]}]
    twice: Callable[[Any], object] = lambda content: content["annotations"][4].update(id=4)  # noqa: E731 - one of several in a table
    with pytest.raises(AnnotationError, match=message):
        list(file(tmp_path, twice).referring(refs, ALL))
    coco = file(tmp_path, twice, skip_bad=True)
    assert [record.id for record in coco.referring(refs, ALL)] == ["ref-2-0"]
    assert len(coco.counts.errors) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--split", "val"], "split has no effect without refs"),
        (["--held_out_share", "0.5"], "held_out_share has no effect without held_out"),
        (["--held_out", "h.jsonl", "--held_out_share", "2"], "held_out_share must be in [0, 1], got 2.0"),
        (["--refs", "r.json", "--max_boxes", "3"], "max_boxes has no effect with refs"),
        (["--max_boxes", "0"], "max_boxes must be ≥ 1, got 0"),
        (["--held_out", "o.jsonl"], "output and held_out must be two files"),
        (["--fromat", "llava"], "--fromat is not a setting; did you mean 'format'?"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["coco", "--annotations", "a.json", "--images", ".", "--format", "llava", "--output", "o.jsonl"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, *extra])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def set_box(index: int, box: Any) -> Callable[[Any], object]:
    return lambda content: content["annotations"][index].update(bbox=box)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_box(1, [0, 0, 0, 4]), r"annotation 2: bbox \[0, 0, 0, 4\] has no area"),
        (set_box(1, [50, 0, 4, 4]), r"annotation 2: bbox .* has no area inside the image of 40 × 20 pixels"),
        (set_box(1, [0, 0, 4]), r"annotation 2: bbox must be \[x, y, width, height\] in pixels, got \[0, 0, 4\]"),
        (set_box(1, [0, 0, 4, float("nan")]), "annotation 2: bbox must be"),
        (set_box(1, [0, 0, 4, "4"]), "annotation 2: bbox must be"),
        (set_box(1, None), "annotation 2: bbox must be"),
        (lambda c: c["annotations"][2].update(image_id=9), "annotation 3: no image has its image_id 9"),
        (lambda c: c["annotations"][2].update(image_id=[9]), r"annotation 3: no image has its image_id \[9\]"),
        (lambda c: c["annotations"][2].pop("category_id"), "annotation 3: no category has its category_id None"),
        (lambda c: c["annotations"].append("x"), "an annotation must be an object, got 'x'"),
        (lambda c: c["images"][0].update(width=20, height=40), "image 7: a.png has 40 × 20 pixels .* as 20 × 40"),
        (set_box(1, [0, 0, 10**400, 4]), "annotation 2: bbox must be"),
        (lambda c: c["images"][1].update(file_name="gone.png"), "image 8: image '.*gone.png' does not exist"),
        (lambda c: c["images"][1].update(file_name="../b.png"), "image 8: .* without '..'"),
        (lambda c: c["images"][1].update(file_name="bomb.png"), "image 8: image .*bomb.png' is too large"),
        (lambda c: c["images"][1].update(file_name="page.eps"), "image 8: image .*page.eps' cannot be opened"),
        (lambda c: c["images"][1].update(file_name="instances.json"), "image 8: .* cannot identify image file"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_file_and_annotation_or_counted(
    change: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AnnotationError, match=rf"instances.json: ({message})(.|\n)*--skip_bad leaves out"):
        list(file(tmp_path, change).detection(ALL, 8))
    coco = file(tmp_path, change, skip_bad=True)
    left = [record.id for record in coco.detection(ALL, 8)]
    assert len(left) == coco.counts.records < 3  # never with a part of the boxes alone
    assert coco.counts.errors
    assert "bad annotations or images skipped" in coco.counts.summary()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected an object with images, annotations and categories"),
        ('{"annotations": [1', "not valid JSON"),
        ('{"annotations": [], "images": {}}', "expected a list 'images'"),
        ('{"annotations": [], "images": [{"id": 1}]}', "images 1 needs id and file_name"),
        ('{"annotations": [], "images": [], "categories": [{"name": "x"}]}', "categories 1 needs id and name"),
        ('{"annotations": [], "images": [{"id": true, "file_name": "a"}]}', "images 1 needs id and file_name"),
        (
            '{"annotations": [], "images": [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]}',
            "two images have the id 7: 'a.png' and 'b.png'",
        ),
        (
            '{"annotations": [], "images": [], "categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}',
            "two categories have the id 1: 'cat' and 'dog'",
        ),
        ("[" * 100_000, "not valid JSON: it is nested too deeply"),
    ],
)
def test_a_file_of_another_kind_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json: {message}"):
        CocoFile(tmp_path / "x.json", tmp_path, "grounding/llava")


def test_an_image_that_its_exif_turns_is_measured_upright(tmp_path: Path) -> None:
    def turned(content: Any) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (20, 40)).save(tmp_path / "turned.jpg", exif=exif)
        content["images"][0]["file_name"] = "turned.jpg"

    assert next(file(tmp_path, turned).detection(ALL, 8)).answer[0] == [0.25, 0.25, 0.75, 0.75]


def test_all_records_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    records = [ListRecord(f"{i}-{j}", f"{i}.jpg", "?") for i in range(400) for j in range(3)]
    train, held_out = divide(records, 0.1)
    assert len(train) + len(held_out) == 1200
    assert not {record.image for record in train} & {record.image for record in held_out}
    assert 60 < len(held_out) < 180
    assert divide(records[::-1], 0.1)[1] == held_out[::-1]  # whatever the order


def test_every_format_has_a_prompt_that_names_the_object() -> None:
    for form in FORMATS:
        assert all(prompt.count("{label}") == 1 for prompt in prompts(form))


def test_the_command_writes_records_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file(tmp_path, set_box(1, [0, 0, 0, 0]))
    command = [
        "coco",
        "--annotations",
        str(tmp_path / "instances.json"),
        "--images",
        str(tmp_path),
        "--format",
        "llava",
    ]
    output = ["--output", str(tmp_path / "out.jsonl")]
    assert cli.main([*command, *output]) == 1
    assert "annotation 2: bbox [0, 0, 0, 0] has no area" in capsys.readouterr().err
    assert cli.main([*command, *output, "--skip-bad"]) == 0
    shown = capsys.readouterr()
    assert "1 records with 1 boxes; 1 crowd annotations skipped; 2 questions left out" in shown.out
    assert "skipped: " in shown.err
    records, _ = read_records(tmp_path / "out.jsonl", require=("answer",), check_images=True, root=tmp_path)
    assert [record.id for record in records] == ["7-2"]
    with pytest.raises(SystemExit):
        cli.main([*command, *output, "--skip-bad", "--prompt", "Where?"])
    assert "--prompt must hold {label}" in capsys.readouterr().err
    assert (
        cli.main([*command, *output, "--skip_bad", "--held_out", str(tmp_path / "h.jsonl"), "--held_out_share", "1"])
        == 1
    )
    assert f"no record is left for {tmp_path / 'out.jsonl'}" in capsys.readouterr().err
