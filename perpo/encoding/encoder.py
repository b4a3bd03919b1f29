"""What a processor and a model expect of text and pictures: prompts and responses as tensors.

`Encoder` is the only place that knows chat templates, image placeholders and end-of-turn tokens; training, generation
and evaluation all encode through it, so that a response is trained in exactly the form in which it is generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn

from perpo.storage.fingerprints import fingerprint

Messages = list[dict[str, Any]]
Prompt = str | Messages
Size = tuple[int, int]  # width, height

PROBE = "0"  # a response that no template treats specially


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
    """

    def __init__(
        self,
        processor: Any,
        end_ids: Sequence[int] = (),
        *,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees_images = getattr(processor, "image_processor", None) is not None
        eos = self.tokenizer.eos_token_id
        self.end_ids = tuple(dict.fromkeys(end_ids)) or (() if eos is None else (eos,))
        if not self.end_ids:
            raise ValueError("end_ids: neither the generation config nor the tokenizer names an end-of-turn token")
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self._seen_sizes: dict[Size, Size] = {}

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
            ValueError: more than one place for the picture, a picture for a model that sees none, a prompt that is
                longer than max_prompt_length.
        """
        text = self.render(prompt, image is not None)
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

        After resizing for models that keep its shape (the Qwen-VL family: image_grid_thw patches); for all others the
        size as it is. Only the size matters, so each is worked out once.
        """
        if size not in self._seen_sizes:
            self._seen_sizes[size] = self._seen_size(size)
        return self._seen_sizes[size]

    def _seen_size(self, size: Size) -> Size:
        images: Any = getattr(self.processor, "image_processor", None)
        patch = getattr(images, "patch_size", None)
        if not isinstance(patch, int):
            return size
        grid = images(images=[Image.new("RGB", size)], return_tensors="pt").get("image_grid_thw")
        return size if grid is None else (int(grid[0, 2]) * patch, int(grid[0, 1]) * patch)

    def render(self, prompt: Prompt, with_image: bool) -> str:
        """The text that is tokenized: chat template and generation prompt around the messages."""
        messages = self._messages(prompt, with_image)
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
        ids = [token for token in self._ids(self.turn.before + text) if token not in self._placeholder_ids]
        return [*ids, *[self.turn.end_id] * complete][: self.max_response_length]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of generated ids, up to the first end token: what `response` makes the same ids of.

        Special tokens that belong to the answer (<|box_start|>, <ref>, …) stay in it; padding, beginnings and places
        of pictures are left out, and before it the white space that the template puts there. An answer without that
        white space cannot be told from one with it: its text gets it back.
        """
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        stop = next((i for i, token in enumerate(listed) if token in self.end_ids), len(listed))
        without = {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id, *self._placeholder_ids}
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
        question = self._messages("?", with_image=False)
        answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
        open_turn = self._apply_template(question, add_generation_prompt=True)
        whole = self._apply_template([*question, answer], add_generation_prompt=False)
        before, _, after = whole.rpartition(PROBE)
        for token in self._ids(after):
            if token in self.end_ids:
                end_id = token
                break
        gap = before.removeprefix(open_turn) if before.startswith(open_turn) else ""
        return Turn(gap if gap.isspace() and self._is_one_tokenization(open_turn, gap) else "", end_id)

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
        return {name: fingerprint(part) for name, part in parts.items()}

    # ------------------------------------------------------------------------------------------------------- details

    @property
    def _is_paligemma(self) -> bool:
        return "PaliGemma" in type(self.processor).__name__

    @property
    def _template(self) -> Any:
        return getattr(self.processor, "chat_template", None)

    @property
    def _image_token(self) -> str:
        return getattr(self.processor, "image_token", None) or "<image>"

    @cached_property
    def _placeholder_ids(self) -> set[int]:
        """Tokens that stand for parts of a picture: in a response there is none that they could stand for."""
        names = ("image_token_id", "video_token_id")
        found = {getattr(holder, name, None) for holder in (self.processor, self.tokenizer) for name in names}
        if self.sees_images:
            found.add(self.tokenizer.get_vocab().get(self._image_token))
        return {token for token in found if isinstance(token, int)}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _is_one_tokenization(self, open_turn: str, gap: str) -> bool:
        """Whether gap + response tokenized alone gives what the whole turn gives. A tokenizer that puts a space before
        every word (sentencepiece) already has the gap in its own form, and would double it."""
        whole, head = self._ids(open_turn + gap + PROBE), self._ids(open_turn)
        return whole == head + self._ids(gap + PROBE)

    def _apply_template(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
        if self.sees_images:
            options["processor_kwargs"] = {"return_tensors": "pt"}  # not used; SmolVLM warns at each call without any
        else:  # a text model's template takes plain strings
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        return self.processor.apply_chat_template(messages, **options)

    def _messages(self, prompt: Prompt, with_image: bool) -> Messages:
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
        for token in {self._image_token, "<image>"} if self.sees_images else ():
            content = content.replace(token, "\0")
        for i, words in enumerate(content.split("\0")):
            if i:
                parts.append({"type": "image"})
                words = words.removeprefix("\n")
            if words:
                parts.append({"type": "text", "text": words})
        return parts
