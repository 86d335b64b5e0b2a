"""A trace as one page: pictures with the boxes on them, and what was said, token by source."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from vpt_agent.errors import TraceError
from vpt_agent.trace.events import (
    Decoded,
    ErrorInfo,
    Event,
    ImageEncoded,
    LimitReached,
    PerceptionAppended,
    PromptRendered,
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
from vpt_agent.trace.show import (
    arguments_text,
    box_text,
    counts_text,
    handling_texts,
    request_text,
    tokens_text,
    usage_text,
)

if TYPE_CHECKING:
    from vpt_agent.trace.store import Trace

LARGEST_SIDE, FILM_SIDE = 1600, 512
"""Pixels a side above which a picture, and one in the film strip, is shown smaller. The run folder
keeps them whole."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --box: #e6007a; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.25rem; margin: 0 0 .25rem } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
.muted { opacity: .65; font-size: .85rem } .run { border-top: 2px solid var(--line);
padding-top: 1.5rem; margin-top: 1.5rem }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.5rem }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr } }
.answer { font-size: 1.15rem; border-left: 4px solid #2a9d55; padding: .25rem .75rem;
white-space: pre-wrap; overflow-wrap: anywhere }
.answer.limit { border-color: #c77d00 } .answer.failed { border-color: #c0392b }
figure { margin: 0 } figcaption { font-size: .85rem; overflow-wrap: anywhere }
.stage { position: relative; display: inline-block; line-height: 0; max-width: 100% }
.stage img { max-width: 100%; height: auto; border: 1px solid var(--line) }
.box { position: absolute; border: 2px solid var(--box); box-shadow: 0 0 0 1px #fff8; }
.box b { position: absolute; left: -2px; top: -1.3em; font: 600 11px/1.3 system-ui;
background: var(--box); color: #fff; padding: 0 .3em; white-space: nowrap }
.film { display: flex; gap: .75rem; overflow-x: auto; padding: .25rem 0 }
.film figure { flex: none; max-width: 16rem } .film img { max-height: 9rem; max-width: 16rem;
border: 1px solid var(--line) }
.turn { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem; margin: .5rem 0 }
.says { font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre-wrap;
overflow-wrap: anywhere } .says span { border-radius: 3px; padding: 0 .15em }
.given { background: #8883 } .sampled { background: #2a9d5540 } .forced { background: #e0a80055 }
.visual { background: #3b82f650 } .error { color: #d23b2b } .handled { color: #b36b00 }
table { border-collapse: collapse; font-size: .85rem } td { padding: .1rem .6rem .1rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; background: var(--soft);
padding: .5rem; border-radius: 4px; margin: .25rem 0 }
"""


def render_html(trace: Trace) -> str:
    """The whole trace as one HTML page with its pictures inside: no script, nothing fetched.

    Everything that came from a question, a model or a tool is escaped.
    """
    body = [f'<p class="error">{escape(problem)}</p>' for problem in trace.problems]
    body += [_run(trace, [e for e in trace.events if e.run == run]) for run in trace.runs]
    title = next((e.question for e in trace.events if isinstance(e, RunStarted)), "Trace")
    manifest = trace.manifest
    name = manifest.model.get("name")
    made = f"vpt_agent {manifest.library}, {manifest.created}" + (f", {name}" if name else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A second wall behind the escaping: the page may run no script and fetch nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title[:80])}</title><style>{_STYLE}</style></head><body>"
        f'<p class="muted">{escape(made)}</p>{"".join(body)}</body></html>\n'
    )


def _run(trace: Trace, events: list[Event]) -> str:
    started = next((e for e in events if isinstance(e, RunStarted)), None)
    finished = next((e for e in events if isinstance(e, RunFinished)), None)
    views = [v for e in events if isinstance(e, RunStarted | ToolFinished) for v in e.views]
    out = ['<section class="run">']
    if started is not None:
        out.append(f"<h1>{escape(started.question)}</h1>")
    facts = [events[0].run, f"{events[-1].clock:.2f} s"]
    if started is not None:
        facts.append(f"tool_choice {started.tool_choice}")
        facts += [f"continues {started.continues}"] if started.continues else []
    out.append(f'<p class="muted">{escape(" · ".join(facts))}</p>')
    if finished is None:
        out.append('<p class="error">The run did not finish.</p>')
    else:
        out.append(_outcome(finished))
    # A follow-up question looks at pictures that an earlier run was given.
    known = trace.views
    roots = [known[root] for root in dict.fromkeys(v.root for v in views) if root in known]
    out.append('<div class="pair"><div><h2>Pictures</h2>')
    out += [_stage(trace, root, views) for root in roots]
    out.append(f"</div><div><h2>Views</h2>{_film(trace, views)}<h2>Turns</h2>")
    out.append(_turns(events))
    return "".join([*out, "</div></div></section>"])


def _outcome(event: RunFinished) -> str:
    out = [
        f'<div class="answer {escape(event.status)}">{escape(event.text) or "(no answer)"}</div>'
    ]
    if event.limit:
        out.append(f'<p class="error">Ended by the limit {escape(event.limit)}.</p>')
    if event.error:
        out.append(f'<p class="error">{escape(event.error)}</p>')
    out += [f'<p class="muted">Warning: {escape(text)}</p>' for text in event.warnings]
    return "".join([*out, f'<p class="muted">{escape(usage_text(event))}</p>'])


def _stage(trace: Trace, root: ViewInfo, views: list[ViewInfo]) -> str:
    width, height = root.root_size
    boxes = []
    for view in views:
        if view.root == root.id and view.id != root.id and width and height:
            left, top, right, bottom = view.box
            where = (
                f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
                f"width:{100 * (right - left) / width:.3f}%;"
                f"height:{100 * (bottom - top) / height:.3f}%"
            )
            boxes.append(f'<div class="box" style="{where}"><b>{escape(view.id)}</b></div>')
    caption = f"{root.id}, {root.size[0]} × {root.size[1]} pixels"  # noqa: RUF001
    return (
        f'<figure><div class="stage">{_image(trace, root, LARGEST_SIDE)}{"".join(boxes)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _film(trace: Trace, views: list[ViewInfo]) -> str:
    figures = []
    for view in views:
        caption = f"{view.id}, {view.size[0]} × {view.size[1]}"  # noqa: RUF001
        if view.id != view.root:
            caption += f", box {box_text(view)} of {view.root}"
        figures.append(
            f"<figure>{_image(trace, view, FILM_SIDE)}"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="film">{"".join(figures)}</div>'


def _image(trace: Trace, view: ViewInfo, largest: int) -> str:
    try:
        picture = trace.picture(view.blob)
    except TraceError as error:
        # A run folder can have lost a blob; the rest of it is still worth a page.
        return f'<span class="error">{escape(str(error))}</span>'
    buffer = io.BytesIO()
    # A crop stays exact; a large picture as PNG would make the page many megabytes.
    if max(picture.size) <= FILM_SIDE:
        kind = "png"
        picture.save(buffer, format="PNG")
    else:
        kind, picture = "jpeg", picture.copy()
        picture.thumbnail((largest, largest))
        picture.save(buffer, format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(view.id)}" src="data:image/{kind};base64,{data}">'


def _turns(events: list[Event]) -> str:
    turns: dict[int, list[str]] = {}
    for event in events:
        text = _event(event)
        if text:
            turns.setdefault(event.turn, []).append(text)
    blocks = (f'<div class="turn">{"".join(parts)}</div>' for parts in turns.values())
    legend = "".join(f'<span class="{s}">{s}</span> ' for s in ("given", "sampled", "forced"))
    legend += '<span class="visual">visual</span>'
    return f'<p class="says muted">{legend}</p>{"".join(blocks)}'


def _event(event: Event) -> str:
    """One event as HTML; nothing for those that only keep the books."""
    if isinstance(event, PromptRendered):
        return f"<details><summary>Prompt</summary>{_spans(event.spans, event.text)}</details>"
    if isinstance(event, ImageEncoded):
        how = "reused" if event.reused else f"{event.seconds:.2f} s"
        text = f"{event.view} by {event.encoder}: {tokens_text(event.visual_tokens)}, {how}"
        return f'<div class="muted">{escape(text)}</div>'
    if isinstance(event, Decoded):
        note = f"{counts_text(event)}, {event.seconds:.2f} s"
        return f'{_spans(event.spans)}<div class="muted">{escape(note)}</div>'
    if isinstance(event, ToolCalled):
        note = f"{event.call_id}, {event.origin}"
        return (
            f"<div><code>{escape(arguments_text(event))}</code>"
            f' <span class="muted">{escape(note)}</span></div>'
        )
    if isinstance(event, ToolRejected):
        return _error(event.error, event.call_id or "")
    if isinstance(event, ToolFinished):
        return _finished(event)
    if isinstance(event, PerceptionAppended):
        shown = _spans(event.spans)
        return f'{shown}<div class="muted">{tokens_text(event.visual_tokens)} appended</div>'
    if isinstance(event, RequestAnswered):
        return f'<div class="muted">{escape(request_text(event))}</div>'
    if isinstance(event, RequestFailed):
        return f'<div class="error">{escape(request_text(event))}</div>'
    if isinstance(event, LimitReached):
        text = f"Limit {event.limit}: {event.value:g} needed, {event.allowed:g} allowed"
        return f'<div class="error">{escape(text)}</div>'
    if isinstance(event, WarningGiven):
        return f'<div class="muted">Warning: {escape(event.message)}</div>'
    return ""


def _finished(event: ToolFinished) -> str:
    notes = (f"{event.call_id} {text}" for text in handling_texts(event))
    parts = [f'<div class="handled">{escape(note)}</div>' for note in notes]
    if event.error is not None:
        parts.append(_error(event.error, event.call_id))
    if event.text:
        parts.append(f"<pre>{escape(event.text)}</pre>")
    facts = [f"{event.call_id}: {', '.join(v.id for v in event.views) or 'no view'}"]
    facts += [tokens_text(event.visual_tokens)] if event.visual_tokens else []
    facts += [", ".join(event.kernels)] if event.kernels else []
    facts.append(f"{event.seconds:.2f} s")
    return "".join([*parts, f'<div class="muted">{escape(" · ".join(facts))}</div>'])


def _error(error: ErrorInfo, call_id: str) -> str:
    line = f'<div class="error">{escape(f"{call_id} {error.kind}: {error.message}".strip())}</div>'
    if not error.detail:
        return line
    return f"{line}<details><summary>Detail</summary><pre>{escape(error.detail)}</pre></details>"


def _spans(spans: tuple[SpanInfo, ...], otherwise: str = "") -> str:
    parts = []
    for span in spans:
        if span.source == "visual":
            text = f"[{span.view or span.kind or 'view'}: {tokens_text(len(span.ids))}]"
        else:
            text = span.text or " ".join(str(i) for i in span.ids)
        title = f"{len(span.ids)} {span.source}"
        if span.logprobs:
            title += f", mean log-probability {sum(span.logprobs) / len(span.logprobs):.3f}"
        parts.append(f'<span class="{span.source}" title="{escape(title)}">{escape(text)}</span>')
    return f'<div class="says">{"".join(parts) or escape(otherwise)}</div>'
