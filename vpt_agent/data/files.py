"""Where rows lie: JSON arrays and JSON lines on disk, lists in memory, tables of `datasets`.

All of them give pairs ``(where, value)``; a value that is no JSON is the :class:`RowError` itself,
so that one bad line does not hide the rest.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vpt_agent.data.rows import RowError
from vpt_agent.errors import MissingExtraError, UserError

Item = tuple[str, object]
CHUNK = 1 << 20
_BLANK = re.compile(r"\s*")


class Items(Protocol):
    """A source of raw rows that can begin again.

    ``fingerprint`` changes when the rows do; None where that cannot be known without reading them.
    """

    name: str

    def fingerprint(self) -> str | None:
        """What the rows are, in a few characters."""

    def __iter__(self) -> Iterator[Item]:
        """Every item with the words that name it."""


@runtime_checkable
class IndexedItems(Items, Protocol):
    """A source whose items can be had by number."""

    def __len__(self) -> int:
        """How many there are."""

    def item(self, index: int) -> Item:
        """Item ``index`` from 0."""


class JsonFile:
    """A ``.json`` file with one array, or a ``.jsonl`` file: one object a line.

    Read piece by piece, never as a whole. Items are looked up by their place in the file, which is
    found in one pass when it is first needed. A missing file, or an array that cannot be read to
    its end, is a :class:`UserError`; a line that is no JSON is an item.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self.lines = self.path.suffix.lower() in (".jsonl", ".ndjson")
        self._places: array[int] | None = None  # start and length of each item, in bytes
        if not self.lines and self.path.suffix.lower() != ".json":
            raise UserError(
                "rows are read from .json or .jsonl files",
                where=path,
                fix="rename the file, or convert it",
            )
        if not self.path.is_file():
            raise UserError("there is no such file", where=path, fix="check the path")

    def __iter__(self) -> Iterator[Item]:
        for _, _, number, value in self._walk():
            yield self._where(number), value

    def __len__(self) -> int:
        return len(self._index()) // 3

    def item(self, index: int) -> Item:
        """Item ``index``: read at its place."""
        start, length, number = self._index()[3 * index : 3 * index + 3]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        where = self._where(number)
        return where, _parsed(data, where)

    def fingerprint(self) -> str:
        """The SHA-256 of the file as it was when first asked."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError("the file cannot be read", where=self.path, got=error) from error

    def _where(self, number: int) -> str:
        return f"{self.path.name}, {'line' if self.lines else 'row'} {number}"

    def _index(self) -> array[int]:
        if self._places is None:
            places = array("Q")
            for start, length, number, _ in self._walk():
                places.extend((start, length, number))
            self._places = places
        return self._places

    def _walk(self) -> Iterator[tuple[int, int, int, object]]:
        """Start and length in bytes, number (of the line from 1, or of the row from 0), value."""
        try:
            yield from self._walk_lines() if self.lines else self._walk_array()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("the file cannot be read", where=self.path, got=error) from error

    def _walk_lines(self) -> Iterator[tuple[int, int, int, object]]:
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield start, len(line), number, _parsed(line, self._where(number))
                start += len(line)

    def _walk_array(self) -> Iterator[tuple[int, int, int, object]]:
        decode, number = json.JSONDecoder().raw_decode, 0
        with _Text(self.path) as rest:
            if rest.peek() != "[":
                raise self._broken("it does not begin with [")
            rest.skip(1)
            if rest.peek() == "]":
                return
            while True:
                rest.peek()
                while True:
                    try:
                        value, end = decode(rest.text, rest.at)
                    except json.JSONDecodeError as error:
                        if not rest.more():
                            why = f"after {rest.offset} bytes: {error.msg}"
                            raise self._broken(why) from error
                        continue
                    # A number could go on in the next piece; whatever follows says it does not.
                    if end < len(rest.text) or not rest.more():
                        break
                start = rest.offset
                rest.skip(end - rest.at)
                yield start, rest.offset - start, number, value
                number += 1
                mark = rest.peek()
                if mark == "]":
                    return
                if mark != ",":
                    raise self._broken(f"after {rest.offset} bytes: no comma between two items")
                rest.skip(1)

    def _broken(self, why: str) -> UserError:
        return UserError(
            "the file is no JSON array",
            where=self.path,
            got=why,
            expected="[{...}, {...}]",
            fix="name it .jsonl if each line is an object" if "begin" in why else None,
        )


class _Text:
    """A UTF-8 file, piece by piece: ``text`` is at hand, read up to ``at``, which is byte
    ``offset`` of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.text, self.at, self.offset = path, "", 0, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def __enter__(self) -> _Text:
        self.file = self.path.open("rb")
        if self.file.read(3) == codecs.BOM_UTF8:
            self.offset = 3
        else:
            self.file.seek(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def more(self) -> bool:
        """Read on, False at the end. Pieces grow with what is at hand: long items cost little."""
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.text = self.text[self.at :] + self.decoder.decode(data, final=not data)
        self.at = 0
        return bool(data)

    def skip(self, count: int) -> None:
        """Go on by ``count`` characters."""
        self.offset += len(self.text[self.at : self.at + count].encode("utf-8"))
        self.at += count

    def peek(self) -> str:
        """Go on to the next character that is no space, and give it; "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self.skip(blank.end() - self.at if blank else 0)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


def _parsed(data: bytes, where: str) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return RowError("not_json", "this is no JSON", where=where, got=str(error))


class ListItems:
    """Rows in memory, or a table of `datasets`: whatever has a length and is indexed."""

    def __init__(self, values: Sequence[object], name: str = "rows") -> None:
        self.values, self.name = values, name

    def fingerprint(self) -> str | None:
        """That of a table of `datasets`; nothing is known of a list."""
        return _table_print(self.values)

    def __iter__(self) -> Iterator[Item]:
        for index in range(len(self.values)):
            yield self.item(index)

    def __len__(self) -> int:
        return len(self.values)

    def item(self, index: int) -> Item:
        """Item ``index``."""
        return f"{self.name}, row {index}", self.values[index]


class StreamItems:
    """Rows that come one after the other: a streamed table of `datasets`, any iterable."""

    def __init__(self, values: Iterable[object], name: str = "stream") -> None:
        if isinstance(values, Iterator):
            raise UserError(
                "a stream of rows must be able to begin again",
                where=name,
                got=type(values).__name__,
                fix="pass what it iterates over: an object with __iter__",
            )
        self.values, self.name = values, name

    def fingerprint(self) -> str | None:
        """None: what comes is known when it has come."""
        return None

    def __iter__(self) -> Iterator[Item]:
        for index, value in enumerate(_each(self.values)):
            yield f"{self.name}, row {index}", value


BLOCK = 64


def _each(values: Iterable[object]) -> Iterator[object]:
    """Every value. In a worker of torch a streamed table of `datasets` would give a part of its
    rows, by itself; whoever reads here deals out rows himself, so it is read by blocks instead."""
    if not _of_datasets(values):
        yield from values
        return
    table: Any = values
    for block in table.iter(batch_size=BLOCK):
        columns = list(block)
        for cells in zip(*block.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))


def _of_datasets(values: object) -> bool:
    return type(values).__module__.partition(".")[0] == "datasets"


def _table_print(values: object) -> str | None:
    found = getattr(values, "_fingerprint", None) if _of_datasets(values) else None
    return None if found is None else str(found)


def open_items(source: object, *, name: str | None = None) -> Items:
    """The items of a path, a list, or a table of `datasets` (local or streamed)."""
    if isinstance(source, str | Path):
        return JsonFile(source)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UserError(
            "rows come from a file, a list or a table of `datasets`", got=type(source).__name__
        )
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        values: Any = source
        return ListItems(values, name or "rows")
    return StreamItems(source, name or "stream")


def open_dataset(
    path: str,
    *,
    split: str = "train",
    config: str | None = None,
    files: str | Sequence[str] | None = None,
    streaming: bool = True,
) -> Any:
    """A table of Hugging Face `datasets`: of the hub, or of local files.

    ``path`` is a dataset's name, or a builder's (``json``) with its ``files``. Streamed tables are
    read as they come, and nothing is stored. Needs the extra ``data``.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "reading with `datasets` needs a package that is not installed",
            got="datasets",
            fix="pip install 'vpt-agent[data]'",
        ) from error
    try:
        return datasets.load_dataset(
            path, config, data_files=files, split=split, streaming=streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            "`datasets` cannot open this", where=path, got=error, expected="a dataset and its split"
        ) from error
