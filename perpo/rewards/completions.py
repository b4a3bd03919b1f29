"""What every reward function here shares: the signature of TRL's GRPO, and which part of a completion is judged.

    reward(prompts, completions, **columns) -> list[float | None]

Every list has one entry per completion; `columns` are the data set's other columns, of which a reward names those it
needs. A reward of None says "this answer cannot be judged": `perpo.rewards.scoring` counts it and makes it 0.

The rewards of this package judge the final answer alone (`final_answer`): a model that thinks aloud is not judged by
its thoughts, and one that was cut while thinking gave no answer.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

RewardFunction = Callable[..., list[float | None]]

LONGEST_RUN, JOINER = 30, "\u034f"  # of combining marks, and what comes then
_MARKS = re.compile(r"<\|\w{1,40}+\|>|</?+(?:ref|box|quad)>")
_THOUGHT = re.compile(r"(?i:[<◁](/?+)think(?:ing)?[>▷])|\[(/?+)THINK\]")  # Qwen, GLM, InternVL; Kimi; Magistral

# Full-width, small and vertical forms of ASCII. Unlike NFKC in full it leaves "m²" alone and takes linear time.
_HALF_WIDTH = {
    code: plain
    for code in (0x3000, *range(0xFE10, 0xFFF0))
    if unicodedata.decomposition(chr(code)).startswith(("<wide>", "<small>", "<vertical>"))
    and (plain := unicodedata.normalize("NFKC", chr(code))).isascii()
}


def without_marks(text: str) -> str:
    """The text without the special tokens that models put around boxes and results (<|begin_of_box|>, <ref>, …)."""
    return _MARKS.sub("", text)


def half_width(text: str) -> str:
    """The text with full-width brackets, digits and punctuation, as Chinese and Japanese input has, in ASCII."""
    return text.translate(_HALF_WIDTH)


def composed(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """The text in a composed form of Unicode, in linear time.

    A run of n combining marks takes n² steps to put in order. As in Unicode's stream-safe format (UAX 15) a joiner
    comes after every 30 of them, more than any language writes.
    """
    if text.isascii():
        return text
    apart: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"
    marks = sorted(one for one in set(text) if unicodedata.combining(unicodedata.normalize(apart, one)[0]))
    if marks and len(text) > LONGEST_RUN:
        text = re.sub(f"[{''.join(marks)}]{{{LONGEST_RUN}}}", rf"\g<0>{JOINER}", text)
    return unicodedata.normalize(form, text)


def final_answer(text: str) -> str | None:
    """What follows the last `</think>`, inside `<answer>…</answer>` if there is one; None if cut while thinking.

    The marks of other families (`◁think▷`, `[THINK]`) are known too. Chat templates often open the thought themselves,
    so that `</think>` may come without its opening. Where neither comes, a thought that was cut looks like an answer:
    put `Encoder.opened` in front of what such a model wrote, as `perpo generate` and `perpo evaluate` do.
    """
    last = None
    for last in _THOUGHT.finditer(text):  # noqa: B007 - the last one
        pass
    if last is not None:
        if "/" not in last[0]:
            return None
        text = text[last.end() :]
    return text.rpartition("<answer>")[2].partition("</answer>")[0]


def open_thought(prompt: str) -> str:
    """The mark at the end of a prompt that opens a thought, with the white space after it; "" where there is none."""
    last = None
    for last in _THOUGHT.finditer(prompt):  # noqa: B007 - the last one
        pass
    if last is None or "/" in last[0] or prompt[last.end() :].strip():
        return ""
    return prompt[last.start() :]


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a message list whose last message holds it (as a string or as parts).

    Raises:
        TypeError: it is neither.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], dict):
        content = completion[-1].get("content")
        if isinstance(content, str):
            return content
        if isinstance(content, Sequence):
            return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    raise TypeError(f"a completion must be a text or a non-empty list of chat messages, got {completion!r:.200}")


def score_each(
    completions: Sequence[Any], score: Callable[..., float], **columns: Sequence[Any] | None
) -> list[float | None]:
    """`score(final answer, *values)` for every completion, with its own value of each column (None for a column None).

    A completion that was cut while thinking scores 0; `score` still sees its values with an empty answer, so that a bad
    truth is an error whatever the model wrote.

    Raises:
        ValueError: a column has another length than `completions`.
    """
    for name, column in columns.items():
        if column is not None and len(column) != len(completions):
            raise ValueError(
                f"completions and {name} must be of one length, got {len(completions)} completions and {len(column)} "
                f"of {name}"
            )
    rewards: list[float | None] = []
    for i, completion in enumerate(completions):
        values = [None if column is None else column[i] for column in columns.values()]
        answer = final_answer(completion_text(completion))
        reward = score(answer or "", *values)
        rewards.append(0.0 if answer is None else reward)
    return rewards
