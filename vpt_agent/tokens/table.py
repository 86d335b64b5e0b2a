"""THE table of perception kinds: the one place that spells a token.

One row per kind. Token spellings, prefixes and trigger phrases are interface strings of the
published models (paper arXiv 2502.17425 section 3) and are used exactly. Ids are looked up in a
tokenizer, never computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from vpt_agent.errors import UserError
from vpt_agent.tokens.pattern import TextPattern

Payload = Literal["grid", "control", "text", "none"]
Encoder = Literal["base", "dino", "sam", "none"]
PositionRule = Literal["mrope", "text"]
ResultLayout = Literal["turn", "inline"]

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
IMAGE_TAG = "<image>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
RESPONSE_START, RESPONSE_END = "<tool_response>", "</tool_response>"
THINK_START, THINK_END = "<think>", "</think>"
"""Tags of calls written as JSON, of their results, and of thoughts (Hermes, Qwen)."""
SPACE = "\u0120"
"""How byte-level vocabularies spell a space that stands alone; other ASCII spells itself."""

REGION_TRIGGER = (
    "Identify the region that can help you answer the question, and then answer the question."
)
REENCODE_TRIGGER = "Require additional perception features, and then answer the question."


@dataclass(frozen=True, kw_only=True)
class PerceptionKind:
    """One row: how a kind is spelled, what it encodes with, and how its result is laid out.

    ``payload`` stands between start and end: ``grid`` four coordinate tokens (x_min, y_min,
    x_max, y_max on a ``grid`` x ``grid`` raster), ``control`` the control token(s), ``text`` a text
    of ``pattern`` (:class:`~vpt_agent.tokens.pattern.TextPattern`), one character a token, ``none``
    nothing. ``argument`` names the tool's argument that the payload fills (text; for a grid
    ``region`` if it is empty). ``placeholder`` is the token that its visual tokens replace; ``tag``
    names it in message text; a kind without features of its own has those of pictures.
    ``visual_tokens`` and ``input_size`` (pixels a side) are fixed numbers, or None where they
    follow from the picture. ``positions`` says whether the placeholders count as a 2-D image
    (``mrope``) or as text. ``result`` says when the result is appended: in a user turn of its own
    after the assistant's turn (``turn``, as published), or at once (``inline``).
    ``answer_prefix`` begins the published answers after this kind.
    """

    name: str
    tool: str
    start: str
    end: str
    payload: Payload
    placeholder: str = IMAGE_PAD
    tag: str = IMAGE_TAG
    encoder: Encoder = "none"
    control: str | None = None
    projector: str | None = None
    config_prefix: str | None = None
    visual_tokens: int | None = None
    input_size: int | None = None
    positions: PositionRule = "text"
    result: ResultLayout = "turn"
    grid: int = 8
    trigger: str = ""
    answer_prefix: str = ""
    pattern: str = ""
    argument: str = ""

    def __post_init__(self) -> None:
        if self.payload != "text" and self.pattern:
            raise UserError("only a text payload has a pattern", where=self.name, got=self.payload)
        if self.payload == "text":
            TextPattern.parse(self.pattern)
            if not self.argument.isidentifier():
                raise UserError(
                    "a text payload fills an argument of its tool, by name",
                    where=self.name,
                    got=repr(self.argument),
                    expected="argument='key', or the like",
                )

    @property
    def characters(self) -> str:
        """Every character that the text of a call can have; empty for other payloads."""
        return TextPattern.parse(self.pattern).characters if self.payload == "text" else ""

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """Tokens that no other kind may have: start, end, control, a placeholder of its own."""
        found = [self.start, self.end, *([self.control] if self.control else [])]
        return (*found, self.placeholder) if self.placeholder != IMAGE_PAD else tuple(found)

    def call_text(
        self, *, region: Iterable[int] | None = None, text: str | None = None, controls: int = 1
    ) -> str:
        """How a call stands in the message of a row: what the model is to learn to say.

        ``region`` is [x_min, y_min, x_max, y_max] in cells of a grid kind, ``text`` the argument
        of a text kind; what does not fit the payload is a :class:`UserError`.
        """
        given = "grid" if region is not None else "text" if text is not None else None
        if given != (self.payload if self.payload in ("grid", "text") else None):
            raise UserError(
                "a call of this kind is spelled otherwise",
                where=self.name,
                got=f"a {given}" if given else "no argument",
                expected={"grid": "region=", "text": "text="}.get(self.payload, "no argument"),
            )
        middle = (self.control or "") * controls
        if region is not None:
            x_min, y_min, x_max, y_max = region
            middle = self.x_token(x_min) + self.y_token(y_min)
            middle += self.x_token(x_max) + self.y_token(y_max)
        if text is not None:
            self.check_text(text)
            middle = text
        return f"{self.start}{middle}{self.end}"

    def check_text(self, text: str) -> None:
        """Raise :class:`UserError` unless ``text`` is of the kind's pattern."""
        if not TextPattern.parse(self.pattern).fits(text):
            raise UserError(
                "this text cannot stand in a call",
                where=self.name,
                got=repr(text),
                expected=f"text of the pattern {self.pattern}",
            )

    def x_token(self, index: int) -> str:
        """Spelling of column ``index``."""
        return f"<|x_{index}|>"

    def y_token(self, index: int) -> str:
        """Spelling of row ``index``."""
        return f"<|y_{index}|>"

    @property
    def grid_tokens(self) -> tuple[str, ...]:
        """All coordinate tokens in the order in which they are added: x first, then y."""
        if self.payload != "grid":
            return ()
        return tuple(self.x_token(i) for i in range(self.grid)) + tuple(
            self.y_token(i) for i in range(self.grid)
        )


