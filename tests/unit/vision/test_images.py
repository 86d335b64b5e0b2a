"""Reading pictures of every kind, and refusing the rest with a reason."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vpt_agent.errors import ImageError
from vpt_agent.vision import load_image, load_views

COLOURS = np.array(
    [[[200, 10, 10], [10, 200, 10], [10, 10, 200]], [[0, 0, 0], [255, 255, 255], [90, 90, 0]]],
    dtype=np.uint8,
)  # [2, 3, 3]: no two pixels alike, so every turn shows
PICTURE = Image.fromarray(COLOURS)


def _bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _pixels(image: Image.Image) -> list[list[list[int]]]:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


@pytest.mark.parametrize("how", ["str", "path", "bytes", "pil", "array"])
def test_sources(how: str, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(_bytes(PICTURE))
    source = {
        "str": str(path),
        "path": path,
        "bytes": path.read_bytes(),
        "pil": PICTURE,
        "array": COLOURS,
    }[how]
    notes: list[str] = []
    assert _pixels(load_image(source, warnings=notes)) == COLOURS.tolist()
    assert notes == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    turned = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS, -1),
        7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOURS),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = load_image(_bytes(PICTURE, exif=exif))
    assert _pixels(got) == turned.tolist()
    assert not got.getexif()


def test_broken_exif_is_said() -> None:
    notes: list[str] = []
    data = _bytes(PICTURE, "PNG", exif=b"Exif\x00\x00II*\x00" + b"\xff" * 3)
    assert _pixels(load_image(data, warnings=notes)) == COLOURS.tolist()
    assert len(notes) == 1
    assert "no rotation is applied" in notes[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_without_transparency(mode: str) -> None:
    image = PICTURE.convert(mode)
    got = load_image(image)
    assert _pixels(got) == _pixels(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[0, 255, 128], [0, 0, 0]], dtype=np.uint8)))
    if mode in ("LA", "La"):
        image = image.convert("LA")
    if mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
        image.putalpha(alpha)
    elif mode in ("RGBa", "La"):
        image = image.convert(mode)
    got = _pixels(load_image(image))
    assert got[0][0] == got[1][2] == [255, 255, 255]
    plain = image.convert("LA") if mode == "La" else image
    blended = np.asarray(plain.convert("RGBA"), dtype=float)[0, 2]
    expected = blended[:3] * blended[3] / 255 + 255 - blended[3]
    assert got[0][2] == pytest.approx(expected.tolist(), abs=1)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30)).convert(mode, dither=Image.Dither.NONE)
    clear = image.getpixel((0, 0))
    data = _bytes(image, transparency=clear)
    assert _pixels(load_image(data)) == [[[255, 255, 255]] * 2]


def test_sixteen_bits_and_floats_become_eight() -> None:
    notes: list[str] = []
    deep = np.array([[0, 257, 65535], [128 * 257, 300, 65000]], dtype=np.uint16)
    expected = [[0, 1, 255], [128, 1, 253]]
    for source in (_bytes(Image.fromarray(deep)), deep, Image.fromarray(deep.astype(np.int32))):
        got = _pixels(load_image(source, warnings=notes))
        assert [[p[0] for p in row] for row in got] == expected
    assert notes == ["16 bits a value, reduced to 8"] * 3
    unit = np.array([[0, 0.5, 1]], dtype=np.float32)
    for source in (unit, Image.fromarray(unit)):
        assert _pixels(load_image(source)) == [[[0] * 3, [128] * 3, [255] * 3]]
    notes.clear()
    assert _pixels(load_image(Image.fromarray(unit * 255), warnings=notes))[0][2] == [255] * 3
    assert notes == ["float values, read as 0..255"]


def test_arrays() -> None:
    grey = np.array([[0, 255]], dtype=np.uint8)
    assert _pixels(load_image(grey)) == _pixels(load_image(grey[:, :, None]))
    assert _pixels(load_image(grey > 100)) == [[[0] * 3, [255] * 3]]
    clear = np.array([[[1, 2, 3, 0]]], dtype=np.uint8)
    assert _pixels(load_image(clear)) == [[[255] * 3]]
    strided = np.asarray(COLOURS)[:, ::-1]
    assert _pixels(load_image(strided)) == strided.tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.uint8), "no pixels"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((3, 8, 9), np.uint8), r"no picture.*shape \(3, 8, 9\).*\[H, W, 3\]"),
        (np.zeros((2, 2), np.int64), "not those of a picture.*int64 from 0 to 0"),
        (np.full((2, 2), 1.5), "float64 from 1.5 to 1.5.*scale the values first"),
        (np.full((2, 2), np.nan), "from nan to nan"),
        (np.full((2, 2), -0.5), "from -0.5 to -0.5"),
        (np.full((2, 2), -5, np.int16), "int16 from -5"),
        (np.zeros((2, 2), complex), "not those of a picture"),
    ],
)
def test_arrays_that_are_no_picture(array: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_32_bit_values_above_16_bits_are_refused() -> None:
    with pytest.raises(ImageError, match=r"not those of a picture.*70000"):
        load_image(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("white", "black")]
    data = _bytes(frames[0], format, save_all=True, append_images=frames[1:])
    notes: list[str] = []
    (view,) = load_views(data, warnings=notes)
    assert _pixels(view.image)[0][0] == [255, 255, 255]
    assert notes == [f"image_1: {format} with several frames: only the first is used"]


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    assert load_image(_bytes(Image.new("L", size))).size == size


def test_the_result_is_a_copy() -> None:
    image = PICTURE.copy()
    got = load_image(image)
    image.putpixel((0, 0), (1, 2, 3))
    assert _pixels(got) == COLOURS.tolist()


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)


def test_size_is_checked_before_decoding() -> None:
    with pytest.raises(ImageError, match=r"too large; where: bytes.*got: 9000 x 9000.*max_pixels"):
        load_image(_png_header(9000, 9000), max_pixels=10**6)
    with pytest.raises(ImageError, match=r"picture is too large.*at most 89478485 pixels"):
        load_image(_png_header(100000, 100000))
    with pytest.raises(ImageError, match=r"got: 3 x 2; expected: at most 5 pixels"):
        load_image(PICTURE, max_pixels=5)
    with pytest.raises(ImageError, match=r"too large; where: array"):
        load_image(COLOURS, max_pixels=5)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such file; where: .*nowhere.png; do: check"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="this is a directory"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"the file is empty; where: .*empty.png"):
        load_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello, world")
    with pytest.raises(ImageError, match=r"not a picture.*b'hello, w'; expected: PNG, JPEG"):
        load_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match=r"file is too large.*at most 10 bytes.*max_bytes"):
        load_image(tmp_path / "text.png", max_bytes=10)
    with pytest.raises(ImageError, match=r"this is no picture; got: int; expected: a path"):
        load_image(5)  # type: ignore[arg-type]


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "p.png").write_bytes(_bytes(PICTURE))
    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(ImageError, match=r"file cannot be read; where: .*Permission denied"):
        load_image(tmp_path / "p.png")


def test_programs_are_not_pictures() -> None:
    with pytest.raises(ImageError, match="not a picture that can be read"):
        load_image(_bytes(PICTURE, "EPS"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(format: str) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = _bytes(noise, format)
    with pytest.raises(ImageError, match=r"broken|not a picture"):
        load_image(data[: len(data) // 2])


@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000", "TGA", "PPM", "ICO"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12),
)
def test_damaged_files_are_read_or_refused(format: str, damage: list[tuple[int, int]]) -> None:
    data = bytearray(_bytes(PICTURE.resize((16, 16)), format))
    for at, value in damage:
        data[at % len(data)] = value
    try:
        image = load_image(bytes(data), max_pixels=10**6)
    except ImageError:
        return
    assert image.mode == "RGB"


def test_views_are_numbered() -> None:
    views = load_views([PICTURE, COLOURS], first=3)
    assert [v.id for v in views] == ["image_3", "image_4"]
    assert all(v.root == v.id and v.parent is None for v in views)
    assert views[0].box == (0, 0, 3, 2)
    assert views[0].root_size == (3, 2)
    assert views[0].sha256 == views[1].sha256
    assert load_views([]) == ()
    with pytest.raises(ImageError, match="no such file"):
        load_views(["nowhere.png"])
