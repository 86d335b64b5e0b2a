"""What the tools draw on pictures: boxes, lines, outlines, labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#00e5ff", "#ffea00", "#ff1744", "#76ff03", "#d500f9", "#ff9100")
"""Strong colours, one after the other."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def colour(number: int) -> str:
    """The colour of the ``number``-th thing, from 0."""
    return COLOURS[number % len(COLOURS)]


def pen(size: tuple[int, int]) -> int:
    """A width of lines that is seen on a picture of ``size``."""
    return max(2, round(max(size) / 240))


def font(size: tuple[int, int]) -> Font:
    """Letters that are read on a picture of ``size``."""
    return ImageFont.load_default(max(10, round(max(size) / 45)))


def label(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: str, letters: Font
) -> None:
    """Text on a patch of ``fill``, its lower left corner at ``at``, moved into the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
    width, height = right - left + 4, bottom - top + 4
    most = draw.im.size
    x = min(max(0.0, at[0]), max(0.0, most[0] - width))
    y = min(max(0.0, at[1] - height), max(0.0, most[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=fill)
    draw.text((x + 2 - left, y + 2 - top), text, fill="black", font=letters)


def boxes(image: Image.Image, found: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """A copy of ``image`` with boxes (its pixels) and their names drawn on it."""
    drawn = image.copy()
    draw, wide, letters = ImageDraw.Draw(drawn), pen(image.size), font(image.size)
    for number, (box, _) in enumerate(found):
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour(number), width=wide)
    for number, (box, name) in enumerate(found):
        label(draw, (box[0], box[1]), name, colour(number), letters)
    return drawn
