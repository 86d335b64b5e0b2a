"""Pictures that say a small size and decode to a large one: what Pillow does not look at."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_ICO = b"\0\0\1\0"
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags


def decoded_sizes(opened: Image.Image) -> Iterator[tuple[int, int]]:
    """Sizes (width, height) of what loading ``opened`` would decode: its own, and that of a TIFF's
    tiles, each decoded whole."""
    yield opened.size
    if opened.format == "TIFF":
        tags = getattr(opened, "tag_v2", {})
        tile = tags.get(_TILE_WIDTH), tags.get(_TILE_LENGTH)
        if isinstance(tile[0], int) and isinstance(tile[1], int):
            yield tile[0], tile[1]


def opened_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Sizes (width, height) of what merely opening ``data`` would decode: the icons of an ICO,
    which Pillow loads at once."""
    if not data.startswith(_ICO) or len(data) < 6:
        return
    (count,) = struct.unpack_from("<H", data, 4)
    for entry in range(count):
        at = 6 + 16 * entry
        if at + 16 > len(data):
            return
        (offset,) = struct.unpack_from("<I", data, at + 12)
        head = data[offset : offset + 24]
        if len(head) < 24:
            continue
        if head.startswith(_PNG):
            yield struct.unpack(">II", head[16:24])
        else:  # a bitmap, whose height counts its mask too
            width, height = struct.unpack("<ii", head[4:12])
            yield abs(width), abs(height)
