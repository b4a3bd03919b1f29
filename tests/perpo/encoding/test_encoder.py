"""Encoding, collating and hidden states equal what each family does by itself: one row, full logits, no tricks."""

import json
import re
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from perpo.encoding.batch import collate_lists
from perpo.encoding.encoder import Encoder
from perpo.encoding.frame import cropped, pads_to_square, seen_size
from perpo.model.head_check import check_language_head
from perpo.model.language_head import response_hidden_states, sequence_log_probs, token_log_probs

from .. import tiny_models

RESPONSES = (["[0.10, 0.20]", "[0.3]", "nothing at all"], ["a"])
SIZES = ((40, 28), (70, 30))  # of different shape: other tiles, grids and numbers of image tokens


def encoded(family: str) -> tuple[Any, Encoder, list[dict[str, Tensor]], list[list[list[int]]]]:
    model, processor = tiny_models.build(family)
    encoder = Encoder.for_model(processor, model)
    prompts = [encoder.prompt("Where is it?", tiny_models.picture(size, i)) for i, size in enumerate(SIZES)]
    return model.eval(), encoder, prompts, [[encoder.response(r) for r in row] for row in RESPONSES]


def plain_log_probs(model: Any, prompt: dict[str, Tensor], ids: list[int]) -> Tensor:
    """One row, all logits, in the plainest way."""
    whole = dict(prompt)
    whole["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.cat([whole[name], torch.full((1, len(ids)), value, dtype=whole[name].dtype)], 1)
    logits = model(**whole).logits[0].float()
    n_prompt = prompt["input_ids"].shape[1]
    return torch.log_softmax(logits[n_prompt - 1 : -1], -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_log_probs_equal_those_of_a_plain_forward_of_each_row(family: str) -> None:
    model, encoder, prompts, responses = encoded(family)
    batch = collate_lists(prompts, responses, encoder.pad_id)
    with torch.no_grad():
        plain = [plain_log_probs(model, p, ids) for p, row in zip(prompts, responses, strict=True) for ids in row]
        ours = token_log_probs(model, batch)
        whole = sequence_log_probs(model, batch)
    torch.testing.assert_close(ours, torch.cat(plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, torch.stack([p.sum() for p in plain]), atol=1e-4, rtol=1e-5)
    assert batch.cu_lists.tolist() == [0, 3, 4]
    assert response_hidden_states(model, batch).shape == (batch.labels.numel(), tiny_models.HIDDEN)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_image_reaches_the_answer(family: str) -> None:
    model, encoder, prompts, responses = encoded(family)
    other = encoder.prompt("Where is it?", tiny_models.picture(SIZES[0], 7))
    with torch.no_grad():
        a = token_log_probs(model, collate_lists(prompts[:1], responses[:1], encoder.pad_id))
        b = token_log_probs(model, collate_lists([other], responses[:1], encoder.pad_id))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_end_of_turn_and_the_gap_come_from_the_template(family: str) -> None:
    model, processor = tiny_models.build(family)
    encoder = Encoder.for_model(processor, model)
    question = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]
    answered = [*question, {"role": "assistant", "content": [{"type": "text", "text": "yes [1]"}]}]
    whole = processor.tokenizer(
        processor.apply_chat_template(answered, tokenize=False), add_special_tokens=False
    ).input_ids
    start = encoder.prompt("Q")["input_ids"][0].tolist()
    made = start + encoder.response("yes [1]")
    assert made == whole[: len(made)]
    assert encoder.decode(encoder.response("yes [1]")) == "yes [1]"


MARKED = (
    "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(120,340),(560,780)<|box_end|>",
    "<ref>dog</ref><box>[[120, 340, 560, 780]]</box>",
    "<|begin_of_box|>3<|end_of_box|>",
)
MARKUP = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<ref>", "</ref>", "<box>",
          "</box>", "<|begin_of_box|>", "<|end_of_box|>")  # fmt: skip
ANSWERS = [*MARKED, "two\nlines\n", " indented", "\n\n- item  ", "字 é", "", "a"]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_trained_is_what_was_sampled(family: str, answer: str) -> None:
    """Token for token: with the marks that a family writes as special tokens, and with all white space."""
    model, processor = tiny_models.build(family)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(MARKUP)})
    encoder = Encoder.for_model(processor, model)
    sampled = processor.tokenizer(encoder.turn.before + answer, add_special_tokens=False)["input_ids"]
    assert len(sampled) < len(answer.encode()) or answer not in MARKED  # the marks are single tokens
    pad, end = processor.tokenizer.pad_token_id, encoder.turn.end_id
    text = encoder.decode([*sampled, end, pad, pad])
    assert text == answer
    assert encoder.response(text) == [*sampled, end]
    assert encoder.decode(torch.tensor(sampled)) == answer  # cut
    assert encoder.response(answer, complete=False) == sampled


