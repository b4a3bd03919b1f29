"""A server with an OpenAI-compatible API in a thread, which can be told to misbehave."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from perpo.encoding.encoder import Encoder

KEY = "sk-a-secret-key"
# What to answer in place of a reply: a status with a body and headers, or a change to the body of a reply.
Fault = tuple[int, str, dict[str, str]] | Callable[[dict[str, Any]], Any]


class ChatServer:
    """Answers with digits that depend on the seed, as vLLM does.

    Args:
        encoder: of the served model.
        names: of the models that are served; None: there is no such list.
        ids: give token ids as vLLM does, not texts alone.
    """

    def __init__(self, encoder: Encoder, names: list[str] | None = None, *, ids: bool = True) -> None:
        self.encoder = encoder
        self.names = ["some/model"] if names is None else names
        self.ids = ids
        self.key: str | None = None
        self.faults: list[Fault] = []  # of the next requests
        self.always: Fault | None = None  # of all requests
        self.seconds = 0.0  # that an answer takes
        self.asked: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []
        self.at_once = self.most_at_once = 0
        self.url = ""
        self.lock = threading.Lock()

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        image = None
        messages = []
        for message in body["messages"]:
            parts = message["content"]
            for part in parts if isinstance(parts, list) else ():
                if part["type"] == "image_url":
                    kind, _, data = part["image_url"]["url"].partition(",")
                    assert kind == "data:image/png;base64"
                    image = Image.open(io.BytesIO(base64.b64decode(data)))
                    self.images.append(image)
            messages.append(message)
        with self.lock:
            prompt = self.encoder.prompt(messages, image)["input_ids"][0].tolist()
        choices = []
        for i in range(body["n"]):
            text = str((body["seed"] // 7 + i) % 10)
            cut = body["max_tokens"] == 1
            choice = {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length" if cut else "stop",
            }
            if self.ids:
                words = self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
                choice["token_ids"] = words if cut else [*words, self.encoder.end_ids[0]]
            choices.append(choice)
        usage = {"prompt_tokens": len(prompt)}
        return {"choices": choices, "usage": usage, **({"prompt_token_ids": prompt} if self.ids else {})}

    def handle(self, path: str, sent: dict[str, Any] | None, key: str) -> tuple[int, str, dict[str, str]]:
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, json.dumps({"error": f"Incorrect API key provided: {key}"}), {}
        if path == "/v1/models" and self.names:
            return 200, json.dumps({"data": [{"id": name} for name in self.names]}), {}
        if path != "/v1/chat/completions" or sent is None:
            return 404, '{"detail":"Not Found"}', {}
        with self.lock:
            self.asked.append(sent)
            fault = self.faults.pop(0) if self.faults else self.always
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.seconds)
            if isinstance(fault, tuple):
                return fault
            if self.names and sent["model"] not in self.names:
                return 404, json.dumps({"error": {"message": f"The model {sent['model']!r} does not exist."}}), {}
            body = self.reply(sent)
            return 200, json.dumps(body if fault is None else fault(body)), {}
        finally:
            with self.lock:
                self.at_once -= 1


@contextmanager
def running(server: ChatServer) -> Iterator[ChatServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, sent: dict[str, Any] | None) -> None:
            status, body, headers = server.handle(self.path, sent, self.headers.get("Authorization", ""))
            if status == 0:  # the connection breaks
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # the client went away
                self.close_connection = True

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
