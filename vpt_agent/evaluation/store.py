"""An evaluation's folder: who was measured, one line per item and setting, control states.

``manifest.json`` is written at the start; ``rows.jsonl`` and ``states.jsonl`` grow as items are
answered. A killed evaluation leaves a folder that goes on where it stopped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpt_agent.errors import UserError
from vpt_agent.evaluation.items import Needs

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
MANIFEST, ROWS, STATES = "manifest.json", "rows.jsonl", "states.jsonl"
MEASURED_WITH = ("vpt-agent", "torch", "transformers", "numpy", "pillow")
SAME = ("schema_version", "settings", "models", "seed", "chunk")
"""What must not change between the parts of one evaluation."""


@dataclass(frozen=True)
class Called:
    """One call of a run; ``error`` is the kind of :class:`~vpt_agent.types.CallError`, or None.

    ``kind`` is "" for calls that no perception token made.
    """

    name: str
    kind: str
    origin: str
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One item under one setting.

    ``score`` is 0 to 1 (1: exactly right), ``status`` that of the answer, or ``skipped`` with the
    reason in ``why`` (it then counts nowhere). ``rejected`` counts texts that began as a call and
    are none. ``boxes`` are the regions shown and ``true`` the objects, in pixels of the picture of
    ``size``. ``needs`` is None where nobody said.
    """

    item: str
    setting: str
    type: str = ""
    question: str = ""
    expected: str = ""
    answer: str = ""
    score: float = 0.0
    status: str = "answered"
    why: str = ""
    calls: tuple[Called, ...] = ()
    rejected: int = 0
    boxes: tuple[tuple[float, ...], ...] = ()
    true: tuple[tuple[float, ...], ...] = ()
    size: tuple[int, int] = (0, 0)
    needs: Needs | None = None
    visual_tokens: int = 0
    forward_tokens: int = 0
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether the item was asked under this setting."""
        return self.status != "skipped"

    def to_line(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Read :meth:`to_line` back. Unknown fields are a :class:`UserError`."""
        known = {f.name for f in fields(cls)}
        extra = sorted(set(data) - known)
        if extra:
            raise UserError(
                "a row of results has unknown fields",
                got=extra,
                fix="it was written by another version of vpt_agent; use that one, or start anew",
            )
        needs = data.get("needs")
        return cls(
            **{
                **data,
                "calls": tuple(Called(**c) for c in data.get("calls", ())),
                "boxes": tuple(tuple(b) for b in data.get("boxes", ())),
                "true": tuple(tuple(b) for b in data.get("true", ())),
                "size": tuple(data.get("size", (0, 0))),
                "needs": None if needs is None else tuple(tuple(n) for n in needs),
            }
        )


@dataclass(frozen=True)
class State:
    """Control states [k, D] (float32) that an item's run had for a kind."""

    item: str
    setting: str
    kind: str
    type: str
    values: NDArray[np.float32]

    @classmethod
    def of(cls, item: str, setting: str, kind: str, type: str, control: Tensor) -> State:
        """From the tensor that a call carries."""
        return cls(item, setting, kind, type, control.detach().float().cpu().numpy())

    def to_line(self) -> str:
        """One line of JSON: the numbers as base64 of little-endian float32."""
        data = self.values.astype("<f4")
        told = {
            "item": self.item,
            "setting": self.setting,
            "kind": self.kind,
            "type": self.type,
            "shape": list(data.shape),
            "float32": base64.b64encode(data.tobytes()).decode(),
        }
        return json.dumps(told)

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> State:
        """Read :meth:`to_line` back."""
        values = np.frombuffer(base64.b64decode(data["float32"]), dtype="<f4")
        shaped = values.reshape(data["shape"]).astype(np.float32)
        return cls(data["item"], data["setting"], data["kind"], data["type"], shaped)


class ResultStore:
    """A folder that is being filled. Opening one that was begun checks that it is the same
    evaluation, to which settings and models may be added, and drops a last line that was cut
    off."""

    def __init__(self, folder: Path | str, manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        given = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **manifest}))
        path = self.folder / MANIFEST
        if path.is_file():
            self.manifest = _load_manifest(path)
            for name in SAME:
                if not _goes_on(self.manifest.get(name), given.get(name)):
                    raise UserError(
                        "this folder holds another evaluation",
                        where=path,
                        got=f"{name} = {str(given.get(name))[:200]}",
                        expected=str(self.manifest.get(name))[:200],
                        fix="name a new folder, or go on with what it was begun with",
                    )
            now = {**self.manifest, **{name: given.get(name) for name in SAME}}
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            now, self.manifest = given, {}
        if now != self.manifest:
            self.manifest = now
            part = path.with_suffix(".part")
            part.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", "utf-8")
            part.replace(path)
        for name in (ROWS, STATES):
            _mend(self.folder / name)
        self.done = {(row.item, row.setting) for row in read_rows(self.folder)}

    def add(self, rows: Iterable[Outcome], states: Iterable[State] = ()) -> None:
        """Append. States first: a row that stands says that its states stand."""
        _append(self.folder / STATES, [s.to_line() for s in states])
        rows = list(rows)
        _append(self.folder / ROWS, [r.to_line() for r in rows])
        self.done |= {(r.item, r.setting) for r in rows}


def _goes_on(begun: Any, given: Any) -> bool:
    """Whether what is ``given`` is what was begun, with settings or models more at most."""
    if isinstance(begun, list) and isinstance(given, list):
        return all(one in given for one in begun)
    if isinstance(begun, dict) and isinstance(given, dict):
        return all(name in given and given[name] == one for name, one in begun.items())
    return bool(begun == given)


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Who was measured, with what. A folder without one is a :class:`UserError`."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError("this is no evaluation", where=folder, expected=f"a folder with {MANIFEST}")
    return _load_manifest(path)


def read_rows(folder: Path | str) -> Iterator[Outcome]:
    """The outcomes in ``folder``, in the order in which they were written."""
    for data in _lines(Path(folder) / ROWS):
        yield Outcome.of_dict(data)


def read_states(folder: Path | str) -> Iterator[State]:
    """The control states in ``folder``; of each (item, setting, kind) the last one written."""
    found = {(d["item"], d["setting"], d["kind"]): d for d in _lines(Path(folder) / STATES)}
    for data in found.values():
        yield State.of_dict(data)


def _load_manifest(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError("the manifest of an evaluation cannot be read", where=path) from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            "the manifest of an evaluation is of another version",
            where=path,
            got=data.get("schema_version") if isinstance(data, dict) else type(data).__name__,
            expected=SCHEMA_VERSION,
        )
    return data


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a cut last line is not read
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise UserError("a line of results cannot be read", where=f"{path}:{number}") from error
        yield data


def _mend(path: Path) -> None:
    """Cut an unfinished last line off: its writer was killed."""
    if path.is_file():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)


def _append(path: Path, lines: list[str]) -> None:
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


# --- who and where -----------------------------------------------------------------------------


def weights_hash(model: object) -> str | None:
    """SHA-256 over names, shapes and bytes of all weights; None for what has none (a script, a
    remote model)."""
    state = getattr(model, "state_dict", None)
    if state is None:
        return None
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What the figures were measured on and with. The date is UTC."""
    versions = {}
    for name in MEASURED_WITH:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    found: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