def test_a_tokenizer_that_puts_a_space_before_every_word_keeps_it_to_itself() -> None:
    """As sentencepiece does for LLaMA: after ASSISTANT: comes the token "▁yes"."""
    words = ["<unk>", "<s>", "</s>", "<box>", "▁yes", "▁", "yes", *"ASITN:Q?USER▁"]
    core = Tokenizer(models.Unigram([(word, -1.0) for word in dict.fromkeys(words)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<unk>", "<s>", "</s>", "<box>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}</s>"
        "{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    encoder = Encoder(tokenizer)
    sampled = tokenizer.convert_tokens_to_ids(["▁yes", "</s>"])
    assert encoder.decode(sampled) == "yes"
    assert encoder.response("yes") == sampled


def test_a_place_of_a_picture_is_no_part_of_an_answer() -> None:
    model, processor = tiny_models.build("qwen2_5_vl")
    encoder = Encoder.for_model(processor, model)
    ids = encoder.response("ab")
    assert encoder.decode([ids[0], processor.image_token_id, *ids[1:]]) == "ab"
    assert encoder.response("a<image>b") == ids


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_head_that_is_found_gives_the_models_logits(family: str) -> None:
    model, _ = tiny_models.build(family)
    check_language_head(model)
    assert model.training


def test_an_image_token_in_the_words_is_the_place_of_the_image() -> None:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model)
    assert encoder.render("<image>\nWhere?", True) == encoder.render("Where?", True)
    assert encoder.render([{"role": "user", "content": "Where?"}], True) == encoder.render("Where?", True)
    with pytest.raises(ValueError, match="2 places for a picture"):
        encoder.prompt("<image><image>", tiny_models.picture())


def test_a_prompt_that_is_too_long_says_by_how_much() -> None:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model, max_prompt_length=20)
    with pytest.raises(ValueError, match="max_prompt_length=20: this prompt has 41 tokens"):
        encoder.prompt("Where?", tiny_models.picture())


def test_a_long_response_is_cut_and_then_has_no_end() -> None:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model, max_response_length=3)
    assert len(encoder.response("far too long")) == 3
    assert encoder.turn.end_id not in encoder.response("far too long")


@pytest.mark.parametrize(("options", "limit"), [({}, 9), ({"max_response_length": 5}, 5)])
def test_prompt_and_response_share_max_length(options: dict[str, int], limit: int) -> None:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model, max_length=50, **options)
    assert encoder.response_limit(41) == limit
    assert Encoder.for_model(processor, model, **options).response_limit(41) == options.get("max_response_length")
    with pytest.raises(ValueError, match="max_length=50: this prompt has 50 tokens, image included, which leaves none"):
        encoder.response_limit(50)
    assert encoder.fingerprint() != Encoder.for_model(processor, model, **options).fingerprint()


