"""What every reward function here shares: the signature of TRL's GRPO, and reading a completion's text.

    reward(prompts, completions, **columns) -> list[float | None]

One entry a completion in every list; `columns` are the data set's other columns, of which a reward names those it
needs. A reward of None says "this answer cannot be judged": `perpo.rewards.scoring` counts it and makes it 0.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

RewardFunction = Callable[..., list[float | None]]

_MARKS = re.compile(r"<\|\w{1,40}+\|>|</?+(?:ref|box|quad)>")


def without_marks(text: str) -> str:
    """The text without the special tokens that models put around boxes and results (<|begin_of_box|>, <ref>, …)."""
    return _MARKS.sub("", text)


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
    """`score(text, *values)` for every completion, with its own value of each column (None where a column is None).

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
        rewards.append(score(completion_text(completion), *values))
    return rewards
