"""A row as token ids and labels: the published layout, label rule and truncation, and ours.

Loss (FACTS section 5): in every assistant turn all tokens up to the end of turn, call tokens
included, carry loss, but for the control tokens; nothing else does. Calls that the row's ``meta``
lists under ``forced_calls`` came from outside and carry none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from vpt_agent.data.rows import PUBLISHED_TAGS, Row, Rules
from vpt_agent.errors import UserError
from vpt_agent.prompt.vpt import FeatureSlot, Ids, PictureSlot, VPTLayout
from vpt_agent.tokens.grammar import Grammar, ParsedCall
from vpt_agent.tokens.table import (
    IMAGE_TAG,
    PUBLISHED,
    PerceptionKind,
    PerceptionTable,
    ResolvedKind,
    ResolvedTable,
)
from vpt_agent.types import Record, Span, View
from vpt_agent.vision.policy import ImagePolicy

IGNORED = -100
"""The label of a token without loss."""

DropReason = Literal["prompt", "call"]

_PUBLISHED_TOKENS = frozenset(
    token
    for tokens in PerceptionTable(tuple(PUBLISHED.values())).tokens_to_add()
    for token in tokens
)


@dataclass(frozen=True)
class Encoded:
    """A row ready for collation.

    ``record`` holds the ids as spans: ``given`` prompts, ``visual`` placeholders (with the view,
    and the kind where it is re-encoded), ``sampled`` assistant turns, ``forced`` control tokens.
    ``labels`` [L] are the ids that carry loss, else -100. ``cut`` counts the tokens left out at
    the end.
    """

    record: Record
    labels: tuple[int, ...]
    cut: int = 0


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be cut to length: its ``prompt`` is too long, or a ``call`` would be cut
    in two or parted from its result. ``length`` is the whole row's, in tokens."""

    reason: DropReason
    length: int
    where: str


@dataclass(frozen=True)
class GenerationPrompt:
    """What is given for the last turn, and the ids [n] of the answer expected."""

    record: Record
    answer: tuple[int, ...]


@dataclass(frozen=True)
class _Turn:
    source: tuple[Span, ...]
    target: tuple[Span, ...]


class _Waiting(NamedTuple):
    """A call whose result has not come yet."""

    kind: PerceptionKind
    id: str


def _asked_for(waiting: Sequence[_Waiting], tag: str, *, cut_out: bool) -> _Waiting | None:
    """The call that a picture under ``tag`` answers: of a kind that shows its results there. A part
    of a picture answers a call that says where (a grid's) before another, a whole one the other
    way round."""
    fits = [w for w in waiting if w.kind.tag == tag]
    return min(fits, key=lambda w: (w.kind.payload == "grid") != cut_out, default=None)


def infer_seqlen(source: int, target: int, budget: int) -> tuple[int, int]:
    """How many tokens of a turn's source and target are kept in ``budget``, as published.

    A side shorter than half the budget is kept whole, the target first; else both keep their
    share. The tails are cut.
    """
    if 2 * target < budget:
        kept = target
    elif 2 * source < budget:
        kept = min(target, budget - source)
    else:  # in floats, as published: they decide where a share is a whole number
        kept = min(target, int(budget * (target / (source + target))))
    return min(source, max(budget - kept, 0)), kept


def labels_of(record: Record, table: ResolvedTable) -> tuple[int, ...]:
    """Labels [L] of ``record``: its sampled tokens, without control tokens; -100 elsewhere."""
    return tuple(
        i if span.source == "sampled" and i not in table.control_ids else IGNORED
        for span in record.spans
        for i in span.ids
    )


