"""Open the image of a record, wherever it is stored, without trusting it.

An image is a path, encoded bytes, a PIL image, `{"bytes": …, "path": …}` as `datasets` stores it, or a `RowImage`.
Paths stay under a root; the number of pixels is looked at before any is decoded; only common raster formats are tried
(PIL would hand an EPS file to Ghostscript).
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485  # PIL's own default: a quarter of a gigabyte as RGB
WHITE_16 = 65535
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ORIENTATION = 0x0112  # the EXIF tag; its values other than 1 (upright):
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be opened; says which and why."""


@dataclass(frozen=True)
class RowImage:
    """An image that stays in its `datasets.Dataset` until it is opened, so that reading records loads none."""

    dataset: Any = field(repr=False, compare=False)
    row: int
    column: str
    item: int | None = None  # of a column that holds lists of images

    def load(self) -> Any:
        held = self.dataset[self.row][self.column]
        return held if self.item is None else held[self.item]


ImageSource = str | os.PathLike[str] | bytes | Image.Image | Mapping[str, Any] | RowImage


def resolve_image(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Path:
    """The file that a record's path means: under `root`, or anywhere (from the working directory) where root is None.

    Raises:
        ImageError: it is absolute, climbs with "..", leaves the root by a symbolic link, or is no file.
    """
    name = os.fspath(path)
    if "\0" in name or "://" in name:
        raise ImageError(f"image {name!r:.200} is not a path of a local file; nothing is downloaded")
    try:
        if root is None:
            file = Path(name)
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            raise ImageError(f"image {name!r:.200} must be a path relative to {os.fspath(root)!r}, without '..'")
        else:
            file = Path(os.path.realpath(Path(root) / name))
            if not file.is_relative_to(os.path.realpath(root)):
                raise ImageError(f"image {name!r:.200} leads out of {os.fspath(root)!r} by a symbolic link")
        if not file.is_file():
            raise ImageError(f"image {os.fspath(file)!r:.300} does not exist, or is no regular file")
    except OSError as error:  # a name too long, a loop of links, a folder that may not be entered
        raise ImageError(f"image {name!r:.200}: {error.strerror or error}") from error
    return file


def open_image(
    image: ImageSource, root: str | os.PathLike[str] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image, decoded, in RGB, turned upright as its EXIF says (as transformers does); of several frames the first.

    Greys of 16 bits are scaled to 8, and what is transparent is laid on white.

    Args:
        root: the folder that paths are under; None allows any path, for files that you trust.
        max_pixels: more than this and nothing is decoded. PIL has its own limit, twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ImageError: no such file, outside the root, too many pixels, no image, a damaged one, one in floating point.
        TypeError: it is none of the kinds of image above.
    """
    with _opened(image, root, max_pixels) as (opened, what):
        try:
            return _as_rgb(_upright(opened), what)
        except ImageError:
            raise
        except Exception as error:  # decoders raise errors of any type
            raise ImageError(f"{what} cannot be decoded: {error}") from error


def image_size(
    image: ImageSource, root: str | os.PathLike[str] | None = None, *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(width, height) of what `open_image` would return, without decoding it. Raises as `open_image`."""
    with _opened(image, root, max_pixels) as (opened, _):
        width, height = opened.size
        turned = orientation(opened) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextlib.contextmanager
def _opened(
    image: ImageSource, root: str | os.PathLike[str] | None, max_pixels: int
) -> Iterator[tuple[Image.Image, str]]:
    """The image, not decoded yet, and its name for errors."""
    source, what = _source(image, root)
    if isinstance(source, Image.Image):
        _check_size(source, what, max_pixels)
        yield source, what
        return
    try:
        opened = Image.open(source, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is too large: {error}") from error
    except Exception as error:
        raise ImageError(f"{what} cannot be opened: {error}") from error
    with opened:
        _check_size(opened, what, max_pixels)
        yield opened, what


def _source(image: ImageSource, root: str | os.PathLike[str] | None) -> tuple[Image.Image | io.BytesIO | Path, str]:
    if isinstance(image, RowImage):
        try:
            image = image.load()
        except Exception as error:
            raise ImageError(f"image of the data set cannot be loaded: {error}") from error
    if isinstance(image, Mapping):
        inner = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if not isinstance(inner, str | os.PathLike | bytes):
            raise ImageError('image holds neither "bytes" nor "path"')
        image = inner
    if isinstance(image, Image.Image):
        return image, "image"
    if isinstance(image, bytes):
        return io.BytesIO(image), f"image ({len(image)} bytes)"
    if isinstance(image, str | os.PathLike):
        file = resolve_image(image, root)
        return file, f"image {os.fspath(file)!r}"
    raise TypeError(f"an image must be a path, bytes, a PIL image or a mapping of these, got {type(image).__name__}")


def _check_size(image: Image.Image, what: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{what} has {image.width} × {image.height} pixels, more than the {max_pixels} that are opened: save it "
            "with fewer"
        )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where it cannot be read.

    `ImageOps.exif_transpose` is not used: it writes all tags back and fails on those that it cannot write.
    """
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
    return value if value in _UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def _as_rgb(image: Image.Image, what: str) -> Image.Image:
    """Eight bits a channel: 16-bit greys are scaled, and what is transparent shows white."""
    if image.mode == "F":
        raise ImageError(
            f"{what} has pixels in floating point, of which it does not say what is white: save it in 8 bits"
        )
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= WHITE_16:
            raise ImageError(
                f"{what} has pixels from {grey.min()} to {grey.max()}, more than 16 bits: save it in 8 bits"
            )
        if image.mode != "I" or grey.max(initial=0) > 255:  # 32 bits, as NumPy's integers come, may hold 8
            grey = (grey * 255 + WHITE_16 // 2) // WHITE_16
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
