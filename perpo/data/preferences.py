"""Preference records of other trainers, read as lists of two answers with the rewards 1 and 0.

ms-swift, whose last message is the chosen answer:

    {"messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "here"}],
     "rejected_response": "there", "images": ["a.png"]}              # or "rejected_messages": all of the other

LLaMA-Factory, in its two forms:

    {"conversations": [{"from": "human", "value": "<image>Where?"}], "chosen": {"from": "gpt", "value": "here"},
     "rejected": {"from": "gpt", "value": "there"}, "images": ["a.png"]}        # or "messages" of role and content
    {"instruction": "Where?", "input": "", "chosen": "here", "rejected": "there", "images": ["a.png"]}

`<image>` is where the picture goes. A key that a form does not have, or that would change what is trained and is not
used here (videos, tools, a second image), is refused by name: nothing is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from perpo.data.record import FieldError, plain, shown, without_nulls

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_PICTURE = {"image", "images", "image_path"}
_COMMON = {"id", "task", "answer", "system", *_PICTURE}
_KEYS = {  # of each form; what marks it comes first
    "ms-swift": ("rejected_response", "rejected_messages", "messages", "objects", "rejected_images"),
    "LLaMA-Factory sharegpt": ("conversations", "messages", "chosen", "rejected", "tools"),
    "LLaMA-Factory alpaca": ("instruction", "input", "history", "chosen", "rejected"),
}
_MARKS = {"rejected_response", "rejected_messages", "rejected"}
_OURS = {"prompt", "responses", "rewards", "ref_log_probs", "flip_probs", "complete"}
_PLACES = re.compile(r"<(image|video|audio|bbox|ref-object)>")


def preference_form(row: Mapping[str, Any]) -> str | None:
    """Whose preference record a row is; None for any other row.

    Raises:
        FieldError: it has keys of several forms, or one that its form does not know.
    """
    if not _MARKS & row.keys():
        return None
    has = {name for name, value in row.items() if not _empty(value)}
    forms = [
        form
        for form, marks in (
            ("ms-swift", has & {"rejected_response", "rejected_messages"}),
            ("LLaMA-Factory sharegpt", {"chosen", "rejected"} <= has and has & {"conversations", "messages"}),
            ("LLaMA-Factory alpaca", {"chosen", "rejected"} <= has and has & {"instruction"}),
        )
        if marks
    ]
    if not forms:
        return None
    form = forms[0]
    foreign = sorted(has - _COMMON - set(_KEYS[form]))
    mixed = [name for name in foreign if name in _OURS or any(name in keys for keys in _KEYS.values())]
    if mixed:
        raise FieldError(mixed[0], f"does not go together with a preference record of {form}: keep one form")
    if foreign:
        raise FieldError(foreign[0], f"is no key of a preference record of {form} that is known here; take it out")
    return form


def preference_list(row: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The row with the fields of a list record.

    Raises:
        FieldError: a key has a wrong value, or one that cannot be used.
    """
    row = {name: without_nulls(plain(value)) if name not in _PICTURE else value for name, value in row.items()}
    for name in ("rejected_images", "tools"):
        if not _empty(row.get(name)):
            raise FieldError(name, "cannot be used here: a list is of one image and of texts alone")
    kept = {name: value for name, value in row.items() if name in _COMMON - {"system"} and not _empty(value)}
    messages, chosen, rejected = _READERS[form](row)
    if not _empty(row.get("system")):
        if any(message["role"] == "system" for message in messages):
            raise FieldError("system", "is given twice, here and as a message")
        messages = [{"role": "system", "content": _text("system", row["system"])}, *messages]
    references = _references(row.get("objects")) if form == "ms-swift" else []
    parts, n_images = [], 0
    for message in messages:
        content, n_here = _with_places(message["content"], references)
        parts.append({"role": message["role"], "content": content})
        n_images += n_here
    chosen, rejected = (_answer(text, references) for text in (chosen, rejected))
    pictures = next((row[name] for name in ("image", "images", "image_path") if not _empty(row.get(name))), None)
    n_given = len(pictures) if isinstance(pictures, list | tuple) else int(pictures is not None)
    if n_images > n_given:
        raise FieldError("images", f"holds {n_given} images, and the texts have {n_images} places <image> for them")
    if row.get("objects"):
        kept["objects"] = row["objects"]
    plain_question = len(parts) == 1 and isinstance(parts[0]["content"], str)
    prompt = parts[0]["content"] if plain_question else parts
    return kept | {"prompt": prompt, "responses": [chosen, rejected], "rewards": [1.0, 0.0]}


