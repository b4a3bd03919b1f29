"""An image is known by what is in it, wherever it is kept, and is not decoded for that; a record by its fields."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perpo.data.fingerprints import WHOLE, field_fingerprints, image_fingerprint, record_fingerprint
from perpo.data.images import RowImage
from perpo.data.record import ListRecord


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
    assert [image_fingerprint(image) for image in kept] == [image_fingerprint(data)] * len(kept)
    assert image_fingerprint("a.png", tmp_path) == image_fingerprint(data)


@pytest.mark.parametrize("size", [1, WHOLE // 2, WHOLE - 1, WHOLE, WHOLE + 1, 2 * WHOLE])
def test_a_change_at_either_end_makes_another_picture(size: int, tmp_path: Path) -> None:
    data = bytearray(size)
    found = {str(image_fingerprint(bytes(data)))}
    for place in {0, size - 1}:
        changed = bytearray(data)
        changed[place] = 1
        (tmp_path / "a").write_bytes(changed)
        assert image_fingerprint(tmp_path / "a") == image_fingerprint(bytes(changed))
        found.add(str(image_fingerprint(bytes(changed))))
    found.add(str(image_fingerprint(bytes(size + 1))))  # or a change of size
    assert len(found) == 2 + len({0, size - 1})


def test_up_to_a_mebibyte_every_byte_counts() -> None:
    data = bytearray(WHOLE)
    middle = [image_fingerprint(bytes(data[:i] + b"\1" + data[i + 1 :])) for i in (WHOLE // 2 - 1, WHOLE // 2)]
    assert len({str(found) for found in [image_fingerprint(bytes(data)), *middle]}) == 3


def test_pictures_in_memory_differ_by_their_pixels() -> None:
    red, green = (Image.new("RGB", (4, 2), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    assert image_fingerprint(red) == image_fingerprint(red.copy()) != image_fingerprint(green)


def test_what_cannot_be_read_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "root").mkdir()
    assert image_fingerprint("nowhere.png") == "unreadable nowhere.png"
    assert image_fingerprint("../secret", tmp_path / "root") == "unreadable ../secret"
    assert image_fingerprint(None) == "none"


def test_the_same_bytes_in_another_mode_or_shape_are_another_picture() -> None:
    pictures = [Image.frombytes(mode, size, bytes(range(8))) for mode in ("L", "P") for size in ((4, 2), (2, 4))]
    assert len({str(image_fingerprint(picture)) for picture in pictures}) == 4


def test_the_mode_and_the_colours_of_an_image_in_memory_count() -> None:
    """The same bytes: a grey image, and palette images whose indices stand for other colours."""
    images = [Image.frombytes(mode, (4, 2), bytes(range(8))) for mode in ("L", "P", "P")]
    images[1].putpalette([0, 0, 0] * 8)
    images[2].putpalette([9, 9, 9] * 8)
    images.append(images[2].copy())
    images[3].info["transparency"] = 0
    assert len({image.tobytes() for image in images}) == 1
    assert len({image_fingerprint(image) for image in images}) == 4


def test_images_that_are_opened_differently_are_told_apart() -> None:
    """Whatever the mode, and whatever tells beside the pixels how they look: alpha in a palette, EXIF."""
    images = [Image.frombytes("P", (4, 2), bytes(range(8))) for _ in range(3)]
    for image, alpha in zip(images, (255, 0, 128), strict=True):
        image.putpalette([1, 2, 3, alpha] * 8, "RGBA")
    for colour in (1, 9):
        image = Image.new("PA", (4, 2))
        image.putpalette([colour, 2, 3] * 4)
        images.append(image)
    images += [Image.frombytes(mode, (4, 2), bytes(16)) for mode in ("I;16", "I;16B", "LA", "La")]
    for turn in (None, 3, 6):
        image, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
        if turn:
            exif[0x0112] = turn
            image.info["exif"] = exif.tobytes()
        images.append(image)
    assert len({image_fingerprint(image) for image in images}) == len(images)


def test_the_fingerprints_of_ordinary_images_are_those_of_earlier_versions() -> None:
    """Caches and unfinished runs hold them."""
    made = {mode: image_fingerprint(Image.new(mode, (3, 2), 1)) for mode in ("RGB", "L", "RGBA", "1", "P")}
    known = {"RGB": "2b82da77ddba8542", "L": "161efa94847acab1", "RGBA": "ca27a12732ed1563"}
    assert made == known | {"1": "e214ec8e9c4845fe", "P": "508cbefa80c718d9"}


def test_a_record_is_known_by_the_fields_that_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    record = ListRecord("r", "a.png", "What?", 3, "counting", ("1", "2"), (0.0, 1.0))
    other = ListRecord("s", "a.png", "What?", 4, "counting", ("1", "3"), (0.0, 1.0))
    asked = ("image", "prompt")
    assert record_fingerprint(record, asked, tmp_path) == record_fingerprint(other, asked, tmp_path)
    assert record_fingerprint(record, (*asked, "answer"), tmp_path) != record_fingerprint(
        other, (*asked, "answer"), tmp_path
    )
    ours, theirs = (field_fingerprints(r, ("image", "answer", "responses", "task"), tmp_path) for r in (record, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"answer", "responses"}
    before = field_fingerprints(record, ("image",), tmp_path)
    (tmp_path / "a.png").write_bytes(b"two")
    assert field_fingerprints(record, ("image",), tmp_path) != before
