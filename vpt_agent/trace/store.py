"""The trace: events in memory, and a run folder that is written while the run goes on."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vpt_agent import __version__
from vpt_agent.errors import TraceError
from vpt_agent.trace.events import (
    SCHEMA_VERSION,
    Event,
    EventBase,
    JsonObject,
    RunStarted,
    ToolFinished,
    ViewInfo,
    read_event,
)
from vpt_agent.types import Record, View

if TYPE_CHECKING:
    import torch
    from PIL import Image

MANIFEST, EVENTS, BLOBS = "manifest.json", "events.jsonl", "blobs"
_BLOB_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,16}")
_EXTENSIONS = (
    (b"\x89PNG\r\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)
AnyEvent = TypeVar("AnyEvent", bound=EventBase)
Listener = Callable[[Event], object]


class Manifest(BaseModel):
    """What a run folder is: ``created`` is UTC in ISO 8601."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    library: str
    created: str
    model: JsonObject = {}


class Trace:
    """Everything that happened in one or more runs.

    Events are always in memory. With ``directory`` (absent or empty, else :class:`TraceError`)
    they are also written as they come: ``manifest.json``, ``events.jsonl`` (one event a line,
    flushed each) and ``blobs/``. A killed process leaves a readable folder. A conversation emits
    all its runs into one trace, each with its own ``run``.

    A blob's name is a hash and an extension. Given bytes and tensors are named by the SHA-256 of
    the bytes; a picture that had to be encoded is named by :attr:`View.sha256`, so equal pixels
    are one blob whichever library wrote the PNG, and nothing is encoded before it is needed.
    """

    def __init__(
        self, directory: str | Path | None = None, *, model: Mapping[str, JsonValue] | None = None
    ) -> None:
        self.manifest = Manifest(
            library=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=dict(model or {}),
        )
        self.directory: Path | None = None
        self._setup()
        if directory is not None:
            self._open(Path(directory))

    def _setup(self) -> None:
        self._events: list[Event] = []
        self._problems: list[str] = []
        self._views: dict[str, ViewInfo] = {}
        self._began: dict[str, float] = {}
        self._pictures: dict[str, Image.Image] = {}
        self._bytes: dict[str, bytes] = {}
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()
        self._finished = False

    def _open(self, directory: Path) -> None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise TraceError(
                "a run is never written over another one",
                where=directory,
                expected="a new or empty directory",
                fix="name another directory, or remove this one",
            )
        try:
            (directory / BLOBS).mkdir(parents=True)
        except OSError as error:
            raise TraceError(
                "the run folder cannot be made", where=directory, got=error.strerror or error
            ) from error
        self.directory = directory
        _write_whole(directory / MANIFEST, self.manifest.model_dump_json(indent=1).encode() + b"\n")
        _write_whole(directory / EVENTS, b"")

    # -- reading ------------------------------------------------------------------------------

    @property
    def events(self) -> tuple[Event, ...]:
        """All events in order."""
        return tuple(self._events)

    @property
    def problems(self) -> tuple[str, ...]:
        """What was wrong with the folder that was read, in words. Empty for a whole one."""
        return tuple(self._problems)

    @property
    def runs(self) -> tuple[str, ...]:
        """The ids of the runs in the order in which they began."""
        return tuple(dict.fromkeys(event.run for event in self._events))

    @property
    def views(self) -> dict[str, ViewInfo]:
        """Every view that an event names, by id, in order of appearance."""
        return dict(self._views)

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """A run folder as the objects that wrote it. The result takes no further events.

        A last line that was cut off (its process was killed) is left out and told in
        :attr:`problems`. Raises :class:`TraceError` where anything else is wrong.
        """
        directory = Path(path)
        trace = cls.__new__(cls)
        trace.manifest = _read_manifest(directory)
        trace.directory = directory
        trace._setup()
        trace._finished = True
        try:
            lines = (directory / EVENTS).read_bytes().split(b"\n")
        except OSError as error:
            raise TraceError(
                "the run folder has no readable events", where=directory / EVENTS
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                trace._keep(read_event(line))
            except ValidationError as error:
                if number < len(lines):
                    raise TraceError(
                        "an event cannot be read",
                        where=f"{directory / EVENTS}, line {number}",
                        got=str(error.errors()[0]["msg"]),
                    ) from error
                trace._problems.append(
                    f"line {number} of {EVENTS} was cut off after {len(line)} bytes: "
                    "the process ended while writing it"
                )
        return trace

    def blob(self, name: str) -> bytes:
        """The bytes of a blob: a picture file, or a safetensors file with one tensor."""
        if name in self._bytes:
            return self._bytes[name]
        if name in self._pictures:
            return _png(self._pictures[name])
        # The name may come from a stranger's trace: it must not lead out of the folder.
        if self.directory is not None and _BLOB_NAME.fullmatch(name):
            path = self.directory / BLOBS / name
            if path.is_file():
                return path.read_bytes()
        raise TraceError("the trace has no such blob", where=self.directory, got=name)

    def picture(self, name: str) -> Image.Image:
        """The picture in a blob: upright, RGB, 8 bits."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        if name in self._pictures:
            return self._pictures[name]
        try:
            picture = Image.open(io.BytesIO(self.blob(name)))
            return ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
            raise TraceError("a picture of the trace cannot be read", where=name, got=e) from e

    def view(self, view_id: str) -> View:
        """A view with its pixels, as the run had it."""
        from vpt_agent.types import Box

        info = self._views.get(view_id)
        if info is None:
            raise TraceError(
                "the trace has no such view", got=view_id, expected=", ".join(self._views)
            )
        return View(
            id=info.id,
            image=self.picture(info.blob),
            root=info.root,
            box=Box(*info.box),
            root_size=info.root_size,
            parent=info.parent,
            origin=info.origin,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in a blob that :meth:`add_tensor` made, on the CPU."""
        from safetensors.torch import load

        return load(self.blob(name))["tensor"]

    # -- writing ------------------------------------------------------------------------------

    def emit(self, event: AnyEvent) -> AnyEvent:
        """Number and date ``event``, keep it, write it, tell the listeners; gives what was kept.

        The agent says ``run`` and ``turn``; ``seq``, ``time`` and ``clock`` are set here.
        """
        if self._finished:
            raise TraceError(
                "a trace that was read takes no further events",
                where=self.directory,
                fix="emit into a new Trace",
            )
        with self._lock:
            now = time.monotonic()
            stamp = {
                "seq": len(self._events),
                "time": time.time(),
                "clock": now - self._began.setdefault(event.run, now),
            }
            kept = event.model_copy(update=stamp)
            if self.directory is not None:
                _append(self.directory / EVENTS, kept.model_dump_json().encode() + b"\n")
            event_kept = cast(Event, kept)  # the union holds every class with a ``type``
            self._keep(event_kept)
            for listener in tuple(self._listeners):
                listener(event_kept)
        return kept

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with every event from now on. Gives the function that ends it."""
        with self._lock:
            self._listeners.append(listener)

        def detach() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return detach

    def add_picture(self, view: View, *, source: bytes | None = None) -> str:
        """Keep the picture of ``view`` and give the name of its blob.

        ``source`` are the bytes of the file it was read from, when known. They are kept as they
        are if they decode to the same pixels; otherwise (and without them) it is kept as PNG.
        """
        if source is not None:
            name = f"{hashlib.sha256(source).hexdigest()}.{_extension(source)}"
            if self._known(name) or self._decodes_to(source, name, view):
                self._store(name, source)
                return name
        name = f"{view.sha256}.png"
        if not self._known(name):
            if self.directory is not None:
                self._store(name, _png(view.image))
            else:
                self._pictures[name] = view.image.copy()
        return name

    def add_tensor(self, tensor: torch.Tensor) -> str:
        """Keep a tensor (a control state) and give the name of its blob."""
        from safetensors.torch import save

        data = save({"tensor": tensor.detach().cpu().contiguous().clone()})
        name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
        self._store(name, data)
        return name

    def save(self, directory: str | Path) -> Path:
        """Write a trace that is in memory as a run folder (same rule as for a new one)."""
        copy = Trace.__new__(Trace)
        copy.manifest = self.manifest
        copy._setup()
        copy._open(Path(directory))
        for name in self.blobs():
            copy._store(name, self.blob(name))
        lines = [event.model_dump_json().encode() + b"\n" for event in self._events]
        _write_whole(Path(directory) / EVENTS, b"".join(lines))
        return Path(directory)

    def blobs(self) -> list[str]:
        """The names of all blobs."""
        names = {*self._bytes, *self._pictures}
        if self.directory is not None and (self.directory / BLOBS).is_dir():
            names |= {
                p.name for p in (self.directory / BLOBS).iterdir() if _BLOB_NAME.fullmatch(p.name)
            }
        return sorted(names)

    # -- readers ------------------------------------------------------------------------------

    def record(self, run: str | None = None) -> Record:
        """See :func:`vpt_agent.trace.record_from_trace`."""
        from vpt_agent.trace.record import record_from_trace

        return record_from_trace(self, run)

    def to_html(self, path: str | Path) -> Path:
        """Write the trace as one page that needs nothing else; gives its path."""
        from vpt_agent.trace.html import render_html

        target = Path(path)
        target.write_text(render_html(self), encoding="utf-8")
        return target

    # -- inside -------------------------------------------------------------------------------

    def _keep(self, event: Event) -> None:
        self._events.append(event)
        if isinstance(event, RunStarted | ToolFinished):
            for view in event.views:
                self._views.setdefault(view.id, view)

    def _known(self, name: str) -> bool:
        if name in self._bytes or name in self._pictures:
            return True
        return self.directory is not None and (self.directory / BLOBS / name).is_file()

    def _store(self, name: str, data: bytes) -> None:
        if self._known(name):
            return
        if self.directory is None:
            self._bytes[name] = data
        else:
            _write_whole(self.directory / BLOBS / name, data)

    def _decodes_to(self, source: bytes, name: str, view: View) -> bool:
        self._bytes[name] = source
        try:
            picture = self.picture(name)
        except TraceError:
            return False
        finally:
            del self._bytes[name]
        return picture.size == view.size and picture.tobytes() == view.image.tobytes()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(
            "this is no run folder", where=directory, expected=f"a directory with {MANIFEST}"
        ) from error
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise TraceError(
            "the manifest of a run cannot be read",
            where=path,
            got="; ".join(str(e["msg"]) for e in error.errors()),
        ) from error
    if not 1 <= manifest.schema_version <= SCHEMA_VERSION:
        raise TraceError(
            "this run was written with another version of the trace",
            where=path,
            got=manifest.schema_version,
            expected=f"1 to {SCHEMA_VERSION}",
            fix=f"read it with vpt-agent {manifest.library}",
        )
    return manifest


def _write_whole(path: Path, data: bytes) -> None:
    """All of the file or none of it: a killed process must not leave half a blob."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise TraceError(
            "the run folder cannot be written", where=path, got=error.strerror or error
        ) from error


def _append(path: Path, line: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(line)
    except OSError as error:
        raise TraceError(
            "the run folder cannot be written", where=path, got=error.strerror or error
        ) from error


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _extension(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _EXTENSIONS if data.startswith(start)), "img")
