"""Open the image of a record, wherever it is kept, without trusting it.

An image is a path, encoded bytes, a PIL image, `{"bytes": …, "path": …}` as `datasets` stores it, or a `RowImage`.
Paths stay under a root; the number of pixels is looked at before any is decoded; only common raster formats are tried
(PIL would hand an EPS file to Ghostscript).
"""

import io
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # PIL's own default: a quarter of a gigabyte as RGB
WHITE_16 = 65535
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_NOT_DECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
)


class ImageError(ValueError):
    """An image cannot be had: where it was looked for, and why not."""


@dataclass(frozen=True)
class RowImage:
    """An image that stays in its `datasets.Dataset` until it is opened, so that reading records loads none."""

    dataset: Any = field(repr=False, compare=False)
    row: int
    column: str

    def load(self) -> Any:
        return self.dataset[self.row][self.column]


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
    if isinstance(image, RowImage):
        image = image.load()
    if isinstance(image, Mapping):
        inner = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if not isinstance(inner, str | os.PathLike | bytes):
            raise ImageError('image holds neither "bytes" nor "path"')
        image = inner
    if isinstance(image, Image.Image):
        return _decode(image, "image", max_pixels)
    if isinstance(image, bytes):
        what, source = f"image ({len(image)} bytes)", io.BytesIO(image)
        return _open(source, what, max_pixels)
    if isinstance(image, str | os.PathLike):
        file = resolve_image(image, root)
        return _open(file, f"image {os.fspath(file)!r}", max_pixels)
    raise TypeError(f"an image must be a path, bytes, a PIL image or a mapping of these, got {type(image).__name__}")


def _open(source: Path | io.BytesIO, what: str, max_pixels: int) -> Image.Image:
    try:
        with Image.open(source, formats=_FORMATS) as opened:
            return _decode(opened, what, max_pixels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is too large: {error}") from error
    except _NOT_DECODABLE as error:
        raise ImageError(f"{what} cannot be opened: {error}") from error


def _decode(image: Image.Image, what: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{what} has {image.width} × {image.height} pixels, more than the {max_pixels} that are opened: save it "
            "with fewer"
        )
    try:
        return _as_rgb(ImageOps.exif_transpose(image), what)
    except ImageError:
        raise
    except _NOT_DECODABLE as error:
        raise ImageError(f"{what} cannot be decoded: {error}") from error


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
