"""Pictures from strangers: what is taken, what is refused, and that nothing but pixels is kept."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bem.errors import DataError
from bem.vision.images import decode, from_data_url


def encoded(picture, form="PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, form, **options)
    return out.getvalue()


PICTURE = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)


def test_a_png_comes_back_to_the_bit_and_is_ours_to_write():
    found = decode(encoded(PICTURE))
    assert np.array_equal(found, PICTURE) and found.flags.writeable and found.flags.owndata
    url = "data:image/png;base64," + base64.b64encode(encoded(PICTURE)).decode()
    assert np.array_equal(from_data_url(url), PICTURE)


def test_exif_turns_the_picture_and_is_gone():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"  # turn by 90 degrees clockwise
    found = decode(encoded(PICTURE, "PNG", exif=exif))
    assert type(found) is np.ndarray and np.array_equal(found, np.rot90(PICTURE, -1))


def test_what_is_transparent_stands_on_white_and_grey_becomes_rgb():
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (decode(encoded(clear)) == 255).all()
    assert decode(encoded(np.full((2, 2), 7, np.uint8))).tolist() == [[[7] * 3] * 2] * 2


def bomb(width: int, height: int) -> bytes:
    """A few bytes that say to be a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (3000, 3000), (1 << 20, 1), (0, 5)])
def test_a_bomb_is_refused_by_its_header(size):
    with pytest.raises(DataError):
        decode(bomb(*size))


def test_a_jpeg_of_endless_scans_is_refused_and_an_honest_progressive_one_is_read():
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    data = encoded(picture, "JPEG", progressive=True, quality=90)
    assert decode(data).shape == (64, 64, 3)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(DataError, match="scans"):
        decode(data[:-2] + scan * 100 + data[-2:])


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF", "PPM", "ICO"])
def test_other_formats_are_refused(form):
    with pytest.raises(DataError, match="PNG, JPEG, WEBP"):
        decode(encoded(np.zeros((32, 32, 3), np.uint8), form))


def test_damage_is_an_error_of_ours():
    whole = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    for data in (
        b"",
        whole[:-30],
        whole[:40],
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        whole[:60] + b"x" * 500,
    ):
        with pytest.raises(DataError):
            decode(data)
    with pytest.raises(DataError, match="1 to 10 bytes"):
        decode(whole, most_bytes=10)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/cat.png",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,AAAA\nAAAA",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "",
    ],
)
def test_nothing_is_fetched_and_odd_urls_are_refused(url):
    with pytest.raises(DataError):
        from_data_url(url)
