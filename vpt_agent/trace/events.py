"""The events of a trace: frozen, versioned, and enough to draw, replay and train on a run.

Every event carries ``seq`` (its number in the trace), ``run`` and ``turn`` (0 before the first
assistant turn), ``time`` (seconds since 1970) and ``clock`` (seconds since its run began).
:meth:`vpt_agent.trace.Trace.emit` fills ``seq``, ``time`` and ``clock``; the agent fills the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter

from vpt_agent.errors import CallErrorKind
from vpt_agent.types import (
    CallError,
    CallOrigin,
    RunStatus,
    Span,
    TokenSource,
    View,
)

SCHEMA_VERSION = 3
"""Version of the events and of the run folder. It grows with every change a reader must know; older
ones are read. 2: requests to servers. 3: what was chosen ahead and begun early."""


def clean_text(value: object) -> object:
    """Text that UTF-8 can hold: a model can emit half of a surrogate pair, a file cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


_DEPTH, _BITS = 64, 512


def jsonable(value: object, depth: int = 0) -> JsonValue:
    """``value`` as JSON that reads back equal. What JSON lacks becomes text, never an error."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # JSON readers, and Python's own conversion to decimal digits, stop at some length.
        return int(value) if value.bit_length() <= _BITS else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return str(clean_text(value))
    if depth >= _DEPTH:
        return "(nested too deeply)"
    if isinstance(value, Mapping):
        return {str(clean_text(str(k))): jsonable(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v, depth + 1) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(v, depth + 1) for v in value), key=str)
    return str(clean_text(str(value)))


Text = Annotated[str, BeforeValidator(clean_text)]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(lambda v: jsonable(v))]
Numbers = dict[str, int | float | None]


class _Part(BaseModel):
    # Infinite and undefined numbers (a log-probability of 0) as text: JSON has no word for them.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ViewInfo(_Part):
    """A view without its pixels. ``box`` is in pixels of the original ``root``; ``blob`` names the
    picture in the trace; ``sha256`` is :attr:`vpt_agent.types.View.sha256`, of its pixels.
    """

    id: str
    parent: str | None
    root: str
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    root_size: tuple[int, int]
    sha256: str
    blob: str
    origin: str = "given"

    @classmethod
    def of(cls, view: View, blob: str) -> ViewInfo:
        """The description of ``view``, whose pixels lie in ``blob``."""
        return cls(
            id=view.id,
            parent=view.parent,
            root=view.root,
            box=tuple(view.box),
            size=view.size,
            root_size=view.root_size,
            sha256=view.sha256,
            blob=blob,
            origin=view.origin,
        )


class SpanInfo(_Part):
    """A :class:`vpt_agent.types.Span`, and the text that a reader shows for it."""

    source: TokenSource
    ids: tuple[int, ...]
    view: str | None = None
    kind: str | None = None
    call_id: str | None = None
    logprobs: tuple[float, ...] = ()
    text: Text = ""

    @classmethod
    def of(cls, span: Span, text: str = "") -> SpanInfo:
        """The description of ``span``."""
        return cls(text=text, **vars(span))

    def to_span(self) -> Span:
        """The span without its text."""
        return Span(self.source, self.ids, self.view, self.kind, self.call_id, self.logprobs)


class ErrorInfo(_Part):
    """A :class:`vpt_agent.types.CallError`: ``message`` is what the model saw."""

    kind: CallErrorKind
    message: Text
    detail: Text = ""

    @classmethod
    def of(cls, error: CallError) -> ErrorInfo:
        """The description of ``error``."""
        return cls(kind=error.kind, message=error.message, detail=error.detail)


class EventBase(_Part):
    """What every event carries; see the module's text."""

    seq: int = -1
    run: str = ""
    turn: int = 0
    time: float = 0.0
    clock: float = 0.0


class RunStarted(EventBase):
    """A question was asked. ``tools`` maps versioned names to contract hashes; ``continues`` names
    the run whose session this one goes on with (a follow-up question)."""

    type: Literal["run_started"] = "run_started"
    question: Text
    views: tuple[ViewInfo, ...] = ()
    tool_choice: str = "auto"
    seed: int | None = None
    limits: Numbers = {}
    tools: dict[str, str] = {}
    model: JsonObject = {}
    sampling: JsonObject = {}
    continues: str | None = None


class PromptRendered(EventBase):
    """The prompt as text and as spans. In a follow-up, only what is new."""

    type: Literal["prompt_rendered"] = "prompt_rendered"
    text: Text
    spans: tuple[SpanInfo, ...] = ()


class ImageEncoded(EventBase):
    """A view became visual tokens. ``grid`` is (time, rows, columns) of patches, where there is
    one; ``key`` is the key of the feature cache, ``reused`` whether it was found there. ``early``
    seconds before it was asked for it was begun, beside the model's work; of its ``seconds`` nobody
    waited for ``hidden``."""

    type: Literal["image_encoded"] = "image_encoded"
    view: str
    encoder: str
    kind: str | None = None
    visual_tokens: int
    grid: tuple[int, ...] = ()
    key: str = ""
    reused: bool = False
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0
    early: float = 0.0
    hidden: float = 0.0


