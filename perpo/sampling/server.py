"""A server with an OpenAI-compatible API: how it is reached, and what is done when it does not answer.

What may pass (no connection, a timeout, 429, 500, a body that is no JSON or holds no answer) is asked again, after
longer and longer waits. What stays is an error: `ServerError` ends the run, a ValueError is about one question.
httpx alone: the `openai` package would add five more, and retries neither a body that is no JSON nor one without
answers.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from transformers.utils import logging

logger = logging.get_logger(__name__)

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before a request is repeated; doubled each time
LONGEST_ASKED_FOR = 600.0  # of the waits that a server asks for (Retry-After)
SAID_EVERY = 10.0  # seconds between two lines about waiting
PASSING = {408, 409, 425, 429}  # and all from 500
OF_THE_QUESTION = {400, 413, 422}


class ServerError(OSError):
    """The server cannot be used, whatever the question."""


class NotFoundError(ServerError):
    """404."""


class UnusableError(Exception):
    """A body that holds no answer; it is asked for again."""


@dataclass(kw_only=True)
class ServerSettings:
    """A server that answers, for engine='openai'."""

    base_url: str | None = field(
        default=None,
        metadata={"help": "For engine='openai': where the server is, such as http://localhost:8000/v1."},
    )
    served_model: str | None = field(
        default=None,
        metadata={"help": "The model's name at the server; default: model_name_or_path, or the only one served."},
    )
    requests_in_flight: int = field(default=16, metadata={"help": "Requests that the server works on at once."})
    request_timeout: float = field(default=600.0, metadata={"help": "Seconds that a request may take."})
    request_retries: int = field(
        default=8, metadata={"help": "How often a request that failed is repeated; eight times take two minutes."}
    )
    api_key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Environment variable that holds the key, if the server asks for one."},
    )
    check_prompts: bool = field(
        default=True,
        metadata={"help": "Compare the tokens of each prompt at the server with those that training makes of it."},
    )

    def check_server(self) -> None:
        """Raises:
        ValueError: a setting that no server can have."""
        try:
            url = httpx.URL(self.base_url or "")
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(
                f"base_url must be an address such as http://localhost:8000/v1, got {_bare(self.base_url)!r}"
            )
        if url.userinfo:
            raise ValueError(
                f"base_url holds a user or a password: put the key into the environment variable "
                f"{self.api_key_variable}, and leave it out of the address"
            )
        for name, least in (("requests_in_flight", 1), ("request_retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be ≥ {least}, got {getattr(self, name)}")
        if not 0 < self.request_timeout < float("inf"):
            raise ValueError(f"request_timeout must be > 0 seconds, got {self.request_timeout}")


class Server:
    """Sends requests, also from several threads; see the module."""

    def __init__(self, settings: ServerSettings) -> None:
        settings.check_server()
        self.url = str(settings.base_url).rstrip("/")
        self.retries = settings.request_retries
        self._key_variable = settings.api_key_variable
        self._key = os.environ.get(self._key_variable, "").strip()
        if not (self._key.isascii() and re.fullmatch(r"\S*", self._key)):
            raise ValueError(f"the environment's {self._key_variable} is no key: it holds spaces or other characters")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(settings.request_timeout, connect=min(30.0, settings.request_timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.requests_in_flight),
        )
        self._lock = threading.Lock()
        self._given_up = 0  # requests; others that wait then do not go on waiting
        self._said = float("-inf")

    def call(self, path: str, body: dict[str, Any] | None, read: Callable[[dict[str, Any]], T], what: str) -> T:
        """What `read` makes of the answer to a POST, or to a GET where there is no body.

        Args:
            read: raises UnusableError where the answer has to be asked for again.
            what: is asked for, for an error: "record 'r1'".

        Raises:
            ValueError: the server refuses this request.
            ServerError: it does not answer, or refuses all requests.
        """
        given_up = self._given_up
        for failures in range(1, self.retries + 2):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1)
            try:
                response = self._client.request("GET" if body is None else "POST", f"{self.url}/{path}", json=body)
                if response.is_success:
                    return read(_json(response))
                self._refused(response, what)
                reason = f"status {response.status_code}: {self._words(response.text)}"
                wait = max(wait, _retry_after(response))
            except httpx.RequestError as error:
                reason = self._words(f"{type(error).__name__}: {error}")
            except UnusableError as error:
                reason = self._words(str(error))
            if failures <= self.retries and not self._waited(wait, given_up, f"{what}: {reason}", failures):
                break
        with self._lock:
            self._given_up += 1
        raise ServerError(
            f"{what}: {self.url} gave no answer, asked {failures} times; the last time: {reason}. What was finished is "
            "kept: see to the server (or leave the record out, if others are answered) and run the same command again"
        )

    def _refused(self, response: httpx.Response, what: str) -> None:
        """Raises for a status that will be the same again."""
        status, said = response.status_code, self._words(response.text)
        if status in OF_THE_QUESTION:
            raise ValueError(
                f"{what}: the server refuses it (status {status}): {said}. A field that it does not know is left out "
                "by engine_options: {name: null}"
            )
        if status in (401, 403):  # what the server says may hold the key
            state = "is not taken" if self._key else "is not set"
            raise ServerError(
                f"{self.url} asks for a key (status {status}), and the environment's {self._key_variable} {state}"
            )
        if status == 404:
            raise NotFoundError(
                f"{what}: {self.url} knows no such model or address (status 404): {said}. base_url ends in /v1 with "
                "most servers; served_model is the model's name there"
            )
        if status < 500 and status not in PASSING:
            raise ServerError(f"{what}: {self.url} answers with status {status}: {said}")

    def _waited(self, seconds: float, given_up: int, why: str, failures: int) -> bool:
        """False where another request was given up in the meantime."""
        with self._lock:
            now = time.monotonic()
            if now - self._said > SAID_EVERY:
                self._said = now
                logger.warning(f"{why}; asking again in {seconds:.0f} s ({failures} of {self.retries})")
        end = now + seconds
        while (left := end - time.monotonic()) > 0:
            if self._given_up > given_up:
                return False
            time.sleep(min(left, 0.5))
        return True

    def _words(self, text: str) -> str:
        """The beginning of what was said, without the key."""
        text = " ".join(text.split()) or "no words"
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 300 else f"{text[:300]}…"


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except (ValueError, RecursionError):
        raise UnusableError(f"a body that is no JSON: {response.text[:200]!r}") from None
    if not isinstance(body, dict):
        raise UnusableError(f"a body that is no JSON object: {response.text[:200]!r}")
    return body


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(LONGEST_ASKED_FOR, float(response.headers.get("retry-after", 0)))
    except ValueError:  # a date
        return 0.0


def _bare(url: str | None) -> str | None:
    """Without user and password."""
    return None if url is None else re.sub(r"//[^/]*@", "//…@", url)
