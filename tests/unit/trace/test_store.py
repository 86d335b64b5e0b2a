"""The run folder: written while the run goes on, read back into the same objects."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from vpt_agent import __version__
from vpt_agent.errors import TraceError
from vpt_agent.trace import Trace, ViewInfo, WarningGiven
from vpt_agent.types import View

from .conftest import Pictures, fill


def test_a_folder_reads_back_into_the_same_objects(tmp_path: Path, pictures: Pictures) -> None:
    trace = Trace(tmp_path / "run", model={"name": "nano"})
    fill(trace, pictures)
    control = torch.arange(8, dtype=torch.bfloat16).view(2, 4)
    blob = trace.add_tensor(control)
    back = Trace.read(tmp_path / "run")
    assert back.events == trace.events
    assert back.manifest == trace.manifest
    assert back.problems == ()
    assert back.views == trace.views
    assert back.manifest.model == {"name": "nano"}
    assert back.manifest.library == __version__
    assert torch.equal(back.tensor(blob), control)
    for view in pictures:
        again = back.view(view.id)
        assert again.sha256 == view.sha256
        assert (again.box, again.root_size, again.parent, again.origin) == (
            view.box,
            view.root_size,
            view.parent,
            view.origin,
        )


def test_events_are_numbered_dated_and_told_to_listeners(pictures: Pictures) -> None:
    trace, heard = Trace(), []
    detach = trace.subscribe(heard.append)
    fill(trace, pictures)
    detach()
    detach()
    trace.emit(WarningGiven(run="r2", message="nobody listens"))
    assert tuple(heard) == trace.events[:-1]
    assert [e.seq for e in trace.events] == list(range(len(trace.events)))
    clocks = [e.clock for e in trace.events[:-1]]
    assert clocks == sorted(clocks)
    assert trace.events[-1].clock == 0.0  # every run has its own clock
    assert trace.events[-1].time >= trace.events[0].time > 1e9
    assert trace.runs == ("r1", "r2")


def test_a_follow_up_appends_to_the_same_trace(tmp_path: Path, pictures: Pictures) -> None:
    trace = Trace(tmp_path / "run")
    fill(trace, pictures, "r1")
    fill(trace, pictures, "r2", continues="r1")
    back = Trace.read(tmp_path / "run")
    assert back.runs == ("r1", "r2")
    assert back.events == trace.events
    assert len(back.blobs()) == 2  # the same pictures are kept once


def test_emitting_from_many_threads_keeps_the_numbers_and_the_lines(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "run")

    def work(name: str) -> None:
        for i in range(25):
            trace.emit(WarningGiven(run=name, message=str(i)))

    threads = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.seq for e in Trace.read(tmp_path / "run").events] == list(range(100))


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Trace(tmp_path / "empty")
    with pytest.raises(TraceError, match=r"never written over another one; where: .*empty"):
        Trace(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(TraceError, match="expected: a new or empty directory"):
        Trace(tmp_path / "file")
    with pytest.raises(TraceError, match="the run folder cannot be made"):
        Trace(tmp_path / "file" / "below")


def test_a_folder_that_vanishes_is_told(tmp_path: Path, pictures: Pictures) -> None:
    trace = Trace(tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").unlink()
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "run" / "blobs").rmdir()
    (tmp_path / "run").rmdir()
    with pytest.raises(TraceError, match=r"cannot be written; where: .*events\.jsonl"):
        trace.emit(WarningGiven(run="r", message="m"))
    with pytest.raises(TraceError, match=r"cannot be written; where: .*blobs"):
        trace.add_picture(pictures.crop)


WRITER = """
import sys, time
from PIL import Image
from vpt_agent.trace import Trace, WarningGiven, ViewInfo, RunStarted
from vpt_agent.types import Box, View
trace = Trace(sys.argv[1])
view = View("image_1", Image.new("RGB", (9, 7), "red"), "image_1", Box(0, 0, 9, 7), (9, 7))
info = ViewInfo.of(view, trace.add_picture(view))
trace.emit(RunStarted(run="r1", question="?", views=(info,)))
print("ready", flush=True)
while True:
    trace.emit(WarningGiven(run="r1", message="x" * 2000))
