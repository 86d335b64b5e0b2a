"""The views of clients: each client sees its own, a bounded number of them, for a bounded time."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vpt_agent.errors import ModelRetry
from vpt_agent.types import Box, View

if TYPE_CHECKING:
    from PIL import Image

Clock = Callable[[], float]

KEY = re.compile(r"[0-9a-f]{32}-")
"""How the ids of clients without a session begin."""


@dataclass(frozen=True)
class Room:
    """What clients may hold: ``views`` and ``pixels`` each, ``clients`` at once, and all of it for
    ``seconds`` after it was used last. What is over is let go, the oldest first."""

    views: int = 64
    pixels: int = 200_000_000
    clients: int = 64
    seconds: float = 1800.0


ROOM = Room()
"""What a client may hold by default."""


@dataclass
class Workspace:
    """One client's views by id, oldest first. ``prefix`` begins every id."""

    room: Room
    prefix: str = ""
    views: OrderedDict[str, View] = field(default_factory=OrderedDict)
    opened: int = 0
    calls: int = 0
    used: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call_id(self) -> str:
        """A name for a call, not used before: the views that it makes are named after it."""
        with self.lock:
            self.calls += 1
            return f"{self.prefix}call_{self.calls}"

    def open(self, image: Image.Image) -> View:
        """A picture as a view of its own."""
        with self.lock:
            self.opened += 1
            name = f"{self.prefix}image_{self.opened}"
            view = View(name, image, name, Box(0, 0, *image.size), image.size)
            self._keep([view])
            return view

    def seen(self) -> Mapping[str, View]:
        """All views, a copy: calls that run beside this one do not change it."""
        with self.lock:
            return dict(self.views)

    def add(self, views: Iterable[View]) -> tuple[View, ...]:
        """Keep what a call made, under ids that are free; gives the views as they are kept."""
        kept: list[View] = []
        with self.lock:
            for view in views:
                view = self._prefixed(view)
                known = self.views.get(view.id)
                name, number = view.id, 1
                while known is not None and known is not view:
                    number += 1
                    name = f"{view.id}.{number}"
                    known = self.views.get(name)
                own = view.root == view.id
                if name != view.id:
                    view = replace(view, id=name, root=name if own else view.root)
                kept.append(view)
                self.views[name] = view
            self._keep(kept)
        return tuple(kept)

    def _prefixed(self, view: View) -> View:
        if view.id.startswith(self.prefix):
            return view
        name = f"{self.prefix}{view.id}"
        return replace(view, id=name, root=name if view.root == view.id else view.root)

    def _keep(self, new: list[View]) -> None:
        for view in new:
            self.views[view.id] = view
            self.views.move_to_end(view.id)
        ids = {view.id for view in new}
        pixels = sum(_pixels(view) for view in self.views.values())
        for name in list(self.views):
            if len(self.views) <= self.room.views and pixels <= self.room.pixels:
                return
            if name not in ids:
                pixels -= _pixels(self.views.pop(name))


def _pixels(view: View) -> int:
    return view.size[0] * view.size[1]


class Workspaces:
    """The workspaces of a server's clients, by what only the client knows."""

    def __init__(self, room: Room, *, clock: Clock = time.monotonic) -> None:
        self.room, self._clock = room, clock
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Workspace] = OrderedDict()

    def of(self, session: str) -> Workspace:
        """The workspace of a session, made if there is none."""
        key = f"session {session}"  # no id can name it
        with self._lock:
            space = self._held.get(key)
            if space is None:
                space = self._held[key] = Workspace(self.room)
            return self._used(key, space)

    def named(self, ids: Iterable[str]) -> Workspace:
        """For clients without a session: the workspace that the ids of its views name, or a new
        one. Its key stands in every id and cannot be guessed, so it is what only the client knows.
        A new one is held once :meth:`hold` finds a view in it.

        Raises :class:`ModelRetry` for ids of several workspaces, and for one that is not held.
        """
        keys = {match.group() for id_ in ids if (match := KEY.match(id_))}
        if not keys:
            return Workspace(self.room, prefix=f"{secrets.token_hex(16)}-")
        if len(keys) > 1:
            raise ModelRetry("these views are not of one conversation", "unknown_source")
        key = keys.pop()
        with self._lock:
            space = self._held.get(key)
            if space is None or self._old(space):
                raise ModelRetry(
                    "there is no view of this name: open the picture again", "unknown_source"
                )
            return self._used(key, space)

    def hold(self, space: Workspace) -> None:
        """Keep a new workspace of :meth:`named`, if there is something in it."""
        if space.prefix and space.views:
            with self._lock:
                self._held.setdefault(space.prefix, space)
                self._used(space.prefix, space)

    def drop(self, session: str) -> None:
        """Let go of a session's views."""
        with self._lock:
            self._held.pop(f"session {session}", None)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._held.clear()

    def __len__(self) -> int:
        return len(self._held)

    def _old(self, space: Workspace) -> bool:
        return space.used < self._clock() - self.room.seconds

    def _used(self, key: str, space: Workspace) -> Workspace:
        space.used = self._clock()
        self._held.move_to_end(key)
        for other in list(self._held):
            if len(self._held) <= self.room.clients and not self._old(self._held[other]):
                break
            if other != key:
                del self._held[other]
        return space
