"""One token of one row on one CPU thread by a routine in C, compiled here when asked for.

What :mod:`vpt_agent.model.onerow` computes by some thirty operators a layer, ``onerow.c`` computes
in one call: nothing lies between two products, weights are asked for before they are needed, and
bfloat16 is read as fast as float32. Sums are float32 throughout, so bfloat16 rounds less often.

It needs a C compiler (``CC``, cc, gcc or clang), takes about a second once a process, and leaves
nothing behind: the library is loaded from a folder that is deleted. With several threads of torch,
and for shapes that it does not know, torch computes as before.

D width, H heads, K key-value heads, d head width, I inner width.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vpt_agent.errors import MissingExtraError

if TYPE_CHECKING:
    from vpt_agent.model.direct import DirectDecoder

KERNEL = "vpt::one_row[cpu:c]"
"""The name by which traces know it."""
_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_SOURCES = ("somerows.c", "onerow.c")  # the first includes the second
_VECTOR = 16
_WEIGHTS = 12
"""Of one layer, in the order of the routine; keys and values follow."""
_TYPES = (torch.float32, torch.bfloat16)


class Slots(NamedTuple):
    """Where one token of one row stands: its ``slot``, and the slots it sees: ``width`` from
    ``first`` on, or those of ``seen`` [width] int64."""

    slot: int
    first: int
    width: int
    seen: Tensor | None


@dataclass(frozen=True, eq=False)
class Library:
    """The loaded routines."""

    one_row: Any
    times: Any
    columns: Any = None
    columns_norm: Any = None
    rows_attend: Any = None


@dataclass
class Counts:
    """Tokens that :func:`one_row` computed in this process."""

    tokens: int = 0


counts = Counts()
_library: Library | None = None
_wanted = False


def use(wanted: bool = True) -> None:
    """Compute with the compiled routines from now on, in this process, or no longer.

    Without a C compiler a :class:`MissingExtraError`. They serve one CPU thread: where torch has
    several, a warning says so, and they wait for ``torch.set_num_threads(1)``.
    """
    global _library, _wanted
    if wanted and _library is None:
        _library = _built()
    if wanted and torch.get_num_threads() > 1:
        warnings.warn(
            "the compiled routines serve one CPU thread, and torch has "
            f"{torch.get_num_threads()}: they are used after torch.set_num_threads(1)",
            stacklevel=3,
        )
    _wanted = wanted


@contextmanager
def using(wanted: bool = True) -> Generator[None, None, None]:
    """As :func:`use`, inside only."""
    before = _wanted
    use(wanted)
    try:
        yield
    finally:
        use(before)


def active() -> Library | None:
    """The routines, if they are wanted and torch computes with one thread."""
    return _library if _wanted and torch.get_num_threads() == 1 else None


def _built() -> Library:
    compiler = _compiler()
    try:
        return _compiled_by(compiler)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingExtraError(
            "the routines for one token cannot be compiled or loaded here",
            where=" ".join(compiler),
            got=str(error)[:200],
            fix="let TMPDIR name a folder that can be written and from which programs may run, "
            "or leave out compiled=True",
        ) from error


def _compiled_by(compiler: Sequence[str]) -> Library:
    with tempfile.TemporaryDirectory(prefix="vpt-agent-") as folder:
        for name in _SOURCES:
            source = (resources.files("vpt_agent.model") / name).read_bytes()
            (Path(folder) / name).write_bytes(source)
        made, c = Path(folder) / "rows.so", Path(folder) / _SOURCES[0]
        said = ""
        for native in _FLAGS:
            command = [
                *compiler,
                "-O3",
                *native,
                "-shared",
                "-fPIC",
                str(c),
                "-o",
                str(made),
                "-lm",
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                return _loaded(made)
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
    raise MissingExtraError(
        "the C compiler cannot compile the routines for one token",
        where=" ".join(compiler),
        got=said[:200],
        fix="install gcc or clang, or leave out compiled=True",
    )


def _compiler() -> list[str]:
    """The compiler's command: ``CC`` with its options, or the first that is installed."""
    named = os.environ.get("CC", "").split()
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    raise MissingExtraError(
        "there is no C compiler",
        where="PATH" if not named else "CC",
        got=" ".join(named) or "neither cc nor gcc nor clang",
        fix="install gcc or clang, or leave out compiled=True",
    )


def _loaded(path: Path) -> Library:
    found = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.vpt_one_row.argtypes = [pointer] * 9 + [number]
    found.vpt_times.argtypes = [pointer] * 3 + [number] * 2 + [pointer, number]
    found.vpt_columns.argtypes = [pointer] * 4 + [number] * 4
    found.vpt_columns_norm.argtypes = [pointer] * 3 + [number] * 2 + [ctypes.c_double, number]
    found.vpt_rows_attend.argtypes = [pointer] * 11 + [number]
    routines = (
        found.vpt_one_row,
        found.vpt_times,
        found.vpt_columns,
        found.vpt_columns_norm,
        found.vpt_rows_attend,
    )
    for routine in routines:
        routine.restype = None
    return Library(*routines)


# --- one token through all layers -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Checked:
    """Where weights lay when they were last looked at, and I if the routine knows their shapes."""

    addresses: list[int]
    dtype: torch.dtype
    inner: int | None


