"""Readers of a trace: the record, the terminal, the page."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vpt_agent.errors import TraceError
from vpt_agent.trace import (
    ErrorInfo,
    RunFinished,
    RunStarted,
    ToolCalled,
    ToolFinished,
    Trace,
    ViewInfo,
    WarningGiven,
    record_from_trace,
)
from vpt_agent.trace.html import LARGEST_SIDE
from vpt_agent.trace.show import render_text
from vpt_agent.types import Box, Span, View

from .conftest import Pictures, fill

ONE_RUN = (
    Span("given", (1, 2)),
    Span("visual", (5, 5), "image_1", "region"),
    Span("given", (3,)),
    Span("sampled", (7,), logprobs=(-0.5,)),
    Span("forced", (8, 9)),
    Span("visual", (5,), "view_1", None, "c1"),
    Span("sampled", (4, 6)),
)


def test_a_record_is_the_sequence_in_the_cache(told: Trace) -> None:
    record = record_from_trace(told)
    assert record.spans == ONE_RUN
    assert record.views == ("image_1", "view_1")
    assert record.ids == [1, 2, 5, 5, 3, 7, 8, 9, 5, 4, 6]
    assert told.record("r1") == record


def test_a_follow_up_has_the_earlier_runs_before_it(pictures: Pictures) -> None:
    trace = Trace()
    fill(trace, pictures, "r1")
    fill(trace, pictures, "other")
    fill(trace, pictures, "r2", continues="r1")
    assert record_from_trace(trace).ids == record_from_trace(trace, "r1").ids * 2
    assert record_from_trace(trace, "other").spans == ONE_RUN


def test_a_record_of_a_run_that_is_not_there(told: Trace) -> None:
    with pytest.raises(TraceError, match="no such run; got: r9; expected: r1"):
        record_from_trace(told, "r9")
    with pytest.raises(TraceError, match="expected: at least one run"):
        record_from_trace(Trace())
    trace = Trace()
    trace.emit(RunStarted(run="r2", question="?", continues="r1"))
    with pytest.raises(TraceError, match="does not hold; where: r2; got: r1"):
        record_from_trace(trace)


def test_the_terminal_shows_a_run_as_one_reads_it(told: Trace) -> None:
    shown = render_text(told).plain
    expected = [
        r"^Run +r1 · answered",
        r"^Question +What stands on the <b>tag</b>\?  tool_choice auto",
        r"^Picture +image_1, 120 x 80 pixels",
        r"^  look +image_1 by base: 2 visual tokens",
        r"^Turn 1",
        r"^  says +<start><end>  1 sampled, 2 forced, at most 0.25 of the probability removed",
        r"^  call +crop_region\(region=\[1, 1, 4, 4\]\)  c1, sampled",
        r"^  result +view_1, 60 x 40 pixels, box 15, 10, 75, 50 of image_1",
        r"^  rejected +unknown_tool: no tool crap",
        r"^  sees +1 visual token appended at 8  c1",
        r"^Turn 2",
        r"^  says +K4X2",
        r"^Limit +calls: 9 needed, 8 allowed",
        r"^Warning +knows its scenes only",
        r"^Answer +K4X2",
        r"^Usage +5 prompt · 0\.25 s",
    ]
    place = 0
    for pattern in expected:
        found = re.compile(pattern, re.MULTILINE).search(shown, place)
        assert found, (pattern, shown)
        place = found.end()


def test_the_terminal_shows_failures_follow_ups_and_features(pictures: Pictures) -> None:
    trace = Trace()
    fill(trace, pictures, "r1")
    trace.emit(RunStarted(run="r2", question="and\nthen?", continues="r1"))
    error = ErrorInfo(kind="timeout", message="too slow")
    trace.emit(ToolFinished(run="r2", turn=1, call_id="c1", name="t", ok=False, error=error))
    trace.emit(ToolFinished(run="r2", turn=1, call_id="c2", name="t", ok=True, visual_tokens=256))
    trace.emit(ToolFinished(run="r2", turn=1, call_id="c3", name="t", ok=True, text="3 apples"))
    shown = render_text(trace).plain
    assert "Run        r2 · not finished  last event tool_finished" in shown
    assert "Follows    r1" in shown
    assert "and ↵ then?" in shown
    assert "  error    timeout: too slow" in shown
    assert "  result   256 visual tokens  c2" in shown
    assert "  result   3 apples  c3" in shown
    trace.emit(RunFinished(run="r2", status="failed", error="no memory"))
    assert "Failed     no memory" in render_text(trace).plain
    trace.emit(RunStarted(run="r3", question="?"))
    trace.emit(RunFinished(run="r3", status="limit", limit="new_tokens"))
    assert "r3 · limit (new_tokens)" in render_text(trace).plain
    assert render_text(Trace()).plain == "The trace holds no run.\n"


def test_the_terminal_cannot_be_steered_by_a_model() -> None:
    trace = Trace()
    trace.emit(RunStarted(run="r", question="\x1b[2J[red]\u202e"))
    trace.emit(
        ToolCalled(run="r", call_id="c", name="\x1b", arguments={"a": "\x07"}, origin="json")
    )
    shown = render_text(trace).plain
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert r"\x1b[2J[red]\u202e" in shown


def test_problems_are_shown(tmp_path: Path, pictures: Pictures) -> None:
    fill(Trace(tmp_path / "run"), pictures)
    with (tmp_path / "run" / "events.jsonl").open("ab") as file:
        file.write(b'{"half')
    trace = Trace.read(tmp_path / "run")
    assert "was cut off after 6 bytes" in render_text(trace).plain
    assert "was cut off after 6 bytes" in trace.to_html(tmp_path / "run.html").read_text()


class _Page(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_else_and_shows_boxes(tmp_path: Path, told: Trace) -> None:
    page = _Page(told.to_html(tmp_path / "run.html").read_text(encoding="utf-8"))
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    assert len(sources) == 3  # the picture with its boxes, and two in the film strip
    crop = sources[-1].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(crop))).size == (60, 40)
    assert not any(a.get("href") for _, a in page.tags)
    assert "script" not in {tag for tag, _ in page.tags}
    styles = [a["style"] for tag, a in page.tags if a.get("class") == "box"]
    assert styles == ["left:12.500%;top:12.500%;width:50.000%;height:50.000%"]
    classes = {a.get("class") for tag, a in page.tags if tag == "span"}
    assert {"given", "sampled", "forced", "visual"} <= classes
    text = "".join(page.text)
    assert "What stands on the <b>tag</b>?" in text  # as text, not as a tag
    assert "crop_region(region=[1, 1, 4, 4])" in text
    assert "Trace\nback" in text
    assert "K4X2" in text


def test_the_page_escapes_everything(tmp_path: Path) -> None:
    evil = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    trace = Trace(model={"name": evil})
    image = Image.new("RGB", (4, 4))
    view = View(evil, image, evil, Box(0, 0, 4, 4), (4, 4))
    info = ViewInfo.of(view, trace.add_picture(view))
    trace.emit(RunStarted(run=evil, question=evil, views=(info,), tool_choice=evil))
    trace.emit(ToolCalled(run=evil, call_id=evil, name=evil, arguments={evil: evil}, origin="json"))
    error = ErrorInfo(kind="tool_failed", message=evil, detail=evil)
    trace.emit(ToolFinished(run=evil, call_id=evil, name=evil, ok=False, text=evil, error=error))
    trace.emit(WarningGiven(run=evil, message=evil))
    trace.emit(RunFinished(run=evil, status="failed", text=evil, error=evil, limit=evil))
    page = _Page(trace.to_html(tmp_path / "run.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert all((a["src"] or "").startswith("data:") for tag, a in page.tags if tag == "img")


def test_a_follow_up_shows_the_picture_of_the_run_before(
    tmp_path: Path, pictures: Pictures
) -> None:
    trace = Trace()
    fill(trace, pictures, "r1")
    trace.emit(RunStarted(run="r2", question="and then?", continues="r1"))
    view = ViewInfo.of(pictures.crop, trace.add_picture(pictures.crop))
    trace.emit(ToolFinished(run="r2", turn=1, call_id="c2", name="t", ok=True, views=(view,)))
    page = _Page(trace.to_html(tmp_path / "run.html").read_text(encoding="utf-8"))
    assert [a["alt"] for tag, a in page.tags if tag == "img"][3:] == ["image_1", "view_1"]
    assert "continues r1" in "".join(page.text)
    assert "did not finish" in "".join(page.text)


def test_a_large_picture_is_shown_smaller_and_a_lost_one_named(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "run")
    image = Image.new("RGB", (LARGEST_SIDE * 2, 10))
    view = View("image_1", image, "image_1", Box(0, 0, *image.size), image.size)
    info = ViewInfo.of(view, trace.add_picture(view))
    trace.emit(RunStarted(run="r", question="?", views=(info,)))
    page = _Page(trace.to_html(tmp_path / "a.html").read_text(encoding="utf-8"))
    source = next(a["src"] for tag, a in page.tags if tag == "img") or ""
    assert source.startswith("data:image/jpeg;base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert shown.size[0] == LARGEST_SIDE
    (tmp_path / "run" / "blobs" / info.blob).unlink()
    page = _Page(trace.to_html(tmp_path / "b.html").read_text(encoding="utf-8"))
    assert "the trace has no such blob" in "".join(page.text)


def test_mended_and_repeated_calls_are_shown(tmp_path: Path) -> None:
    trace = Trace()
    trace.emit(RunStarted(run="r1", question="?"))
    repaired = {"repairs": ["box: '1' was read as 1 <b>", "a second\none"], "other": "secret"}
    for call, told in (("c1", repaired), ("c2", {"repeats": "c1"}), ("c3", {"abandoned": True})):
        trace.emit(ToolFinished(run="r1", call_id=call, name="t", ok=True, text="x", metadata=told))
    trace.emit(RunFinished(run="r1", status="answered", text="y"))
    lines = [
        "mended: box: '1' was read as 1 <b>",
        "mended: a second ↵ one",
        "repeats c1, so it was answered without running",
        "its thread did not stop and was left behind",
    ]
    shown = render_text(trace).plain
    page = trace.to_html(tmp_path / "run.html").read_text(encoding="utf-8")
    for call, line in zip(("c1", "c1", "c2", "c3"), lines, strict=True):
        assert re.search(rf"  note +{re.escape(line)}  {call}", shown)
        assert f'<div class="handled">{call} {html.escape(line)}</div>' in page
    assert "secret" not in shown
    assert "was read as 1 <b>" not in page
