"""Rows to a file of published JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vpt_agent.data.rows import ImageRef, Row, row_json
from vpt_agent.errors import UserError


def write_rows(
    rows: Iterable[Row], path: str | Path, *, absolute: bool = False, overwrite: bool = False
) -> int:
    """Write ``rows`` as a JSON array (``.json``) or JSON lines (``.jsonl``); gives their number.

    Paths of pictures are written relative to the file's folder where they lie in it (so the folder
    can be moved), else absolute; always absolute with ``absolute`` (the released trainer does not
    find relative paths with a crop). A file that is there is left alone unless ``overwrite``.
    """
    folder = Path(path).parent.resolve()

    def placed(ref: ImageRef) -> ImageRef:
        whole = Path(os.path.abspath(ref.path))
        inside = whole.is_relative_to(folder) and not absolute
        return ImageRef(str(whole.relative_to(folder) if inside else whole), ref.crop)

    def values() -> Iterable[Mapping[str, Any]]:
        for row in rows:
            pictures = {tag: tuple(map(placed, refs)) for tag, refs in row.pictures.items()}
            yield row_json(replace(row, pictures=pictures))

    return write_json(values(), path, overwrite=overwrite)


def write_json(
    values: Iterable[Mapping[str, Any]], path: str | Path, *, overwrite: bool = False
) -> int:
    """Write JSON objects as an array or as lines, by the file's ending; gives their number.

    The file appears when it is complete.
    """
    target = Path(path)
    lines = target.suffix.lower() == ".jsonl"
    if not lines and target.suffix.lower() != ".json":
        raise UserError("rows are written to .json or .jsonl files", where=target)
    if target.exists() and not overwrite:
        raise UserError(
            "a file is never written over another one",
            where=target,
            fix="name another file, or remove this one",
        )
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    count = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            for value in values:
                if not lines:
                    file.write(",\n" if count else "[\n")
                file.write(json.dumps(value, ensure_ascii=False) + ("\n" if lines else ""))
                count += 1
            if not lines:
                file.write("\n]\n" if count else "[]\n")
        part.replace(target)
    except OSError as error:
        raise UserError(
            "the file cannot be written", where=target, got=error.strerror or error
        ) from error
    finally:
        if part.exists():
            part.unlink()
    return count