def _reencode(name: str, prefix: str, encoder: Encoder, **values: Any) -> PerceptionKind:
    return PerceptionKind(
        name=name,
        tool=f"reencode_{name}",
        start=f"<|{prefix}_action_start|>",
        control=f"<|{prefix}_action|>",
        end=f"<|{prefix}_action_end|>",
        placeholder=f"<|{prefix}_image_pad|>",
        tag=f"<{prefix}_image>",
        payload="control",
        encoder=encoder,
        projector=f"{prefix}_projector",
        config_prefix=prefix,
        trigger=REENCODE_TRIGGER,
        **values,
    )


REGION = PerceptionKind(
    name="region",
    tool="crop_region",
    start="<|region_token_start|>",
    end="<|region_token_end|>",
    payload="grid",
    placeholder=IMAGE_PAD,
    tag=IMAGE_TAG,
    encoder="base",
    positions="mrope",
    trigger=REGION_TRIGGER,
    answer_prefix="Now answer the question.\n",
)
CLIP = _reencode("clip", "clip", "base")
DINO = _reencode("dino", "detection", "dino", visual_tokens=256, input_size=224)
SAM = _reencode("sam", "seg", "sam", visual_tokens=256, input_size=1024)

_OWN_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


def own_kind(
    name: str,
    *,
    payload: Payload,
    tool: str | None = None,
    pattern: str = "",
    argument: str = "",
    encoder: Encoder | None = None,
    visual_tokens: int | None = None,
    input_size: int | None = None,
    grid: int = 8,
    result: ResultLayout = "turn",
    trigger: str = "",
) -> PerceptionKind:
    """A kind for a tool of one's own, its tokens spelled after its ``name``.

    ``tool`` is the tool's name (default: the kind's). A ``text`` payload needs ``pattern`` and
    ``argument``. A ``control`` payload re-encodes with ``encoder``: ``base`` (default), or ``dino``
    or ``sam`` with their ``visual_tokens`` and ``input_size``; it gets a placeholder and a
    projector of its own. The others show pictures through the base tower, or give text. A name that
    is none, or a published one, is a :class:`UserError`.
    """
    prefixes = {kind.config_prefix for kind in PUBLISHED.values()}
    if not _OWN_NAME.fullmatch(name) or name in PUBLISHED or name in prefixes:
        raise UserError(
            "this cannot be the name of a perception kind of your own",
            got=repr(name),
            expected="small letters, digits and _, at most 32, and no published name",
        )
    features: dict[str, Any] = {}
    if payload == "control":
        features = {
            "control": f"<|{name}|>",
            "placeholder": f"<|{name}_image_pad|>",
            "tag": f"<{name}_image>",
            "projector": f"{name}_projector",
            "config_prefix": name,
        }
    default: Encoder = "base" if payload in ("grid", "control") else "none"
    return PerceptionKind(
        name=name,
        tool=name if tool is None else tool,
        start=f"<|{name}_start|>",
        end=f"<|{name}_end|>",
        payload=payload,
        encoder=default if encoder is None else encoder,
        positions="mrope" if payload == "grid" else "text",
        visual_tokens=visual_tokens,
        input_size=input_size,
        result=result,
        grid=grid,
        trigger=trigger,
        pattern=pattern,
        argument=argument,
        **features,
    )