def test_without_a_chat_template_the_image_comes_before_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_models.build("llava")
    processor.chat_template = None
    monkeypatch.setattr("perpo.encoding.encoder.CHAT_TOKENS", ())  # a base model's tokenizer has none
    encoder = Encoder.for_model(processor, model)
    assert encoder.render("Where?", True) == "<image>\nWhere?\n"
    assert encoder.prompt("Where?", tiny_models.picture())["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize("with_image", [True, False])
def test_a_prompt_begins_once_whoever_writes_the_beginning(with_image: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA's tokenizers put their first token before every text, and so does the template of many."""
    model, processor = tiny_models.build("llava")
    monkeypatch.setattr("perpo.encoding.encoder.CHAT_TOKENS", ())  # a base model's tokenizer has none
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    image = tiny_models.picture() if with_image else None
    for template in (processor.chat_template, processor.chat_template.removeprefix("<|bos|>"), None):
        processor.chat_template = template
        ids = Encoder.for_model(processor, model).prompt("Where?", image)["input_ids"][0]
        assert (ids == bos).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("opened", ["", "<think>\n", "◁think▷", "[THINK]", "<think>\n\n</think>\n\n", "think"])
def test_a_thought_that_the_template_opens_is_known(opened: str) -> None:
    _, processor = tiny_models.build("llava")
    processor.chat_template += f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
    encoder = Encoder(processor, [0])
    assert encoder.render("Is <think> a word?", with_image=False).endswith(opened)
    thinks = opened not in ("", "think") and "/" not in opened
    assert encoder.opened == (opened if thinks else "")


def test_a_chat_model_without_any_chat_template_is_refused() -> None:
    model, processor = tiny_models.build("llava")
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"LlavaProcessor has no chat template.*'<\|im_start\|>'.*chat_template.jinja"):
        Encoder.for_model(processor, model)


def test_a_chat_template_that_only_the_tokenizer_has_is_used() -> None:
    model, processor = tiny_models.build("llava")
    expected = Encoder.for_model(processor, model)
    processor.chat_template, processor.tokenizer.chat_template = None, processor.chat_template
    encoder = Encoder.for_model(processor, model)
    assert encoder.render("Where?", True) == expected.render("Where?", True)
    assert encoder.response("there") == expected.response("there")
    assert encoder.fingerprint() == expected.fingerprint()
    # One that knows text alone, as those of LLaVA's language models
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | trim) + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}bot: {% endif %}"
    )
    encoder = Encoder.for_model(processor, model)
    assert encoder.render("Where?", True) == "user: <image>\nWhere?<|im_end|>bot: "
    assert encoder.response("there")[-1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


GLM_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_an_answer_ends_with_what_the_model_ends_it_with_where_the_template_ends_nothing() -> None:
    """GLM's turn ends with the token that begins the next one."""
    _, processor = tiny_models.build("glm4v")
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    processor.chat_template, tokenizer.eos_token = GLM_TEMPLATE, "<|endoftext|>"
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    encoder = Encoder(processor, [tokenizer.eos_token_id, user])
    sampled = [*tokenizer("3")["input_ids"], user]
    assert encoder.decode(sampled) == "3"
    assert encoder.response(encoder.decode(sampled)) == sampled


@pytest.mark.parametrize("text", ["yes<|im_end|>", "yes<|im_end|>\n", "yes<|im_end|><|endoftext|>"])
def test_a_response_with_the_end_of_its_turn_gets_no_second_one(text: str) -> None:
    model, processor = tiny_models.build("qwen2_5_vl")
    encoder = Encoder.for_model(processor, model)
    assert encoder.response(text) == encoder.response("yes")
    assert encoder.response("a <|im_end|> b")[-1] == encoder.turn.end_id  # an end that is only spoken of


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_5_vl", "<|vision_start|><image><|vision_end|>Where?"),
        ("glm4v", "<|vision_start|><image><|vision_end|>Where?"),
        ("internvl", "<img><image></img>\nWhere?"),
        ("gemma3", "<|vision_start|>Where?"),
    ],
)
def test_a_place_with_its_markers_is_one_place(family: str, words: str) -> None:
    model, processor = tiny_models.build(family)
    encoder = Encoder.for_model(processor, model)
    assert encoder.render(words, True) == encoder.render("Where?", True)
    picture = tiny_models.picture()
    assert torch.equal(encoder.prompt(words, picture)["input_ids"], encoder.prompt("Where?", picture)["input_ids"])


