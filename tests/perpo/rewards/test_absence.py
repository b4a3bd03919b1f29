"""An answer says that there is nothing only where it speaks of what was asked for."""

import pytest

from perpo.rewards.absence import says_none


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"bbox_2d": null}',
        "No.",
        "Nothing.",
        "There are no dogs visible in the picture.",
        "I'm sorry, but there are no dogs in the image.",
        "I cannot see any dog in this image.",
        "I don't see any dogs in the photo.",
        "The image does not show any dogs.",
        "The dog is not visible.",
        "No, there aren't any dogs.",
        "There is not.",
        "no people in the background of the image",
        "没有",
        "图片中没有任何狗",
        "图中未发现狗",
        "在图片里看不到狗",
        "无",
        "犬はいません。",
        "개가 없습니다",
        "Kein Hund",
    ],
)
def test_an_answer_that_says_so(text: str) -> None:
    assert says_none(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "No problem! Here it is.",
        "No worries, it is on the left.",
        "no doubt, there it is",
        "No, the dog is on the left.",
        "Nothing I can do.",
        "I'm sorry, but I cannot see any image.",
        "I can't view images.",
        "I do not see an attached image.",
        "I am unable to view the picture, so I see none.",
        "As an AI, I see none.",
        "There is no image.",
        "No image was provided.",
        "The image is not visible to me.",
        "The picture has not been provided, nothing to see.",
        "I cannot see what is in the image.",
        "没有问题！在这里。",
        "有没有",
        "没有看到图片",
        "对不起，我看不到任何图片",
        "图片没有显示",
    ],
)
def test_an_answer_that_does_not(text: str) -> None:
    assert not says_none(text)
