"""Pictures out of bytes that strangers send: few formats, known sizes, and nothing kept but the pixels."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bem.errors import DataError
from bem.vision.scenes import Picture

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES, MOST_PIXELS, MOST_SIDE = 4 << 20, 1 << 22, 1 << 13
"""Of one picture: encoded bytes; pixels, read from its header before anything is unpacked; and of each side."""
SCAN, MOST_SCANS = b"\xff\xda", 64
"""Where a scan of a JPEG begins; each of a progressive one costs a pass over all pixels, however few bytes it has."""


def decode(data: bytes, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS) -> Picture:
    """The pixels of a PNG, JPEG or WebP file, turned as its EXIF says; all else in the file is dropped.

    Of an animation the first frame; what is transparent stands on white.

    Raises:
        DataError: too large, of another format, or damaged.
    """
    if not 0 < len(data) <= most_bytes:
        raise DataError(f"a picture may have 1 to {most_bytes} bytes, this one has {len(data)}.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > most_pixels or max(width, height) > MOST_SIDE:
                raise DataError(
                    f"the picture has {width} x {height} pixels: {most_pixels} in all and {MOST_SIDE} a side are "
                    "taken. Make it smaller."
                )
            if image.format == "JPEG" and data.count(SCAN) > MOST_SCANS:
                raise DataError(f"a JPEG of {data.count(SCAN)} scans: {MOST_SCANS} are taken.")
            return _pixels(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise DataError(f"no {', '.join(FORMATS)} picture: it begins with {data[:8]!r}.") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        MemoryError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"a damaged picture: {type(error).__name__} {error}"[:300]) from None


def _pixels(image: Image.Image) -> Picture:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")).copy()


def from_data_url(
    url: str, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS
) -> Picture:
    """The picture of a `data:image/...;base64,...` URL.

    Raises:
        DataError: another URL (nothing is ever fetched), or as `decode`.
    """
    head, comma, body = url.partition(",")
    if not head[:11].lower() == "data:image/" or not comma:
        raise DataError(
            f"pictures come as data URLs (data:image/png;base64,...), nothing is fetched; got {url[:40]!r}."
        )
    if not head.lower().endswith(";base64"):
        raise DataError(f"a data URL must be base64, got {head[:60]!r}.")
    if len(body) > most_bytes * 4 // 3 + 4:
        raise DataError(
            f"a picture may have {most_bytes} bytes, this one has about {len(body) * 3 // 4}."
        )
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"a data URL that is no base64: {error}.") from None
    return decode(data, most_bytes, most_pixels)
