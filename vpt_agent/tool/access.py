"""What a call may read besides the pictures of its run: files under named folders, addresses.

Nothing, unless the user allows it. Paths and addresses come from a model or from another agent, so
what is refused is a :class:`ModelRetry` with one line that tells nothing about this machine: the
same words for a file that is elsewhere and for one that does not exist elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vpt_agent.errors import ImageError, ModelRetry, UserError

if TYPE_CHECKING:
    from PIL import Image

_LONGEST_NAME = 4096  # characters of a path or an address; what is longer is neither
_DATA = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
# How PNG, JPEG, GIF, WebP, BMP and TIFF begin in base64. Nothing else is taken for base64 unsaid.
_BASE64_PICTURE = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)")
_LEAST_BASE64 = 48

_ELSEWHERE = "this file is not in a folder that may be read here"


@dataclass(frozen=True, kw_only=True)
class Access:
    """What may be read, and how much of it at once.

    ``roots``: folders whose files may be read, with all below them. ``urls``: whether http(s)
    addresses may be fetched, and then only from public hosts unless ``private``; ``seconds`` is the
    time of one fetch, redirects included. ``max_bytes`` holds for files, addresses and data URLs,
    ``max_pixels`` for pictures, before they are decoded. Raises :class:`UserError` for a root that
    is no folder, or the whole machine.
    """

    roots: tuple[Path, ...] = ()
    urls: bool = False
    private: bool = False
    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    seconds: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", tuple(_root(root) for root in self.roots))
        for name in ("max_bytes", "max_pixels", "seconds"):
            if not getattr(self, name) > 0:
                raise UserError(
                    "a limit of what may be read is more than 0",
                    where=f"Access.{name}",
                    got=getattr(self, name),
                )

    def read(self, path: str) -> bytes:
        """The bytes of a file under one of :attr:`roots`; a relative path is looked for in each.

        Symbolic links are followed as long as they stay there. Raises :class:`ModelRetry`.
        """
        return read_beneath(self.roots, path, self.max_bytes)

    def fetch(self, url: str) -> bytes:
        """The bytes at an address. Raises :class:`ModelRetry`."""
        if not self.urls:
            raise ModelRetry("addresses are not fetched here: send the picture itself")
        if len(url) > _LONGEST_NAME:
            raise ModelRetry("this address is too long")
        from vpt_agent.vision.fetch import fetch, is_public

        check = (lambda _: True) if self.private else is_public
        try:
            return fetch(url, self.max_bytes, check=check, seconds=self.seconds)
        except ImageError as error:
            raise ModelRetry(error.what) from error

    def bytes_of(self, source: str) -> bytes:
        """The bytes that ``source`` names: a data URL, the base64 of a picture, an http(s) address
        or a path. Raises :class:`ModelRetry`."""
        if source[:5].lower() == "data:":
            return self._decoded(source)
        if len(source) >= _LEAST_BASE64 and _BASE64_PICTURE.match(source):
            return self._plain(source)
        if _SCHEME.match(source):
            if not re.match(r"https?://", source, re.IGNORECASE):
                raise ModelRetry("a picture is a path, a data URL or an http(s) address")
            return self.fetch(source)
        return self.read(source)

    def image(self, source: str) -> Image.Image:
        """The picture that ``source`` names, RGB with 8 bits. Raises :class:`ModelRetry`."""
        return self.decoded(self.bytes_of(source))

    def decoded(self, data: bytes) -> Image.Image:
        """The picture in ``data``, RGB with 8 bits. Raises :class:`ModelRetry`."""
        from vpt_agent.vision.images import load_image

        try:
            return load_image(data, max_pixels=self.max_pixels, max_bytes=self.max_bytes)
        except ImageError as error:
            # Not `got`: it can hold the first bytes of a file that is no picture.
            hint = f" (expected {error.expected})" if error.expected else ""
            raise ModelRetry(f"{error.what}{hint}") from error

    def _decoded(self, source: str) -> bytes:
        begin = _DATA.match(source[:200])
        if begin is None:
            raise ModelRetry("a data URL begins with data:image/...;base64,")
        return self._plain(source[begin.end() :])

    def _plain(self, text: str) -> bytes:
        if len(text) > self.max_bytes * 4 // 3 + 4:
            raise ModelRetry(f"the picture is too large: at most {self.max_bytes} bytes")
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ModelRetry("this is no base64") from error


NOTHING = Access()
"""No files and no addresses: what a call may read by default."""


def read_beneath(roots: Iterable[Path], path: str, max_bytes: int) -> bytes:
    """The bytes of a regular file under one of ``roots`` (real paths of folders).

    Raises :class:`ModelRetry` for everything else: what leads out by ``..``, an absolute path or a
    symbolic link, folders, devices, pipes, and files of more than ``max_bytes``.
    """
    roots = tuple(roots)
    if not roots:
        raise ModelRetry("no files may be read here: send the picture itself, as a data URL")
    if not path.strip() or "\0" in path or len(path) > _LONGEST_NAME:
        raise ModelRetry("this is no path of a file")
    missing = False
    for root in roots:
        try:
            parts = _parts(root, path)
            if parts is not None:
                return _read(root, parts, max_bytes)
        except FileNotFoundError:
            missing = True
        except (OSError, ValueError) as error:
            raise ModelRetry("this file cannot be read") from error
    raise ModelRetry("there is no such file" if missing else _ELSEWHERE)


def _parts(root: Path, path: str) -> tuple[str, ...] | None:
    """The real way from ``root`` to a file, link by link resolved; None if it leads elsewhere."""
    real = Path(os.path.realpath(root / path))
    return real.relative_to(root).parts if real.is_relative_to(root) else None


def _read(root: Path, parts: tuple[str, ...], max_bytes: int) -> bytes:
    handle = _opened(root, parts)
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise ModelRetry("this is not a regular file")
        large = state.st_size > max_bytes
        data = b"" if large else os.fdopen(handle, "rb", closefd=False).read(max_bytes + 1)
    finally:
        os.close(handle)
    if large or len(data) > max_bytes:
        raise ModelRetry(f"the file is too large: at most {max_bytes} bytes")
    return data


def _opened(root: Path, parts: tuple[str, ...]) -> int:
    """A handle of the file. Opened folder by folder without following links, so that nobody can
    put one in the way between the check and the opening; never waits (a pipe would)."""
    if not parts:
        raise ModelRetry("this is a folder, not a file")
    if os.open not in os.supports_dir_fd:  # Windows
        return os.open(root.joinpath(*parts), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            inner = os.open(name, flags, dir_fd=folder)
            os.close(folder)
            folder = inner
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        return os.open(parts[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)


def _root(root: str | Path) -> Path:
    try:
        real = Path(root).resolve(strict=True)
    except OSError as error:
        raise UserError("there is no such folder", where="Access.roots", got=root) from error
    if not real.is_dir():
        raise UserError("this is no folder", where="Access.roots", got=root)
    if real == Path(real.anchor):
        raise UserError(
            "the whole machine is too much to allow",
            where="Access.roots",
            got=root,
            fix="name the folder with the pictures",
        )
    return real
