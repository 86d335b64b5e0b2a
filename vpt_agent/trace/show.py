"""A run as a person wants to read it in a terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vpt_agent.trace.events import (
    Decoded,
    ErrorInfo,
    Event,
    ImageEncoded,
    LimitReached,
    PerceptionAppended,
    RequestAnswered,
    RequestFailed,
    RunFinished,
    RunStarted,
    SpanInfo,
    ToolCalled,
    ToolFinished,
    ToolRejected,
    ViewInfo,
    WarningGiven,
)

if TYPE_CHECKING:
    from rich.text import Text

    from vpt_agent.trace.store import Trace

_LABEL = 11


def render_text(trace: Trace) -> Text:
    """All runs of a trace as styled text; ``str()`` of it is plain. Print it with rich.

    Text that came from a model or a tool is shown with its control characters made visible.
    """
    from rich.text import Text

    out = Text()
    for number, run in enumerate(trace.runs):
        if number:
            out.append("\n")
        _Page(out, trace).run([e for e in trace.events if e.run == run])
    for problem in trace.problems:
        _Page(out, trace).line("problem", problem, "red")
    if not trace.runs:
        out.append("The trace holds no run.\n")
    return out


def visible(text: str) -> str:
    """``text`` on one line, safe to print: line breaks as an arrow, other controls escaped."""
    text = text.replace("\r\n", "\n").replace("\n", " ↵ ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def box_text(view: ViewInfo) -> str:
    """Where a view lies in its original, in pixels: ``left, top, right, bottom``."""
    return ", ".join(f"{value:g}" for value in view.box)


def arguments_text(call: ToolCalled) -> str:
    """A call as one writes it: ``crop_region(region=[2, 3, 4, 4])``."""
    values = (f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in call.arguments.items())
    return visible(f"{call.name}({', '.join(values)})")


def span_text(span: SpanInfo) -> str:
    """What a span says: its text, or its ids where the trace has no text."""
    return visible(span.text) if span.text else " ".join(str(i) for i in span.ids)


def decoded_text(event: Decoded) -> str:
    """The words of a stretch of decoding."""
    return "".join(span_text(span) for span in event.spans if span.source != "visual")


def counts_text(event: Decoded) -> str:
    """How many tokens of each source, and the probability mass that the constraint removed."""
    counts: dict[str, int] = {}
    for span in event.spans:
        counts[span.source] = counts.get(span.source, 0) + len(span.ids)
    words = ", ".join(f"{n} {source}" for source, n in counts.items())
    if event.removed_mass:
        words += f", at most {max(event.removed_mass):.2g} of the probability removed"
    if event.ahead:
        words += f", {event.ahead} chosen on the device"
    return words


def usage_text(event: RunFinished) -> str:
    """The figures of a run on one line."""
    names = {
        "prompt_tokens": "prompt",
        "sampled_tokens": "sampled",
        "forced_tokens": "forced",
        "visual_tokens": "visual tokens",
        "forward_tokens": "positions computed",
        "encoder_calls": "pictures encoded",
        "reused_features": "reused",
        "tool_calls": "calls",
        "requests": "requests",
        "cached_tokens": "cached",
        "cost": "cost",
    }
    words = [f"{event.usage[k]:g} {word}" for k, word in names.items() if event.usage.get(k)]
    seconds = event.usage.get("seconds")
    if seconds:
        words.append(f"{seconds:.2f} s")
    return " · ".join(words)


def request_text(event: RequestAnswered | RequestFailed) -> str:
    """A request to a model's server: what it took, or why it came to nothing."""
    if isinstance(event, RequestFailed):
        status = "" if event.status is None else f" {event.status}"
        after = "given up" if event.wait is None else f"again after {event.wait:.1f} s"
        if event.left_out is not None:
            after = f"again without {event.left_out}"
        message = visible(event.message)
        return f"attempt {event.attempt}: {event.error}{status}: {message} ({after})"
    counts = {
        "prompt": event.prompt_tokens,
        "cached": event.cached_tokens,
        "said": event.completion_tokens,
        "thought": event.reasoning_tokens,
    }
    words = [f"{count} {name}" for name, count in counts.items() if count is not None]
    if event.cost is not None:
        words.append(f"cost {event.cost:.6g}")
    return f"{event.model}: {event.finish}, {', '.join(words) or 'tokens not told'}"


def tokens_text(count: int) -> str:
    """A number of visual tokens in words."""
    return f"{count} visual token" if count == 1 else f"{count} visual tokens"


def error_text(error: ErrorInfo) -> str:
    """The kind of an error and the line that the model saw."""
    return f"{error.kind}: {visible(error.message)}"


