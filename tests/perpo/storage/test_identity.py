"""A picture is known by what is in it, wherever it lies, and is not decoded for that."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perpo.data.images import RowImage
from perpo.storage.identity import WHOLE, difference, image_identity


def test_a_picture_is_the_same_in_every_place_it_can_be_kept(tmp_path: Path) -> None:
    data = b"any bytes: nothing is decoded" * 3
    (tmp_path / "a.png").write_bytes(data)
    rows = [{"image": {"bytes": data, "path": "elsewhere.png"}}]
    kept: list[Any] = [
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        tmp_path / "a.png",
        RowImage(rows, 0, "image"),
    ]
    assert [image_identity(image) for image in kept] == [image_identity(data)] * len(kept)
    assert image_identity("a.png", tmp_path) == image_identity(data)


@pytest.mark.parametrize("size", [1, WHOLE // 2, WHOLE - 1, WHOLE, WHOLE + 1, 2 * WHOLE])
def test_a_change_at_either_end_makes_another_picture(size: int, tmp_path: Path) -> None:
    data = bytearray(size)
    found = {str(image_identity(bytes(data)))}
    for place in {0, size - 1}:
        changed = bytearray(data)
        changed[place] = 1
        (tmp_path / "a").write_bytes(changed)
        assert image_identity(tmp_path / "a") == image_identity(bytes(changed))
        found.add(str(image_identity(bytes(changed))))
    found.add(str(image_identity(bytes(size + 1))))  # or a change of size
    assert len(found) == 2 + len({0, size - 1})


def test_up_to_a_mebibyte_every_byte_counts() -> None:
    data = bytearray(WHOLE)
    middle = [image_identity(bytes(data[:i] + b"\1" + data[i + 1 :])) for i in (WHOLE // 2 - 1, WHOLE // 2)]
    assert len({str(found) for found in [image_identity(bytes(data)), *middle]}) == 3


def test_pictures_in_memory_differ_by_their_pixels() -> None:
    red, green = (Image.new("RGB", (4, 2), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    assert image_identity(red) == image_identity(red.copy()) != image_identity(green)


def test_the_same_bytes_in_another_mode_or_shape_are_another_picture() -> None:
    pictures = [Image.frombytes(mode, size, bytes(range(8))) for mode in ("L", "P") for size in ((4, 2), (2, 4))]
    assert len({str(image_identity(picture)) for picture in pictures}) == 4


def test_what_cannot_be_read_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "root").mkdir()
    assert image_identity("nowhere.png") == ["unreadable", "nowhere.png"]
    assert image_identity("../secret", tmp_path / "root") == ["unreadable", "../secret"]
    assert image_identity(None) == []


def test_a_folder_keeps_the_identity_it_was_begun_with(tmp_path: Path) -> None:
    assert difference(tmp_path, {"k": "5", "seed": "0"}) == ""
    assert difference(tmp_path, {"seed": "0", "k": "5"}) == ""
    assert difference(tmp_path, {"k": "6", "top_p": "1"}) == "k (5 there, 6 now), seed (0 there, none now), " + (
        "top_p (none there, 1 now)"
    )
