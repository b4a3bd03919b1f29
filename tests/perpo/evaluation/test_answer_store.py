"""Answers are kept whole, found again, and given up where they are damaged."""

import json
from pathlib import Path

import pytest

from perpo.evaluation.answer_store import Answers, AnswerStore, Key
from perpo.evaluation.config import EvaluationConfig
from perpo.evaluation.evaluate import evaluate
from perpo.storage.journal import Journal
from perpo.storage.lock import Lock


def test_answers_are_found_again_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    kept = [(Key("m", "greedy/8", f"r{i}", "c"), Answers((f"é\n{i}", ""), (3, 4) if i else None, i)) for i in range(3)]
    with AnswerStore(path) as store:
        store.add(kept[:2])
    with path.open("ab") as file:
        file.write(b'{"model": "m", "condition": "greedy/8", "rec')
    with AnswerStore(path) as store:
        assert len(store) == 2
        store.add(kept[2:])
        assert store[kept[2][0]] == kept[2][1]
    with AnswerStore(path) as store:
        assert [store[key] for key, _ in kept] == [answers for _, answers in kept]
        assert Key("other", *kept[0][0][1:]) not in store
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        AnswerStore(tmp_path / "a.jsonl"),
        pytest.raises(BlockingIOError, match=r"a.jsonl is in use by"),
    ):
        AnswerStore(tmp_path / "a.jsonl")
    AnswerStore(tmp_path / "a.jsonl").__exit__(None, None, None)


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append({"model": "m"}, what="another journal's line")
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is no answer of a model"):
        AnswerStore(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ["3", "[]", '{"model": "m", "condition": "greedy", "record": "r", "content": "c"}'])
def test_lines_without_a_checksum_are_not_taken(line: str, tmp_path: Path) -> None:
    """Of an older version, or written by hand; their questions are asked again."""
    (tmp_path / "a.jsonl").write_text(line + "\n" + line + "\n")
    with pytest.warns(
        RuntimeWarning, match=r"a.jsonl:1 and 1 more line of it cannot be used, .*no checksum.*asked again"
    ):
        store = AnswerStore(tmp_path / "a.jsonl")
    with store:
        assert len(store) == 0


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_an_answer_with_a_flipped_bit_is_not_taken(place: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    kept = [(Key("m", "greedy/8", f"r{i}", "c"), Answers(("a cat", "a dog"), (3, 4), i)) for i in range(3)]
    with AnswerStore(path) as store:
        store.add(kept)
    data = bytearray(path.read_bytes())
    place %= len(data) - 1  # but for the last byte, which would look like a line that was cut off
    data[place] ^= 1 << place % 7
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="cannot be used, damaged"):
        store = AnswerStore(path)
    with store:
        assert all(store[key] == answers for key, answers in kept if key in store)
        assert len(store) in (1, 2)  # one, or two where a line's end was hit


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    """Else figures of one might stand beside the report of the other."""
    config = EvaluationConfig(models=["base=nowhere"], records="none.jsonl", output=str(tmp_path / "out"))
    lock = tmp_path / "out" / ".lock"
    with Lock(lock, "other"), pytest.raises(BlockingIOError, match=f"output: {tmp_path / 'out'} is in use by process"):
        evaluate(config)
