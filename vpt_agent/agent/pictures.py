"""What a user gives as pictures, read into views: on threads, ahead of need, where that can gain.

Reading a file, decoding and resizing leave Python's lock alone most of the time, so on a machine of
several CPUs they go on beside the model's work. Several pictures of one question are read side by
side; of a batch, the pictures of the next questions are read while the model answers the others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vpt_agent.engine.parts import Wait
from vpt_agent.errors import UserError
from vpt_agent.types import View
from vpt_agent.vision.images import Source, load_views

T = TypeVar("T")
R = TypeVar("R")
Images = Source | Sequence[Source] | None

WORKERS = 4
"""Threads that read pictures, at most; one CPU is left to the model."""
WAITING = 16
"""Questions of a batch, at most, whose pictures were read and whom nobody has asked yet."""


@dataclass(frozen=True)
class Given:
    """Pictures of the user: views, with the bytes of their files (None: no file) and notes."""

    views: tuple[View, ...] = ()
    files: tuple[bytes | None, ...] = ()
    notes_of: tuple[tuple[str, ...], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was said when they were read."""
        return tuple(note for notes in self.notes_of for note in notes)

    def plus(self, other: Given) -> Given:
        """These and ``other``."""
        return Given(
            (*self.views, *other.views),
            (*self.files, *other.files),
            (*self.notes_of, *other.notes_of),
        )


class Pictures:
    """Reads pictures. ``prepare`` is told of each that is read on a thread, there, and may do for
    it what it can (resize it). ``workers`` None: as many as this machine has CPUs to spare."""

    def __init__(
        self,
        prepare: Callable[[View], None],
        *,
        allow_urls: bool = False,
        workers: int | None = None,
    ) -> None:
        self._prepare, self.allow_urls = prepare, allow_urls
        self.workers = max(0, min(WORKERS, _cpus() - 1)) if workers is None else workers
        self._pool: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()

    def close(self) -> None:
        """Stop the threads; what somebody asked for is read first."""
        with self._starting:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def load(self, images: Images | Given) -> Given:
        """Read ``images``. What cannot be read is a :class:`UserError`: of several, the first."""
        if isinstance(images, Given):
            return images
        sources = _sources(images)
        if len(sources) < 2 or not self.workers:
            parts = [self._one(source) for source in sources]
        else:
            found = [self.submit(self._ready, source) for source in sources]
            parts = [future.result() for future in found]
        done = Given()
        for part in parts:
            done = done.plus(part)
        return done

    def ahead(self, wanted: Sequence[Images], *, most: int) -> Ahead | None:
        """Read the pictures of questions one after another, on threads; ``most`` questions at once
        go on. None where it gains nothing."""
        if not self.workers or len(wanted) < 2:
            return None
        return Ahead(self, wanted, most)

    def submit(self, read: Callable[[T], R], what: T) -> Future[R]:
        """Let a thread ``read`` ``what``."""
        with self._starting:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="pictures")
            return self._pool.submit(read, what)

    def read(self, images: Images) -> Given:
        """Read and prepare ``images`` on this thread."""
        done = Given()
        for source in _sources(images):
            done = done.plus(self._ready(source))
        return done

    def _ready(self, source: Source) -> Given:
        given = self._one(source)
        self._prepare(given.views[0])
        return given

    def _one(self, source: Source) -> Given:
        notes: list[str] = []
        (view,) = load_views([source], allow_urls=self.allow_urls, warnings=notes)
        file = source if isinstance(source, bytes) else None
        if isinstance(source, str | Path) and Path(source).is_file():
            file = Path(source).read_bytes()
        return Given((view,), (file,), (tuple(notes),))


class Ahead:
    """The pictures of a batch's questions, each when its :meth:`future` is done.

    A bounded number is in memory: at most those of :data:`WAITING` questions that have not taken
    them, and none of a question that could not begin anyway, since ``most`` are still going on.
    """

    def __init__(self, pictures: Pictures, wanted: Sequence[Images], most: int) -> None:
        self._pictures, self._wanted, self._most = pictures, wanted, most
        self._futures: list[Future[Given]] = [Future() for _ in wanted]
        self._begun = self._finished = 0
        self._taken: set[int] = set()  # by number: some questions end before they ask
        self._lock = threading.Lock()
        self._more()

    def given(self, number: int) -> Generator[Wait, Any, Given]:
        """The pictures of question ``number``, as a part of its run; its error is that run's."""
        try:
            (given,) = yield Wait((self._futures[number],), _on_their_way)
        finally:
            with self._lock:
                self._taken.add(number)
                self._futures[number] = Future()  # the pictures are the run's now
            self._more()
        pictures: Given = given
        return pictures

    def finished(self, number: int) -> None:
        """Question ``number`` was answered, or given up."""
        with self._lock:
            self._finished += 1
            self._taken.add(number)
        self._more()

    def close(self) -> None:
        """Begin no more."""
        with self._lock:
            self._begun = len(self._wanted)

    def _more(self) -> None:
        while True:
            with self._lock:
                number = self._begun
                if number >= len(self._wanted) or number - self._finished >= self._most:
                    return
                if number - len(self._taken) >= WAITING:
                    return
                self._begun += 1
            self._pictures.submit(self._read, number)

    def _read(self, number: int) -> None:
        with self._lock:
            future = self._futures[number]
            if number in self._taken:  # it ended before its pictures were read
                return
        try:
            future.set_result(self._pictures.read(self._wanted[number]))
        except BaseException as error:  # told to the run that asked for it
            future.set_exception(error)


def _on_their_way() -> None:
    """The threads read already. Unlike a plain :class:`Wait`, this lets the loop wait a moment, so
    that questions whose pictures come together go through the model together."""


def _sources(images: Images) -> list[Any]:
    if images is None:
        return []
    single = isinstance(images, str | Path | bytes | bytearray) or not isinstance(images, Sequence)
    sources: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
    if not sources:
        raise UserError(
            "the list of pictures is empty",
            got=repr(images),
            fix="pass image=None for a question without a picture",
        )
    return sources


def _cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
