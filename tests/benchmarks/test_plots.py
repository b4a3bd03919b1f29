"""The pictures of the committed rows: every curve shows, no labels lie on each other, and names are words."""

from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots
from benchmarks.rows import RESULTS, Row, newest, read


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    files = sorted(RESULTS.glob("*-cpu*.json"))
    return [row for row in newest(row for file in files for row in read(file)) if row["ok"]]


def overlaps(labels: Any, figure: Any) -> bool:
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels if label.get_text()]
    return any(a.overlaps(b) for a, b in pairwise(boxes))


def test_memory_hides_no_curve_and_no_label(rows: list[Row]) -> None:
    figure = plots.memory(rows)
    figure.canvas.draw()
    for axes in figure.axes:
        assert not overlaps(axes.get_xticklabels(), figure)
        drawn = [tuple(line.get_ydata()) for line in axes.lines]
        assert len(drawn) == 5
        *others, ours = drawn  # drawn last, with smaller markers: where a curve is under it, its markers show
        assert all(line.get_markersize() > axes.lines[-1].get_markersize() for line in axes.lines[:-1])
        highest = max(max(curve) for curve in drawn)
        for i, curve in enumerate(others):
            for other in others[:i]:
                assert max(abs(a - b) for a, b in zip(curve, other, strict=True)) > 0.01 * highest or highest < 1
        assert axes.get_ylim()[0] < 0 <= min(min(curve) for curve in (*others, ours))
    named = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert "plain PyTorch\n= F.linear_cross_entropy" in named
    plots.plt.close(figure)


def test_what_a_shared_prompt_saves_is_named_in_words(rows: list[Row]) -> None:
    figure = plots.prefix_sharing(rows)
    figure.canvas.draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["A whole training step", "Attention alone, forward and backward", "Sampling the answers"]
    names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert len(names) == 17
    assert "Qwen2.5-VL: 576 prompt tokens, 20 answers of 24" in names
    assert all("prompt tokens" in name and "_" not in name for name in names)
    for axes in figure.axes:
        assert not overlaps(axes.get_yticklabels(), figure)
    plots.plt.close(figure)


def test_the_floors_name_every_case_in_words(rows: list[Row]) -> None:
    figure = plots.floors(rows)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "Loss from hidden states: frozen head, 800 tokens" in names
    assert "Attention over a shared prompt: 576 prompt tokens, 20 answers of 24" in names
    assert not [name for name in names if "_" in name or "laptop" in name or "launches" in name]
    plots.plt.close(figure)


def test_a_case_of_another_form_keeps_its_name() -> None:
    assert plots.in_words("fp32, peaked logits") == "fp32, peaked logits"
    assert plots.in_words("trainable llama-8b T4000") == "trainable head of llama-8b, 4,000 tokens"
    assert plots.in_words("other P600 R500 k8") == "other: 600 prompt tokens, 8 answers of 500"
