"""Records survive every format, a bad one is named by file, line and field, and nothing is half written."""

import dataclasses
import datetime
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perpo.data.read import RecordError, read_records
from perpo.data.record import FieldError, ListRecord, write_records

GOOD: dict[str, Any] = {
    "id": "a",
    "image": "train/a.jpg",
    "prompt": "Where is the glass?",
    "answer": "[0.61, 0.1, 0.77, 0.54]",
    "task": "grounding",
    "responses": ["[0.61, 0.17, 0.77, 0.53]", "[0.57, 0.38, 0.69, 0.52]"],
    "rewards": [0.8, 0.15],
    "ref_log_probs": [-3.5, -4],
}
# The shape of the records of PerPO's authors.
AUTHORS: dict[str, Any] = {
    "image_id": 7,
    "image_path": "COCO/train2014/7.jpg",
    "question": "Please provide the bounding box coordinate of the region this sentence describes: a red cup",
    "answer": "[0.61, 0.1, 0.77, 0.54]",
    "answers_gen": ["[0.61, 0.17, 0.77, 0.53]", "[0.57, 0.17, 0.78, 0.52]", "[0.26, 0.17, 0.48, 0.45]"],
    "iou_scores": [0.8003244239631337, 0.652158627478554, 0.0],
}
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (GOOD | changes).items() if value is not ...}


@st.composite
def list_records(draw: st.DrawFn) -> ListRecord:
    k = draw(st.integers(1, 4))
    numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=k, max_size=k)
    answers = st.one_of(st.text(), st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(-9, 9))
    try:
        return ListRecord(
            id=draw(st.uuids()).hex,
            image=draw(st.one_of(st.none(), st.text(min_size=1))),
            prompt=draw(st.one_of(st.text(min_size=1).map("?{}".format), st.just(CHAT))),
            answer=draw(answers),
            task=draw(st.sampled_from(["", "ocr", "grounding/qwen3-vl"])),
            responses=draw(st.lists(st.text(), min_size=k, max_size=k)),
            rewards=draw(numbers),
            ref_log_probs=draw(st.one_of(st.none(), numbers)),
            flip_probs=draw(st.one_of(st.none(), st.lists(st.floats(0, 0.999), min_size=k, max_size=k))),
            complete=draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=k, max_size=k))),
            weight=draw(st.one_of(st.none(), st.floats(0, 3e38))),
        )
    except FieldError:
        return draw(list_records())  # a number beyond 1.7e308


@given(st.lists(list_records(), min_size=1, max_size=4))
def test_what_is_written_is_read_back_exactly(tmp_path: Path, records: list[ListRecord]) -> None:
    path = tmp_path / "lists.jsonl"
    assert write_records(records, path) == len(records)
    read, report = read_records(path)
    assert read == records
    assert (report.n_records, report.n_bad) == (len(records), 0)


CLOSE = [0.0, -0.0, -2.5e-274, 5e-324, 1e-46, 1.4e-45, 0.1, 0.1 + 3e-16, 0.1 + 1e-10, 0.1 + 2e-10, 1.0, 1 + 1e-13, -1.0]


@given(st.lists(st.sampled_from(CLOSE), min_size=2, max_size=5))
@example([0.0, 0.0, 1.0, -2.5e-274])
def test_rewards_keep_their_order_in_fp32_and_their_ties(rewards: list[float]) -> None:
    """Those that would else be equal in fp32 are moved apart, and what was equal to one that moves goes with it."""
    rewards = [*rewards, 9.0]  # steps of fp32 are small against the range
    kept = ListRecord("a", None, "?", "", "", ("",) * len(rewards), rewards).rewards
    assert kept is not None
    for i, j in itertools.permutations(range(len(rewards)), 2):
        if rewards[i] == rewards[j]:
            assert kept[i] == kept[j]
        elif rewards[j] - rewards[i] > 1e-12 * abs(rewards[j]):
            assert np.float32(kept[i]) < np.float32(kept[j])
    assert ListRecord("a", None, "?", "", "", ("",) * len(kept), kept).rewards == kept


