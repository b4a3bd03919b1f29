"""What a processor and a model expect of text and pictures: prompts and responses as tensors.

`Encoder` is the only place that knows chat templates, image placeholders and end-of-turn tokens; training, generation
and evaluation all encode through it, so that a response is trained in exactly the form in which it is generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from perpo.encoding.frame import Size, cropped, pads_to_square, seen_size
from perpo.rewards.completions import open_thought
from perpo.storage.fingerprints import fingerprint

logger = logging.get_logger(__name__)

Messages = list[dict[str, Any]]
Prompt = str | Messages

PROBE = "0"  # a response that no template treats specially

# Tokens that begin a turn: a model that has one and no chat template would be asked in a form it was not trained in.
CHAT_TOKENS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|start_of_role|>",
    "<start_of_turn>",
    "<|assistant|>",
    "<|Assistant|>",
    "<|turn>",
    "[INST]",
)
# What processors and tokenizers call the tokens that they or the template put around the place of a picture.
_MARKERS = ("vision_start_token", "vision_end_token", "start_image_token", "end_image_token", "boi_token", "eoi_token")


class Turn(NamedTuple):
    """What the chat template puts around a response."""

    before: str  # between the generation prompt and the response: "" or white space
    end_id: int  # the token that ends the turn


class Encoder:
    """Prompts, pictures and responses of one model family as tensors and token ids.

    Args:
        processor: an `AutoProcessor`, or a tokenizer for a model that sees no images.
        end_ids: tokens that end generation, as in `generation_config.eos_token_id`. The one that the chat template
            writes after a response is appended to every response. Empty: the tokenizer's eos token.
        max_prompt_length: longest prompt in tokens, image included; a longer one is an error, since cutting it would
            cut the image or the question. None: no limit.
        max_response_length: tokens after which a response is cut (it then has no end-of-turn token). None: no limit.
        max_length: tokens of prompt and response together, past which the response is cut. None: no limit.
    """

    def __init__(
        self,
        processor: Any,
        end_ids: Sequence[int] = (),
        *,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._images: Any = getattr(processor, "image_processor", None)
        self.sees_images = self._images is not None
        eos = self.tokenizer.eos_token_id
        self.end_ids = tuple(dict.fromkeys(end_ids)) or (() if eos is None else (eos,))
        if not self.end_ids:
            raise ValueError("end_ids: neither the generation config nor the tokenizer names an end-of-turn token")
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.max_length = max_length
        self._seen_sizes: dict[Size, Size] = {}
        self._cropped: dict[Size, str | None] = {}
        self._check_template()

    @classmethod
    def for_model(cls, processor: Any, model: nn.Module, **limits: int | None) -> Encoder:
        """The encoder with the end-of-turn tokens of the model's generation config."""
        config = getattr(model, "generation_config", None)
        eos = getattr(config, "eos_token_id", None)
        return cls(processor, [] if eos is None else [eos] if isinstance(eos, int) else eos, **limits)

    @property
    def pad_id(self) -> int:
        """A token for the end of shorter rows; no attention reaches it."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]

    @property
    def answer_values(self) -> dict[str, int]:
        """Keywords that run along the tokens whose value at answers is not the usual one of text."""
        return {"token_type_ids": 1} if self._is_paligemma else {}  # what is not of the prompt is seen causally

    def prompt(self, prompt: Prompt, image: Image.Image | None = None) -> dict[str, Tensor]:
        """One question about one picture -> what the model's forward takes: input_ids [1, P], pixel_values, …

        Args:
            prompt: the user's words, or chat messages. The picture goes where an {"type": "image"} part or the
                processor's image token stands, otherwise before the first words of the user.
            image: RGB, or None for a question without a picture.

        Raises:
            ValueError: more than one place for the picture, a picture for a model that sees none or of which the
                processor shows it a part, a prompt that is longer than max_prompt_length.
        """
        text = self.render(prompt, image is not None)
        if image is not None:
            self.check_frame(image.size)
        options: dict[str, Any] = {"return_tensors": "pt"}
        bos = self.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            options["add_special_tokens"] = False  # the template has written it already
        if image is not None:
            options["images"] = [image.convert("RGB")]
        encoded = dict(self.processor(text=[text], **options))
        encoded.pop("labels", None)  # PaliGemma's, all of them "none"
        length = encoded["input_ids"].shape[1]
        if self.max_prompt_length is not None and length > self.max_prompt_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length}: this prompt has {length} tokens, image included; raise "
                "the limit, shorten the prompt, or give the image processor fewer pixels"
            )
        return encoded

    def seen_size(self, size: Size) -> Size:
        """The size of a picture as the model sees it, which boxes in pixels are measured in.

        Raises:
            ValueError: the processor shows it a part of the picture.
        """
        self.check_frame(size)
        if size not in self._seen_sizes:
            self._seen_sizes[size] = seen_size(self._images, size)
        return self._seen_sizes[size]

    def render(self, prompt: Prompt, with_image: bool) -> str:
        """The text that is tokenized: chat template and generation prompt around the messages."""
        messages = self.messages(prompt, with_image)
        if self._template is None:
            words = "\n".join(part["text"] for m in messages for part in m["content"] if part["type"] == "text")
            if self._is_paligemma:  # its processor writes the beginning and the end of a prompt
                return f"{self._image_token}{words}" if with_image else words
            return f"{self._image_token}\n{words}\n" if with_image else f"{words}\n"
        return self._apply_template(messages, add_generation_prompt=True)

    def response(self, text: str, complete: bool = True) -> list[int]:
        """Token ids of a response and the end of its turn, as the model would generate them.

        Args:
            complete: False for a response that was cut while it was generated: it gets no end of turn.
        """
        return self.whole_response(text, complete)[: self.max_response_length]

    def whole_response(self, text: str, complete: bool = True) -> list[int]:
        """As `response`, and not cut. A text that holds the end of its turn already gets no second one."""
        ids = [token for token in self._ids(self.turn.before + text) if token not in self.placeholder_ids]
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        if end is not None and all(token in self.end_ids or self._is_space(token) for token in ids[end + 1 :]):
            return ids[: end + 1]
        return [*ids, *[self.turn.end_id] * complete]

    def response_limit(self, n_prompt: int) -> int | None:
        """Tokens after which a response to a prompt of n_prompt tokens is cut.

        Raises:
            ValueError: the prompt leaves no room for a response.
        """
        if self.max_length is None:
            return self.max_response_length
        if n_prompt >= self.max_length:
            raise ValueError(
                f"max_length={self.max_length}: this prompt has {n_prompt} tokens, image included, which leaves none "
                "for a response; raise the limit, shorten the prompt, or give the image processor fewer pixels"
            )
        room = self.max_length - n_prompt
        return room if self.max_response_length is None else min(room, self.max_response_length)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of generated ids, up to the first end token: what `response` makes the same ids of.

        Special tokens that belong to the answer (<|box_start|>, <ref>, …) stay in it; padding, beginnings and places
        of pictures are left out, and before it the white space that the template puts there. An answer without that
        white space has the same text as one with it, and is trained with it.
        """
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        stop = next((i for i, token in enumerate(listed) if token in self.end_ids), len(listed))
        without = {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id, *self.placeholder_ids}
        kept = [token for token in listed[:stop] if token not in without]
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        if not getattr(self.tokenizer, "is_fast", True):
            options["spaces_between_special_tokens"] = False
        return self.tokenizer.decode(kept, **options).removeprefix(self.turn.before)

    @cached_property
    def turn(self) -> Turn:
        """Read off the template by rendering an answered question."""
        fallback = self.tokenizer.eos_token_id
        end_id = fallback if fallback in self.end_ids else self.end_ids[0]
        if self._template is None:
            return Turn("", end_id)
        question = self.messages("?", with_image=False)
        answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
        open_turn = self._apply_template(question, add_generation_prompt=True)
        whole = self._apply_template([*question, answer], add_generation_prompt=False)
        before, _, after = whole.rpartition(PROBE)
        # GLM writes nothing after an answer: what ends it is the token that begins the user's next turn.
        next_turn = self._apply_template([*question, answer, *question], add_generation_prompt=False)
        follows = next_turn.removeprefix(whole) if next_turn.startswith(whole) else ""
        ends = [token for token in self._ids(after) if token in self.end_ids]
        ends += [token for token in self._ids(follows)[:1] if token in self.end_ids]
        end_id = ends[0] if ends else end_id
        gap = before.removeprefix(open_turn) if before.startswith(open_turn) else ""
        return Turn(gap if gap.isspace() and self._is_one_tokenization(open_turn, gap) else "", end_id)

    @cached_property
    def opened(self) -> str:
        """The mark with which the template opens a thought before every response ("<think>"), or "".

        It is part of the prompt. Where a response is judged it goes in front of it: else one that was cut while
        thinking would look like an answer.
        """
        if self._template is None:
            return ""
        return open_thought(self._apply_template(self.messages("?", with_image=False), add_generation_prompt=True))

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of all that turns records into token ids and pixels."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        pixels = self.processor.image_processor.to_json_string() if self.sees_images else ""
        parts = {
            "tokenizer": words,
            "chat template": str(self._template),
            "image processor": pixels,
            "response format": f"with special tokens, {self.turn} {self.max_response_length}",
        }
        if self.max_length is not None:
            parts["response format"] += f" {self.max_length}"
        return {name: fingerprint(part) for name, part in parts.items()}

    # ------------------------------------------------------------------------------------------------------- details

    def check_frame(self, size: Size) -> None:
        """Raises:
        ValueError: the processor cuts off parts of a picture of this size; says which setting shows all of it."""
        if size not in self._cropped:
            self._cropped[size] = cropped(self._images, size)
            if pads_to_square(self._images, size):
                logger.warning_once(
                    f"{type(self._images).__name__} pads pictures to a square: boxes are fractions of that square. "
                    "Give grounding tasks the box format llava-pad"
                )
        if problem := self._cropped[size]:
            raise ValueError(f"image: {problem}")

    @property
    def _is_paligemma(self) -> bool:
        return "PaliGemma" in type(self.processor).__name__

    @property
    def _template(self) -> Any:
        """The processor's, or else its tokenizer's."""
        return getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)

    def _check_template(self) -> None:
        if self._template is not None or self._is_paligemma:
            return
        known = self.tokenizer.get_vocab()
        mark = next((token for token in CHAT_TOKENS if token in known), None)
        kind = type(self.processor).__name__
        if mark is not None:
            raise ValueError(
                f"processor: {kind} has no chat template, nor has its tokenizer, but it has {mark!r}, which only chat "
                "models have. Put the model's chat_template.jinja into its folder, or set processor.chat_template"
            )
        logger.warning_once(f"{kind} has no chat template: the model is asked with the words of a prompt alone")

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template knows content that is a list of parts; a tokenizer's may know text alone."""
        if not self.sees_images:
            return False
        if getattr(self.processor, "chat_template", None) is not None:
            return True
        parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
        try:
            text = self._render_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        except Exception as error:  # a template's own, of any type
            logger.debug(f"the tokenizer's chat template takes no parts: {error}")
            return False
        return PROBE in text and "'type'" not in text and '"type"' not in text

    @property
    def _image_token(self) -> str:
        return getattr(self.processor, "image_token", None) or "<image>"

    @cached_property
    def placeholder_ids(self) -> set[int]:
        """Tokens that stand for parts of a picture. A response has no picture, so they are left out of it."""
        names = ("image_token_id", "video_token_id")
        found = {getattr(holder, name, None) for holder in (self.processor, self.tokenizer) for name in names}
        if self.sees_images:
            found.add(self.tokenizer.get_vocab().get(self._image_token))
        return {token for token in found if isinstance(token, int)}

    def _is_space(self, token: int) -> bool:
        return not self.tokenizer.decode([token]).strip()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _is_one_tokenization(self, open_turn: str, gap: str) -> bool:
        """Whether gap + response tokenized alone gives what the whole turn gives. A tokenizer that puts a space before
        every word (sentencepiece) already has the gap in its own form, and would double it."""
        whole, head = self._ids(open_turn + gap + PROBE), self._ids(open_turn)
        return whole == head + self._ids(gap + PROBE)

    def _apply_template(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        if not self._takes_parts:  # a text model's template takes plain strings
            place = f"{self._image_token}\n"
            messages = [{**m, "content": "".join(part.get("text", place) for part in m["content"])} for m in messages]
        return self._render_template(messages, add_generation_prompt=add_generation_prompt)

    def _render_template(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
        if getattr(self.processor, "chat_template", None) is None:
            return self.tokenizer.apply_chat_template(messages, **options)
        if self.sees_images:
            options["processor_kwargs"] = {"return_tensors": "pt"}  # not used; SmolVLM warns at each call without any
        return self.processor.apply_chat_template(messages, **options)

    @cached_property
    def _place(self) -> re.Pattern[str]:
        """A place for a picture, as it may stand in the words of a prompt: with the markers that the template or the
        processor puts around it, which are not to be there twice."""
        holders = (self.processor, self.tokenizer)
        found = {getattr(holder, name, None) for holder in holders for name in _MARKERS}
        markers = {marker for marker in found if isinstance(marker, str)}
        tokens = {self._image_token, "<image>"}
        if self._template is not None and self._takes_parts:
            parts = [{"type": "text", "text": PROBE}, {"type": "image"}, {"type": "text", "text": PROBE}]
            text = self._render_template([{"role": "user", "content": parts}], add_generation_prompt=False)
            around = text.partition(PROBE)[2].rpartition(PROBE)[0].strip()  # "<|vision_start|><image><|vision_end|>"
            before, token, after = around.partition(self._image_token)
            if around and not token:
                tokens.add(around)  # Gemma writes a token that its processor replaces by others
            markers |= {marker for marker in (before.strip(), after.strip()) if token and marker}
        marks, places = ("|".join(map(re.escape, sorted(x, key=len, reverse=True))) for x in (markers - tokens, tokens))
        around = rf"(?:{marks})?" if marks else ""
        return re.compile(f"{around}(?:{places}){around}")

    def messages(self, prompt: Prompt, with_image: bool) -> Messages:
        """Messages whose content is a list of parts, with exactly one image part if there is a picture."""
        if with_image and not self.sees_images:
            raise ValueError(
                f"image: {type(self.processor).__name__} has no image processor; load a vision-language model, or "
                "leave out the image"
            )
        given: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [{**m, "content": self._parts(m["content"])} for m in given]
        n_places = sum(part["type"] == "image" for m in messages for part in m["content"])
        if n_places > int(with_image):
            raise ValueError(
                f"prompt: {n_places} places for a picture ({self._image_token!r} or an image part), but the record has "
                f"{int(with_image)} image"
            )
        if with_image and n_places == 0:
            user = next((m for m in messages if m["role"] == "user"), None)
            if user is None:
                raise ValueError("prompt: no message of role 'user' to put the image into")
            user["content"] = [{"type": "image"}, *user["content"]]
        return messages

    def _parts(self, content: Any) -> list[dict[str, Any]]:
        """Content as image and text parts; an image token written in the text is a place for the picture."""
        if not isinstance(content, str):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind in ("image", "image_url"):
                    parts.append({"type": "image"})
                elif kind == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    raise ValueError(f"prompt: a message part must have type 'text' or 'image', got {part!r}")
            return parts
        parts = []
        for i, words in enumerate(self._place.split(content) if self.sees_images else [content]):
            if i:
                parts.append({"type": "image"})
                words = words.removeprefix("\n")
            if words:
                parts.append({"type": "text", "text": words})
        return parts