class Prefilled(EventBase):
    """``tokens`` positions entered the cache from row ``start``; ``next_position`` is the next
    position id."""

    type: Literal["prefilled"] = "prefilled"
    tokens: int
    start: int = 0
    next_position: int
    seconds: float = 0.0


class Decoded(EventBase):
    """A stretch of decoding. ``removed_mass`` is the probability mass that the constraint took
    away at each token (-1: not known); ``stop`` says why the stretch ended.

    ``drawn`` is the log probability with which each token was drawn, under the constraint and the
    run's sampling (0: greedy, or no choice). With the grammar, ``first`` (ids that alone could
    begin the turn, sorted; empty: free), ``banned`` and ``max_calls`` give the constraint again.
    ``ahead`` of the tokens were chosen on the device, before the host looked (docs/gpu-decode.md).
    ``kernels`` names what computed single tokens meanwhile, where it was not torch alone.
    """

    type: Literal["decoded"] = "decoded"
    spans: tuple[SpanInfo, ...]
    removed_mass: tuple[float, ...] = ()
    drawn: tuple[float, ...] = ()
    first: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    max_calls: int | None = None
    stop: str = ""
    seconds: float = 0.0
    ahead: int = 0
    kernels: tuple[str, ...] = ()


class ToolCalled(EventBase):
    """A call is complete. ``tokens`` spelled it; ``control`` names the blob of its state."""

    type: Literal["tool_called"] = "tool_called"
    call_id: str
    name: Text
    arguments: JsonObject = {}
    kind: str | None = None
    origin: CallOrigin
    tokens: tuple[int, ...] = ()
    control: str | None = None


class ToolRejected(EventBase):
    """Something that began as a call was none that could run."""

    type: Literal["tool_rejected"] = "tool_rejected"
    call_id: str | None = None
    name: Text | None = None
    error: ErrorInfo
    tokens: tuple[int, ...] = ()


class ToolFinished(EventBase):
    """A call gave its result. ``metadata`` was not shown to the model."""

    type: Literal["tool_finished"] = "tool_finished"
    call_id: str
    name: Text
    ok: bool
    views: tuple[ViewInfo, ...] = ()
    text: Text | None = None
    structured: Annotated[JsonValue, BeforeValidator(lambda v: jsonable(v))] = None
    error: ErrorInfo | None = None
    visual_tokens: int = 0
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0
    metadata: JsonObject = {}


class PerceptionAppended(EventBase):
    """Results joined the cache: ``spans`` from row ``start``, ``visual_tokens`` of them visual.
    ``kernels`` put these in their places."""

    type: Literal["perception_appended"] = "perception_appended"
    call_ids: tuple[str, ...]
    spans: tuple[SpanInfo, ...]
    visual_tokens: int
    start: int
    next_position: int
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0


class RequestFailed(EventBase):
    """A request to a model's server came to nothing. ``error`` names its kind (the official
    client's class), ``status`` the HTTP status if there was one, ``wait`` the seconds until it was
    tried again (None: it was not). ``left_out`` is what the server refused and is not asked for any
    more: then it was tried again without."""

    type: Literal["request_failed"] = "request_failed"
    attempt: int
    error: str
    status: int | None = None
    message: Text = ""
    wait: float | None = None
    left_out: str | None = None


class RequestAnswered(EventBase):
    """A model's server answered. Token counts are the server's own, None where it did not tell;
    ``cost`` is by the prices that were given, or as the server says. ``reasoning`` are thoughts
    that it showed apart from its words."""

    type: Literal["request_answered"] = "request_answered"
    model: str = ""
    response_id: str = ""
    finish: str = ""
    attempts: int = 1
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: float | None = None
    reasoning: Text = ""
    refusal: Text | None = None
    seconds: float = 0.0


class LimitReached(EventBase):
    """A limit ended or cut something: ``value`` was needed, ``allowed`` was left or given."""

    type: Literal["limit_reached"] = "limit_reached"
    limit: str
    value: float
    allowed: float


class WarningGiven(EventBase):
    """Something the user should know; also in ``answer.warnings``."""

    type: Literal["warning"] = "warning"
    message: Text


class RunFinished(EventBase):
    """The outcome. ``error`` is our or the user's fault that ended the run, if one did."""

    type: Literal["run_finished"] = "run_finished"
    status: RunStatus
    text: Text = ""
    usage: Numbers = {}
    warnings: tuple[Text, ...] = ()
    limit: str | None = None
    error: Text | None = None


Event = Annotated[
    RunStarted
    | PromptRendered
    | ImageEncoded
    | Prefilled
    | Decoded
    | ToolCalled
    | ToolRejected
    | ToolFinished
    | PerceptionAppended
    | RequestFailed
    | RequestAnswered
    | LimitReached
    | WarningGiven
    | RunFinished,
    Field(discriminator="type"),
]
"""Any event; ``type`` says which."""

_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


def read_event(line: bytes) -> Event:
    """One line of ``events.jsonl`` as the object that wrote it. Raises pydantic's
    ``ValidationError``, a ``ValueError``."""
    return _ADAPTER.validate_json(line)


def span_infos(spans: Iterable[Span]) -> tuple[SpanInfo, ...]:
    """Descriptions of spans without their text."""
    return tuple(SpanInfo.of(span) for span in spans)