PUBLISHED: Mapping[str, PerceptionKind] = {k.name: k for k in (REGION, CLIP, DINO, SAM)}
"""The published rows by name, in the order in which their tokens are added."""


def character_tokens(kind: PerceptionKind) -> tuple[str, ...]:
    """How the vocabulary spells each of the kind's :attr:`~PerceptionKind.characters`."""
    return tuple(SPACE if c == " " else c for c in kind.characters)


_LATER_COLUMNS = ("pattern", "argument")


def _columns(kind: PerceptionKind) -> dict[str, Any]:
    """A row for a manifest. Columns that came later stand there only where they say something:
    an older version refuses what it does not know, and can read all other checkpoints."""
    row = asdict(kind)
    return {name: v for name, v in row.items() if v or name not in _LATER_COLUMNS}


@dataclass(frozen=True)
class PerceptionTable:
    """The kinds of one model. ``controls`` is the number of control tokens a call carries."""

    kinds: tuple[PerceptionKind, ...]
    controls: int = 1

    def __post_init__(self) -> None:
        names = [k.name for k in self.kinds]
        starts = [k.start for k in self.kinds]
        for what, values in (("name", names), ("start token", starts)):
            twice = sorted({v for v in values if values.count(v) > 1})
            if twice:
                raise UserError(
                    f"two perception kinds have the same {what}", where="PerceptionTable", got=twice
                )
        if self.controls < 1:
            raise UserError("a call carries at least one control token", got=self.controls)

    def __getitem__(self, name: str) -> PerceptionKind:
        for kind in self.kinds:
            if kind.name == name:
                return kind
        raise UserError(
            "this model has no such perception kind",
            got=name,
            expected=", ".join(k.name for k in self.kinds) or "none",
        )

    def __contains__(self, name: object) -> bool:
        return any(k.name == name for k in self.kinds)

    def tokens_to_add(self) -> tuple[list[str], list[str]]:
        """New special tokens, and new plain tokens, in the published order of addition.

        Placeholders first (special), then start/end and coordinates of grid kinds, then the
        start, control and end tokens of each other kind. With one encoder this gives the
        published ids.
        """
        special = [k.placeholder for k in self.kinds if k.placeholder != IMAGE_PAD]
        plain: list[str] = []
        for kind in self.kinds:
            if kind.payload == "grid":
                plain += [kind.start, kind.end, *kind.grid_tokens]
        for kind in self.kinds:
            if kind.payload != "grid":
                plain += [kind.start, *([kind.control] if kind.control else []), kind.end]
        return list(dict.fromkeys(special)), list(dict.fromkeys(plain))

    def resolve(self, lookup: Callable[[str], int | None]) -> ResolvedTable:
        """Look every token up. ``lookup`` gives an id, or None for a token it does not have."""

        def need(token: str) -> int:
            found = lookup(token)
            if found is None:
                raise UserError(
                    "the tokenizer lacks a perception token",
                    got=token,
                    fix="add PerceptionTable.tokens_to_add() to the tokenizer first",
                )
            return found

        rows = []
        for kind in self.kinds:
            is_grid = kind.payload == "grid"
            rows.append(
                ResolvedKind(
                    kind=kind,
                    start=need(kind.start),
                    end=need(kind.end),
                    control=need(kind.control) if kind.control else None,
                    placeholder=need(kind.placeholder),
                    x=tuple(need(kind.x_token(i)) for i in range(kind.grid)) if is_grid else (),
                    y=tuple(need(kind.y_token(i)) for i in range(kind.grid)) if is_grid else (),
                    characters=tuple(need(t) for t in character_tokens(kind)),
                )
            )
        return ResolvedTable(tuple(rows), self.controls)

    def to_manifest(self) -> dict[str, Any]:
        """JSON form: what a checkpoint carries."""
        return {"controls": self.controls, "kinds": [_columns(k) for k in self.kinds]}

    @classmethod
    def from_manifest(cls, data: Mapping[str, Any]) -> PerceptionTable:
        """Read :meth:`to_manifest` back. Unknown fields are an error that names them."""
        known = {f.name for f in fields(PerceptionKind)}
        for row in data["kinds"]:
            extra = sorted(set(row) - known)
            if extra:
                raise UserError(
                    "a perception kind has unknown fields",
                    where=row.get("name"),
                    got=extra,
                    fix="this checkpoint was written by a newer vpt_agent; upgrade",
                )
        kinds = tuple(PerceptionKind(**row) for row in data["kinds"])
        return cls(kinds, int(data.get("controls", 1)))

    @classmethod
    def published(
        cls, encoders: Iterable[str] = (), *, region: bool = True, grid: int = 8, controls: int = 1
    ) -> PerceptionTable:
        """The published rows for ``encoders`` (any of clip, dino, sam) at grid size ``grid``."""
        wanted = list(encoders)
        unknown = sorted(set(wanted) - (set(PUBLISHED) - {"region"}))
        if unknown:
            raise UserError("unknown encoder", got=unknown, expected="clip, dino, sam")
        if grid not in (4, 8, 16, 32):
            raise UserError("unsupported region grid", got=grid, expected="4, 8, 16 or 32")
        rows = [replace(REGION, grid=grid)] if region else []
        rows += [PUBLISHED[name] for name in ("clip", "dino", "sam") if name in wanted]
        return cls(tuple(rows), controls)