def _references(objects: Any) -> list[Any]:
    """The names of objects, in the order of their places in the texts."""
    if _empty(objects):
        return []
    if not isinstance(objects, Mapping) or not isinstance(objects.get("ref") or [], list | tuple):
        raise FieldError("objects", f'must be a mapping {{"ref": names, "bbox": boxes}}, got {shown(objects)}')
    return list(objects.get("ref") or [])


def _swift(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str, str]:
    if not _empty(row.get("rejected_response")) and not _empty(row.get("rejected_messages")):
        raise FieldError("rejected_messages", "and rejected_response are both given: keep one")
    *messages, last = _messages("messages", row.get("messages"))
    if last["role"] != "assistant" or not messages:
        raise FieldError("messages", "must end with the chosen answer, of the role assistant, after a question")
    if _empty(row.get("rejected_messages")):
        return messages, last["content"], _text("rejected_response", row.get("rejected_response"))
    *others, other = _messages("rejected_messages", row["rejected_messages"])
    if others != messages or other["role"] != "assistant":
        raise FieldError("rejected_messages", "must be messages with another last answer, and otherwise the same")
    return messages, last["content"], other["content"]


def _sharegpt(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str, str]:
    names = [name for name in ("conversations", "messages") if not _empty(row.get(name))]
    if len(names) > 1:
        raise FieldError("messages", "and conversations are both given: keep one")
    messages = _messages(names[0], row[names[0]])
    if messages[-1]["role"] != "user":
        raise FieldError(names[0], "must end with the user's question; the answers are in chosen and rejected")
    answers = []
    for name in ("chosen", "rejected"):
        (said,) = _messages(name, [row[name]])
        if said["role"] != "assistant":
            raise FieldError(name, f"must be said by the model (gpt, assistant), got {said['role']}")
        answers.append(said["content"])
    return messages, answers[0], answers[1]


def _alpaca(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str, str]:
    messages = []
    history = row.get("history") or ()
    for turn in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise FieldError("history", f"must be pairs of question and answer, got {shown(turn)}")
        messages += [
            {"role": role, "content": _text("history", text)}
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    asked = [_text(name, row[name]) for name in ("instruction", "input") if not _empty(row.get(name))]
    messages.append({"role": "user", "content": "\n".join(asked)})
    return messages, _text("chosen", row["chosen"]), _text("rejected", row["rejected"])


_READERS = {"ms-swift": _swift, "LLaMA-Factory sharegpt": _sharegpt, "LLaMA-Factory alpaca": _alpaca}


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    """Messages in the words of either project, as role and content."""
    if not isinstance(value, list | tuple) or not value:
        raise FieldError(name, f"must be a list of messages, got {shown(value)}")
    found = []
    for message in value:
        keys = set(message) if isinstance(message, Mapping) else set()
        if keys not in ({"role", "content"}, {"from", "value"}):
            raise FieldError(name, f"a message must hold role and content, or from and value; got {shown(message)}")
        role, text = (message[key] for key in (("role", "content") if "role" in keys else ("from", "value")))
        if role not in _ROLES:
            raise FieldError(name, f"role {role!r} cannot be used here; known are {', '.join(_ROLES)}")
        found.append({"role": _ROLES[role], "content": _text(name, text)})
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise FieldError(name, f"must be a text that is not empty, got {shown(value)}")
    return value


def _with_places(text: str, references: list[Any]) -> tuple[Any, int]:
    """A message's content, as parts where it holds the place of a picture; and how many such places."""
    pieces = re.split("(<image>)", _named(text, references))
    parts = [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces if piece]
    n_images = pieces.count("<image>")
    return (parts if n_images else pieces[0]), n_images


def _answer(text: str, references: list[Any]) -> str:
    found = _named(text, references)
    if "<image>" in found:
        raise FieldError("images", "an answer has a place <image>: the models trained here answer with text")
    return found


def _named(text: str, references: list[Any]) -> str:
    """The text with the names of its objects; other places are refused."""

    def fill(place: re.Match[str]) -> str:
        if place[1] == "image":
            return place[0]
        if place[1] != "ref-object":
            raise FieldError(
                "objects" if place[1] == "bbox" else f"{place[1]}s",
                f"the text has a place {place[0]}, which each model family fills in its own way: write "
                "the boxes into the texts"
                if place[1] == "bbox"
                else f"the text has a place {place[0]}: only images are trained on here",
            )
        if not references:
            raise FieldError("objects", "the texts have more places <ref-object> than objects has names in ref")
        return _text("objects", references.pop(0))

    return _PLACES.sub(fill, text)


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not len(value))
