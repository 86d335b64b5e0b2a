"""Recorded runs as rows, and as labels: what the model chose is told from what was put upon it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vpt_agent.data.check import ALL_KINDS
from vpt_agent.data.encode import IGNORED, Encoded
from vpt_agent.data.rows import ImageRef, Message, Row, RowError
from vpt_agent.errors import UserError
from vpt_agent.tokens.grammar import Grammar, ParsedCall, ParseError
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_TAG,
    VISION_END,
    VISION_START,
    PerceptionTable,
    ResolvedTable,
)
from vpt_agent.trace import (
    Decoded,
    Event,
    PerceptionAppended,
    PromptRendered,
    RunFinished,
    RunStarted,
    ToolCalled,
    ToolFinished,
    ToolRejected,
    Trace,
    ViewInfo,
)
from vpt_agent.trace.record import chain_of_runs
from vpt_agent.types import Box

_TURN = re.compile(
    f"{re.escape(IM_START)}(system|user|assistant)\n(.*?){re.escape(IM_END)}", re.DOTALL
)
_LAYOUT_TOKENS = (IM_START, IM_END, VISION_START, VISION_END)


@dataclass(frozen=True)
class TracedCall:
    """A call of a run. ``outside`` says that the user's ``tool_choice`` (or the user) asked for it:
    such a call carries no loss. Tokens that only the grammar left open do not make it so."""

    call_id: str
    kind: str | None
    outside: bool


def traced_calls(trace: Trace, run: str | None = None) -> tuple[TracedCall, ...]:
    """The calls of ``run`` (default: the last) and of the runs it continues, in order.

    With a ``tool_choice`` that demands a call, the first call of the first turn is from outside,
    even where the model still chose between kinds.
    """
    choices: dict[str, str] = {}
    met: set[str] = set()
    calls = []
    for event in _events(trace, run):
        if isinstance(event, RunStarted):
            choices[event.run] = event.tool_choice
        if isinstance(event, ToolCalled):
            demanded = choices.get(event.run, "auto") not in ("auto", "none")
            first = event.turn == 1 and event.run not in met
            met.add(event.run)
            outside = event.origin in ("forced", "user") or (demanded and first)
            calls.append(TracedCall(event.call_id, event.kind, outside))
    return tuple(calls)


def encoded_from_trace(trace: Trace, table: ResolvedTable, run: str | None = None) -> Encoded:
    """The run's own tokens with labels [L]: no second rendering, no second tokenising.

    As in rows: all that the assistant said carries loss, grammar-forced ends of its own calls too,
    but for control tokens. Calls from outside and torn calls carry none.
    """
    record = trace.record(run)
    outside = {call.call_id for call in traced_calls(trace, run) if call.outside}
    called = [e for e in _events(trace, run) if isinstance(e, ToolCalled)]
    grammar, labels = Grammar(table), list[int]()
    waiting = iter(called)
    for event in _events(trace, run):
        if not isinstance(event, PromptRendered | Decoded | PerceptionAppended):
            continue
        ids = [i for span in event.spans for i in span.ids]
        if not isinstance(event, Decoded):
            labels += [IGNORED] * len(ids)
            continue
        said = [IGNORED if i in table.control_ids else i for i in ids]
        state, parsed = grammar.start, None
        for place, token in enumerate(ids):
            state, parsed = grammar.step(state, token)
            if parsed is None:
                continue
            # An id that starts the next call ends a torn one without belonging to it.
            end = place + (isinstance(parsed, ParsedCall) or token == parsed.tokens[-1])
            call = next(waiting, None) if isinstance(parsed, ParsedCall) else None
            if call is None or call.call_id in outside:
                start = end - len(parsed.tokens)
                said[start:end] = [IGNORED] * (end - start)
        torn = grammar.finish(state)
        if isinstance(torn, ParseError):
            said[len(said) - len(torn.tokens) :] = [IGNORED] * len(torn.tokens)
        labels += said
    return Encoded(record, tuple(labels))


def rows_from_trace(
    trace: Trace | str | Path,
    *,
    table: PerceptionTable = ALL_KINDS,
    pictures: str | Path | None = None,
    failed_calls: Literal["skip", "keep"] = "skip",
) -> tuple[Row | RowError, ...]:
    """A row for each conversation of a trace (a run folder, or a :class:`Trace`).

    The row is what was said, to the letter: encoded by the same model it gives the run's own ids.
    Crops stand as crops of their originals. Pictures stay in the run folder; those of a trace in
    memory are written into ``pictures``. ``meta["forced_calls"]`` numbers the calls that came from
    outside (see :class:`TracedCall`). A conversation that makes no row comes as a
    :class:`RowError` in its place: a run that was not answered, a failed call (unless
    ``failed_calls="keep"``), a result inside a turn, a text that spells the layout's tokens.
    """
    if not isinstance(trace, Trace):
        trace = Trace.read(trace)
    continued = {e.continues for e in trace.events if isinstance(e, RunStarted)}
    found: list[Row | RowError] = []
    for run in trace.runs:
        if run in continued:
            continue
        try:
            maker = _Maker(trace, run, table, None if pictures is None else Path(pictures))
            found.append(maker.row(keep_failed=failed_calls == "keep"))
        except RowError as error:
            found.append(error)
    return tuple(found)


def run_folders(folder: str | Path) -> tuple[Path, ...]:
    """The run folders in ``folder`` (or itself), sorted; none is a :class:`UserError`."""
    base = Path(folder)
    found = sorted(path.parent for path in base.rglob("events.jsonl"))
    if not found:
        raise UserError("there are no recorded runs here", where=base, fix="record with --trace")
    return tuple(found)


def _events(trace: Trace, run: str | None) -> Iterator[Event]:
    runs = set(chain_of_runs(trace, run))
    return (event for event in trace.events if event.run in runs)


class _Maker:
    """Makes the row of one conversation."""

    def __init__(
        self, trace: Trace, run: str, table: PerceptionTable, pictures: Path | None
    ) -> None:
        self.trace, self.run, self.table, self.pictures = trace, run, table, pictures
        self.events = tuple(_events(trace, run))
        self.where = f"{trace.directory or 'trace'}, {run}"
        self.originals: list[str] = []
        self.sources: dict[str, str] = {}  # call id -> the view it encoded again
        self.lists: dict[str, list[ImageRef]] = {IMAGE_TAG: []}

    def row(self, *, keep_failed: bool) -> Row:
        self._check_outcome(keep_failed)
        text = "".join(self._texts())
        turns = _TURN.findall(text)
        if turns and turns[0][0] == "system":
            turns = turns[1:]
        messages = [Message(role, content) for role, content in turns if role != "system"]
        whole = "\n".join(f"{IM_START}{role}\n{content}{IM_END}" for role, content in turns)
        in_turn = [m.role for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        if not messages or not in_turn or not text.endswith(whole):
            raise self._no_row("a run is not in the layout of rows")
        for message in messages:
            if any(token in message.content for token in _LAYOUT_TOKENS):
                raise self._no_row("a text of the run spells tokens of the layout")
        row = Row(
            tuple(messages),
            {tag: tuple(refs) for tag, refs in self.lists.items()},
            self.where,
            self._meta(messages),
        )
        if any(row.tags(tag) != len(refs) for tag, refs in self.lists.items()):
            raise self._no_row("a text of the run spells the tag of a picture")
        return row

    def _no_row(self, what: str, got: object = None) -> RowError:
        return RowError("not_a_row", what, where=self.where, got=got)

    def _check_outcome(self, keep_failed: bool) -> None:
        ended = [e for e in self.events if isinstance(e, RunFinished)]
        if {e.run for e in self.events} - {e.run for e in ended}:
            raise self._no_row("a run did not end")
        for end in ended:
            if end.status != "answered":
                raise self._no_row("a run was not answered", end.error or end.limit)
        if any(isinstance(e, Decoded) and e.stop == "inline" for e in self.events):
            raise self._no_row("a result stands inside a turn")
        failed = [e.error for e in self.events if isinstance(e, ToolRejected | ToolFinished)]
        for error in failed:
            if error is not None and not keep_failed:
                raise RowError(
                    "results", "a call of the run failed", where=self.where, got=error.message
                )

    def _texts(self) -> Iterator[str]:
        """The conversation as text, tags for pictures; fills the lists of pictures on the way."""
        for event in self.events:
            if isinstance(event, RunStarted):
                self.originals += [view.id for view in event.views]
            elif isinstance(event, ToolCalled):
                given = event.arguments.get("source")
                latest = self.originals[-1] if self.originals else ""
                self.sources[event.call_id] = str(given) if given is not None else latest
            elif isinstance(event, PromptRendered | Decoded | PerceptionAppended):
                text = ""
                for span in event.spans:
                    text += span.text if span.source != "visual" else self._shown(span)
                for tag in self.lists:
                    text = text.replace(f"{VISION_START}{tag}{VISION_END}", tag)
                yield text

    def _shown(self, span: Any) -> str:
        if span.kind is not None and span.kind not in self.table:
            raise RowError(
                "kinds",
                "a run used a perception kind that is not in the table",
                where=self.where,
                got=span.kind,
                expected=", ".join(kind.name for kind in self.table.kinds),
                fix="give the table of the model that ran",
            )
        tag = IMAGE_TAG if span.kind is None else self.table[span.kind].tag
        view = span.view or self.sources.get(span.call_id or "", "")
        self.lists.setdefault(tag, []).append(self._ref(view))
        return tag

    def _ref(self, view_id: str) -> ImageRef:
        views: Mapping[str, ViewInfo] = self.trace.views
        if view_id not in views:
            raise self._no_row("a run shows a picture that its trace does not hold", view_id)
        view = views[view_id]
        if view.parent is not None and view.root in views:
            left, top, right, bottom = (int(n) for n in view.box)
            whole = (left, top, right, bottom) == view.box
            if whole and self._is_crop(view, views[view.root]):
                return ImageRef(self._path(views[view.root].blob), (left, top, right, bottom))
        return ImageRef(self._path(view.blob))

    def _is_crop(self, view: ViewInfo, root: ViewInfo) -> bool:
        """Whether the view is nothing but a part of the original, pixel for pixel."""
        if view.size != (view.box[2] - view.box[0], view.box[3] - view.box[1]):
            return False
        box = Box(*view.box)
        cut = self.trace.picture(root.blob).crop(tuple(int(n) for n in box))  # type: ignore[arg-type]
        return cut.tobytes() == self.trace.picture(view.blob).tobytes()

    def _path(self, blob: str) -> str:
        if self.trace.directory is not None and self.pictures is None:
            return str(self.trace.directory / "blobs" / blob)
        if self.pictures is None:
            raise UserError(
                "the pictures of this trace are in memory only",
                where=self.where,
                fix="name a folder for them: pictures=",
            )
        path = self.pictures / blob
        if not path.exists():
            self.pictures.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.trace.blob(blob))
        return str(path)

    def _meta(self, messages: list[Message]) -> dict[str, Any]:
        calls = traced_calls(self.trace, self.run)
        kinds = list(dict.fromkeys(call.kind for call in calls if call.kind is not None))
        phrases = [self.table[kind].trigger for kind in kinds if kind in self.table]
        asked = "\n".join(m.content for m in messages if m.role == "user")
        answers = [e.text for e in self.events if isinstance(e, RunFinished)]
        meta: dict[str, Any] = {
            "id": self.run,
            "kind": kinds[0] if kinds else "direct",
            "tools": kinds,
            "answer": answers[-1],
            "trigger": any(phrase and phrase in asked for phrase in phrases),
        }
        outside = [number for number, call in enumerate(calls, 1) if call.outside]
        return meta | ({"forced_calls": outside} if outside else {})
