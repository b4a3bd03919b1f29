"""Hostile input from a fixed seed: a result that is right, or an error that names what is wrong; nothing else.

Each case is drawn from its own seed, which the name of a failing test shows.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import perpo_kernels as pk
from perpo.data.read import RecordError, read_records
from perpo.data.record import ListRecord
from perpo.rewards import (
    FORMATS,
    box_reward,
    counting_reward,
    edit_similarity,
    iou_reward,
    numeric_reward,
    ocr_reward,
    read_boxes,
)
from perpo.rewards.scoring import Tally, score_record
from perpo_kernels.objectives import PRESETS

ROUNDS = 40  # of each test; each round tries many inputs

NUMBERS = [0, -1, 1, 0.5, 1e39, -1e39, 1e-46, 10**400, math.nan, math.inf, -math.inf, True, 2**53, 1e308]
TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "é" * 40,
    "\u202eabc",
    "👩‍👩‍👧",
    "<image>",
    "<image><image>",
    "[0.1, 0.2, 0.3, 0.4]",
    "［１０，２０，３０，４０］",
    '{"bbox_2d": [1, 2, 3, 4]}',
    '{"bbox_2d": [1, 2, 3}',
    "<think>[0, 0, 1, 1]</think>",
    "<think>unfinished",
    "[" * 2000,
    "9" * 5000,
    "3 dogs",
    "三",
    "$(rm -rf /)",
    "../../etc/passwd",
]
NAMES = [
    "image",
    "images",
    "prompt",
    "answer",
    "responses",
    "rewards",
    "task",
    "ref_log_probs",
    "flip_probs",
    "complete",
]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, mostly of the wrong kind."""
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return None
    if kind == 3:
        return [rng.random() for _ in range(rng.randrange(5))]
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice([*NAMES, "role", "content", "text", "type"]): value(rng, depth + 1) for _ in range(rng.randrange(4))
    }


def record(rng: random.Random, name: str) -> dict[str, Any]:
    good = {
        "id": name,
        "prompt": "Where?",
        "answer": [0.1, 0.2, 0.5, 0.6],
        "task": "grounding",
        "responses": ["[0.1, 0.2, 0.5, 0.6]", "no"],
        "rewards": [1.0, 0.0],
    }
    for _ in range(rng.randrange(1, 4)):  # the id stays: a second record of the same name is refused for that
        good[rng.choice(NAMES)] = value(rng)
    if rng.random() < 0.2:
        good.pop(rng.choice(list(good)[1:]))
    return good


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_every_record_is_taken_whole_or_refused_by_its_line(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [record(rng, f"r{i}") for i in range(300)]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    taken, said = {}, []
    for i, row in enumerate(rows, 1):
        one = tmp_path / "one.jsonl"
        one.write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            (taken[i],), _ = read_records(one)
        except RecordError as error:
            said.append(str(error))
    assert all("one.jsonl:1" in text and "\n" not in text for text in said)
    if not taken:
        with pytest.raises(ValueError, match="no usable record"):
            read_records(path, skip_bad=True)
        return
    records, report = read_records(path, skip_bad=True)
    assert (len(records), report.n_bad) == (len(taken), len(rows) - len(taken))
    for kept in records:
        assert kept.rewards is not None
        assert len(kept.rewards) == len(kept.responses) > 0
        assert all(map(math.isfinite, kept.rewards))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_every_answer_has_a_reward_between_0_and_1_or_its_truth_is_refused(seed: int) -> None:
    rng = random.Random(1000 + seed)
    for _ in range(400):
        text = "".join(
            rng.choice([*TEXTS, "0.5", ",", " ", "1", "[", "]", "{", "}", "\n"]) for _ in range(rng.randrange(6))
        )
        truth = rng.choice(
            [value(rng), [0.1, 0.2, 0.5, 0.6], [[0.1, 0.2, 0.5, 0.6]], [], 3, "three", "words of a page"]
        )
        for reward in (iou_reward, box_reward("qwen3-vl"), ocr_reward, counting_reward, numeric_reward):
            try:
                (got,) = reward(["?"], [text], answer=[truth])
            except (ValueError, TypeError):
                continue
            assert got is None or 0 <= got <= 1, (reward, text, truth, got)
        reading = read_boxes(text, rng.choice(list(FORMATS)), (640, 480))
        assert all(0 <= side <= 1 for box in reading.boxes for side in box)
    assert edit_similarity(TEXTS[4], TEXTS[4]) == 1


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_scoring_a_record_gives_as_many_rewards_as_answers_or_a_reason(seed: int) -> None:
    rng = random.Random(2000 + seed)
    n_scored = 0
    for _ in range(300):
        answers = [rng.choice(TEXTS) for _ in range(rng.randrange(1, 6))]
        task = rng.choice(["grounding", "ocr", "counting", "numeric", "exact", "os:system", "evil:f", "", "groundin"])
        try:
            given = ListRecord("r", None, "?", rng.choice([value(rng), [0.1, 0.2, 0.5, 0.6], 3, "a"]), task, answers)
            scored = score_record(given, None, Tally())
        except ValueError:
            continue
        n_scored += 1
        assert ":" not in task
        assert scored.rewards is not None
        assert len(scored.rewards) == len(scored.responses)
    assert n_scored > 0


def tensors(rng: random.Random, g: torch.Generator, n: int) -> torch.Tensor:
    x = torch.randn(n, generator=g) * rng.choice([1e-3, 1.0, 30.0])
    if rng.random() < 0.3:
        x[rng.randrange(n)] = rng.choice([math.nan, math.inf, -math.inf])
    return x


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_list_loss_is_the_definitions_and_no_absent_candidate_moves_it(seed: int) -> None:
    rng, g = random.Random(3000 + seed), torch.Generator().manual_seed(seed)
    for _ in range(80):
        sizes = [rng.randrange(6) for _ in range(rng.randrange(1, 4))]
        n = sum(sizes)
        if not n:
            continue
        objective = PRESETS[rng.choice([name for name in PRESETS if name not in ("mdpo", "rosepo")])]()
        rewards = tensors(rng, g, n)
        reference = torch.randn(n, generator=g) if objective.reference else None
        lengths = torch.randint(1, 9, (n,), generator=g)
        layout = pk.layout.cumulative(sizes)
        results = []
        for backend in ("eager", "reference"):
            scores = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
            loss = pk.perpo_loss(
                scores,
                rewards.double().clamp(-5, 5),
                None if reference is None else reference.double(),
                cu_lists=layout,
                lengths=lengths,
                objective=objective,
                backend=backend,
            )
            loss.backward()
            results.append((loss.detach(), scores.grad))
        (loss, gradient), (right, right_gradient) = results
        torch.testing.assert_close(loss, right, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, right_gradient, rtol=1e-9, atol=1e-12)
        absent = ~rewards.double().clamp(-5, 5).isfinite()
        assert gradient[absent].eq(0).all()


def test_a_reward_that_no_float_can_hold_is_refused_by_its_record() -> None:
    with pytest.raises(ValueError, match="record 'r': a reward must be a finite number"):
        score_record(ListRecord("r", None, "?", 3, "counting", ["a"]), lambda *_, **__: [10**400], Tally())