class RowEncoder:
    """Encodes rows for one tokenizer, table and image policy.

    ``layout`` spells turns, ``policy`` says how many visual tokens a picture has, ``max_length`` is
    the most tokens of a row. Under ``strict`` rules nothing in a row's text becomes a special
    token but the model's own call tokens in assistant turns, calls must be well formed, and a row
    is never cut inside a prompt, inside a call or between a call and its result: see
    :meth:`encode`. Under ``published`` rules text is tokenised as it is and cut as
    :func:`infer_seqlen` says, wherever that falls. ``counts`` says what became of the rows.
    """

    def __init__(
        self,
        layout: VPTLayout,
        policy: ImagePolicy,
        *,
        max_length: int = 2048,
        rules: Rules = "strict",
    ) -> None:
        if max_length < 1:
            raise UserError("a row has at least one token", where="max_length", got=max_length)
        self.layout, self.policy, self.max_length, self.rules = layout, policy, max_length, rules
        if rules == "published":
            self.layout = _RawLayout(layout.tokenizer, layout.table, system=layout.system)
        self.table = layout.table.resolve(layout.tokenizer.convert_tokens_to_ids)
        self.grammar = Grammar(self.table)
        self.counts: Counter[str] = Counter()
        own = [t for tokens in layout.table.tokens_to_add() for t in tokens]
        placeholders = {kind.placeholder for kind in layout.table.kinds}
        self._calls = {t: layout.tokenizer.convert_tokens_to_ids(t) for t in own}
        self._calls = {t: i for t, i in self._calls.items() if t not in placeholders}
        self._call_text = re.compile(f"({'|'.join(map(re.escape, self._calls)) or '(?!)'})")
        self._kinds: dict[str, PerceptionKind | None] = {IMAGE_TAG: None}
        self._kinds |= {k.tag: k for k in layout.table.kinds if k.tag != IMAGE_TAG}
        every_tag = dict.fromkeys((*self._kinds, *PUBLISHED_TAGS))
        self._tag_text = re.compile(f"({'|'.join(map(re.escape, every_tag))})")

    # --- rows ---------------------------------------------------------------------------------

    def encode(self, row: Row, views: Mapping[str, Sequence[View]]) -> Encoded | Dropped:
        """The row's ids and labels, cut to ``max_length``; or why it had to be dropped.

        ``views`` are the row's pictures by tag (``row_views``). Under strict rules an answer may
        lose its tail, and turns that do not fit are left out with their pictures. A row is dropped
        whose first prompt does not fit, or whose last call would lose its end or its result.
        """
        turns = self._turns(row, views)
        cut = self._cut_published if self.rules == "published" else self._cut
        kept = cut(turns)
        length = sum(_length(t.source) + _length(t.target) for t in turns)
        self.counts["rows"] += 1
        if not isinstance(kept, list):
            self.counts[f"dropped: {kept}"] += 1
            return Dropped(kept, length, row.where)
        record = _record(span for turn in kept for span in (*turn.source, *turn.target))
        missing = length - len(record.ids)
        self.counts["shortened"] += missing > 0
        return Encoded(record, labels_of(record, self.table), missing)

    def prompt(self, row: Row, views: Mapping[str, Sequence[View]]) -> GenerationPrompt:
        """The row up to its last assistant turn, and that turn's ids.

        Cut as published under published rules. Under strict ones a prompt that leaves no room for
        its answer is a :class:`UserError`.
        """
        turns = self._turns(row, views)
        spans = [span for turn in turns for span in (*turn.source, *turn.target)]
        last = turns[-1].target
        given, answer = _record(spans[: len(spans) - len(last)]), _record(last).ids
        lengths = infer_seqlen(len(given.ids), len(answer), self.max_length)
        if lengths == (len(given.ids), len(answer)):
            return GenerationPrompt(given, tuple(answer))
        if self.rules == "strict":
            raise UserError(
                "a prompt and its answer are too long",
                where=row.where,
                got=f"{len(given.ids)} + {len(answer)} tokens",
                expected=f"at most {self.max_length}",
                fix="raise max_length",
            )
        return GenerationPrompt(
            _record(_first(given.spans, lengths[0])), tuple(answer[: lengths[1]])
        )

    # --- turns --------------------------------------------------------------------------------

    def _turns(self, row: Row, views: Mapping[str, Sequence[View]]) -> list[_Turn]:
        pictures = {tag: iter(views.get(tag, ())) for tag in self._kinds}
        waiting: list[_Waiting] = []
        turns = []
        calls = 0
        for index in range(0, len(row.messages), 2):
            user, assistant = row.messages[index : index + 2]
            source = self._source(user.content, pictures, waiting, row, first=index == 0)
            target = self._target(assistant.content, calls, row)
            made = {s.call_id: s.kind for s in target if s.call_id is not None}
            # Results stand in the very next turn: what has none there (words) gets none later.
            waiting = [
                _Waiting(self.table[kind].kind, call)
                for call, kind in made.items()
                if kind is not None
            ]
            calls += len(made)
            turns.append(_Turn(source, target))
        return turns

    def _source(
        self,
        text: str,
        pictures: Mapping[str, Iterator[View]],
        waiting: list[_Waiting],
        row: Row,
        *,
        first: bool,
    ) -> tuple[Span, ...]:
        pieces: list[str | PictureSlot | FeatureSlot] = []
        shown: list[Span] = []
        for piece in self._tag_text.split(text):
            if self._tag_text.fullmatch(piece):
                span = self._visual(piece, pictures, waiting, row)
                shown.append(span)
                view = span.view or ""
                pieces.append(FeatureSlot(view, span.kind) if span.kind else PictureSlot(view))
            elif piece:
                pieces.append(piece)
        slots = iter(shown)
        return tuple(
            Span("given", part.ids) if isinstance(part, Ids) else next(slots)
            for part in self.layout.user_turn(pieces, system=first)
        )

    def _visual(
        self,
        tag: str,
        pictures: Mapping[str, Iterator[View]],
        waiting: list[_Waiting],
        row: Row,
    ) -> Span:
        if tag not in self._kinds:
            raise UserError(
                "a row needs a perception kind that the model does not have",
                where=row.where,
                got=tag,
                expected=", ".join(self._kinds),
                fix="make the row for the model's own kind",
            )
        view = next(pictures[tag], None)
        if view is None:
            raise UserError("too few pictures for the tags in the messages", where=row.where,
                            got=f"none left for {tag}")  # fmt: skip
        kind = self._kinds[tag]
        fixed = kind.visual_tokens if kind is not None else None
        policy = self.policy.at_input(kind.input_size if kind is not None else None)
        count = fixed or policy.plan(view.size, crop=view.parent is not None).visual_tokens
        call = _asked_for(waiting, tag, cut_out=view.parent is not None)
        if call is not None:
            waiting.remove(call)
        pad = self.layout.image_pad if kind is None else self.table[kind.name].placeholder
        return Span("visual", (pad,) * count, view.id, kind.name if kind else None,
                    call.id if call else None)  # fmt: skip

    def _target(self, text: str, calls: int, row: Row) -> tuple[Span, ...]:
        """The assistant's turn as spans, its calls apart from its words."""
        spans: list[Span] = []
        outside = row.meta.get("forced_calls", ())
        state, begun = self.grammar.start, list[int]()
        ids = self._assistant_ids(text, row)
        for i in ids:
            begun.append(i)
            state, event = self.grammar.step(state, i)
            if isinstance(event, ParsedCall):
                before = begun[: len(begun) - len(event.tokens)]
                spans += [Span("sampled", tuple(before))] if before else []
                calls += 1
                spans += self._call_spans(event, f"call_{calls}", outside=calls in outside)
                begun = []
            elif event is not None:
                self._refuse_call(event.message, row)
        unfinished = self.grammar.finish(state)
        if unfinished is not None:
            self._refuse_call(unfinished.message, row)
        return (*spans, Span("sampled", (*begun, self.layout.end)))

    def _refuse_call(self, message: str, row: Row) -> None:
        if self.rules == "strict":
            raise UserError("a call in a row cannot be read", where=row.where, got=message)

    def _call_spans(self, call: ParsedCall, name: str, *, outside: bool) -> Iterator[Span]:
        if outside:  # nobody learns to make a call that was put upon the model
            yield Span("forced", call.tokens, kind=call.kind, call_id=name)
            return
        controls = self.table.control_ids
        run: list[int] = []
        for i in call.tokens:
            if run and (i in controls) != (run[-1] in controls):
                yield self._call_span(run, call.kind, name)
                run = []
            run.append(i)
        yield self._call_span(run, call.kind, name)

    def _call_span(self, ids: Sequence[int], kind: str, name: str) -> Span:
        source: Literal["forced", "sampled"] = (
            "forced" if ids[0] in self.table.control_ids else "sampled"
        )
        return Span(source, tuple(ids), kind=kind, call_id=name)

    def _assistant_ids(self, text: str, row: Row) -> list[int]:
        if self.rules == "published":
            return self.layout.encode_text(text)
        foreign = sorted(t for t in _PUBLISHED_TOKENS if t in text and t not in self._calls)
        if foreign:
            raise UserError(
                "an assistant's message holds perception tokens that cannot stand there",
                where=row.where,
                got=", ".join(foreign),
                expected="calls of "
                + (", ".join(k.name for k in self.layout.table.kinds) or "no kind"),
                fix="make the row for the model's own kinds",
            )
        ids: list[int] = []
        begun: ResolvedKind | None = None
        for piece in self._call_text.split(text):
            known = self._calls.get(piece)
            if known is None:
                ids += self._payload_ids(piece, begun) or self.layout.encode_text(piece)
            else:
                ids.append(known)
                begun = self.table.by_start(known)
        return ids

    @staticmethod
    def _payload_ids(text: str, begun: ResolvedKind | None) -> list[int]:
        """A text payload, one character a token, as models generate it; [] for what is none."""
        if begun is None or begun.kind.payload != "text":
            return []
        ids = dict(zip(begun.kind.characters, begun.characters, strict=True))
        return [ids[c] for c in text] if set(text) <= set(ids) else []

    # --- length -------------------------------------------------------------------------------

    def _cut_published(self, turns: Sequence[_Turn]) -> list[_Turn]:
        kept: list[_Turn] = []
        left = self.max_length
        for turn in turns:
            if left <= 0:
                break
            source, target = infer_seqlen(_length(turn.source), _length(turn.target), left)
            kept.append(_Turn(_first(turn.source, source), _first(turn.target, target)))
            left -= source + target
        return kept

    def _cut(self, turns: Sequence[_Turn]) -> list[_Turn] | DropReason:
        kept: list[_Turn] = []
        left = self.max_length
        for turn in turns:
            room = left - _length(turn.source)
            if room < 1:  # nothing of the answer fits: end before this turn
                if not kept:
                    return "prompt"
                return "call" if _calls(kept[-1]) else kept
            if _length(turn.target) > room:
                if _calls(turn):
                    return "call"
                return [*kept, _Turn(turn.source, _first(turn.target, room))]
            kept.append(turn)
            left = room - _length(turn.target)
        return kept


class _RawLayout(VPTLayout):
    """As the release: text is tokenised as it stands, special tokens and all."""

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _calls(turn: _Turn) -> bool:
    return any(span.call_id is not None for span in turn.target)


def _length(spans: Sequence[Span]) -> int:
    return sum(len(span.ids) for span in spans)


def _first(spans: Sequence[Span], count: int) -> tuple[Span, ...]:
    """The first ``count`` tokens of ``spans``."""
    kept = []
    for span in spans:
        ids = span.ids[:count]
        if ids:
            kept.append(replace(span, ids=ids))
        count -= len(ids)
    return tuple(kept)


def _record(spans: Iterator[Span] | Sequence[Span]) -> Record:
    kept = tuple(spans)
    views = dict.fromkeys(s.view for s in kept if s.view is not None)
    return Record(kept, tuple(views))
