"""A row as a picture: the originals with the regions and crops on them, and what is seen again."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vpt_agent.data.check import ALL_KINDS
from vpt_agent.data.pictures import row_views
from vpt_agent.data.rows import Row
from vpt_agent.errors import UserError
from vpt_agent.tokens.grammar import ParsedCall, read_text
from vpt_agent.tokens.grid import region_to_box
from vpt_agent.tokens.table import IMAGE_TAG, PerceptionTable
from vpt_agent.types import View

WHOLE, PART, GAP = 560, 260, 12
COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080")
PAPER, INK = "#ffffff", "#222222"


def draw_row(row: Row, *, table: PerceptionTable | None = None) -> Image.Image:
    """``row`` as one RGB picture.

    Left, each original: cells of a call's region hatched by a thin line, the crop it gives as a
    thick one, in one colour a region. Right, every crop and every picture seen through another
    encoder, as large as room allows, with its tag and size. Missing pictures are an error.
    """
    views = row_views(row)
    table = table or ALL_KINDS
    originals = list({v.id: v for vs in views.values() for v in vs if v.parent is None}.values())
    crops = [v for v in views.get(IMAGE_TAG, ()) if v.parent is not None]
    again = [(tag, v) for tag, vs in views.items() if tag != IMAGE_TAG for v in vs]
    regions = _regions(row, table)
    lefts = [_marked(v, [c for c in crops if c.root == v.id], regions) for v in originals]
    rights = [
        _labelled(_fit(v.image, PART), f"crop {i}: {v.size[0]} x {v.size[1]}", _colour(i))
        for i, v in enumerate(crops)
    ]
    rights += [_labelled(_fit(v.image, PART), f"{tag} {v.id}", INK) for tag, v in again]
    columns = [_stack(column) for column in (lefts, rights) if column]
    width = sum(c.width for c in columns) + GAP * (len(columns) + 1)
    page = Image.new("RGB", (width, max((c.height for c in columns), default=0) + 2 * GAP), PAPER)
    at = GAP
    for column in columns:
        page.paste(column, (at, GAP))
        at += column.width + GAP
    return page


def html_page(rows: Iterable[Row], *, table: PerceptionTable | None = None) -> str:
    """Rows as one page that needs no other file: picture, messages and ``meta`` of each."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Rows</title><style>"
        "body{font:15px/1.45 system-ui,sans-serif;margin:24px;color:#222;max-width:1000px}"
        "section{border-top:1px solid #ccc;padding:12px 0}img{max-width:100%}"
        "p{margin:4px 0;white-space:pre-wrap;overflow-wrap:anywhere}"
        ".user{color:#14508c}.assistant{color:#22662a}.meta{color:#666;font-size:13px}"
        "</style><body>"
    ]
    for row in rows:
        data = io.BytesIO()
        draw_row(row, table=table).save(data, format="PNG")
        picture = base64.b64encode(data.getvalue()).decode("ascii")
        parts.append(f"<section><h2>{html.escape(row.where)}</h2>")
        parts.append(f"<img alt='pictures of this row' src='data:image/png;base64,{picture}'>")
        for message in row.messages:
            text = html.escape(message.content)
            parts.append(f"<p class='{message.role}'><b>{message.role}</b> {text}</p>")
        if row.meta:
            known = ", ".join(f"{key}: {value}" for key, value in row.meta.items())
            parts.append(f"<p class='meta'>{html.escape(known)}</p>")
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>\n"])


def show_rows(
    rows: Mapping[int, Row], folder: str | Path, *, table: PerceptionTable | None = None
) -> list[Path]:
    """Write ``row_N.png`` for each row by number, and ``index.html`` with all; gives the files."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        files = []
        for number, row in rows.items():
            files.append(target / f"row_{number}.png")
            draw_row(row, table=table).save(files[-1])
        page = target / "index.html"
        page.write_text(html_page(rows.values(), table=table), encoding="utf-8")
    except OSError as error:
        raise UserError(
            "the pictures cannot be written", where=target, got=error.strerror or error
        ) from error
    return [*files, page]


def _regions(row: Row, table: PerceptionTable) -> list[tuple[list[int], int]]:
    """(cells, grid) of every region called, in order."""
    said = "\n".join(m.content for m in row.messages if m.role == "assistant")
    events = [e for e in read_text(said, table) if isinstance(e, ParsedCall)]
    return [(e.arguments["region"], table[e.kind].grid) for e in events if "region" in e.arguments]


def _marked(view: View, crops: list[View], regions: list[tuple[list[int], int]]) -> Image.Image:
    image = _fit(view.image, WHOLE)
    scale = image.width / view.size[0], image.height / view.size[1]
    draw = ImageDraw.Draw(image)

    def outline(box: Iterable[float], colour: str, width: int) -> None:
        left, top, right, bottom = box
        edges = (left * scale[0], top * scale[1], right * scale[0] - 1, bottom * scale[1] - 1)
        draw.rectangle(edges, outline=colour, width=width)

    if crops:
        for number, (cells, grid) in enumerate(regions):
            outline(region_to_box(cells, view.size, grid, "cover"), _colour(number), 1)
    for number, crop in enumerate(crops):
        outline(crop.box, _colour(number), 3)
    return _labelled(image, f"{view.id}: {view.size[0]} x {view.size[1]}", INK)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _fit(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _labelled(image: Image.Image, text: str, colour: str) -> Image.Image:
    font = ImageFont.load_default(15)
    page = Image.new("RGB", (max(image.width, int(font.getlength(text)) + 4), image.height + 22),
                     PAPER)  # fmt: skip
    ImageDraw.Draw(page).text((2, 1), text, fill=colour, font=font)
    page.paste(image, (0, 22))
    return page


def _stack(images: list[Image.Image]) -> Image.Image:
    height = sum(i.height + GAP for i in images) - GAP
    page = Image.new("RGB", (max(i.width for i in images), height), PAPER)
    at = 0
    for image in images:
        page.paste(image, (0, at))
        at += image.height + GAP
    return page
