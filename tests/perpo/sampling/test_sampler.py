"""Settings of sampling, one seed for each answer, and the search for distinct answers."""

from typing import Any

import pytest

from perpo.sampling.sampler import Answer, Question, Sampling, distinct_answers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be ≥ 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be ≥ 1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


class Scripted:
    """Gives prepared answers, and notes what it was asked."""

    encoder: Any = None
    batch_size = 2

    def __init__(self, **texts: list[list[str]]) -> None:
        self.texts = texts
        self.asked: list[tuple[str, int, int]] = []

    def sample(self, questions: Any, n: int, attempt: int = 0) -> list[list[Answer]]:
        self.asked += [(question.id, n, attempt) for question in questions]
        return [[Answer(text, True) for text in self.texts[question.id][attempt][:n]] for question in questions]

    def identity(self) -> dict[str, str]:
        return {}


def test_different_answers_are_looked_for_up_to_a_limit() -> None:
    made = Scripted(
        a=[["x", "x", "y"], ["x", "z", "w"], ["?", "?", "?"]],
        b=[["1", "2", "3"]],
        c=[["o", "o", "o"], ["o", "o", "o"], ["p"]],
    )
    questions = [Question(name, "?", None) for name in "abc"]
    texts = [[answer.text for answer in answers] for answers in distinct_answers(made, questions, 3, 7)]
    assert texts == [["x", "y", "z"], ["1", "2", "3"], ["o", "p", "o"]]
    assert made.asked == [("a", 3, 0), ("b", 3, 0), ("c", 3, 0), ("a", 3, 1), ("c", 3, 1), ("c", 1, 2)]


def test_every_attempt_at_a_record_has_a_seed_of_its_own() -> None:
    one = Sampling(seed=3)
    keys = [("a", 0), ("a", 1), ("a", 10), ("b", 0), ("a1", 0), ("1a", 0), ("1a", 1), ("\ud800", 0)]
    seeds = [one.seed_of(*key) for key in keys]
    seeds += [Sampling(seed=4).seed_of("a", 0), Sampling(seed=31).seed_of("a", 0)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**56 for seed in seeds)
    assert one.seed_of("a", 0) == Sampling(temperature=0.5, max_new_tokens=3, seed=3).seed_of("a", 0)


def test_the_identity_holds_what_shapes_the_answers() -> None:
    assert Sampling(0.5, 0.9, 7, 3).identity() == {
        "temperature": "0.5",
        "top_p": "0.9",
        "max_new_tokens": "7",
        "seed": "3",
    }
    assert Sampling(0, 0.9, 7, 3).identity() == Sampling(0, 1.0, 7, 4).identity()  # greedy: nothing is drawn
    assert Sampling(0, 0.9, 7, 3).identity() != Sampling(0, 0.9, 8, 3).identity()
