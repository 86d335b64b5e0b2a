"""Questions and answers about pictures, with boxes where there are any, from wherever they lie."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from vpt_agent.data.check import picture_size
from vpt_agent.data.files import Item, Items, JsonFile, open_items
from vpt_agent.data.rows import RowError
from vpt_agent.errors import ImageError, UserError
from vpt_agent.types import Box
from vpt_agent.vision.images import load_image

BoxFormat = Literal["xyxy", "xywh", "xyxy_1", "xyxy_1000"]
"""How boxes are written: left, top, right, bottom or left, top, width, height in pixels; or the
former in fractions of the picture's sides, or in thousandths of them."""

FIELDS = ("image", "question", "answer", "boxes", "id", "type", "kinds", "argument", "result")


@dataclass(frozen=True)
class Annotation:
    """One question about one picture.

    ``image`` is a path; ``boxes`` are in pixels of the upright picture, whose ``size`` (width,
    height) is read from the file if it is None. ``kinds`` names the kinds of row it may become
    (empty: any that fits). ``argument`` is the text of a call and ``result`` what the tool says,
    for kinds that take and give text. ``where`` names it in errors.
    """

    image: str
    question: str
    answer: str
    boxes: tuple[Box, ...] = ()
    id: str = ""
    type: str = ""
    kinds: tuple[str, ...] = ()
    argument: str | None = None
    result: str | None = None
    size: tuple[int, int] | None = None
    where: str = field(default="annotation", compare=False)

    def picture_size(self) -> tuple[int, int]:
        """Width and height in pixels; a picture that is missing or broken is a :class:`RowError`"""
        return self.size if self.size is not None else _size_of(self.image, self.where)


class Annotations(Iterable[Annotation | RowError]):
    """The annotations of a JSON file, a list or a table of `datasets`, one after the other.

    ``columns`` says which key of an item each field of :class:`Annotation` is read from (a dot
    goes into an object: ``{"boxes": "objects.bbox"}``); without an entry it has its own name.
    ``box_format`` says how boxes are written. Relative paths begin in ``folder`` (default for
    files: the file's own). Pictures that are no paths (tables of `datasets` hold them) are written
    into ``pictures``, each once. What is wrong with an item comes as a :class:`RowError` in its
    place.
    """

    def __init__(
        self,
        source: object,
        *,
        columns: Mapping[str, str] | None = None,
        box_format: BoxFormat = "xyxy",
        folder: str | Path | None = None,
        pictures: str | Path | None = None,
    ) -> None:
        self.items: Items = open_items(source, name="annotations")
        self.columns = {name: name for name in FIELDS} | dict(columns or {})
        unknown = sorted(set(self.columns) - set(FIELDS))
        if unknown:
            raise UserError(
                "an annotation has no such field",
                where="columns",
                got=", ".join(unknown),
                expected=", ".join(FIELDS),
            )
        if box_format not in get_args(BoxFormat):
            raise UserError(
                "unknown format of boxes",
                got=box_format,
                expected=", ".join(get_args(BoxFormat)),
            )
        if folder is None and isinstance(self.items, JsonFile):
            folder = self.items.path.parent
        self.box_format: BoxFormat = box_format
        self.folder = None if folder is None else Path(folder)
        self.pictures = None if pictures is None else Path(pictures)

    def __iter__(self) -> Iterator[Annotation | RowError]:
        for item in self.items:
            try:
                yield self._annotation(item)
            except RowError as error:
                yield error

    def _annotation(self, item: Item) -> Annotation:
        where, value = item
        if isinstance(value, RowError):
            raise value
        if not isinstance(value, Mapping):
            raise _wrong("an annotation is a JSON object", where, type(value).__name__)
        got = {name: _at(value, key) for name, key in self.columns.items()}
        for name in ("image", "question", "answer"):
            if got[name] is None:
                raise _wrong(
                    f"an annotation lacks its {name}",
                    where,
                    f"keys {', '.join(map(str, value))}",
                    f"a key {self.columns[name]}",
                )
        image = self._image(got["image"], where)
        size: tuple[int, int] | None = None
        boxes: tuple[Box, ...] = ()
        if got["boxes"]:
            size = _size_of(image, where)
            boxes = tuple(
                read_box(box, self.box_format, size, where) for box in _boxes(got["boxes"], where)
            )
        return Annotation(
            image,
            _text(got["question"], "question", where),
            _text(got["answer"], "answer", where),
            boxes,
            id="" if got["id"] is None else str(got["id"]),
            type="" if got["type"] is None else str(got["type"]),
            kinds=_names(got["kinds"], where),
            argument=None if got["argument"] is None else str(got["argument"]),
            result=None if got["result"] is None else str(got["result"]),
            size=size,
            where=where,
        )

    def _image(self, value: Any, where: str) -> str:
        if isinstance(value, str | Path):
            path = Path(value)
            return str(path if self.folder is None else self.folder / path)
        # A table of `datasets` gives a decoded picture, or its bytes beside a path.
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
            if isinstance(value, str):
                return self._image(value, where)
        if not isinstance(value, bytes | Image.Image):
            raise _wrong(
                "this is no picture", where, type(value).__name__, "a path, or a picture of a table"
            )
        if self.pictures is None:
            raise UserError(
                "the pictures of this table must be written to files",
                where=where,
                fix="name a folder for them: pictures=",
            )
        return save_picture(value, self.pictures, where)