@dataclass(frozen=True)
class ResolvedKind:
    """A row with the ids of its tokens in one tokenizer. ``x`` and ``y`` are ids by index,
    ``characters`` those of the kind's :attr:`~PerceptionKind.characters`."""

    kind: PerceptionKind
    start: int
    end: int
    control: int | None
    placeholder: int
    x: tuple[int, ...] = ()
    y: tuple[int, ...] = ()
    characters: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The kind's name."""
        return self.kind.name

    @property
    def token_ids(self) -> frozenset[int]:
        """Every id that only a call may contain (placeholder and characters excluded)."""
        ids = {self.start, self.end, *self.x, *self.y}
        return frozenset(ids if self.control is None else ids | {self.control})


@dataclass(frozen=True)
class ResolvedTable:
    """The table with ids: what the grammar, the engine and the model read."""

    rows: tuple[ResolvedKind, ...]
    controls: int = 1

    def __getitem__(self, name: str) -> ResolvedKind:
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(
            "this model has no such perception kind",
            got=name,
            expected=", ".join(r.name for r in self.rows) or "none",
        )

    def __contains__(self, name: object) -> bool:
        return any(r.name == name for r in self.rows)

    def by_start(self, token_id: int) -> ResolvedKind | None:
        """The kind that ``token_id`` starts, if any."""
        return next((r for r in self.rows if r.start == token_id), None)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset(r.control for r in self.rows if r.control is not None)

    @property
    def table(self) -> PerceptionTable:
        """The rows without ids."""
        return PerceptionTable(tuple(r.kind for r in self.rows), self.controls)
