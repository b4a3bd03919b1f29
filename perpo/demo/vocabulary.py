"""The demo model's words: a question is five tokens, a box four.

A coordinate is one token, to a hundredth of the image. The brackets and commas of `[0.12, 0.34, 0.56, 0.78]` never
vary, so `box_texts` writes them and the model does not have to.
"""

import torch
from torch import Tensor

WORDS = ["<pad>", "<image>", "where", "is", "the", "?", *(str(digit) for digit in range(10))]
TOKENS = [*WORDS, *(f"{hundredth / 100:.2f}" for hundredth in range(101))]
IMAGE = TOKENS.index("<image>")
FIRST_DIGIT = TOKENS.index("0")
FIRST_COORDINATE = len(WORDS)
ANSWER_TOKENS = 4


def question_text(digit: int) -> str:
    return f"where is the {digit}?"


def question_ids(digits: Tensor) -> Tensor:
    """The tokens [..., 5] of "where is the <digit> ?" for digits [...]."""
    ids = (
        torch.tensor([TOKENS.index(word) for word in ("where", "is", "the", "0", "?")])
        .expand(*digits.shape, -1)
        .clone()
    )
    ids[..., 3] = FIRST_DIGIT + digits
    return ids


def box_ids(boxes: Tensor) -> Tensor:
    """The tokens [..., 4] of boxes [..., 4], rounded to hundredths."""
    return FIRST_COORDINATE + (boxes.clamp(0, 1) * 100).round().long()


def box_texts(ids: Tensor) -> list[str]:
    """The text of each answer [N, 4]. A word where a number should be stays a word: the parser refuses it."""
    return ["[" + ", ".join(TOKENS[token] for token in row) + "]" for row in ids.tolist()]
