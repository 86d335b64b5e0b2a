"""Distances, areas and colours in a picture."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from PIL import Image, ImageDraw, ImageStat
from pydantic import Field

from vpt_agent.errors import ModelRetry
from vpt_agent.tool import PixelBox, PixelPoints, ToolContext, ToolOutput, perception_tool
from vpt_agent.types import Box, View
from vpt_agent.vision.frames import clamp
from vpt_tools import _draw

Point = tuple[float, float]


@perception_tool(timeout=30.0, licence="Apache-2.0")
def measure(
    context: ToolContext,
    what: Literal["distance", "area", "colour"],
    points: PixelPoints | None = None,
    box: PixelBox | None = None,
    radius: Annotated[int, Field(ge=0, le=100)] = 0,
    scale: Annotated[float, Field(gt=0, le=1e9)] | None = None,
    unit: Annotated[str, Field(min_length=1, max_length=12)] | None = None,
    show: bool = False,
    source: str | None = None,
) -> ToolOutput:
    """Measure in a picture: how far points are apart, how large a part is, what colour it has.

    distance: along two or more points. area: of a box, or of the shape that three or more points
    go around. colour: at each of the points, or on average in a box.

    Args:
        what: distance, area or colour
        radius: pixels around a point of which the colour is averaged
        scale: how long one pixel of the view is, in unit, if that is known
        unit: the unit of scale
        show: show the picture with what was measured, too
        source: id of the view to measure in; the latest picture by default
    """
    view = context.require_view()
    marks = [_inside(point, view.size) for point in points or ()]
    area = None if box is None else clamp(box, view.size)
    if (scale is None) != (unit is None):
        raise ModelRetry("scale and unit go together: give both, or none")
    if what == "distance":
        told, values = _distance(marks, area, view)
    elif what == "area":
        told, values = _area(marks, area, view)
    else:
        told, values = _colour(marks, area, radius, view)
    if scale is not None and what != "colour":
        power = 2 if what == "area" else 1
        amount = float(str(values["pixels"])) * scale**power
        values |= {"amount": float(f"{amount:.10g}"), "unit": f"{unit}^2" if power == 2 else unit}
        told += f"; {amount:.6g} {values['unit']}"
    drawn = [context.redrawn(view, _shown(view, marks, area, what))] if show else []
    return ToolOutput(
        views=drawn, text=f"{told}.", structured={"what": what, "of": view.id} | values
    )


def _inside(point: Sequence[float], size: tuple[int, int]) -> Point:
    x, y = point
    if not (0 <= x <= size[0] and 0 <= y <= size[1]):  # false for NaN, too
        raise ModelRetry(
            f"point [{x:g}, {y:g}] lies outside the picture of {size[0]} x {size[1]} pixels",
            "box_outside",
        )
    return float(x), float(y)


def _one_of(points: list[Point], box: Box | None, least: int, what: str) -> None:
    if (len(points) >= least) == (box is not None) or (points and box is not None):
        raise ModelRetry(f"{what} needs a box, or {least} or more points (not both)")


def _stretch(view: View) -> tuple[float, float]:
    """Pixels of the original in one pixel of the view, across and down."""
    return view.box.width / view.size[0], view.box.height / view.size[1]


def _resized(view: View) -> bool:
    return view.size != (view.box.width, view.box.height)


def _distance(points: list[Point], box: Box | None, view: View) -> tuple[str, dict[str, object]]:
    if len(points) < 2 or box is not None:
        raise ModelRetry("distance needs two or more points, and no box")
    legs = [math.dist(a, b) for a, b in itertools.pairwise(points)]
    total = sum(legs)
    told = f"The distance is {total:.1f} pixels of {view.id}"
    values: dict[str, object] = {"pixels": round(total, 3), "legs": [round(x, 3) for x in legs]}
    if _resized(view):
        x, y = _stretch(view)
        real = sum(math.dist((a[0] * x, a[1] * y), (b[0] * x, b[1] * y))
                   for a, b in itertools.pairwise(points))  # fmt: skip
        values["original_pixels"] = round(real, 3)
        told += f", {real:.1f} of the original"
    return told, values


def _area(points: list[Point], box: Box | None, view: View) -> tuple[str, dict[str, object]]:
    _one_of(points, box, 3, "area")
    corners = points
    if box is not None:
        corners = [(box[0], box[1]), (box[2], box[1]), (box[2], box[3]), (box[0], box[3])]
    if _crosses_itself(corners):
        raise ModelRetry("the shape's outline crosses itself: give its corners in order")
    size = abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in _edges(corners))) / 2
    share = size / (view.size[0] * view.size[1])
    told = f"The area is {size:.1f} pixels of {view.id}, {share:.2%} of it"
    values: dict[str, object] = {"pixels": round(size, 3), "share": round(share, 6)}
    if box is not None:
        values |= {"width": box.width, "height": box.height}
    if _resized(view):
        x, y = _stretch(view)
        values["original_pixels"] = round(size * x * y, 3)
        told += f", {size * x * y:.1f} pixels of the original"
    return told, values


def _edges(corners: Sequence[Point]) -> list[tuple[Point, Point]]:
    return list(zip(corners, [*corners[1:], corners[0]], strict=True))


def _crosses_itself(corners: Sequence[Point]) -> bool:
    edges = _edges(corners)
    return any(
        _cross(edges[i], edges[j])
        for i in range(len(edges))
        for j in range(i + 2, len(edges))
        if (i, j) != (0, len(edges) - 1)
    )


def _cross(a: tuple[Point, Point], b: tuple[Point, Point]) -> bool:
    """Whether two lines cross in a point that is an end of neither."""

    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(*a, b[0]) * side(*a, b[1]) < 0 and side(*b, a[0]) * side(*b, a[1]) < 0


def _colour(
    points: list[Point], box: Box | None, radius: int, view: View
) -> tuple[str, dict[str, object]]:
    _one_of(points, box, 1, "colour")
    image = view.image
    if box is not None:
        left, top, right, bottom = (int(v) for v in box)
        found = [_told_colour(image.crop((left, top, right, bottom)), None)]
        return f"On average {found[0]['name']}, {found[0]['hex']}", {"colours": found}
    found = [_told_colour(*_around(image, point, radius)) for point in points]
    places = (
        f"[{x:g}, {y:g}] {c['name']}, {c['hex']}" for (x, y), c in zip(points, found, strict=True)
    )
    return "; ".join(places), {"colours": found, "radius": radius}


def _around(
    image: Image.Image, point: Point, radius: int
) -> tuple[Image.Image, Image.Image | None]:
    """The pixels within ``radius`` of a point, and a mask of them."""
    x = min(int(point[0]), image.width - 1)
    y = min(int(point[1]), image.height - 1)
    left, top = max(0, x - radius), max(0, y - radius)
    part = image.crop((left, top, min(image.width, x + radius + 1),
                       min(image.height, y + radius + 1)))  # fmt: skip
    if radius == 0:
        return part, None
    mask = Image.new("L", part.size)
    ImageDraw.Draw(mask).ellipse(
        (x - radius - left, y - radius - top, x + radius - left, y + radius - top), fill=255
    )
    return part, mask


def _told_colour(part: Image.Image, mask: Image.Image | None) -> dict[str, object]:
    red, green, blue = (round(v) for v in ImageStat.Stat(part, mask).mean)
    return {
        "rgb": [red, green, blue],
        "hex": f"#{red:02x}{green:02x}{blue:02x}",
        "name": colour_name(red, green, blue),
    }


_HUES = (
    (15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (200, "cyan"), (255, "blue"),
    (290, "purple"), (345, "pink"), (360, "red"),
)  # fmt: skip


def colour_name(red: int, green: int, blue: int) -> str:
    """The everyday name of a colour, each part 0 to 255."""
    hue, light, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
    if light < 0.12:
        return "black"
    if light > 0.92 or (saturation < 0.12 and light > 0.85):
        return "white"
    if saturation < 0.12:
        return "grey"
    name = next(name for most, name in _HUES if hue * 360 <= most)
    if name == "orange" and light < 0.4:
        return "brown"
    return name


def _shown(view: View, points: list[Point], box: Box | None, what: str) -> Image.Image:
    """The picture with what was measured drawn on it."""
    drawn = view.image.copy()
    draw, wide = ImageDraw.Draw(drawn), _draw.pen(view.size)
    fill, letters = _draw.colour(0), _draw.font(view.size)
    if box is not None:
        draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), outline=fill, width=wide)
    if what == "distance":
        draw.line(points, fill=fill, width=wide)
    elif what == "area" and points:
        draw.polygon(points, outline=fill, width=wide)
    dot = 2 * wide
    for number, (x, y) in enumerate(points, 1):
        draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=fill, outline="black")
        _draw.label(draw, (x + dot, y - dot), str(number), fill, letters)
    return drawn