def save_picture(value: bytes | Image.Image, folder: Path, where: str) -> str:
    """Write a picture into ``folder`` as PNG, named by its pixels, and give its path."""
    try:
        image = load_image(value)
    except ImageError as error:
        raise RowError("unreadable_pictures", error.what, where=where, got=error.got) from error
    size = "x".join(map(str, image.size)).encode()
    path = folder / f"{hashlib.sha256(size + image.tobytes()).hexdigest()[:32]}.png"
    if not path.exists():
        data = io.BytesIO()
        image.save(data, format="PNG")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(data.getvalue())
            part.replace(path)  # a killed process leaves no half picture under the name
        except OSError as error:
            raise UserError(
                "a picture cannot be written", where=path, got=error.strerror or error
            ) from error
    return str(path)


def read_box(
    value: object, box_format: BoxFormat, size: tuple[int, int], where: str = "annotation"
) -> Box:
    """``value`` in ``box_format`` as a box in pixels of a picture of ``size`` (width, height).

    A box that is none, or leaves the picture by more than a pixel, is a :class:`RowError`; less
    than that is rounding, and cut off.
    """
    if isinstance(value, Mapping):
        value = value.get("box", value.get("bbox"))
    numbers = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not numbers or not all(isinstance(n, int | float) for n in value):  # type: ignore[attr-defined]
        raise _wrong("a box is four numbers", where, repr(value)[:80], box_format)
    found = [float(n) for n in value]  # type: ignore[attr-defined]
    if len(found) != 4:
        raise _wrong("a box is four numbers", where, f"{len(found)} numbers", box_format)
    left, top, right, bottom = found
    if box_format == "xywh":
        right, bottom = left + right, top + bottom
    if box_format in ("xyxy_1", "xyxy_1000"):
        unit = 1.0 if box_format == "xyxy_1" else 1000.0
        left, right = left * size[0] / unit, right * size[0] / unit
        top, bottom = top * size[1] / unit, bottom * size[1] / unit
    cut = Box(max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1]))
    # Not `> 1` anywhere: that is false for NaN.
    near = all(abs(a - b) <= 1 for a, b in zip((left, top, right, bottom), cut, strict=True))
    if not near or cut.width <= 0 or cut.height <= 0:
        raise RowError(
            "crops_outside",
            "a box is empty or leaves its picture",
            where=where,
            got=found,
            expected=f"{box_format} inside {size[0]} x {size[1]} pixels",
        )
    return cut


def _size_of(path: str, where: str) -> tuple[int, int]:
    try:
        return picture_size(path)
    except ImageError as error:
        raise RowError(
            "unreadable_pictures" if Path(path).exists() else "missing_pictures",
            error.what,
            where=f"{where}, {path}",
            got=error.got,
        ) from error


def _at(value: Any, key: str) -> Any:
    """What lies under ``key``, or under its parts between dots; None if nothing does."""
    if isinstance(value, Mapping) and key in value:
        return value[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = Counter(value).most_common(1)[0][0]  # several people answered: what most said
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(f"an annotation's {name} is a text", where, repr(value)[:80])
    return value.strip()


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value or ()
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise _wrong("an annotation's kinds are names", where, repr(value)[:80])
    return tuple(names)


def _boxes(value: Any, where: str) -> list[object]:
    if not isinstance(value, list | tuple):
        raise _wrong("an annotation's boxes are a list", where, repr(value)[:80])
    alone = len(value) == 4 and all(isinstance(n, int | float) for n in value)
    return [list(value)] if alone else list(value)


def _wrong(what: str, where: str, got: object, expected: object = None) -> RowError:
    return RowError("not_a_row", what, where=where, got=got, expected=expected)
