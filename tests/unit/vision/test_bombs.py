"""Small files that decode to large pictures are refused before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import IcoImagePlugin, Image, TiffImagePlugin

from vpt_agent.errors import ImageError
from vpt_agent.vision.images import load_image

SIDE = 3000


def png(width: int, height: int) -> bytes:
    """A grey PNG that says this size, and has the pixels of its first rows only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * min(height, 10), 9)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ico(*inner: bytes) -> bytes:
    """Icons that say they have one pixel each."""
    entries, at = b"", 6 + 16 * len(inner)
    for part in inner:
        entries += struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(part), at)
        at += len(part)
    return struct.pack("<HHH", 0, 1, len(inner)) + entries + b"".join(inner)


def bitmap(width: int, height: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 32, 0, 0, 0, 0, 0, 0)


def tiff(size: int, tile: int) -> bytes:
    """A TIFF of ``size`` pixels a side in one tile of ``tile``, compressed to nearly nothing."""
    data = zlib.compress(b"\0" * tile * tile, 9)
    tags = [(256, 3, size), (257, 3, size), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
            (322, 4, tile), (323, 4, tile), (324, 4, 0), (325, 4, len(data))]  # fmt: skip
    at = 8 + 2 + 12 * len(tags) + 4
    out = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, kind, value in tags:
        out += struct.pack("<HHII", tag, kind, 1, at if tag == 324 else value)
    return out + struct.pack("<I", 0) + data


@pytest.mark.parametrize(
    "data",
    [
        png(SIDE, SIDE),
        ico(png(SIDE, SIDE)),
        ico(png(1, 1), png(SIDE, SIDE)),
        ico(bitmap(SIDE, SIDE)),
        tiff(16, SIDE),
    ],
    ids=["png", "ico", "second icon", "bitmap in an icon", "tiff tile"],
)
def test_a_bomb_is_refused_before_it_is_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    Image.init()  # its readers make pictures of their own
    for cls in (Image.Image, IcoImagePlugin.IcoImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(cls, "load", never)
    with pytest.raises(ImageError, match=r"the picture is too large.*at most 1000000 pixels"):
        load_image(data, max_pixels=1_000_000)


def test_the_same_things_of_fair_size_are_read() -> None:
    picture = Image.new("RGBA", (16, 16), "red")
    for kind in ("ICO", "TIFF", "PNG"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        assert load_image(buffer.getvalue(), max_pixels=600).getpixel((3, 3)) == (255, 0, 0)
    assert load_image(tiff(16, 16), max_pixels=256).size == (16, 16)


@pytest.mark.filterwarnings("ignore")
def test_an_icon_without_pictures_is_no_picture() -> None:
    for data in (ico(b""), ico(b"abc"), ico(png(2, 2))[:20], ico(png(2, 2))[:40]):
        with pytest.raises(ImageError, match=r"no picture|not a picture|broken"):
            load_image(data)


def test_of_a_long_animation_one_frame_is_decoded() -> None:
    frames = [Image.new("RGB", (400, 400), (i, 0, 0)) for i in range(40)]
    for kind in ("GIF", "WEBP", "PNG"):
        buffer, notes = io.BytesIO(), []
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        # All frames together are more than is allowed; one is not.
        image = load_image(buffer.getvalue(), max_pixels=200_000, warnings=notes)
        assert image.size == (400, 400)
        assert notes == [f"{kind} with several frames: only the first is used"]
