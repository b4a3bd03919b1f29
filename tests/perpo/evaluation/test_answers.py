"""Answers are kept, and without its image a model sees none."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder
from perpo.evaluation.answers import ask, blanked
from perpo.evaluation.config import EvaluationConfig
from perpo.evaluation.models import ModelSource, parse_models
from perpo.sampling.sampler import Sampling
from perpo.sampling.with_transformers import TransformersSampler

from .. import tiny_models


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def asked(family: str, records: Sequence[ListRecord], n: int = 1, *, blank: bool = False, **sampling: Any) -> Any:
    model, processor = tiny_models.build(family)
    options = {"temperature": 0, "max_new_tokens": 8} | sampling
    sampler = TransformersSampler(model, Encoder.for_model(processor, model), Sampling(**options))
    return ask(sampler, records, n, blank=blank)


def test_a_row_of_the_store_holds_all_answers_to_a_record_and_how_many_were_cut() -> None:
    records = [ListRecord("a", tiny_models.picture((40, 28)), "Where?"), ListRecord("b", None, "Why?")]
    seen, blind = asked("llava", records, 5, temperature=1.0, max_new_tokens=40)
    assert (len(seen.texts), seen.image_size) == (5, (40, 28))
    assert (len(blind.texts), blind.image_size) == (5, None)
    assert 0 < seen.n_cut + blind.n_cut < 10
    assert [answers.n_cut for answers in asked("llava", records, 5, temperature=1.0, max_new_tokens=1)] == [5, 5]


def test_a_blanked_picture_is_its_mean_colour_and_nothing_else() -> None:
    image = tiny_models.picture((70, 30), 3)
    blank = blanked(image)
    assert blank.size == image.size
    pixels = np.asarray(blank).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    assert pixels[0] == pytest.approx(np.asarray(image).reshape(-1, 3).mean(0), abs=0.51)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_its_image_a_model_sees_the_mean_colour_alone(family: str) -> None:
    """Two pictures of the same size and mean are told apart with the image, and not without."""
    image = tiny_models.picture((56, 56), 1)
    pair = [ListRecord(str(i), picture, "Where?") for i, picture in enumerate((image, image.rotate(180)))]
    seen, blind = asked(family, pair), asked(family, pair, blank=True)
    assert seen[0].texts != seen[1].texts
    assert blind[0].texts == blind[1].texts
    assert blind[0].image_size == seen[0].image_size


def test_boxes_in_pixels_are_of_the_resized_picture() -> None:
    record = ListRecord("r", Image.new("RGB", (200, 100)), "Where?")
    assert asked("qwen2_5_vl", [record])[0].image_size == (56, 28)
    assert asked("llava", [record])[0].image_size == (200, 100)


def test_what_shapes_the_answers_is_in_the_condition_they_are_kept_under() -> None:
    def condition(kind: str, **options: Any) -> str:
        return EvaluationConfig(["a=x"], "r.jsonl", "out", **options).condition(kind)

    other: dict[str, Any] = {"n": 4, "temperature": 0.5, "top_p": 0.5, "seed": 1, "max_new_tokens": 9}
    for name, value in other.items():
        assert condition("sampled", **{name: value}) != condition("sampled")
        if name != "max_new_tokens":  # greedy answers do not depend on it: they are not asked for again
            assert condition("greedy", **{name: value}) == condition("greedy")
    for kind in ("greedy", "blank", "sampled"):
        assert condition(kind, max_new_tokens=9) != condition(kind)
        assert condition(kind, resamples=9) == condition(kind)
        assert (condition(kind, batch_size=3) == condition(kind)) == (kind != "sampled")
    assert len({condition(kind) for kind in ("greedy", "blank", "sampled")}) == 3


# ----------------------------------------------------------------------------------------------------------- models


def test_models_are_named_in_every_form(tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    given = ["base=models/base", "both = models/base + runs/lora", "runs/lr=1e-5/out", f"lora={adapter}", "org/hub"]
    assert parse_models(given) == [
        ModelSource("base", "models/base"),
        ModelSource("both", "models/base", "runs/lora"),
        ModelSource("out", "runs/lr=1e-5/out"),
        ModelSource("lora", "models/base", str(adapter)),
        ModelSource("hub", "org/hub"),
    ]
    assert parse_models({"a": "x", "b": "y + z"}) == [ModelSource("a", "x"), ModelSource("b", "y", "z")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "name at least one"),
        (["a=x", "a=y"], "'a' is the name of two models"),
        (["a="], "expected name=path"),
        (["=x"], "expected name=path"),
        (["a=x + "], "expected name=path"),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_models(given)


def test_the_identity_changes_with_weights_and_options_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    source = ModelSource("a", str(folder))
    before = source.identity({"dtype": "auto"})
    (folder / "README.md").write_text("words")
    (folder / "optimizer.pt").write_bytes(b"state")
    assert copy.copy(source).identity({"dtype": "auto"}) == before
    assert ModelSource("renamed", str(folder)).identity({"dtype": "auto"}) == before
    assert source.identity({"dtype": "bfloat16"}) != before
    assert ModelSource("a", str(folder), str(folder)).identity({"dtype": "auto"}) != before
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert source.identity({"dtype": "auto"}) != before


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="there is no folder 'no/such/folder'"):
        ModelSource("a", "no/such/folder").identity({})