_checked: WeakKeyDictionary[DirectDecoder, _Checked] = WeakKeyDictionary()


def one_row(decoder: DirectDecoder, embeds: Tensor, positions: Tensor, cache: Any) -> Tensor | None:
    """Final-norm hidden state [1, 1, D] of one token ``embeds`` [1, 1, D] at ``positions``
    [3, 1, 1]; None where torch must compute it.

    ``cache`` says by ``single()`` where the token stands (:class:`Slots`, or None), and has
    ``keys`` and ``values`` [slots, K * d] of each layer, which are written.
    """
    library, single = active(), getattr(cache, "single", None)
    slots: Slots | None = None if library is None or single is None else single()
    if library is None or slots is None or embeds.dtype not in _TYPES or not fits(cache, embeds):
        return None
    plain, known = _looked_at(decoder, embeds.dtype)
    if known.inner is None:
        return None
    kv, d, heads = decoder.kv_heads, decoder.head_dim, decoder.heads
    width, depth = embeds.shape[-1], len(decoder.layers)
    parts: list[int] = []
    for layer in range(depth):
        parts += plain[_WEIGHTS * layer : _WEIGHTS * (layer + 1)]
        parts += (cache.keys[layer].data_ptr(), cache.values[layer].data_ptr())
    padded = -(-slots.width // _VECTOR) * _VECTOR
    floats = 2 * width + (2 * heads + 2 * kv + 1) * d + 2 * known.inner + heads // kv * padded
    speed = decoder.text.rotary_emb.inv_freq.float().contiguous()
    room, out, token = torch.empty(floats), torch.empty_like(embeds), embeds.contiguous()
    library.one_row(
        (ctypes.c_int64 * 9)(
            depth, width, heads, kv, d, known.inner, slots.slot, slots.first, slots.width
        ),
        (ctypes.c_void_p * len(parts))(*parts),
        None if slots.seen is None else slots.seen.data_ptr(),
        speed.data_ptr(),
        (ctypes.c_double * 3)(int(positions[0, 0, 0]), decoder.scaling, decoder.eps),
        plain[-1],
        token.data_ptr(),
        out.data_ptr(),
        room.data_ptr(),
        embeds.dtype == torch.bfloat16,
    )
    counts.tokens += 1
    return out


def _looked_at(decoder: DirectDecoder, dtype: torch.dtype) -> tuple[list[int], _Checked]:
    """Where the weights lie (0: there is none), and what is known of their shapes."""
    weights = _weights(decoder)
    plain = [0 if w is None else w.data_ptr() for w in weights]
    known = _checked.get(decoder)
    if known is None or known.addresses != plain or known.dtype != dtype:
        known = _Checked(plain, dtype, _inner(decoder, weights, dtype))
        _checked[decoder] = known
    return plain, known


def fits(cache: Any, embeds: Tensor) -> bool:
    """Whether what is written for ``embeds`` is what ``cache`` holds: a model may have been cast
    since, and a routine in C would write behind the cache's end."""
    keys: Tensor = cache.keys[0]
    return keys.dtype == embeds.dtype and keys.device.type == "cpu"


def knows(decoder: DirectDecoder, dtype: torch.dtype) -> bool:
    """Whether the routines know the shapes and types of the weights, the tokens being ``dtype``."""
    return dtype in _TYPES and _looked_at(decoder, dtype)[1].inner is not None


def _weights(decoder: DirectDecoder) -> list[Tensor | None]:
    """Those of all layers in the routine's order (None: no bias), and the last norm's."""
    found: list[Tensor | None] = []
    for q, k, v, o, gate, up, down, before, between in decoder.layers:
        found += (
            q["weight"], k["weight"], v["weight"], q["bias"], k["bias"], v["bias"], o["weight"],
            gate["weight"], up["weight"], down["weight"], before["weight"], between["weight"],
        )  # fmt: skip
    return [*found, decoder.text.norm._parameters["weight"]]


def _inner(
    decoder: DirectDecoder, weights: Sequence[Tensor | None], dtype: torch.dtype
) -> int | None:
    """I, or None where the routine does not know the shapes or types of the weights."""
    there = [w for w in weights if w is not None]
    inner, width = decoder.layers[0].gate["weight"].shape
    known = (
        all(w.is_contiguous() and w.device.type == "cpu" and w.dtype == dtype for w in there)
        and all(n % _VECTOR == 0 for n in (inner, width, decoder.head_dim))
        and all(layer.gate["weight"].shape == (inner, width) for layer in decoder.layers)
        and all(layer.gate["bias"] is None and layer.up["bias"] is None for layer in decoder.layers)
    )
    return int(inner) if known else None


def times(weight: Tensor, row: Tensor) -> Tensor | None:
    """``weight`` [m, n] times ``row`` [n] as float32 [m]; None where torch must compute it."""
    library = active()
    if library is None or row.dtype not in _TYPES or weight.dtype != row.dtype:
        return None
    (m, n), fits = weight.shape, weight.device.type == "cpu" and weight.is_contiguous()
    if not fits or n % _VECTOR or row.numel() != n:
        return None
    out, room, own = torch.empty(m), torch.empty(n), row.contiguous()
    library.times(
        weight.data_ptr(), own.data_ptr(), out.data_ptr(), m, n, room.data_ptr(),
        row.dtype == torch.bfloat16,
    )  # fmt: skip
    return out
