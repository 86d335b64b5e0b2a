"""Rows of a file, a list or a table: read lazily, checked, with paths and encoders put right."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

from vpt_agent.data.check import Depth, problems
from vpt_agent.data.files import IndexedItems, Item, Items, JsonFile, open_items
from vpt_agent.data.report import CheckReport
from vpt_agent.data.retarget import retarget
from vpt_agent.data.rows import PUBLISHED_TAGS, ImageRef, Row, RowError, Rules, column_of, read_row
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import PUBLISHED, PerceptionTable

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How raw rows become :class:`Row`.

    ``folder`` is where relative paths begin. ``remap`` maps the beginnings of paths (whole folders)
    to others, the longest first, before ``folder``. ``columns`` renames keys: rows that keep their
    clip pictures under the name of the published dataset description are read with
    ``{"depth_images": "clip_images"}``. ``table`` re-targets rows to the kinds of a model, with
    ``encoder`` where it has several (see :func:`retarget`). ``own_tags`` are tags of kinds of one's
    own whose lists may stand in rows, where there is no ``table``. ``ignore`` and ``rules`` as in
    :func:`read_row`; ``pictures`` says how far pictures are checked on reading.
    """

    folder: Path | None = None
    remap: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    table: PerceptionTable | None = None
    encoder: str | None = None
    own_tags: Sequence[str] = ()
    ignore: Collection[str] = ()
    rules: Rules = "strict"
    pictures: Depth = "none"

    def __post_init__(self) -> None:
        if self.pictures not in get_args(Depth):
            raise UserError(
                "unknown depth of checking",
                got=self.pictures,
                expected=", ".join(get_args(Depth)),
            )

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags that may stand in rows: the published ones and the model's own."""
        own = (kind.tag for kind in self.table.kinds) if self.table is not None else ()
        return tuple(dict.fromkeys((*PUBLISHED_TAGS, *own, *self.own_tags)))

    def row(self, item: Item) -> Row:
        """The row of an item; what is wrong with it is a :class:`RowError`."""
        where, value = item
        if isinstance(value, RowError):
            raise value
        row = read_row(
            self._renamed(value, where),
            where=where,
            tags=self.tags,
            ignore=self.ignore,
            rules=self.rules,
        )
        pictures = {tag: tuple(map(self._placed, refs)) for tag, refs in row.pictures.items()}
        row = replace(row, pictures=pictures)
        return row if self.table is None else retarget(row, self.table, encoder=self.encoder)

    def _renamed(self, value: object, where: str) -> object:
        if not isinstance(value, Mapping):
            return value
        # Tables fill columns that a row lacks with None: those say nothing.
        given = {key: item for key, item in value.items() if item is not None}
        taken = sorted(old for old, new in self.columns.items() if old in given and new in given)
        if taken:
            raise RowError(
                "unknown_keys",
                "two keys of a row would become one",
                where=where,
                got=", ".join(f"{old} and {self.columns[old]}" for old in taken),
            )
        lost = [k for k in given if k == "depth_images" and k not in self.columns]
        wants = column_of(PUBLISHED["clip"].tag)
        if lost and wants not in given and "depth_images" not in self.ignore:
            raise RowError(
                "unknown_keys",
                "a row has keys that nothing reads",
                where=where,
                got=", ".join(lost),
                expected=", ".join(("messages", *map(column_of, self.tags))),
                fix=f"if they are clip pictures, read with the column depth_images as {wants}",
            )
        return {self.columns.get(key, key): item for key, item in given.items()}

    def prefix_of(self, path: str) -> str | None:
        """The longest prefix of ``remap`` that is a folder of ``path``, or ``path`` itself."""
        fits = [p for p in self.remap if path == p or path.startswith(p.rstrip("/") + "/")]
        return max(fits, key=len, default=None)

    def _placed(self, ref: ImageRef) -> ImageRef:
        path, prefix = ref.path, self.prefix_of(ref.path)
        if prefix is not None:
            new = self.remap[prefix].rstrip("/") or "/"
            path = str(Path(new) / path[len(prefix) :].lstrip("/"))
        if self.folder is not None:
            path = str(self.folder / path)
        return ImageRef(path, ref.crop)


