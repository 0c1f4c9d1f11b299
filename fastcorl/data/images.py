"""Images of untrusted rows: a few formats, a size cap, and no file outside the data's folder."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """An image that cannot be used, and why."""


def open_image(value: Any, folder: Path | None = None) -> Image.Image:
    """The image's header, checked; its pixels are decoded when first used.

    `value` is a PIL image, encoded bytes, a path relative to `folder`, or a `datasets` record of bytes and path.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        image = value
    elif isinstance(value, bytes):
        image = _open(io.BytesIO(value))
    elif isinstance(value, str | os.PathLike):
        image = _open(_inside(folder, Path(value)))
    else:
        raise ImageError(f"is no image but {'missing' if value is None else 'a ' + type(value).__name__}")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width}x{height} pixels, more than {MAX_PIXELS}")
    if width * height == 0:
        raise ImageError("has no pixels")
    if getattr(image, "is_animated", False):
        raise ImageError("is an animation")
    return image


def decode_image(value: Any, folder: Path | None = None) -> Image.Image:
    """The image of `open_image`, decoded, upright and RGB."""
    image = open_image(value, folder)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"does not decode: {error}") from error


def _inside(folder: Path | None, path: Path) -> Path:
    if folder is None:
        raise ImageError(f"is the path {str(path)!r}, but this source has no folder for images")
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise ImageError(f"{str(path)!r} leads out of the data's folder")
    if not resolved.is_file():
        raise ImageError(f"{str(path)!r} is no file in the data's folder")
    return resolved


def _open(source: Any) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"is not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # as above
        raise ImageError(f"does not open: {error}") from error
