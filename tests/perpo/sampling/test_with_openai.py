"""Answers from a server: the distribution and the prompt of training, and what is done when it misbehaves.

The server is a real one, in a thread (`chat_server`).
"""

import json
import logging
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageChops

from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder
from perpo.sampling import server as http
from perpo.sampling.candidates import CandidateConfig, Outcome, generate
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.sampling.server import ServerError, ServerSettings
from perpo.sampling.with_openai import OpenAISampler, ServerWarning

from .. import tiny_models
from ..chat_server import KEY, ChatServer, running

PICTURE = tiny_models.picture((60, 44))
ASKED = Question("a", "Where is the glass?", PICTURE)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    model, processor = tiny_models.build("llava")
    return Encoder.for_model(processor, model)


@pytest.fixture
def server(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running(ChatServer(encoder)) as made:
        yield made


def sampler(server: ChatServer, sampling: Sampling | None = None, **settings: Any) -> OpenAISampler:
    options = settings.pop("options", None)
    given = ServerSettings(**{"base_url": server.url, "request_retries": 3, **settings})
    return OpenAISampler("some/model", server.encoder, sampling or Sampling(), given, options)


def run(folder: Path, made: OpenAISampler, n: int = 12, **config: Any) -> Outcome:
    return generate(records(n), made, folder / "out.jsonl", CandidateConfig(k=4, **config))


def records(n: int) -> list[ListRecord]:
    return [ListRecord(f"r{i}", None, "How many?", 3, "counting") for i in range(n)]


# ------------------------------------------------------------------------------------------------------ what is asked


def test_a_request_leaves_nothing_between_logits_and_answers_to_a_default(server: ChatServer) -> None:
    made = sampler(server, Sampling(0.7, 0.9, 5, seed=3))
    made.sample([ASKED], 2, attempt=1)
    (body,) = server.asked
    content = body.pop("messages")[0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[1]["text"] == "Where is the glass?"
    assert body == {
        "model": "some/model",
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 5,
        "seed": made.sampling.seed_of("a", 1),
        "top_k": -1,
        "min_p": 0.0,
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(made.encoder.end_ids),
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


def test_the_server_sees_the_pixels_that_training_sees(server: ChatServer) -> None:
    sampler(server).sample([ASKED], 1)
    assert ImageChops.difference(server.images[0], PICTURE.convert("RGB")).getbbox() is None


@pytest.mark.parametrize("ids", [True, False])
def test_answers_are_those_that_other_samplers_would_give(ids: bool, server: ChatServer) -> None:
    server.ids = ids
    made = sampler(server)
    lists = made.sample([ASKED, Question("b", "Why?", None)], 3)
    for question, answers in zip("ab", lists, strict=True):
        seed = made.sampling.seed_of(question, 0)
        assert answers == [Answer(str((seed // 7 + i) % 10), True) for i in range(3)]
    cut = sampler(server, Sampling(max_new_tokens=1)).sample([ASKED], 2)
    assert [answer.complete for answer in cut[0]] == [False, False]


def test_answers_that_the_servers_context_cuts_are_said(server: ChatServer) -> None:
    def cut(body: dict[str, Any]) -> dict[str, Any]:
        body["choices"][0] |= {"finish_reason": "length", "token_ids": body["choices"][0]["token_ids"][:1]}
        return body

    server.always = cut
    with pytest.warns(ServerWarning, match="before max_new_tokens=128, one after 1: .*--max-model-len"):
        assert not sampler(server).sample([ASKED], 1)[0][0].complete


def test_an_end_of_turn_that_the_server_leaves_in_the_text_is_no_part_of_the_answer(server: ChatServer) -> None:
    server.ids = False
    end = server.encoder.tokenizer.decode([server.encoder.turn.end_id])

    def with_end(body: dict[str, Any]) -> dict[str, Any]:
        body["choices"][0]["message"]["content"] += end
        return body

    plain = sampler(server).sample([ASKED], 1)
    server.always = with_end
    assert sampler(server).sample([ASKED], 1) == plain


def test_fields_of_requests_may_be_added_and_left_out_and_the_distribution_stays(server: ChatServer) -> None:
    made = sampler(server, options={"chat_template_kwargs": {"a": 1}, "top_k": None, "return_token_ids": None})
    made.sample([ASKED], 1)
    assert server.asked[0]["chat_template_kwargs"] == {"a": 1}
    assert not {"top_k", "return_token_ids"} & server.asked[0].keys()
    assert made.identity()["chat_template_kwargs"] == "{'a': 1}"
    for options, message in (({"seed": 3}, "seed cannot be given"), ({"top_k": 40}, "top_k changes the distribution")):
        with pytest.raises(ValueError, match=message):
            sampler(server, options=options)


def test_the_identity_says_engine_model_and_distribution_and_not_where_the_server_is(
    server: ChatServer, tmp_path: Path
) -> None:
    plain = sampler(server).identity()
    assert plain.items() >= {"engine": "openai", "model": "some/model", "served model": "some/model"}.items()
    assert sampler(server, requests_in_flight=2, request_timeout=7.0, check_prompts=False).identity() == plain
    assert server.url not in str(plain)
    (tmp_path / "config.json").write_text("1")
    given = ServerSettings(base_url=server.url)
    assert OpenAISampler(str(tmp_path), server.encoder, Sampling(), given).identity()["model"] != plain["model"]


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["some/model", "lora"], None, "some/model"),
        (["served"], None, "served"),
        (["some/model", "lora"], "lora", "lora"),
        ([], None, "some/model"),
        ([], "lora", "lora"),
        (["a", "b"], None, "serves no model 'some/model', but 'a', 'b': set served_model"),
        (["a"], "b", "serves no model 'b', but 'a'"),
    ],
)
def test_the_model_is_found_by_its_name_at_the_server(
    names: list[str], wanted: str | None, found: str, server: ChatServer
) -> None:
    server.names = names
    if " " in found:
        with pytest.raises(ServerError, match=found):
            sampler(server, served_model=wanted)
    else:
        assert sampler(server, served_model=wanted).served_model == found


# ------------------------------------------------------------------------------------------------------ the prompt


def test_another_chat_template_at_the_server_is_refused(server: ChatServer, tmp_path: Path) -> None:
    def other(body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt_token_ids"]
        return body | {"prompt_token_ids": [*ids[:3], *ids[4:]], "usage": {"prompt_tokens": len(ids) - 1}}

    server.always = other
    with pytest.raises(
        ServerError, match=r"record 'r\d+': .* another prompt .* text token 4 on it is '.*' at the server"
    ):
        run(tmp_path, sampler(server), skip_bad=True)
    assert sampler(server, check_prompts=False).sample([ASKED], 1)


@pytest.mark.parametrize("ids", [True, False])
def test_another_number_of_image_tokens_is_refused(ids: bool, server: ChatServer) -> None:
    place = next(iter(server.encoder.placeholder_ids))
    server.ids = ids

    def smaller(body: dict[str, Any]) -> dict[str, Any]:
        given = body.get("prompt_token_ids")
        fewer = {} if given is None else {"prompt_token_ids": [t for t in given if t != place]}
        return body | fewer | {"usage": {"prompt_tokens": 5}}

    server.always = smaller
    with pytest.raises(ServerError, match=r"tokens at the server and \d+ in training, image of 60 × 44 included"):
        sampler(server).sample([ASKED], 1)


def test_a_server_that_expands_no_image_in_its_ids_or_counts_a_prompt_once_an_answer_agrees(server: ChatServer) -> None:
    place = next(iter(server.encoder.placeholder_ids))

    def short(body: dict[str, Any]) -> dict[str, Any]:
        return body | {"prompt_token_ids": [t for t in body["prompt_token_ids"] if t != place]}

    def many(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": body["choices"], "usage": {"prompt_tokens": 3 * body["usage"]["prompt_tokens"]}}

    server.faults = [short, many]
    assert len(sampler(server).sample([ASKED, ASKED], 3)) == 2


def test_a_server_that_says_nothing_about_prompts_is_said_once(server: ChatServer) -> None:
    server.ids = False
    server.always = lambda body: {"choices": body["choices"]}
    made = sampler(server)
    with pytest.warns(ServerWarning, match="is not checked") as caught:
        made.sample([ASKED, ASKED], 1)
    assert len([one for one in caught if one.category is ServerWarning]) == 1


def test_a_prompt_beyond_the_limit_is_refused_before_it_is_sent(server: ChatServer) -> None:
    encoder = Encoder(server.encoder.processor, server.encoder.end_ids, max_prompt_length=8)
    made = OpenAISampler("some/model", encoder, Sampling(), ServerSettings(base_url=server.url, check_prompts=False))
    with pytest.raises(ValueError, match="max_prompt_length=8"):
        made.sample([ASKED], 1)
    assert not server.asked


# ------------------------------------------------------------------------------------------------------ misbehaviour


def without_choices(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"choices": []}


def aborted(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"choices": [choice | {"finish_reason": "abort"} for choice in body["choices"]]}


def no_message(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"choices": [{"finish_reason": "stop"}, None]}


PASSING: dict[str, Any] = {
    "500": (500, '{"error": "CUDA out of memory"}', {}),
    "502 of a proxy": (502, "<html>Bad Gateway</html>", {}),
    "429": (429, '{"error": "too many requests"}', {"Retry-After": "0.01"}),
    "429 with a date": (429, "", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "a broken connection": (0, "", {}),
    "no JSON": (200, "<html>It works!</html>", {}),
    "no JSON object": (200, "[1, 2]", {}),
    "an error with status 200": (200, '{"error": {"message": "overloaded"}}', {}),
    "bad compression": (200, "not gzip", {"Content-Encoding": "gzip"}),
    "no choices": without_choices,
    "aborted": aborted,
    "no message": no_message,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_asked_again_and_the_answers_are_the_same(
    fault: Any, server: ChatServer, tmp_path: Path
) -> None:
    expected = sampler(server).sample([ASKED], 2)
    server.asked.clear()
    server.faults = [fault, fault]
    assert sampler(server).sample([ASKED], 2) == expected
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_stays_ends_in_one_sentence_and_the_same_command_resumes(
    fault: Any, server: ChatServer, tmp_path: Path
) -> None:
    """Nothing lost, nothing doubled: each answer that was kept is asked for once."""
    run(tmp_path / "whole", sampler(server))
    server.asked.clear()
    server.faults = [lambda body: body] * 5
    server.always = fault
    with pytest.raises(
        ServerError, match=r"^record 'r\d+': .* gave no answer, asked \d times?; the last time: "
    ) as caught:
        run(tmp_path / "cut", sampler(server, requests_in_flight=3), skip_bad=True)
    assert "\n" not in str(caught.value)
    journal = tmp_path / "cut" / "out.jsonl.parts" / "shard-00000.jsonl"
    kept = [json.loads(line)["id"] for line in journal.read_bytes().splitlines()]
    assert len(kept) == len(set(kept)) == 5
    server.asked.clear()
    server.always = None
    run(tmp_path / "cut", sampler(server, requests_in_flight=3), skip_bad=True)
    assert len(server.asked) == 7 + extra(server)
    assert (tmp_path / "cut" / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()


def extra(server: ChatServer) -> int:
    """Requests for further answers, in search of distinct ones."""
    first = {Sampling().seed_of(f"r{i}", 0) for i in range(12)}
    return sum(body["seed"] not in first for body in server.asked)


def test_a_server_that_hangs_is_left_after_the_timeout(server: ChatServer) -> None:
    server.seconds = 2.0
    with pytest.raises(ServerError, match="asked 2 times; the last time: ReadTimeout"):
        sampler(server, request_timeout=0.1, request_retries=1).sample([ASKED], 1)


def test_no_connection_is_said_with_the_address(server: ChatServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=f"the list of models: {url} gave no answer, asked 3 times.*ConnectError"):
        sampler(server, base_url=url, request_retries=2)


def test_missing_answers_are_asked_for_with_other_seeds(server: ChatServer) -> None:
    """A server that ignores n."""
    server.always = lambda body: body | {"choices": body["choices"][:1]}
    made = sampler(server)
    with pytest.warns(ServerWarning, match="gave 1 of 3 answers that were asked for") as caught:
        (answers,) = made.sample([ASKED], 3)
    assert len(answers) == 3
    assert len([one for one in caught if one.category is ServerWarning]) == 1
    assert [body["n"] for body in server.asked] == [3, 2, 1]
    assert len({body["seed"] for body in server.asked}) == 3


def test_more_answers_than_asked_for_are_left(server: ChatServer) -> None:
    server.always = lambda body: body | {"choices": body["choices"] * 2}
    assert len(sampler(server).sample([ASKED], 3)[0]) == 3


def test_an_empty_answer_is_an_answer(server: ChatServer) -> None:
    """As it is when transformers samples; SGLang writes it as null."""
    server.ids = False
    for content in ("", None):

        def empty(body: dict[str, Any], content: str | None = content) -> dict[str, Any]:
            body["choices"][0]["message"]["content"] = content
            return body

        server.always = empty
        assert sampler(server).sample([ASKED], 1) == [[Answer("", True)]]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "tool_calls"])
def test_a_server_that_takes_answers_apart_is_refused(field: str, server: ChatServer) -> None:
    def parsed(body: dict[str, Any]) -> dict[str, Any]:
        body["choices"][0]["message"] |= {"content": None, field: "I see"}
        return body

    server.always = parsed
    with pytest.raises(ServerError, match="without reasoning and tool parsers"):
        sampler(server).sample([ASKED], 1)
    assert len(server.asked) == 1


def test_a_question_that_the_server_refuses_is_a_bad_record(server: ChatServer, tmp_path: Path) -> None:
    server.faults = [(400, '{"error": {"message": "This model\'s maximum context length is 8"}}', {})]
    made = sampler(server, requests_in_flight=1)
    with pytest.raises(ValueError, match=r"record 'r0': the server refuses it \(status 400\): .*maximum context"):
        run(tmp_path, made)
    server.faults = [(413, "too large", {})]
    assert run(tmp_path, made, skip_bad=True).totals.n_failed == 1


def test_a_wrong_model_name_ends_the_run(server: ChatServer, tmp_path: Path) -> None:
    made = sampler(server)
    server.names = ["another"]
    with pytest.raises(ServerError, match=r"404.*The model 'some/model' does not exist.*served_model"):
        run(tmp_path, made, skip_bad=True)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.key = KEY
    with pytest.raises(ServerError, match=r"asks for a key \(status 401\), and .* OPENAI_API_KEY is not set"):
        sampler(server)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(ServerError, match="OPENAI_API_KEY is not taken") as caught:
        sampler(server)
    assert "sk-wrong" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    made = sampler(server, api_key_variable="MY_KEY", request_retries=1)
    run(tmp_path, made)
    server.always = (500, f"I was called with {KEY}", {})
    with pytest.raises(ServerError, match=r"I was called with \*\*\*"):
        made.sample([ASKED], 1)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 2
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    assert KEY not in caplog.text
    monkeypatch.setenv("MY_KEY", "two words")
    with pytest.raises(ValueError, match="MY_KEY is no key"):
        sampler(server, api_key_variable="MY_KEY")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": None}, "base_url must be an address"),
        ({"base_url": "localhost:8000"}, "base_url must be an address"),
        ({"base_url": "http://host:port/v1"}, "base_url must be an address"),
        ({"base_url": "http://host/v1?key=a"}, "base_url must be an address"),
        ({"base_url": "http://me:secret@host/v1"}, "holds a user or a password"),
        ({"base_url": "ftp://me:secret@host/v1"}, "base_url must be an address"),
        ({"requests_in_flight": 0}, "requests_in_flight must be ≥ 1"),
        ({"request_retries": -1}, "request_retries must be ≥ 0"),
        ({"request_timeout": 0}, "request_timeout must be > 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str, server: ChatServer) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sampler(server, **settings)
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ several at once


def test_several_requests_are_in_flight_and_the_output_is_in_order(server: ChatServer, tmp_path: Path) -> None:
    run(tmp_path / "one", sampler(server, requests_in_flight=1))
    assert server.most_at_once == 1
    server.seconds = 0.1
    run(tmp_path / "many", sampler(server, requests_in_flight=4))
    assert 1 < server.most_at_once <= 4
    assert (tmp_path / "one" / "out.jsonl").read_bytes() == (tmp_path / "many" / "out.jsonl").read_bytes()
    assert [one.id for one in read_records(tmp_path / "many" / "out.jsonl")[0]] == [f"r{i}" for i in range(12)]


def test_after_an_error_the_answers_in_flight_are_kept(server: ChatServer, tmp_path: Path) -> None:
    """The first request fails at once, while the three others are under way."""
    ready = threading.Event()

    def slow(body: dict[str, Any]) -> dict[str, Any]:
        ready.wait(10)
        return body

    server.faults = [slow, slow, (400, "no", {})]
    made = sampler(server, requests_in_flight=3)
    sample: Callable[..., Any] = made.sample

    def released(*arguments: Any) -> Any:
        try:
            return sample(*arguments)
        except ValueError:
            ready.set()
            raise

    made.sample = released
    with pytest.raises(ValueError, match="status 400"):
        run(tmp_path, made)
    kept = (tmp_path / "out.jsonl.parts" / "shard-00000.jsonl").read_bytes().splitlines()
    assert len(kept) >= 2


def test_a_run_that_ends_well_warns_of_nothing(server: ChatServer, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, sampler(server))