"""


def test_a_killed_process_leaves_a_readable_trace(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while (tmp_path / "run" / "events.jsonl").stat().st_size < 50_000:
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    trace = Trace.read(tmp_path / "run")
    assert len(trace.events) > 20
    assert [e.seq for e in trace.events] == list(range(len(trace.events)))
    assert trace.view("image_1").image.getpixel((0, 0)) == (255, 0, 0)


def test_a_cut_last_line_is_left_out_and_told(tmp_path: Path, pictures: Pictures) -> None:
    trace = Trace(tmp_path / "run")
    fill(trace, pictures)
    file = tmp_path / "run" / "events.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    back = Trace.read(tmp_path / "run")
    assert back.events == trace.events[:-1]
    assert len(back.problems) == 1
    assert f"line {len(trace.events)} of events.jsonl was cut off" in back.problems[0]
    file.write_bytes(whole[:-1])  # only the line break is missing: the event is whole
    assert Trace.read(tmp_path / "run").events == trace.events


def test_other_damage_is_an_error(tmp_path: Path, pictures: Pictures) -> None:
    folder = tmp_path / "run"
    fill(Trace(folder), pictures)
    events, manifest = folder / "events.jsonl", folder / "manifest.json"
    whole = events.read_bytes()
    events.write_bytes(b"{not json\n" + whole)
    with pytest.raises(TraceError, match=r"an event cannot be read; where: .*line 1; got: Invalid"):
        Trace.read(folder)
    events.unlink()
    with pytest.raises(TraceError, match="no readable events"):
        Trace.read(folder)
    events.write_bytes(whole)
    data = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(data | {"schema_version": 99}))
    told = f"got: 99; expected: 1 to 3; do: .*vpt-agent {__version__}"
    with pytest.raises(TraceError, match=told):
        Trace.read(folder)
    manifest.write_text("{}")
    with pytest.raises(TraceError, match="manifest of a run cannot be read"):
        Trace.read(folder)
    with pytest.raises(TraceError, match="this is no run folder"):
        Trace.read(tmp_path)


def test_a_read_trace_takes_no_events(tmp_path: Path) -> None:
    Trace(tmp_path / "run")
    with pytest.raises(TraceError, match="takes no further events"):
        Trace.read(tmp_path / "run").emit(WarningGiven(run="r", message="m"))


def _file(view: View, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    view.image.save(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif")])
def test_the_bytes_of_a_given_file_are_kept(pictures: Pictures, kind: str, ending: str) -> None:
    trace, data = Trace(), _file(pictures.original, kind)
    name = trace.add_picture(pictures.original, source=data)
    assert name.endswith(f".{ending}")
    assert trace.blob(name) == data
    assert trace.add_picture(pictures.original, source=data) == name


def test_bytes_that_show_something_else_are_not_kept(pictures: Pictures) -> None:
    trace, name = Trace(), f"{pictures.original.sha256}.png"
    lossy = _file(pictures.original, "JPEG", quality=10)
    assert trace.add_picture(pictures.original, source=lossy) == name
    assert trace.add_picture(pictures.original, source=b"no picture") == name
    assert trace.blobs() == [name]
    assert Image.open(io.BytesIO(trace.blob(name))).tobytes() == pictures.original.image.tobytes()


def test_a_turned_photograph_is_kept_and_shown_upright(pictures: Pictures) -> None:
    image = pictures.crop.image
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    buffer = io.BytesIO()
    image.rotate(90, expand=True).save(buffer, format="PNG", exif=exif)
    trace = Trace()
    name = trace.add_picture(pictures.crop, source=buffer.getvalue())
    assert trace.blob(name) == buffer.getvalue()
    assert trace.picture(name).tobytes() == image.tobytes()


def test_webp_and_unknown_endings(pictures: Pictures) -> None:
    lossless = _file(pictures.original, "WEBP", lossless=True)
    assert Trace().add_picture(pictures.original, source=lossless).endswith(".webp")
    ppm = _file(pictures.original, "PPM")
    assert Trace().add_picture(pictures.original, source=ppm).endswith(".img")


def test_a_picture_in_memory_is_not_touched_by_later_drawing(pictures: Pictures) -> None:
    trace = Trace()
    name = trace.add_picture(pictures.crop)
    before = pictures.crop.image.tobytes()
    pictures.crop.image.putpixel((0, 0), (1, 2, 3))
    assert trace.picture(name).tobytes() == before


def test_a_trace_in_memory_can_be_saved(tmp_path: Path, told: Trace) -> None:
    control = told.add_tensor(torch.ones(1, 3))
    back = Trace.read(told.save(tmp_path / "run"))
    assert back.events == told.events
    assert back.manifest == told.manifest
    assert back.blobs() == told.blobs()
    assert back.tensor(control).tolist() == [[1.0, 1.0, 1.0]]
    with pytest.raises(TraceError, match="never written over"):
        told.save(tmp_path / "run")


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "0" * 64 + ".png", ""])
def test_a_blob_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    Trace(tmp_path / "run")
    with pytest.raises(TraceError, match="has no such blob"):
        Trace.read(tmp_path / "run").blob(name)


def test_a_blob_that_is_no_picture_and_a_view_that_is_not_there(told: Trace) -> None:
    tensor = told.add_tensor(torch.zeros(1))
    with pytest.raises(TraceError, match="picture of the trace cannot be read"):
        told.picture(tensor)
    with pytest.raises(TraceError, match="no such view; got: view_9; expected: image_1, view_1"):
        told.view("view_9")


def test_the_module_loads_no_torch() -> None:
    code = "import sys, vpt_agent.trace; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "False\n"


def test_view_info_says_where_the_view_lies(pictures: Pictures) -> None:
    info = ViewInfo.of(pictures.crop, "b")
    assert (info.box, info.size, info.root, info.parent) == (
        (15, 10, 75, 50),
        (60, 40),
        "image_1",
        "image_1",
    )