class RowStream(Iterable[Row]):
    """Rows that come one after the other; each iteration begins anew.

    With ``on_error="skip"`` rows with a fault are left out and counted in ``report``, the report
    of the latest iteration; else the first one is raised.
    """

    def __init__(self, items: Items, reading: Reading, on_error: OnError = "raise") -> None:
        if on_error not in ("raise", "skip"):
            raise UserError("unknown on_error", got=on_error, expected="raise or skip")
        self.items, self.reading, self.on_error = items, reading, on_error
        self.name = items.name
        self.report = CheckReport(items.name)

    def fingerprint(self) -> str | None:
        """Of the raw rows: it changes when they do (None: that is not known)."""
        return self.items.fingerprint()

    def __iter__(self) -> Iterator[Row]:
        self.report = CheckReport(self.name)
        for item in self.items:
            try:
                row = self._checked(item)
            except RowError as error:
                self.report.add(error)
                if self.on_error == "raise":
                    raise
                continue
            self.report.add()
            yield row

    def _checked(self, item: Item) -> Row:
        row = self.reading.row(item)
        if self.reading.pictures != "none":
            for error in problems(row, pictures=self.reading.pictures, table=self.reading.table):
                raise error
        return row

    def check(
        self,
        *,
        pictures: Depth = "headers",
        table: PerceptionTable | None = None,
        limit: int | None = None,
    ) -> CheckReport:
        """Read every row (the first ``limit``) and say what is wrong; stops at nothing.

        See :func:`~vpt_agent.data.check.problems` for ``pictures`` and ``table`` (default: the
        model's that rows are re-targeted to, if any).
        """
        table = table or self.reading.table
        report = CheckReport(self.name)
        seen: set[str] = set()
        unused = set(self.reading.remap)
        for number, item in enumerate(self.items):
            if number == limit:
                break
            unused -= {self.reading.prefix_of(path) or "" for path in _paths(item[1])}
            try:
                row = self.reading.row(item)
            except RowError as error:
                report.add(error)
                continue
            report.add(*problems(row, pictures=pictures, table=table))
            if pictures != "none":
                seen |= {ref.path for refs in row.pictures.values() for ref in refs}
        report.pictures, report.unused_remaps = len(seen), tuple(sorted(unused))
        return report


class Rows(RowStream, Sequence[Row]):
    """Rows with numbers. Nothing is read before it is asked for, and nothing is kept.

    With ``on_error="skip"`` the first look at the length or at a number reads all rows once, to
    leave out those with a fault; ``report`` counts them.
    """

    def __init__(self, items: IndexedItems, reading: Reading, on_error: OnError = "raise") -> None:
        super().__init__(items, reading, on_error)
        self.indexed = items
        self._good: list[int] | None = None

    def __len__(self) -> int:
        return len(self.indexed) if self.on_error == "raise" else len(self._kept())

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative numbers, and the IndexError of a range
        if self.on_error == "skip":
            number = self._kept()[number]
        return self._checked(self.indexed.item(number))

    def _kept(self) -> list[int]:
        if self._good is None:
            good, report = list[int](), CheckReport(self.name)
            for number, item in enumerate(self.items):
                try:
                    self._checked(item)
                except RowError as error:
                    report.add(error)
                    continue
                report.add()
                good.append(number)
            self._good, self.report = good, report
        return self._good


def _paths(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for column in value.values():
            if isinstance(column, list):
                yield from (path for path in column if isinstance(path, str))


class ReadingOptions(TypedDict, total=False):
    """The fields of :class:`Reading`, as :func:`load_rows` and :func:`stream_rows` take them: a
    folder may be text, and None leaves the default (for files: the folder that they lie in)."""

    folder: str | Path | None
    remap: Mapping[str, str] | None
    columns: Mapping[str, str] | None
    table: PerceptionTable | None
    encoder: str | None
    own_tags: Sequence[str]
    ignore: Collection[str]
    rules: Rules
    pictures: Depth


def load_rows(
    source: object,
    *,
    name: str | None = None,
    on_error: OnError = "raise",
    **options: Unpack[ReadingOptions],
) -> Rows:
    """Rows of a ``.json`` or ``.jsonl`` file, of a list, or of a local table of `datasets`.

    ``name`` is what rows without a file are called in errors. With ``pictures`` other than ``none``
    a row whose pictures or calls have a fault is an error too. ``on_error="skip"`` leaves rows with
    a fault out, and counts them. See :class:`Reading` for the other options.
    """
    items = open_items(source, name=name)
    if not isinstance(items, IndexedItems):
        raise UserError(
            "these rows have no numbers: they can only be streamed",
            got=type(source).__name__,
            fix="use stream_rows",
        )
    return Rows(items, _reading(items, options), on_error)


def stream_rows(
    source: object,
    *,
    name: str | None = None,
    on_error: OnError = "raise",
    **options: Unpack[ReadingOptions],
) -> RowStream:
    """As :func:`load_rows`, for any iterable too: a streamed table of `datasets`
    (:func:`open_dataset`), or whatever can be iterated again and gives the JSON objects."""
    items = open_items(source, name=name)
    return RowStream(items, _reading(items, options), on_error)


def _reading(items: Items, options: ReadingOptions) -> Reading:
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if "folder" in given:
        given["folder"] = Path(given["folder"])
    elif isinstance(items, JsonFile):
        given["folder"] = items.path.parent
    return Reading(**given)  # a misspelt option is a TypeError there
