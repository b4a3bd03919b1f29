"""Generating lists: what is in them, which records are bad, and what is refused before any sampling."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.evaluation.answers import ask
from perpo.evaluation.metrics import judge
from perpo.rewards.scoring import Tally, UnreadableAnswers
from perpo.sampling.candidates import CandidateConfig, generate
from perpo.sampling.sampler import Answer, Question
from perpo.storage.identity import StaleError

from .. import tiny_models
from ..counting_sampler import Counting, records, run

CONFIG = CandidateConfig(k=4)


def test_lists_are_scored_and_in_the_order_of_the_records(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    lists, report = read_records(tmp_path / "out.jsonl")
    assert [one.id for one in lists] == [f"r{i}" for i in range(7)]
    assert not report.ignored
    assert not report.further
    for one in lists:
        assert one.k == 4
        assert one.task == "counting"
        assert one.rewards is not None
        assert all((reward == 1.0) == (text == "3") for text, reward in zip(one.responses, one.rewards, strict=True))
    totals = outcome.totals
    rewards = [reward for one in lists for reward in one.rewards or ()]
    assert outcome.n_missing == 0
    assert (totals.n_lists, totals.n_answers, totals.n_unreadable) == (7, 28, 0)
    assert totals.reward_sum == pytest.approx(sum(rewards))
    assert totals.best_sum == pytest.approx(sum(max(one.rewards or ()) for one in lists))
    assert totals.n_active == sum(one.has_preference for one in lists)
    assert totals.n_repeats == sum(4 - len(set(one.responses)) for one in lists)
    assert "7 lists, 28 answers" in totals.summary()


@pytest.mark.parametrize("ends", [(True, False, True), (True, True, True)])
def test_answers_that_were_cut_are_known_in_the_lists(ends: tuple[bool, ...], tmp_path: Path) -> None:
    class Cut(Counting):
        def one(self, question: Question, n: int, attempt: int) -> list[Answer]:
            return [Answer(str(i), end) for i, end in enumerate(ends)]

    outcome = run(tmp_path, records(1), Cut(), k=3)
    assert outcome.totals.n_cut == ends.count(False)
    (record,), _ = read_records(tmp_path / "out.jsonl")
    assert record.complete == (None if all(ends) else ends)


def test_an_answer_cut_in_a_thought_that_the_template_opened_scores_nothing(tmp_path: Path) -> None:
    """Only the prompt shows that it is a thought. The lists hold what the model wrote, which training feeds."""
    texts = ("I see 3", "I see 2</think>3", "I see 3</think>2")

    class Thinking(Counting):
        def one(self, question: Question, n: int, attempt: int) -> list[Answer]:
            return [Answer(text, "</think>" in text) for text in texts]

    made = Thinking()
    made.encoder.opened = "<think>\n"
    outcome = run(tmp_path, records(1), made, k=3)
    (record,), _ = read_records(tmp_path / "out.jsonl")
    assert record.responses == texts
    assert record.rewards is not None
    assert record.rewards[0] == 0 < record.rewards[2] < record.rewards[1] == 1
    assert outcome.totals.n_unreadable == 1
    answers = ask(made, records(1), 3)[0].texts
    judged = judge(records(1)[0], answers, "counting", None, Tally())
    assert [one.readable for one in judged] == [False, True, True]
    assert judged[0].final is None


def test_a_reward_gets_the_further_columns_of_its_record_and_they_stay_in_the_list(tmp_path: Path) -> None:
    (plain,) = records(1)
    outcome = run(tmp_path, [replace(plain, columns={"bonus": 2.5})], reward=f"{__name__}:bonus_reward")
    assert outcome.totals.reward_sum == 10
    assert read_records(tmp_path / "out.jsonl")[0][0].columns == {"bonus": 2.5}
    with pytest.raises(StaleError, match="record 'r0' has another columns now"):
        run(tmp_path, [replace(plain, columns={"bonus": 3})], reward=f"{__name__}:bonus_reward")


def bonus_reward(prompts: list, completions: list, bonus: list, **columns: Any) -> list[float]:
    return bonus


def _damaged(folder: Path) -> list[ListRecord]:
    (folder / "text.png").write_text("no image")
    tiny_models.picture().save(folder / "good.png")
    bad = [
        ListRecord("gone", "nowhere.png", "How many?", 3, "counting"),
        ListRecord("text", "text.png", "How many?", 3, "counting"),
        ListRecord("long", "good.png", "too long", 3, "counting"),
        ListRecord("truth", "good.png", "How many?", "many", "counting"),
    ]
    return [*bad[:2], ListRecord("good", "good.png", "How many?", 3, "counting"), *bad[2:]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (0, r"record 'gone': image .*nowhere.png' does not exist"),
        (1, r"record 'text': image .*text.png' cannot be opened"),
        (3, r"record 'long': this prompt has 9 tokens"),
        (4, r"reward 'counting' failed on record 'truth'"),
    ],
)
def test_a_bad_record_is_an_error_that_names_it(bad: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{message}(?s:.)*skip_bad leaves out"):
        run(tmp_path, [_damaged(tmp_path)[bad]], image_root=str(tmp_path))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_bad_records_can_be_skipped_and_are_tried_again_later(
    batch_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _damaged(tmp_path)
    options: dict[str, Any] = {"image_root": str(tmp_path), "skip_bad": True}
    outcome = run(tmp_path, data, Counting(batch_size), **options)
    assert (outcome.totals.n_lists, outcome.totals.n_failed) == (1, 4)
    assert "4 bad records skipped" in outcome.totals.summary()
    assert "skipped: record 'gone': image" in "".join(capsys.readouterr())
    assert [one.id for one in read_records(tmp_path / "out.jsonl")[0]] == ["good"]
    tiny_models.picture().save(tmp_path / "nowhere.png")
    made = Counting(batch_size)
    outcome = run(tmp_path, data, made, **options)
    assert "good" not in made.asked
    assert (outcome.totals.n_lists, outcome.totals.n_failed) == (2, 3)
    assert [one.id for one in read_records(tmp_path / "out.jsonl")[0]] == ["gone", "good"]


def test_nothing_but_bad_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 2 were skipped; the first: record 'gone'"):
        run(tmp_path, _damaged(tmp_path)[:2], skip_bad=True, image_root=str(tmp_path))


def test_answers_that_cannot_be_read_are_loud_also_after_a_resume(tmp_path: Path) -> None:
    data = [ListRecord(f"r{i}", None, "Where?", [0.1, 0.1, 0.5, 0.5], "grounding") for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, Counting(stop=2))
    with pytest.warns(UnreadableAnswers, match=r"(?s)16 of 16 answers.*Expected: a box as llava models write it"):
        assert "100.0% of the answers could not be read" in run(tmp_path, data).totals.summary()


@pytest.mark.parametrize(
    ("prepare", "data", "name", "message"),
    [
        (None, records(1), "out.txt", r"must be a .jsonl or .parquet file"),
        (None, [ListRecord("r", tiny_models.picture(), "?", 1, "counting")], "out.jsonl", r"name a .parquet file"),
        (Path.touch, records(1), "out.jsonl", r"exists, and there is no out.jsonl.parts to resume from"),
        (None, records(1) * 2, "out.jsonl", r"ids must be distinct"),
        (None, [ListRecord("r", None, "?", 1, "guessing")], "out.jsonl", r"record 'r': task 'guessing' is not known"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_beginning(
    prepare: Callable[[Path], Any] | None, data: list[ListRecord], name: str, message: str, tmp_path: Path
) -> None:
    if prepare:
        prepare(tmp_path / name)
    made = Counting()
    with pytest.raises(ValueError, match=message):
        generate(data, made, tmp_path / name, CONFIG)
    assert made.asked == []


def test_images_in_memory_go_into_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = [ListRecord(f"r{i}", tiny_models.picture(seed=i), "How many?", 3, "counting") for i in range(3)]
    generate(data, Counting(), tmp_path / "out.parquet", CONFIG)
    lists, _ = read_records(tmp_path / "out.parquet")
    assert [one.k for one in lists] == [4, 4, 4]
    assert os.listdir(tmp_path / "out.parquet.parts") != []


def test_the_reward_is_told_the_image_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 100))
    image.save(tmp_path / "tall.png")
    data = [ListRecord("r", "tall.png", "Where?", [0.0, 0.0, 0.5, 0.5], "grounding/qwen2.5-vl")]

    class Pixels(Counting):
        def one(self, question: Question, n: int, attempt: int) -> list[Answer]:
            return [Answer('{"bbox_2d": [0, 0, 25, 50]}', True), Answer('{"bbox_2d": [0, 0, 50, 50]}', True)]

    run(tmp_path, data, Pixels(), k=2, image_root=str(tmp_path))
    assert read_records(tmp_path / "out.jsonl")[0][0].rewards == pytest.approx((1.0, 0.5))
