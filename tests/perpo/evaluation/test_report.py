"""The report is one well-formed page that loads nothing, runs nothing and shows what was measured."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perpo.data.record import ListRecord
from perpo.evaluation.evaluate import Evaluation
from perpo.evaluation.examples import choose_examples, example_picture, question
from perpo.evaluation.plots import TRUTH, metrics_plot, model_colours, picture, rounds_plot
from perpo.evaluation.report import report_html, write_report
from perpo.rewards.grounding import true_boxes_of

from ..evaluating import evaluate_made_up

VOID = {"meta", "img", "br"}
ATTACK = "<script>alert('&')</script><img src=\"http://evil.example/x.png\">"


class Page(HTMLParser):
    """Tags must close in order; collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def boxes(centre: float, n: int) -> list[list[str]]:
    return [[f"[{centre - 0.2:.2f}, 0.2, {centre + 0.2 + 0.01 * i:.2f}, 0.8]"] for i in range(n)]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two tasks, three models, the texts of one of them an attack on the page."""
    folder = tmp_path_factory.mktemp("report")
    n = 6
    where = [ListRecord(f"g{i}", None, "Where is <it>?", [0.3, 0.2, 0.7, 0.8], "grounding") for i in range(n)]
    read = [ListRecord(f"o{i}", None, "Read.", f"some words {i}", "ocr") for i in range(n)]
    texts = [[f"some words {i}"] for i in range(n)]
    answers = {
        "base": {
            "greedy": boxes(0.6, n) + [["some word"]] * n,
            "blank": boxes(0.7, n) + [["w"]] * n,
            "sampled": [[*a, *b] for a, b in zip(boxes(0.5, n), boxes(0.8, n), strict=True)] + [["some", "words"]] * n,
        },
        "<b>middle": {"greedy": [[ATTACK]] * n + [[ATTACK]] * n},
        "aligned": {"greedy": boxes(0.5, n) + texts, "blank": boxes(0.7, n) + [["w"]] * n},
    }
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="could not be read"):
        return evaluate_made_up(folder, [*where, *read], answers, patch, examples=8)


@pytest.fixture(scope="module")
def page(evaluation: Evaluation) -> Page:
    return Page(report_html(evaluation))


def test_nothing_is_loaded_from_outside_and_no_script_runs(evaluation: Evaluation, page: Page) -> None:
    assert {"script", "link", "iframe", "object", "form", "base"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("href", "srcset", "background", "action")
            assert not name.startswith("on")
            if name == "src":
                assert value is not None
                assert re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$", value)
    styles = re.findall(r"<style>(.*?)</style>", report_html(evaluation), re.S)
    assert not any(word in style for style in styles for word in ("url(", "@import"))
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in page.tags
    ]


def test_texts_are_shown_as_they_are(page: Page) -> None:
    words = "".join(page.words)
    assert ATTACK in words
    assert "<b>middle" in words
    assert "Where is <it>?" in words


def test_thoughts_do_not_hide_the_answer_that_is_judged(evaluation: Evaluation) -> None:
    task = evaluation.tasks[0]
    thinking = f"<think>{'hm, ' * 300}</think>here it is"
    greedy = [dataclasses.replace(answer, text=thinking) for answer in task.answers["base"].greedy]
    alone = dataclasses.replace(task, answers={"base": dataclasses.replace(task.answers["base"], greedy=greedy)})
    one = dataclasses.replace(evaluation, models=evaluation.models[:1], tasks=[alone])
    assert "(1215 characters before the answer) here it is" in "".join(Page(report_html(one)).words)


def test_tables_hold_the_figures(evaluation: Evaluation, page: Page) -> None:
    _, grounding, head_room, gaps, *_ = page.tables
    assert grounding[0] == ["", "base", "<b>middle", "aligned"]
    assert [row[0] for row in grounding[1:]] == ["AP@50 ↑", "AP@75 ↑", "mean IoU ↑", "unreadable answers ↓"]
    figure = evaluation.tasks[0].figures.by_model["aligned"]["mean_iou"]
    assert figure.over_first is not None
    assert f"{figure.greedy.value:.3f} (too few records)" in grounding[3][3]  # six
    assert f"{figure.over_first.value:+.3f}" in grounding[3][3]
    assert head_room[0] == ["", "greedy", "best of n", "head-room"]
    assert head_room[2][0] == "AP@50 ↑, <b>middle"
    assert head_room[2][2:] == ["–", "–"]  # it has greedy answers alone
    assert gaps[0] == ["", "with image", "without", "gap", "gap − that of base"]
    words = " ".join(page.words)
    assert "METEOR is left out" in words or "METEOR ↑" in words
    assert "could not be read" in words  # the notice about the middle model


def test_every_picture_decodes(page: Page) -> None:
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]
    assert sum(p.format == "PNG" for p in pictures) == 6  # three plots a task
    assert sum(p.format == "JPEG" for p in pictures) >= 8
    for opened in pictures:
        opened.load()
        assert np.asarray(opened.convert("L")).std() > 1  # not empty
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_the_report_is_written_whole(evaluation: Evaluation, tmp_path: Path) -> None:
    path = write_report(evaluation, tmp_path)
    assert path.read_text(encoding="utf-8") == report_html(evaluation)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_one_model_alone_has_a_report(evaluation: Evaluation) -> None:
    task = evaluation.tasks[0]
    alone = dataclasses.replace(task, answers={"base": task.answers["base"]})
    one = dataclasses.replace(evaluation, models=evaluation.models[:1], tasks=[alone])
    assert "gained most" not in " ".join(Page(report_html(one)).words)


def test_examples_are_random_ones_then_gains_then_losses(evaluation: Evaluation) -> None:
    task = evaluation.tasks[0]
    groups = choose_examples(task, 4, seed=0)
    assert list(groups) == ["drawn at random", "where aligned gained most over base"]  # nothing was lost
    assert len(groups["drawn at random"]) == 2
    assert len(groups["where aligned gained most over base"]) == 1
    assert choose_examples(task, 0, seed=0) == {}
    everything = choose_examples(task, 100, seed=0)
    ids = [example.record.id for group in everything.values() for example in group]
    assert sorted(ids) == sorted(record.id for record in task.records)  # none twice


def test_boxes_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (200, 100), "white")
    drawn = Image.open(io.BytesIO(picture(image, [("#ff0000", [(0.25, 0.2, 0.75, 0.8)])])))
    assert drawn.size == (320, 160)
    pixels = np.asarray(drawn).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 120) & (pixels[..., 2] < 120)
    rows, columns = np.nonzero(red)
    assert (columns.min(), columns.max()) == pytest.approx((80, 240), abs=3)
    assert (rows.min(), rows.max()) == pytest.approx((32, 128), abs=3)
    assert not red[40:120, 90:230].any()


def test_degenerate_boxes_do_not_stop_the_report() -> None:
    tiny = [(0.5, 0.5, 0.5001, 0.5001), (0.0, 0.0, 1.0, 1.0), (0.999, 0.999, 1.0, 1.0)]
    assert picture(Image.new("RGB", (3, 900)), [(TRUTH, tiny)])


def test_truths_in_every_form() -> None:
    box = (0.1, 0.2, 0.3, 0.4)
    for truth in ("[0.1, 0.2, 0.3, 0.4]", list(box), box, [box], np.array([box])):
        assert true_boxes_of(truth)[0] == [box]


def test_an_image_that_is_gone_is_left_out(evaluation: Evaluation, tmp_path: Path) -> None:
    (examples, *_) = choose_examples(evaluation.tasks[0], 2, seed=0).values()
    colours = model_colours(list(evaluation.tasks[0].answers))
    assert example_picture(examples[0], colours, evaluation.config.image_root)
    assert example_picture(examples[0], colours, str(tmp_path)) is None


def test_the_words_of_a_chat() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert question(ListRecord("r", None, prompt)) == "Be brief.\nWhere?"


def test_every_model_has_a_colour_of_its_own(evaluation: Evaluation) -> None:
    for n in range(1, 9):
        assert len(set(model_colours([f"m{i}" for i in range(n)]).values())) == n
    assert metrics_plot(evaluation.tasks[1]).startswith(b"\x89PNG")


def test_rounds_have_a_curve_and_other_models_none(evaluation: Evaluation) -> None:
    task = evaluation.tasks[0]
    assert rounds_plot(task) is None

    def named(*names: str) -> Any:
        of = dict(zip(task.answers, names, strict=False))
        figures = {of[model]: found for model, found in task.figures.by_model.items() if model in of}
        return dataclasses.replace(
            task,
            answers={of[model]: answers for model, answers in task.answers.items() if model in of},
            figures=dataclasses.replace(task.figures, by_model=figures),
        )

    drawn = rounds_plot(named("start", "round-1", "round-2"))
    assert drawn is not None
    assert np.asarray(Image.open(io.BytesIO(drawn)).convert("L")).std() > 1
    assert rounds_plot(named("start", "round-1")) is None  # two points are in the table
    assert rounds_plot(named("start", "round-2", "round-1")) is None