def handling_texts(event: ToolFinished) -> list[str]:
    """What became of a call on its way: what was mended to read it, of which call it is a repeat,
    whether its thread was left behind. The model was told none of it."""
    told = event.metadata
    repairs = told.get("repairs")
    lines = [f"mended: {visible(str(x))}" for x in repairs] if isinstance(repairs, list) else []
    if isinstance(told.get("repeats"), str):
        lines.append(f"repeats {visible(str(told['repeats']))}, so it was answered without running")
    if told.get("abandoned") is True:
        lines.append("its thread did not stop and was left behind")
    return lines


class _Page:
    def __init__(self, out: Text, trace: Trace) -> None:
        self.out, self.trace, self.turn = out, trace, 0

    def line(self, label: str, text: str, style: str = "", note: str = "") -> None:
        self.out.append(f"{label:<{_LABEL}}", "bold" if style != "red" else "bold red")
        self.out.append(text, style)
        if note:
            self.out.append(f"  {note}", "dim")
        self.out.append("\n")

    def run(self, events: list[Event]) -> None:
        last = events[-1]
        if isinstance(last, RunFinished):
            state = last.status if last.limit is None else f"{last.status} ({last.limit})"
            note = f"{last.clock:.2f} s"
        else:
            state, note = "not finished", f"last event {last.type} after {last.clock:.2f} s"
        self.line("Run", f"{last.run} · {state}", note=note)
        for event in events:
            self.event(event)

    def event(self, event: Event) -> None:
        spoken = (Decoded, ToolCalled, ToolRejected, ToolFinished)
        if isinstance(event, spoken) and event.turn != self.turn:
            self.turn = event.turn
            self.out.append(f"Turn {event.turn}\n", "bold cyan")
        if isinstance(event, RunStarted):
            self.started(event)
        elif isinstance(event, ImageEncoded):
            how = "features reused" if event.reused else f"{event.seconds:.2f} s"
            what = f"{event.view} by {event.encoder}: {tokens_text(event.visual_tokens)}"
            self.line("  look", what, note=how)
        elif isinstance(event, Decoded):
            note = f"{counts_text(event)}, {event.seconds:.2f} s"
            self.line("  says", decoded_text(event), "green", note)
        elif isinstance(event, ToolCalled):
            self.line("  call", arguments_text(event), "yellow", f"{event.call_id}, {event.origin}")
        elif isinstance(event, ToolRejected):
            self.line("  rejected", error_text(event.error), "red", event.call_id or "")
        elif isinstance(event, ToolFinished):
            self.finished(event)
        elif isinstance(event, PerceptionAppended):
            what = f"{tokens_text(event.visual_tokens)} appended at {event.start}"
            self.line("  sees", what, note=", ".join(event.call_ids))
        elif isinstance(event, RequestAnswered):
            note = f"{event.attempts} attempts, {event.seconds:.2f} s"
            self.line("  server", request_text(event), note=note)
        elif isinstance(event, RequestFailed):
            self.line("  server", request_text(event), "red")
        else:
            self.outcome(event)

    def started(self, event: RunStarted) -> None:
        if event.continues:
            self.line("Follows", event.continues)
        self.line("Question", visible(event.question), note=f"tool_choice {event.tool_choice}")
        for view in event.views:
            width, height = view.size
            self.line("Picture", f"{view.id}, {width} x {height} pixels")

    def finished(self, event: ToolFinished) -> None:
        note = f"{event.call_id}, {event.seconds:.2f} s"
        for text in handling_texts(event):
            self.line("  note", text, "magenta", event.call_id)
        if event.error is not None:
            self.line("  error", error_text(event.error), "red", note)
        for view in event.views:
            what = f"{view.id}, {view.size[0]} x {view.size[1]} pixels"
            if view.parent is not None and view.root != view.id:
                what += f", box {box_text(view)} of {view.root}"
            self.line("  result", what, note=note)
        if event.text:
            self.line("  result", visible(event.text), note=note)
        if event.ok and not event.views and not event.text:
            self.line("  result", tokens_text(event.visual_tokens), note=note)

    def outcome(self, event: Event) -> None:
        if isinstance(event, LimitReached):
            what = f"{event.limit}: {event.value:g} needed, {event.allowed:g} allowed"
            self.line("Limit", what, "magenta")
        elif isinstance(event, WarningGiven):
            self.line("Warning", visible(event.message), "magenta")
        elif isinstance(event, RunFinished):
            if event.error:
                self.line("Failed", visible(event.error), "red")
            self.line("Answer", visible(event.text), "bold green")
            self.line("Usage", usage_text(event))
