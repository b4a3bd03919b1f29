"""Preference records of ms-swift and LLaMA-Factory become lists of two; what cannot be used is refused by name."""

from typing import Any

import pytest

from perpo.data.read import RecordError, read_records

from .. import tiny_models

SWIFT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "here"}],
    "rejected_response": "there",
    "images": ["a.png"],
}
SHAREGPT: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "<image>Where?"}],
    "chosen": {"from": "gpt", "value": "here"},
    "rejected": {"from": "gpt", "value": "there"},
    "images": ["a.png"],
}
ALPACA: dict[str, Any] = {
    "instruction": "Where?",
    "input": "",
    "chosen": "here",
    "rejected": "there",
    "images": ["a.png"],
}
WITH_PLACE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (SWIFT, WITH_PLACE),
        (
            {
                "messages": SWIFT["messages"],
                "rejected_messages": [SWIFT["messages"][0], {"role": "assistant", "content": "there"}],
                "images": ["a.png"],
            },
            WITH_PLACE,
        ),
        (SHAREGPT, WITH_PLACE),
        (
            {
                "messages": [{"role": "user", "content": "Where?"}],
                "chosen": {"role": "assistant", "content": "here"},
                "rejected": {"role": "assistant", "content": "there"},
                "image": "a.png",
                "tools": "",
            },
            "Where?",
        ),
        (ALPACA, "Where?"),
        (
            ALPACA | {"input": "Say it.", "system": "Be brief.", "history": [["Hi.", "Hello."]]},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Where?\nSay it."},
            ],
        ),
    ],
)
def test_a_preference_is_a_list_of_two(row: dict[str, Any], prompt: Any) -> None:
    (record,), report = read_records([row])
    assert record.prompt == prompt
    assert (record.responses, record.rewards) == (("here", "there"), (1, 0))
    assert record.image == "a.png"
    assert record.id == "1"
    assert "1 from preferences as " in report.summary()
    assert not report.further
    assert not report.ignored


def test_a_record_says_more() -> None:
    row = SWIFT | {"id": "x", "answer": "here", "task": "exact", "objects": None, "rejected_images": []}
    ((record,), _) = read_records([row])
    assert (record.id, record.answer, record.task) == ("x", "here", "exact")


def test_names_of_objects_are_written_and_boxes_are_not_guessed() -> None:
    row = SWIFT | {
        "messages": [
            {"role": "user", "content": "<image>Where is <ref-object>?"},
            {"role": "assistant", "content": "The <ref-object> is here"},
        ],
        "objects": {"ref": ["the dog", "dog"], "bbox": []},
    }
    (record,), _ = read_records([row])
    assert record.prompt[0]["content"][1]["text"] == "Where is the dog?"
    assert record.responses == ("The dog is here", "there")
    assert record.columns["objects"]["ref"] == ["the dog", "dog"]
    with pytest.raises(RecordError, match=r"objects: the text has a place <bbox>, which each model family fills"):
        read_records([row | {"rejected_response": "<bbox>"}])
    with pytest.raises(RecordError, match=r"objects: the texts have more places <ref-object>"):
        read_records([row | {"objects": {"ref": ["the dog"]}}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SWIFT | {"prompt": "Where?"}, "prompt: does not go together with a preference record of ms-swift"),
        (SWIFT | {"conversations": SHAREGPT["conversations"]}, "conversations: does not go together"),
        (SHAREGPT | {"instruction": "Where?"}, "instruction: does not go together with"),
        (ALPACA | {"rewards": [1, 0]}, "rewards: does not go together with"),
        (SWIFT | {"margin": 2.0}, "margin: is no key of a preference record of ms-swift that is known here; take it"),
        (SHAREGPT | {"videos": ["a.mp4"]}, "videos: is no key of a preference record of LLaMA-Factory sharegpt"),
        (SWIFT | {"rejected_images": ["b.png"]}, "rejected_images: cannot be used here"),
        (SHAREGPT | {"tools": "[{}]"}, "tools: cannot be used here"),
        (SWIFT | {"images": ["a.png", "b.png"]}, "images: holds 2 images, but a record has one"),
        (SWIFT | {"images": []}, "images: holds 0 images, and the texts have 1 places <image>"),
        (SWIFT | {"rejected_messages": SWIFT["messages"]}, "rejected_messages: and rejected_response are both given"),
        (SWIFT | {"messages": SWIFT["messages"][:1]}, "messages: must end with the chosen answer"),
        (
            SWIFT | {"rejected_response": ["there"]},
            "rejected_response: must be a text that is not empty, got ['there']",
        ),
        (SWIFT | {"rejected_response": "<image>"}, "images: an answer has a place <image>"),
        (
            SHAREGPT | {"conversations": [{"from": "gpt", "value": "x"}]},
            "conversations: must end with the user's question",
        ),
        (SHAREGPT | {"conversations": [{"from": "tool", "value": "x"}]}, "role 'tool' cannot be used here"),
        (SHAREGPT | {"conversations": [{"from": "human"}]}, "conversations: a message must hold role and content, or"),
        (SHAREGPT | {"chosen": {"from": "human", "value": "x"}}, "chosen: must be said by the model"),
        (ALPACA | {"history": ["Hi"]}, "history: must be pairs of question and answer"),
        (ALPACA | {"history": 5}, "history: must be pairs of question and answer, got 5"),
        (SWIFT | {"objects": 5}, "objects: must be a mapping"),
        (SWIFT | {"objects": {"ref": "dog"}}, "objects: must be a mapping"),
        (ALPACA | {"instruction": "See <video>"}, "videos: the text has a place <video>"),
        (
            {
                "rejected_messages": [{"role": "user", "content": "When?"}],
                **{k: SWIFT[k] for k in ("messages", "images")},
            },
            "rejected_messages: must be messages with another last answer, and otherwise the same",
        ),
    ],
)
def test_what_cannot_be_used_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as error:
        read_records([row])
    assert message in str(error.value)


def test_the_picture_is_encoded_where_the_place_was() -> None:
    from perpo.encoding.encoder import Encoder

    encoder = Encoder(tiny_models.build("llava")[1])
    row = SWIFT | {"messages": [{"role": "user", "content": "Here: <image> Where?"}, *SWIFT["messages"][1:]]}
    (record,), _ = read_records([row])
    rendered = encoder.render(record.prompt, True)
    assert rendered.index("Here: ") < rendered.index("<image>") < rendered.index(" Where?")