def test_a_text_model_takes_a_tokenizer_and_refuses_an_image() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = tiny_models.CHATML
    encoder = Encoder(tokenizer)
    assert encoder.render("Hello?", False) == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoder.prompt("Hello?")["input_ids"][0]) == encoder.render("Hello?", False)
    assert encoder.decode(encoder.response("yes")) == "yes"
    with pytest.raises(ValueError, match="no image processor"):
        encoder.prompt("Hello?", tiny_models.picture())


def test_lists_with_and_without_image_do_not_share_a_batch() -> None:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model)
    prompts = [encoder.prompt("Where?", tiny_models.picture()), encoder.prompt("Where?")]
    with pytest.raises(ValueError, match="batches of their own"):
        collate_lists(prompts, [[[1]], [[1]]], encoder.pad_id)


def test_an_input_along_the_tokens_that_is_not_known_is_refused() -> None:
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="'cross_attention_mask' of shape"):
        collate_lists([{"input_ids": ids, "cross_attention_mask": torch.ones(1, 5, 1, 4)}], [[[1]]], 0)


def test_boxes_in_pixels_are_measured_in_the_image_as_resized() -> None:
    _, processor = tiny_models.build("qwen2_5_vl")
    image = Image.new("RGB", (90, 30))
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert Encoder(processor).seen_size(image.size) == (grid[2] * 7, grid[1] * 7) != image.size
    assert Encoder(tiny_models.build("llava")[1]).seen_size((90, 30)) == (90, 30)
    assert seen_size(None, (90, 30)) == (90, 30)  # a text model's


def hub_llava() -> Any:
    """A processor as LLaVA-1.5 has it on the hub: the shorter edge is resized, and the centre cropped."""
    _, processor = tiny_models.build("llava")
    images = processor.image_processor
    images.do_center_crop, images.size = True, {"shortest_edge": 28}
    images.crop_size = {"height": 28, "width": 28}
    return processor


def test_a_processor_that_crops_what_boxes_are_measured_in_is_refused() -> None:
    processor = hub_llava()
    encoder = Encoder(processor)
    with pytest.raises(ValueError, match="crops a picture of 56×28 to its centre") as error:
        encoder.prompt("Where?", Image.new("RGB", (56, 28)))
    with pytest.raises(ValueError, match="crops a picture of 28×56 to its centre"):
        encoder.prompt("Where?", Image.new("RGB", (28, 56)))
    with pytest.raises(ValueError, match="crops a picture of 28×56 to its centre"):
        encoder.seen_size((28, 56))
    encoder.prompt("Where?", Image.new("RGB", (28, 28)))
    setting = json.loads(re.search(r"processor_options (\{.*\}) shows", str(error.value))[1])
    for name, value in setting.items():
        setattr(processor.image_processor, name, value)
    pictures = [Image.new("RGB", (56, 28)) for _ in range(2)]
    pictures[1].paste("white", (0, 0, 4, 28))  # an object at the left edge
    before, after = (Encoder(processor).prompt("Where?", picture)["pixel_values"] for picture in pictures)
    assert (before != after).any()


def test_a_processor_that_pads_to_a_square_says_which_boxes_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = tiny_models.build("llava")
    square = {"height": 28, "width": 28}
    processor.image_processor = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=square)
    heard: list[str] = []
    monkeypatch.setattr("perpo.encoding.encoder.logger.warning_once", heard.append)
    Encoder(processor).prompt("Where?", Image.new("RGB", (28, 28)))
    assert heard == []
    Encoder(processor).prompt("Where?", Image.new("RGB", (56, 28)))
    assert "LlavaImageProcessorPil pads pictures to a square" in heard[0]
    assert "llava-pad" in heard[0]


@pytest.mark.parametrize("family", tiny_models.FAMILIES + tiny_models.MORE_FAMILIES)
def test_all_of_a_picture_reaches_the_model(family: str) -> None:
    _, processor = tiny_models.build(family)
    for size in ((80, 40), (40, 80), (40, 40)):
        assert cropped(processor.image_processor, size) is None
        assert not pads_to_square(processor.image_processor, size)
