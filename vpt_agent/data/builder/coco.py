"""Boxes in COCO's layout, with questions or captions beside them, as annotations."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vpt_agent.data.builder.annotations import Annotation, _text, read_box
from vpt_agent.data.files import JsonFile
from vpt_agent.data.rows import RowError
from vpt_agent.errors import UserError


class CocoAnnotations(Iterable[Annotation | RowError]):
    """Questions about pictures whose boxes lie in a COCO file.

    ``boxes`` is COCO's instances file (``images``, ``annotations`` with ``image_id``, ``bbox`` as
    left, top, width, height, ``categories``). ``texts`` holds entries with an ``image_id`` and
    either a ``question`` and its ``answer``, or a ``caption`` (then ``question`` is asked): a JSON
    lines file, or JSON with the entries in a list or under ``questions`` or ``annotations`` (as
    VQA and COCO have them; answers of a VQA file are found by ``question_id``). An entry names its
    boxes by ``annotation_ids``, or by ``category`` (a name or an id: all of that category in the
    picture), or has a ``bbox`` of its own; one that names none has none. Pictures lie in
    ``folder`` (default: where ``boxes`` lies).
    """

    def __init__(
        self,
        boxes: str | Path,
        texts: str | Path,
        *,
        answers: str | Path | None = None,
        folder: str | Path | None = None,
        question: str = "Describe the image.",
    ) -> None:
        self.folder = Path(boxes).parent if folder is None else Path(folder)
        self.question, self.texts = question, Path(texts)
        data = _whole(boxes)
        if not isinstance(data, Mapping) or not isinstance(data.get("images"), list):
            raise UserError(
                "this is no file of COCO's layout",
                where=boxes,
                expected='{"images": [...], "annotations": [...], "categories": [...]}',
            )
        self.images: dict[Any, Mapping[str, Any]] = {i["id"]: i for i in data["images"]}
        self.by_id: dict[Any, Mapping[str, Any]] = {}
        self.by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for found in data.get("annotations", ()):
            self.by_id[found.get("id")] = found
            self.by_image[found.get("image_id")].append(found)
        self.categories = {c["name"]: c["id"] for c in data.get("categories", ())}
        self.answers = {
            a["question_id"]: a.get("multiple_choice_answer", a.get("answer"))
            for a in ([] if answers is None else _entries(_whole(answers), answers))
        }

    def __iter__(self) -> Iterator[Annotation | RowError]:
        lines = self.texts.suffix.lower() in (".jsonl", ".ndjson")
        entries: Iterable[object] = (
            (value for _, value in JsonFile(self.texts))
            if lines
            else _entries(_whole(self.texts), self.texts)
        )
        for number, entry in enumerate(entries):
            where = f"{self.texts.name}, entry {number}"
            try:
                yield self._annotation(entry, where)
            except RowError as error:
                yield error

    def _annotation(self, entry: Any, where: str) -> Annotation:
        if isinstance(entry, RowError):
            raise entry
        image = self.images.get(entry.get("image_id")) if isinstance(entry, Mapping) else None
        if image is None:
            raise RowError(
                "missing_pictures",
                "an entry names no picture of the boxes' file",
                where=where,
                got=repr(entry)[:100],
                expected="image_id of one of its images",
            )
        answer = entry.get(
            "caption", entry.get("answer", self.answers.get(entry.get("question_id")))
        )
        path = self.folder / str(image["file_name"])
        size = (int(image["width"]), int(image["height"]))
        return Annotation(
            str(path),
            _text(entry.get("question", self.question), "question", where),
            _text(answer, "answer", where),
            tuple(read_box(box, "xywh", size, where) for box in self._boxes(entry, where)),
            id=str(entry.get("question_id", entry.get("id", ""))),
            type=str(entry.get("question_type", entry.get("type", ""))),
            size=size,
            where=where,
        )

    def _boxes(self, entry: Mapping[str, Any], where: str) -> list[object]:
        if "annotation_ids" in entry:
            missing = [i for i in entry["annotation_ids"] if i not in self.by_id]
            if missing:
                raise RowError(
                    "paths", "an entry names boxes that are not there", where=where, got=missing
                )
            return [self.by_id[i]["bbox"] for i in entry["annotation_ids"]]
        if "category" in entry:
            wanted = self.categories.get(entry["category"], entry["category"])
            here = self.by_image[entry["image_id"]]
            return [a["bbox"] for a in here if a.get("category_id") == wanted]
        return [entry["bbox"]] if "bbox" in entry and "caption" not in entry else []


def _whole(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError("the file cannot be read as JSON", where=path, got=error) from error


def _entries(data: Any, path: str | Path) -> list[Any]:
    if isinstance(data, Mapping):
        # A captions file and an answers file have "annotations", a questions file "questions".
        data = data.get("questions", data.get("annotations"))
    if not isinstance(data, list):
        raise UserError(
            "the file holds no list of entries",
            where=path,
            expected='[...], {"questions": [...]} or {"annotations": [...]}',
        )
    return data
