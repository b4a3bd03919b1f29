"""Images open wherever they are kept, and hostile or broken ones are refused with a reason."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from perpo.data.images import ImageError, RowImage, image_size, open_image, resolve_image

RED = Image.new("RGB", (4, 2), (255, 0, 0))


def encoded(image: Image.Image = RED, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims to be that large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "red.png").write_bytes(encoded())
    (tmp_path / "secret.png").write_bytes(encoded())
    return folder


def test_every_kind_of_image_opens_to_the_same_picture(root: Path) -> None:
    kinds = [
        "train/red.png",
        Path("train/red.png"),
        encoded(),
        RED,
        {"bytes": encoded(), "path": "no such file, and not looked at"},
        {"bytes": None, "path": "train/red.png"},
        RowImage([{"image": {"bytes": encoded(), "path": None}}], 0, "image"),
    ]
    for kind in kinds:
        opened = open_image(kind, root)
        assert (opened.mode, opened.size, opened.getpixel((3, 1))) == ("RGB", (4, 2), (255, 0, 0))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    opened = open_image(encoded(RED.convert(mode), "TIFF" if mode == "CMYK" else "PNG"))
    assert (opened.mode, opened.size) == ("RGB", (4, 2))
    if mode in ("P", "RGBA"):
        assert opened.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", ">u2"), ("TIFF", np.int32), (None, np.uint16), (None, np.int32)],
)
def test_greys_of_16_bits_are_scaled_and_not_cut_off(kind: str | None, dtype: Any) -> None:
    image = Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=dtype))
    opened = open_image(encoded(image, kind) if kind else image)
    assert [opened.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_a_dark_picture_of_16_bits_stays_dark_and_8_bits_in_32_stay_as_they_are() -> None:
    grey = np.array([[0, 200]])
    assert open_image(Image.fromarray(grey.astype(np.uint16))).getpixel((1, 0)) == (1, 1, 1)
    assert open_image(Image.fromarray(grey.astype(np.int32))).getpixel((1, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0, 0.5, 1]], dtype=np.float32), "floating point"),
        (np.array([[0, 70000]], dtype=np.int32), "from 0 to 70000, more than 16 bits"),
        (np.array([[-1, 5]], dtype=np.int32), "from -1 to 5"),
    ],
)
def test_pixels_of_which_nobody_knows_what_is_white_are_refused(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(encoded(Image.fromarray(pixels), "TIFF"))


def test_what_is_transparent_is_white_and_not_what_happens_to_be_stored_there() -> None:
    rgba = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 255))  # black text on nothing
    rgba.putpixel((2, 0), (255, 0, 0, 128))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    for image in (rgba, encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True)):
        opened = open_image(image)
        assert [opened.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (0, 0, 0), (255, 127, 127)]
    opened = open_image(encoded(palette, transparency=0))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (10, 20, 30)]
    opened = open_image(encoded(rgba.convert("LA")))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    assert open_image(encoded(RED, "JPEG", exif=exif)).size == (2, 4)


def exif_with(tag: int, kind: int, value: bytes) -> bytes:
    """EXIF with the orientation "turned by 90°" and one more tag, of any type."""
    entries = [struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", tag, kind, len(value), value)]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(sorted(entries)) + b"\0\0\0\0"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (exif_with(0x0128, 2, b"abc\0"), (2, 4)),  # ResolutionUnit as a text: PIL reads it and cannot write it back
        (exif_with(0x011A, 2, b"abc\0"), (2, 4)),  # XResolution
        (b"Exif\0\0II*\0garbage", (4, 2)),
    ],
)
def test_exif_never_decides_whether_pixels_can_be_had(exif: bytes, size: tuple[int, int]) -> None:
    opened = open_image(encoded(RED, "JPEG", exif=exif))
    assert opened.size == image_size(encoded(RED, "JPEG", exif=exif)) == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation: int) -> None:
    """As Pillow's own, which fails on tags that it cannot write."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(Image.effect_noise((5, 3), 90).convert("RGB"), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    opened = open_image(turned)
    assert opened.tobytes() == expected.tobytes()
    assert image_size(turned) == opened.size == expected.size


def test_a_data_set_that_fails_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="image of the data set cannot be loaded: list index out of range"):
        open_image(RowImage([], 0, "image"))


def test_without_a_root_any_path_opens(root: Path) -> None:
    assert open_image(root / "train" / "red.png").size == (4, 2)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "must be a path relative to"),
        ("train/../../secret.png", "must be a path relative to"),
        ("train/../train/red.png", "must be a path relative to"),
        ("/etc/passwd", "must be a path relative to"),
        ("train/none.png", "does not exist"),
        ("train", "does not exist, or is no regular file"),
        ("a\0b.png", "is not a path of a local file"),
        ("https://example.com/a.png", "nothing is downloaded"),
        ("file:///etc/passwd", "nothing is downloaded"),
        ("x" * 5000, "name too long"),
    ],
)
def test_paths_stay_under_the_root(root: Path, path: str, reason: str) -> None:
    with pytest.raises(ImageError, match=f"(?i){reason}"):
        open_image(path, root)
    with pytest.raises(ImageError, match=f"(?i){reason}"):
        open_image({"bytes": None, "path": path}, root)


def test_links_may_not_lead_out_of_the_root_but_may_point_inside(root: Path) -> None:
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "up").symlink_to(root.parent)
    (root / "in.png").symlink_to(root / "train" / "red.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    for escape in ("out.png", "up/secret.png"):
        with pytest.raises(ImageError, match=r"leads out of .* by a symbolic link"):
            resolve_image(escape, root)
    with pytest.raises(ImageError):
        resolve_image("loop.png", root)
    assert open_image("in.png", root).size == (4, 2)
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert open_image("train/red.png", linked_root).size == (4, 2)


def test_a_pipe_is_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    with pytest.raises(ImageError, match="no regular file"):
        open_image("pipe.png", root)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_not_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"more than the \d+ that are opened|is too large"):
        open_image(png_of_size(*size))


def test_the_limit_holds_for_images_in_memory_and_can_be_set() -> None:
    with pytest.raises(ImageError, match=r"4 × 2 pixels, more than the 7 that are opened: save it with fewer"):
        open_image(RED, max_pixels=7)
    assert open_image(RED, max_pixels=8).size == (4, 2)


@pytest.mark.parametrize(
    "data",
    [
        b"not an image",
        encoded()[:40],
        encoded(Image.effect_noise((64, 64), 50))[:700],
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:700],
        png_of_size(4, 2),  # no pixels inside
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 2\n%%EndComments\n%%EOF",
        b"GIF89a",
        encoded(kind="PCX"),  # whole, but not among the formats that are tried
    ],
)
def test_damaged_and_foreign_files_are_errors_that_say_so(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"image \(\d+ bytes\) cannot be (opened|decoded)"):
        open_image(data)


def test_an_empty_holder_and_another_type_are_errors() -> None:
    with pytest.raises(ImageError, match='neither "bytes" nor "path"'):
        open_image({"bytes": None, "path": None})
    with pytest.raises(TypeError, match="got int"):
        open_image(7)
