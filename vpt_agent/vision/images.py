"""Whatever a caller has as a picture, to RGB with 8 bits; or a reason why not."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vpt_agent.errors import ImageError
from vpt_agent.types import Box, View
from vpt_agent.vision.bombs import decoded_sizes, opened_sizes
from vpt_agent.vision.fetch import fetch

Source = str | Path | bytes | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 89_478_485  # Pillow's own mark, above which it suspects a decompression bomb
MAX_BYTES = 128 * 2**20

# Those that decode pixels in this process: Pillow hands EPS, for one, to another program.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO",
    "TGA",
)  # fmt: skip

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Source,
    *,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    warnings: list[str] | None = None,
) -> Image.Image:
    """Read a picture as RGB, 8 bits, upright, its own copy of the pixels.

    ``source`` is a path, the bytes of a file, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3]
    or [H, W, 4] (uint8, uint16, bool, or float in 0..1). EXIF orientation is applied, transparency
    is laid on white, 16 bits become 8, palettes, CMYK and grey become RGB, of an animation the
    first frame is taken; what a caller may not expect is appended to ``warnings``.

    A picture above ``max_pixels`` or a file above ``max_bytes`` is refused before it is decoded,
    and so is one that holds more than it says (tiles, icons).
    URLs (http, https) are refused unless ``allow_urls``, and then only public hosts are asked.
    Everything that cannot be read is an :class:`ImageError` with its reason.
    """
    notes: list[str] = [] if warnings is None else warnings
    if isinstance(source, np.ndarray):
        _check_pixels((source.shape[1], source.shape[0]) if source.ndim > 1 else (0, 0),
                      max_pixels, "array")  # fmt: skip
        return _from_array(source, "array", notes)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "PIL image", max_pixels, notes)
    if isinstance(source, bytes):
        return _decode(source, "bytes", max_pixels, max_bytes, notes)
    if isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", source):
        where = source if len(source) < 200 else f"{source[:200]}..."
        if not re.match(r"https?://", source):
            raise ImageError(
                "only http and https addresses can be pictures",
                where=where,
                expected="a path, an http(s) address, bytes, a PIL image or an array",
            )
        if not allow_urls:
            raise ImageError(
                "addresses are not fetched unless asked for",
                where=where,
                fix="download the picture, or pass allow_urls=True",
            )
        return _decode(fetch(source, max_bytes), where, max_pixels, max_bytes, notes)
    if isinstance(source, str | Path):
        return _decode(_read(Path(source), max_bytes), str(source), max_pixels, max_bytes, notes)
    raise ImageError(
        "this is no picture",
        got=type(source).__name__,
        expected="a path, an http(s) address, bytes, a PIL image or an array",
    )


def load_views(
    sources: Source | Sequence[Source],
    *,
    first: int = 1,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    warnings: list[str] | None = None,
) -> tuple[View, ...]:
    """Read one or more pictures as views ``image_1``, ``image_2``, ... (see :func:`load_image`).

    ``first`` is the number of the first one. Warnings begin with the view's id.
    """
    if isinstance(sources, str | Path | bytes | Image.Image | np.ndarray):
        sources = [sources]
    views = []
    for number, source in enumerate(sources, first):
        notes: list[str] = []
        image = load_image(
            source,
            allow_urls=allow_urls,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
            warnings=notes,
        )
        id_ = f"image_{number}"
        views.append(View(id_, image, id_, Box(0, 0, *image.size), image.size))
        if warnings is not None:
            warnings += [f"{id_}: {note}" for note in notes]
    return tuple(views)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if path.is_dir():
            raise ImageError("this is a directory", where=path, expected="a picture file")
        if not path.exists():
            raise ImageError("there is no such file", where=path, fix="check the path")
        if not path.is_file():  # a pipe or a device would never end
            raise ImageError("this is not a regular file", where=path, expected="a picture file")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError("the file cannot be read", where=path, got=error) from error


def _check_pixels(size: tuple[int, int], max_pixels: int, where: str) -> None:
    if min(size) < 1:
        raise ImageError("the picture has no pixels", where=where, got=f"{size[0]} x {size[1]}")
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            "the picture is too large",
            where=where,
            got=f"{size[0]} x {size[1]}",
            expected=f"at most {max_pixels} pixels",
            fix="make it smaller, or raise max_pixels",
        )


def _decode(
    data: bytes, where: str, max_pixels: int, max_bytes: int, notes: list[str]
) -> Image.Image:
    if not data:
        raise ImageError("the file is empty", where=where)
    if len(data) > max_bytes:
        raise ImageError(
            "the file is too large",
            where=where,
            expected=f"at most {max_bytes} bytes",
            fix="make it smaller, or raise max_bytes",
        )
    for size in opened_sizes(data):
        _check_pixels(size, max_pixels, where)
    Image.init()  # registers every reader, so that the list below can be narrowed to those at hand
    try:
        opened = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
        frames = getattr(opened, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            "the picture is too large",
            where=where,
            got=error,
            expected=f"at most {max_pixels} pixels",
            fix="make it smaller",
        ) from error
    except Exception as error:  # decoders of foreign bytes raise many types; all mean this
        raise ImageError(
            "this is not a picture that can be read",
            where=where,
            got=f"{len(data)} bytes beginning {data[:8]!r}",
            expected=", ".join(FORMATS),
        ) from error
    with opened:
        for size in decoded_sizes(opened):
            _check_pixels(size, max_pixels, where)
        if frames > 1 and opened.format != "MPO":  # there the others are a camera's by-products
            notes.append(f"{opened.format} with several frames: only the first is used")
        return _to_rgb(opened, where, max_pixels, notes)


def _to_rgb(image: Image.Image, where: str, max_pixels: int, notes: list[str]) -> Image.Image:
    _check_pixels(image.size, max_pixels, where)
    try:
        image.load()
        if image.mode in ("F", "I") or image.mode.startswith("I;16"):
            result = _from_array(np.asarray(image), where, notes, mode=image.mode)
        elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
            result = _on_white(image)
        else:
            result = image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # as above: broken pixels, or a mode without a way to RGB
        raise ImageError(
            "the picture is broken or of a kind that cannot be read",
            where=where,
            got=f"{image.format or 'picture'}, mode {image.mode}: {error}",
            expected="a complete picture with grey, palette, RGB or CMYK pixels",
        ) from error
    turn = _orientation(image, notes)
    result = result if turn is None else result.transpose(turn)
    # A bare picture: metadata and palettes of the source play no part in what follows.
    return Image.frombytes("RGB", result.size, result.tobytes())


def _orientation(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error) as error:
        notes.append(f"EXIF data cannot be read, so no rotation is applied ({error})")
        return None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey has no direct way to RGBA
        image = image.convert("LA")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("RGB")


def _from_array(
    array: npt.NDArray[Any], where: str, notes: list[str], *, mode: str = ""
) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ImageError(
            "the array is no picture",
            where=where,
            got=f"shape {array.shape}",
            expected="[H, W], [H, W, 1], [H, W, 3] or [H, W, 4]",
        )
    image = Image.fromarray(np.ascontiguousarray(_eight_bits(array, where, notes, mode)))
    return _on_white(image) if image.mode == "RGBA" else image.convert("RGB")


def _eight_bits(
    array: npt.NDArray[Any], where: str, notes: list[str], mode: str
) -> npt.NDArray[np.uint8]:
    kind, low, high = array.dtype.kind, array.min(), array.max()
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return np.asarray(array * np.uint8(255), dtype=np.uint8)
    if kind in "iu" and (array.dtype.itemsize == 2 or mode == "I") and low >= 0:
        if high <= 65535:
            notes.append("16 bits a value, reduced to 8")
            return np.asarray((array.astype(np.uint32) * 255 + 32767) // 65535, dtype=np.uint8)
    elif kind == "f" and low >= 0 and high <= 1:
        return np.asarray(np.rint(array * 255.0), dtype=np.uint8)
    elif kind == "f" and mode == "F" and low >= 0 and high <= 255:
        notes.append("float values, read as 0..255")
        return np.asarray(np.rint(array), dtype=np.uint8)
    raise ImageError(
        "these values are not those of a picture",
        where=where,
        got=f"{array.dtype} from {low} to {high}",
        expected="uint8; uint16; bool; or float from 0 to 1",
        fix="scale the values first",
    )
