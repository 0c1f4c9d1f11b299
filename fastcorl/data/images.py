"""Images of untrusted rows: a few formats, a size cap, and no file outside the data's folder."""

import io
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:{1,2}//|data:")


class ImageError(ValueError):
    """An image that cannot be used, and why."""


def open_image(value: Any, folder: Path | None = None, *, absolute: bool = False) -> Image.Image:
    """The image's header, checked; its pixels are decoded when first used.

    `value` is a PIL image, encoded bytes, a path relative to `folder`, or a `datasets` record of bytes and path.
    With `absolute` a path may also be absolute, as long as it lies in `folder`.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        image = value
    elif isinstance(value, bytes | bytearray | memoryview):
        image = _open(io.BytesIO(value))
    elif isinstance(value, str | os.PathLike):
        image = _open(_inside(folder, os.fspath(value), absolute))
    else:
        raise ImageError("is missing" if value is None else f"is no image but a {type(value).__name__}")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width}x{height} pixels, more than {MAX_PIXELS}")
    if width * height == 0:
        raise ImageError("has no pixels")
    if getattr(image, "is_animated", False):
        raise ImageError("is an animation")
    return image


def decode_image(value: Any, folder: Path | None = None, *, absolute: bool = False) -> Image.Image:
    """The image of `open_image`, decoded, upright and RGB."""
    image = open_image(value, folder, absolute=absolute)
    try:
        if image.mode.startswith("I;16"):  # Pillow's own conversion takes all above 255 for white
            image = image.point(lambda level: level / 256).convert("L")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"does not decode: {error}") from error


def _inside(folder: Path | None, text: str, absolute: bool) -> Path:
    if _ADDRESS.match(text):
        raise ImageError(f"is the address {text[:80]!r}; images are never fetched")
    if folder is None:
        raise ImageError(f"is the path {text!r}, but this source has no folder for images")
    if "\0" in text or not text.isprintable():
        raise ImageError(f"{text[:80]!r} is no path")
    if Path(text).is_absolute() and not absolute:
        raise ImageError(f"{text!r} is an absolute path; it must be relative to the data's folder")
    try:
        resolved = (folder / text).resolve()
        if not resolved.is_relative_to(folder.resolve()):
            raise ImageError(f"{text!r} leads out of the data's folder")
        if not resolved.is_file():
            raise ImageError(f"{text!r} is no file in the data's folder")
    except (OSError, RuntimeError) as error:  # a name that is too long, a circle of links
        reason = getattr(error, "strerror", None) or "it cannot be followed"
        raise ImageError(f"{text[:80]!r} is no file in the data's folder: {reason}") from None
    return resolved


def _open(source: Any) -> Image.Image:
    try:
        return Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"is not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # as above
        raise ImageError(f"does not open: {error}") from error
