"""Answers do not depend on what else is in the batch, are kept, and without its image a model sees none."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder
from perpo.evaluation.answers import Answerer, blanked, left_padded
from perpo.evaluation.models import ModelSource, parse_models

from .. import tiny_models

SIZES = ((40, 28), (70, 30), (28, 56))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def answerer(family: str, max_new_tokens: int = 5) -> Answerer:
    model, processor = tiny_models.build(family)
    return Answerer(model.eval(), Encoder.for_model(processor, model), max_new_tokens=max_new_tokens)


def records(n: int = 3) -> list[ListRecord]:
    return [ListRecord(f"r{i}", tiny_models.picture(SIZES[i], i), "Where is " + "it? " * (i + 1)) for i in range(n)]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_answer_does_not_depend_on_its_batch(family: str) -> None:
    ask = answerer(family)
    together = ask.greedy(records())
    assert together == [ask.greedy([record])[0] for record in records()]
    assert len({answers.texts for answers in together}) > 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_greedy_is_the_most_probable_token_again_and_again(family: str) -> None:
    ask = answerer(family)
    ask.model.generation_config.update(repetition_penalty=9.0, do_sample=True, temperature=9.0, min_new_tokens=4)
    record = records()[0]
    ids = ask.encoder.prompt(str(record.prompt), record.image)  # type: ignore[arg-type]
    made: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            token = int(ask.model(**ids).logits[0, -1].argmax())
        made.append(token)
        if token in ask.encoder.end_ids:
            break
        for key, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if key in ids:
                ids[key] = torch.cat([ids[key], torch.tensor([[value]])], 1)
    (answer,) = ask.greedy([record])
    assert answer.texts == (ask.encoder.decode(made),)
    assert answer.n_cut == int(made[-1] not in ask.encoder.end_ids)


def test_rows_are_padded_on_the_left() -> None:
    prompts = [{"input_ids": torch.tensor([[5, 6, 7]])}, {"input_ids": torch.tensor([[8]])}]
    inputs = left_padded(prompts, pad_id=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_sampled_answers_depend_on_seed_and_record_alone() -> None:
    ask = answerer("llava", max_new_tokens=8)
    first, second, _ = records()
    options = {"temperature": 1.0, "top_p": 1.0, "batch_size": 2}
    state = torch.get_rng_state()
    found = ask.sample(first, 5, seed=0, **options)  # type: ignore[arg-type]
    assert (torch.get_rng_state() == state).all()  # nothing outside is disturbed
    ask.sample(second, 5, seed=0, **options)  # type: ignore[arg-type]
    torch.rand(3)
    assert ask.sample(first, 5, seed=0, **options) == found  # type: ignore[arg-type]
    assert ask.sample(first, 5, seed=1, **options) != found  # type: ignore[arg-type]
    twin = ListRecord("another id", first.image, first.prompt)
    assert ask.sample(twin, 5, seed=0, **options) != found  # type: ignore[arg-type]
    assert len(found.texts) == 5
    assert len(set(found.texts)) > 1


def test_a_cold_sample_is_the_greedy_answer() -> None:
    ask = answerer("llava")
    record = records()[0]
    cold = ask.sample(record, 2, temperature=1e-4, top_p=1.0, seed=0, batch_size=8)
    assert set(cold.texts) == set(ask.greedy([record])[0].texts)


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
    ask = answerer(family, max_new_tokens=8)
    image = tiny_models.picture((56, 56), 1)
    pair = [ListRecord(str(i), picture, "Where?") for i, picture in enumerate((image, image.rotate(180)))]
    seen, blind = ask.greedy(pair), ask.greedy(pair, blank=True)
    assert seen[0].texts != seen[1].texts
    assert blind[0].texts == blind[1].texts
    assert blind[0].image_size == seen[0].image_size


def test_boxes_in_pixels_are_of_the_resized_picture() -> None:
    record = ListRecord("r", Image.new("RGB", (200, 100)), "Where?")
    assert answerer("qwen2_5_vl").greedy([record])[0].image_size == (56, 28)
    assert answerer("llava").greedy([record])[0].image_size == (200, 100)


def test_a_prompt_that_cannot_be_encoded_names_its_record() -> None:
    with pytest.raises(ValueError, match="record 'two': prompt: 2 places for a picture"):
        answerer("llava").greedy([ListRecord("two", tiny_models.picture(), "<image><image>")])


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