def test_strange_characters_survive_jsonl(tmp_path: Path) -> None:
    texts = ["line\nbreak", "\u2028\u2029\x85", "字", "\0", '"', "\U0001f600"]
    before = ListRecord("a", None, "?", ["\ud800"], "", tuple(texts), (0.0,) * len(texts), columns={"c": "\udfff"})
    write_records([before], tmp_path / "a.jsonl")
    assert read_records(tmp_path / "a.jsonl")[0] == [before]


def test_the_authors_records_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "authors.json"
    path.write_text(json.dumps([AUTHORS, AUTHORS | {"image_id": 8}, AUTHORS], indent=2))
    records, report = read_records(path)
    assert [record.id for record in records] == ["7", "8", "7#2"]
    first = records[0]
    assert (first.image, first.prompt) == (AUTHORS["image_path"], AUTHORS["question"])
    assert (first.answer, first.task) == (AUTHORS["answer"], "grounding")
    assert (first.responses, first.rewards) == (tuple(AUTHORS["answers_gen"]), tuple(AUTHORS["iou_scores"]))
    assert (first.k, first.has_preference, report.ignored) == (3, True, {})


def test_an_error_in_the_authors_records_uses_their_field_names_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "authors.json"
    path.write_text(json.dumps([AUTHORS, AUTHORS | {"iou_scores": [0.5]}], indent=1))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if i > 2 and text == " {")
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert str(caught.value) == f"{path}:{line}: iou_scores: must hold one number a response: 3 responses, 1 rewards"


BAD = [
    ({"rewards": [0.8]}, "rewards", "2 responses, 1 rewards"),
    ({"rewards": [0.8, math.nan]}, "rewards", "item 1 must be a finite number, got nan"),
    ({"rewards": [math.inf, 1]}, "rewards", "item 0 must be a finite number, got inf"),
    ({"rewards": [0.8, None]}, "rewards", "item 1 .* got None"),
    ({"rewards": [0.8, "0.5"]}, "rewards", "item 1 .* got '0.5'"),
    ({"rewards": [0.8, True]}, "rewards", "item 1 .* got True"),
    ({"rewards": [10**400, 1]}, "rewards", "item 0"),
    ({"rewards": "high"}, "rewards", "must be a list of numbers, got 'high'"),
    ({"rewards": {"a": 1}}, "rewards", "must be a list of numbers"),
    ({"rewards": ...}, "rewards", "is missing or empty: run `perpo generate` first"),
    ({"rewards": None}, "rewards", "is missing or empty"),
    ({"responses": []}, "responses", "is missing or empty"),
    ({"responses": "a text"}, "responses", "must be a list of texts"),
    ({"responses": ["a", 1]}, "responses", "must be a list of texts"),
    ({"ref_log_probs": [-1.0]}, "ref_log_probs", "2 responses, 1 ref_log_probs"),
    ({"ref_log_probs": [-1.0, -math.inf]}, "ref_log_probs", "item 1 must be a finite number"),
    ({"flip_probs": [0.1]}, "flip_probs", "2 responses, 1 flip_probs"),
    ({"flip_probs": [0.1, 1.0]}, "flip_probs", r"must be probabilities in \[0, 1\)"),
    ({"flip_probs": [-0.1, 0.5]}, "flip_probs", r"must be probabilities in \[0, 1\)"),
    ({"complete": [True]}, "complete", "2 responses, 1 complete"),
    ({"complete": [True, 0]}, "complete", "must be a list of true and false"),
    ({"weight": -0.5}, "weight", "must be a number from 0 to 3.4e38, what the list counts in the loss, got -0.5"),
    ({"weight": math.nan}, "weight", "must be a number from 0 to 3.4e38"),
    ({"weight": "12 kg"}, "weight", "a column that means something else needs another name"),
    ({"weight": True}, "weight", "must be a number from 0 to 3.4e38"),
    ({"columns": 3}, "columns", "must be a mapping by name"),
    ({"prompt": ...}, "prompt", "is missing or empty"),
    ({"prompt": " "}, "prompt", "must be a text that is not empty"),
    ({"prompt": [{"content": "x"}]}, "prompt", "message 0 must be"),
    ({"prompt": [{"role": "user"}]}, "prompt", "content of message 0"),
    ({"prompt": [{"role": "user", "content": [{"text": "no type"}]}]}, "prompt", "content of message 0"),
    ({"prompt": 5}, "prompt", "must be a text"),
    ({"prompt": "what \ud83d"}, "prompt", r"half of a surrogate pair \('\\ud83d' after 'what '\)"),
    ({"prompt": [{"role": "user", "content": "\udc00"}]}, "prompt", "half of a surrogate pair"),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "prompt", "a text part of message 0 must be"),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "prompt", "a text part of message 0"),
    ({"responses": ["a", "b\ud800"]}, "responses", "half of a surrogate pair"),
    ({"responses": ["a", None]}, "responses", "must be a list of texts"),
    ({"image": ..., "images": ["a.jpg", "b.jpg"]}, "images", "holds 2 images, but a record has one"),
    ({"images": ["a.jpg", "b.jpg"]}, "images", "holds 2 images, but a record has one"),
    ({"image": ["a.jpg", "b.jpg"]}, "image", "holds 2 images, but a record has one"),
    ({"image": ..., "image_path": 5}, "image_path", "must be a path"),
    ({"image": 5}, "image", "must be a path"),
    ({"image": ""}, "image", "must be a path"),
    ({"id": 1.5}, "id", "must be a text"),
    ({"id": ""}, "id", "must not be empty"),
    ({"id": True}, "id", "must be a text"),
    ({"task": 3}, "task", "must be a text"),
    ({"id": "first"}, "id", "'first' is taken by the record at line 1"),
]


