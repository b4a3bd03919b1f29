"""Answers from a server with an OpenAI-compatible API (`vllm serve`, SGLang, …), several questions at once.

The server puts prompts together: with its chat template and its image processor. Training does it with ours, so the two
are compared, token by token where the server gives them (vLLM: return_token_ids), by their number elsewhere. Pictures
go as PNG, so that the server sees the pixels that training sees.
"""

from __future__ import annotations

import base64
import io
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.sampling.server import NotFoundError, Server, ServerError, ServerSettings, UnusableError
from perpo.storage.fingerprints import fingerprint, model_fingerprints

# What stands between logits and answers, and the value at which it does nothing. Servers fill in what is left out from
# the model's generation config.
PLAIN: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
# Fields that settings of their own give, or that would change the distribution in other ways.
NOT_FREE = {
    *("model", "messages", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stream"),
    *("stop", "stop_token_ids", "ignore_eos", "logit_bias", "bad_words", "allowed_token_ids", "logits_processors"),
    *("response_format", "structured_outputs", "tools", "tool_choice", "use_beam_search", "truncate_prompt_tokens"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex", "ebnf", "json_schema"),
}


class ServerWarning(UserWarning):
    """A server does less than it was asked for; the answers are right, but take longer or are not checked."""


class _Reply(NamedTuple):
    answers: list[Answer]
    prompt_ids: list[int] | None
    n_prompt: int | None


class OpenAISampler:
    """One question a request, with a seed of its own; `in_flight` of them may be asked at once, in threads.

    Args:
        model_name_or_path: the model whose processor is the encoder's; its weights are the server's affair.
        encoder: renders prompts as for training, to compare them, and decodes answers.
        sampling: temperature and so on.
        settings: of the server.
        options: further fields of each request, such as {"chat_template_kwargs": {…}}; None leaves a field out that the
            server does not know.

    Raises:
        ValueError: settings or options that cannot be.
        ServerError: no answer from the server; it does not serve the model.
    """

    batch_size = 1

    def __init__(
        self,
        model_name_or_path: str,
        encoder: Encoder,
        sampling: Sampling,
        settings: ServerSettings,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoder = encoder
        self.sampling = sampling
        self.in_flight = settings.requests_in_flight
        self._checks = settings.check_prompts
        self._options = dict(options or {})
        _check_options(self._options)
        self._lock = threading.Lock()  # tokenizers are not thread-safe
        self._warned: set[str] = set()
        self._server = Server(settings)
        self.served_model = self._find_model(settings.served_model, model_name_or_path)
        folder = Path(model_name_or_path)
        content = fingerprint(model_fingerprints(folder)) if folder.is_dir() else model_name_or_path
        self._model = {"engine": "openai", "model": content, "served model": self.served_model}
        self._model |= {name: str(value) for name, value in sorted(self._options.items()) if value is not None}

    def identity(self) -> dict[str, str]:
        return {
            **self._model,
            **self.encoder.fingerprint(),
            "end tokens": str(self.encoder.end_ids),
            **self.sampling.identity(),
        }

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        """As `Sampler.sample`.

        Raises:
            ValueError: a question that the server refuses, or that is too long.
            ServerError: the server gives no answer, or makes another prompt of a question than training does.
        """
        return [self._answers(question, n, attempt) for question in questions]

    # ------------------------------------------------------------------------------------------------------- details

    def _find_model(self, wanted: str | None, own: str) -> str:
        """Its name at the server, which must be among those that the server lists, if it lists any."""
        try:
            names = self._server.call("models", None, _model_names, "the list of models")
        except NotFoundError:
            return wanted or own
        name = wanted or (names[0] if len(names) == 1 else own)
        if names and name not in names:
            raise ServerError(
                f"{self._server.url} serves no model {name!r}, but {', '.join(map(repr, names))}: set served_model to "
                "its name there"
            )
        return name

    def _answers(self, question: Question, n: int, attempt: int) -> list[Answer]:
        what = f"record {question.id!r}"
        ids = self._own_ids(question)
        body = self._request(question)
        answers: list[Answer] = []
        while len(answers) < n:
            # Those that a server left out are drawn with another seed, or they might be the same once more.
            seed_of = f"{question.id}\0{len(answers)}" if answers else question.id
            body |= {"n": n - len(answers), "seed": self.sampling.seed_of(seed_of, attempt)}
            reply = self._server.call("chat/completions", body, self._reply, what)
            if ids is not None and not answers:
                self._check_prompt(what, question, ids, reply, body["n"])
            answers += reply.answers[: body["n"]]
            if len(answers) < n:
                self._warn_once(
                    "fewer",
                    f"{what}: the server gave {len(reply.answers)} of {body['n']} answers that were asked for; the "
                    "others are asked for again, and the prompt is read again for them",
                )
        return answers

    def _own_ids(self, question: Question) -> list[int] | None:
        """The prompt's tokens as in training; raises where the prompt is too long or its image is cropped."""
        with self._lock:
            if question.image is not None:
                self.encoder.check_frame(question.image.size)
            if not self._checks and self.encoder.max_prompt_length is None:
                return None
            ids = self.encoder.prompt(question.prompt, question.image)["input_ids"][0].tolist()
        return ids if self._checks else None

    def _request(self, question: Question) -> dict[str, Any]:
        with self._lock:
            messages = self.encoder.messages(question.prompt, question.image is not None)
        body: dict[str, Any] = {
            "model": self.served_model,
            "messages": [{**message, "content": _content(message["content"], question.image)} for message in messages],
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            **PLAIN,
            "stop_token_ids": list(self.encoder.end_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
            **self._options,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _reply(self, body: dict[str, Any]) -> _Reply:
        """Raises UnusableError where it holds no answer at all."""
        if not isinstance(choices := body.get("choices"), list):
            raise UnusableError(f"a body without choices: {body.get('error', body)!s:.200}")
        answers: list[Answer] = []
        faults: list[str] = []
        for choice in choices:
            try:
                answers.append(self._answer(choice))
            except UnusableError as error:
                faults.append(str(error))
        if not answers:
            raise UnusableError(f"no answer among {len(choices)} choices{': ' * bool(faults)}{', '.join(faults[:1])}")
        usage = body.get("usage")
        n_prompt = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        ids = _ids(body.get("prompt_token_ids"))
        return _Reply(answers, ids, n_prompt if isinstance(n_prompt, int) else None)

    def _answer(self, choice: Any) -> Answer:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise UnusableError(f"a choice without a message: {choice!r:.100}")
        for name in ("tool_calls", "reasoning_content", "reasoning"):
            if message.get(name):
                raise ServerError(
                    f"{self._server.url} takes answers apart ({name}), and training needs all that the model wrote: "
                    "start the server without reasoning and tool parsers"
                )
        why = choice.get("finish_reason")
        if why not in ("stop", "length"):  # "abort", "error", "content_filter", none at all
            raise UnusableError(f"finish_reason {why!r}, neither 'stop' nor 'length'")
        with self._lock:
            if (ids := _ids(choice.get("token_ids"))) is not None:
                if why == "length" and len(ids) < self.sampling.max_new_tokens:
                    self._warn_once(
                        "short",
                        f"the server cuts answers before max_new_tokens={self.sampling.max_new_tokens}, one after "
                        f"{len(ids)}: prompt and answer together are too long for it; serve with a larger context "
                        "(vLLM: --max-model-len)",
                    )
                return Answer(self.encoder.decode(ids), why != "length")
            text = message.get("content")
            if not isinstance(text, str | None):
                raise UnusableError(f"content that is no text: {text!r:.100}")
            text = (text or "").removeprefix(self.encoder.turn.before)
            return Answer(text.removesuffix(self.encoder.tokenizer.decode([self.encoder.turn.end_id])), why != "length")

    def _check_prompt(self, what: str, question: Question, ours: list[int], reply: _Reply, n: int) -> None:
        """Raises ServerError where the server's prompt is another than ours."""
        theirs, count = reply.prompt_ids, reply.n_prompt
        places = self.encoder.placeholder_ids
        if theirs is None and count is None:
            return self._warn_once(
                "unchecked",
                "the server tells neither the tokens of prompts nor their number: whether its chat template and image "
                "processor are those of training is not checked",
            )
        words = None if theirs is None else [token for token in theirs if token not in places]
        own_words = [token for token in ours if token not in places]
        if words is not None and words != own_words:
            pairs = zip(words, own_words, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(words), len(own_words)))
            here, there = (self.encoder.tokenizer.decode(ids[first : first + 8]) for ids in (own_words, words))
            found = f"from its text token {first + 1} on it is {there!r} at the server and {here!r} in training"
        elif len(ours) not in (len(theirs or ()), count, (count or 0) / n):  # some count a prompt once an answer
            size = (
                ""
                if question.image is None
                else f", image of {question.image.width} × {question.image.height} included"
            )
            found = f"it has {len(theirs) if theirs else count} tokens at the server and {len(ours)} in training{size}"
        else:
            return None
        raise ServerError(
            f"{what}: the server makes another prompt of it than training will: {found}. Serve the model of "
            "model_name_or_path, with its chat template and the image sizes of processor_options; check_prompts=false "
            "takes the answers as they are"
        )

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, ServerWarning, stacklevel=2)


def _check_options(options: Mapping[str, Any]) -> None:
    if taken := [name for name in options if name in NOT_FREE]:
        raise ValueError(
            f"engine_options: {', '.join(taken)} cannot be given: temperature, top_p, max_new_tokens and seed are "
            "settings of their own, and training takes answers to be drawn from softmax(logits / temperature) cut to "
            "top_p"
        )
    if other := [name for name, plain in PLAIN.items() if options.get(name, plain) not in (plain, None)]:
        raise ValueError(
            f"engine_options: {', '.join(other)} changes the distribution that answers are drawn from, and training "
            "takes it to be softmax(logits / temperature) cut to top_p. Leave it out"
        )


def _model_names(body: dict[str, Any]) -> list[str]:
    listed = body.get("data")
    if not isinstance(listed, list):
        raise UnusableError("a list of models without data")
    return [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one]


def _ids(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(isinstance(token, int) for token in value) else None


def _content(parts: Sequence[Mapping[str, Any]], image: Image.Image | None) -> str | list[dict[str, Any]]:
    """Parts as the API takes them; words alone as a text, which every server's template knows."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    url = {"url": _data_url(image)} if image is not None else {}
    return [{"type": "image_url", "image_url": url} if part["type"] == "image" else dict(part) for part in parts]


def _data_url(image: Image.Image) -> str:
    """Lossless."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