@pytest.mark.parametrize(("changes", "field", "reason"), BAD)
def test_a_bad_record_is_named_by_file_line_field_and_reason_or_skipped(
    tmp_path: Path, changes: dict[str, Any], field: str, reason: str
) -> None:
    path = jsonl(tmp_path / "lists.jsonl", good(id="first"), "", good(**changes), good(id="last"))
    with pytest.raises(RecordError, match=reason) as caught:
        read_records(path)
    error = caught.value
    assert (error.source, error.place, error.field) == (str(path), "3", field)
    assert str(error).startswith(f"{path}:3: {field}: ")
    records, report = read_records(path, skip_bad=True)
    assert [record.id for record in records] == ["first", "last"]
    assert (report.n_bad, [e.place for e in report.errors]) == (1, ["3"])
    assert "1 bad records skipped" in report.summary()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": ', "not valid JSON"),
        ("[1, 2]", "must be an object"),
        ("null", "must be an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named_or_skipped(tmp_path: Path, line: str, reason: str) -> None:
    path = jsonl(tmp_path / "lists.jsonl", GOOD, line)
    with pytest.raises(RecordError, match=f":2: {reason}"):
        read_records(path)
    assert read_records(path, skip_bad=True)[1].n_bad == 1


def test_bytes_that_are_not_utf8_spoil_one_line_only(tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    first, last = json.dumps(GOOD).encode(), json.dumps(good(id="b")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + first + b'\n{"id": "\xff"}\n' + last)
    records, report = read_records(path, skip_bad=True)
    assert [record.id for record in records] == ["a", "b"]
    assert "utf-8" in report.errors[0].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([GOOD, GOOD])[:-30], "not valid JSON from here on"),
        (json.dumps([GOOD])[:-1], "may have broken off"),
        (json.dumps([GOOD])[:-1] + ",]", "not valid JSON"),
        (json.dumps(GOOD), "expected a JSON array"),
        ("", "expected a JSON array"),
        ("[", "not valid JSON"),
        (json.dumps([GOOD]) + "\n" + json.dumps([good(id="b")]), r"lists.json:2: the array of records ends before"),
        (json.dumps([GOOD]) + "]", "lists.json:1: the array of records ends before this line"),
    ],
)
def test_a_broken_json_file_is_an_error_even_when_skipping(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "lists.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_records(path, skip_bad=True)


def test_no_usable_record_is_an_error_that_shows_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable record \(2 bad, 0 .* the first bad one is .*:1: rewards: item 0"):
        read_records(jsonl(tmp_path / "a.jsonl", *[good(rewards=[None, 1])] * 2), skip_bad=True)
    (tmp_path / "b.json").write_text(" [ ] ")
    for empty in (jsonl(tmp_path / "b.jsonl"), tmp_path / "b.json", []):
        with pytest.raises(ValueError, match="no usable record"):
            read_records(empty)


def test_what_is_odd_but_usable_is_kept_and_counted() -> None:
    rows = [
        good(id="ragged", responses=["a", "b", "c"], rewards=[3, 2, 1], ref_log_probs=...),
        good(id="tied", responses=["a", "b", "c"], rewards=[1, 1, 0], ref_log_probs=...),
        good(id="repeated", responses=["a", "a"]),
        good(id="inactive", rewards=[0.5, 0.5]),
        good(id="single", responses=["a"], rewards=[1.0], ref_log_probs=..., note="?"),
    ]
    records, report = read_records(rows)
    assert [record.has_preference for record in records] == [True, True, True, False, False]
    assert (report.n_records, report.n_inactive, report.n_tied, report.n_repeated) == (5, 2, 2, 1)
    assert report.sizes == {3: 2, 2: 2, 1: 1}
    assert report.summary() == (
        "list: 5 lists of 1–3 answers; 2 without any preference (kept); 2 with ties; 1 with repeated answers; "
        "further columns: note"
    )
    records, report = read_records(rows, drop_inactive=True)
    assert [record.id for record in records] == ["ragged", "tied", "repeated"]
    assert (report.n_records, report.n_dropped) == (3, 2)


def test_records_before_sampling_need_only_what_is_required(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "questions.jsonl", good(responses=..., rewards=..., ref_log_probs=..., id=...), {"prompt": "?"}
    )
    (first,), report = read_records(path, require=("answer",), skip_bad=True)
    assert (first.id, first.k, first.rewards, first.has_preference) == ("1", 0, None, False)
    assert report.errors[0].field == "answer"
    assert (report.n_inactive, report.n_tied) == (0, 0)
    with pytest.raises(ValueError, match=r"require must name fields .* got \['label'\]"):
        read_records(path, require=("label",))


@pytest.mark.parametrize("answer", ["", []])
def test_an_empty_answer_is_an_answer(answer: Any, tmp_path: Path) -> None:
    """A blank page has no text, and some images none of the objects that are asked for."""
    (record,), _ = read_records(jsonl(tmp_path / "a.jsonl", good(answer=answer)), require=("answer",))
    assert record.answer == answer
    with pytest.raises(RecordError, match=r"answer: is missing$"):
        read_records(jsonl(tmp_path / "a.jsonl", good(answer=...)), require=("answer",))


def test_arrays_and_numbers_of_numpy_are_taken_for_lists_and_numbers() -> None:
    row = {
        "id": np.int64(5),
        "prompt": "?",
        "answer": np.array([[0.5, 0.25]]),
        "responses": np.array(["a", "b"]),
        "rewards": np.array([1, 0], dtype=np.float32),
        "ref_log_probs": [np.float32(-1), np.float64(-2)],
        "complete": np.array([True, False]),
        "size": np.array([4, 5]),
    }
    (record,), _ = read_records([row])
    assert record == ListRecord(
        "5",
        None,
        "?",
        [[0.5, 0.25]],
        "",
        ("a", "b"),
        (1, 0),
        (-1, -2),
        complete=(True, False),
        columns={"size": [4, 5]},
    )
    assert type(record.answer[0][0]) is float
    assert type(record.responses[0]) is str


def test_what_else_a_record_holds_is_kept_for_rewards_if_json_can_hold_it(tmp_path: Path) -> None:
    when = datetime.date(2024, 5, 31)
    (record,), report = read_records([good(page=3, meta={"a": [1]}, empty=None, taken=when, odd=math.nan)])
    assert record.columns == {"page": 3, "meta": {"a": [1]}}
    assert (report.further, report.ignored) == ({"page": 1, "meta": 1}, {"taken": 1, "odd": 1})
    assert "further columns: meta, page; fields not used: odd, taken" in report.summary()
    write_records([record], tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text()).items() >= {"page": 3, "meta": {"a": [1]}}.items()
    assert read_records(tmp_path / "a.jsonl")[0] == [record]


def test_other_responses_come_without_what_was_known_of_the_old() -> None:
    record = ListRecord("a", None, "?", 3, "t", ("x",), (1.0,), (-1.0,), (0.1,), (False,), {"page": 1})
    assert record.answered(["y", "z"]) == ListRecord("a", None, "?", 3, "t", ("y", "z"), columns={"page": 1})
    assert record.answered(["y"], [0.5], [True]).complete is None  # as usual
    assert record.answered(["y", "z"], [0.5, 1], [True, False]).complete == (True, False)


def test_images_are_checked_where_asked(tmp_path: Path) -> None:
    (tmp_path / "here.jpg").write_bytes(b"")
    path = jsonl(tmp_path / "lists.jsonl", good(image="here.jpg"), good(id="b", image="../etc/passwd"))
    assert len(read_records(path)[0]) == 2
    with pytest.raises(RecordError, match=r":2: image: .*must be a path relative to"):
        read_records(path, check_images=True, root=tmp_path)
    assert read_records(path, check_images=True, root=tmp_path, skip_bad=True)[1].n_bad == 1


@pytest.mark.parametrize(
    "row",
    [
        good(image="a.jpg"),
        good(image=["a.jpg"]),
        good(image=..., images=["a.jpg"]),
        good(image=None, images="a.jpg"),
        good(image=[], images=["a.jpg"]),
        good(image=..., image_path="a.jpg"),
        good(image=..., images=[], image_path="a.jpg"),
    ],
)
def test_the_one_picture_is_found_under_the_names_that_others_give_it(row: dict[str, Any], tmp_path: Path) -> None:
    (record,), report = read_records([row])
    assert record.image == "a.jpg"
    assert report.n_without_image == 0
    assert "image" not in report.summary()
    write_records([record], tmp_path / "a.jsonl")
    assert read_records(tmp_path / "a.jsonl")[0] == [record]


def test_records_without_a_picture_are_counted_and_a_misspelt_one_is_pointed_at() -> None:
    rows = [good(), good(id="b", image=...), good(id="c", image=..., imgae="a.jpg", image_id=5)]
    records, report = read_records(rows)
    assert [record.image for record in records] == ["train/a.jpg", None, None]
    assert "2 without an image (is 'imgae' one? name it 'image')" in report.summary()


def test_reading_takes_at_most_twelve_times_what_parsing_the_lines_takes(tmp_path: Path) -> None:
    """100 000 records of 20 answers: seven seconds, of which parsing takes one."""
    n = 5_000
    many = {"responses": [f"[0.{i}, 0.17, 0.77, 0.53]" for i in range(20)], "rewards": [i / 7 for i in range(20)]}
    path = jsonl(tmp_path / "lists.jsonl", *[good(id=f"r{i}", ref_log_probs=..., source="x", **many) for i in range(n)])
    lines, times = path.read_text().splitlines(), []
    for _ in range(4):  # other processes on the machine cost time even of this one
        start = time.process_time()
        read_records(path)
        middle = time.process_time()
        for line in lines:
            json.loads(line)
        times.append((middle - start, time.process_time() - middle))
    reading, parsing = map(min, zip(*times, strict=True))
    assert reading < 12 * parsing


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".json", ".parquet"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        with pytest.raises(OSError, match=f"pipe{suffix}' is not a regular file"):
            read_records(tmp_path / f"pipe{suffix}")


def test_whatever_goes_wrong_with_a_record_can_be_skipped() -> None:
    class Odd(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise KeyError("odd")

    rows = [good(), Odd(good(id="b"))]
    with pytest.raises(RecordError, match="list: row 2: KeyError: 'odd'"):
        read_records(rows)
    records, report = read_records(rows, skip_bad=True)
    assert ([record.id for record in records], report.n_bad) == (["a"], 1)


def test_records_cannot_be_made_bad_or_changed() -> None:
    record = ListRecord("a", None, "?", responses=["x", "y"], rewards=[1, 2])
    assert (record.responses, record.rewards) == (("x", "y"), (1.0, 2.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.id = "b"
    with pytest.raises(FieldError, match="rewards: item 1"):
        dataclasses.replace(record, rewards=(1.0, math.nan))


def test_records_themselves_are_a_source() -> None:
    record = ListRecord("a", None, CHAT, responses=("x", "y"), rewards=(1.0, 2.0))
    assert read_records([record])[0] == [record]


@pytest.mark.parametrize("source", [5, {"train": []}, b"lists.jsonl"])
def test_other_sources_are_type_errors(source: object) -> None:
    with pytest.raises(TypeError, match="must come from a file, a data set or an iterable"):
        read_records(source)


def test_unknown_suffixes_and_missing_files_are_errors(tmp_path: Path) -> None:
    for wrong in (lambda p: read_records(p), lambda p: write_records([], p)):
        with pytest.raises(ValueError, match=r"records (must be in|are written to) a .jsonl"):
            wrong(tmp_path / "lists.csv")
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")


def test_writing_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    old = [ListRecord("old", None, "?")]
    write_records(old, path)

    def interrupted():
        yield ListRecord("new", None, "?")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(interrupted(), path)
    for unwritable in (ListRecord("x", None, "?", answer={1, 2}), ListRecord("x", None, "?", answer=math.nan)):
        with pytest.raises(ValueError, match="record 'x' cannot be written as JSON"):
            write_records([*old, unwritable], path)
    with pytest.raises(ValueError, match="record 'x' holds its image itself"):
        write_records([ListRecord("x", b"...", "?")], path)
    assert read_records(path, require=())[0] == old
    assert [file.name for file in tmp_path.iterdir()] == ["lists.jsonl"]


def test_writing_through_a_link_writes_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    write_records([ListRecord("a", Path("a.jpg"), "?")], tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert read_records(tmp_path / "real.jsonl", require=())[0][0].image == "a.jpg"


def test_a_full_disk_is_an_error_that_names_it() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from perpo.data import files as record_files

    with pytest.MonkeyPatch.context() as patch:
        real = Path.open
        patch.setattr(Path, "open", lambda self, mode: real(Path("/dev/full"), mode.replace("x", "w")))
        with pytest.raises(OSError, match="No space left"), record_files.atomic_file("lists.jsonl") as file:
            file.write(b"x" * 100_000)
    assert not Path("lists.jsonl").exists()


def test_what_is_known_of_a_response_goes_with_it() -> None:
    known = {"rewards": (0.1, 0.2, 0.3), "ref_log_probs": (-1.0, -2.0, -3.0), "complete": (True, False, True)}
    record = ListRecord("a", None, "?", "", "ocr", ("x", "y", "z"), flip_probs=(0.0, 0.1, 0.2), **known)
    kept = record.picked([2, 0])
    assert kept.responses == ("z", "x")
    assert kept.flip_probs == (0.2, 0.0)
    for name, values in known.items():
        assert getattr(kept, name) == (values[2], values[0])
    assert (kept.id, kept.prompt, kept.task) == ("a", "?", "ocr")
