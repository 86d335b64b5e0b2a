"""Config files of runs: reading, changes, what is wrong, and going on with the one begun with.

Plain values only; nothing is opened or loaded but the YAML itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vpt_agent.errors import MissingExtraError, UserError


class Part(BaseModel):
    """A part of a config: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(Part):
    """The config of a run whose results lie in ``out``."""

    out: Path

    def to_yaml(self) -> str:
        """The whole config, defaults included, as YAML."""
        text: str = _yaml().safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def read_as(kind: type[ConfigT], path: Path | str, changes: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file. ``changes`` are ``key=value``, values in YAML: ``data.rows=2``."""
    yaml = _yaml()
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("the config cannot be read", where=path, got=error.strerror) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("the config is no YAML", where=path, got=error) from error
    if not isinstance(data, dict):
        raise UserError("a config is a table of keys and values", where=path, got=repr(data)[:80])
    for change in changes:
        _change(data, change)
    return make_as(kind, data, where=str(path))


def make_as(kind: type[ConfigT], data: Mapping[str, Any], *, where: str = "config") -> ConfigT:
    """A config of plain values; all that is wrong is said in one :class:`UserError`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problems(kind, error))
        raise UserError("the config is wrong", where=where, got=problems) from error


def require_same(was: RunConfig, now: RunConfig, *, free: Collection[str]) -> None:
    """Raise :class:`UserError` unless ``now`` is ``was`` but for the keys ``free``.

    Keys are dotted (``data.rows``); a free key frees all below it.
    """
    before, after = (_leaves(config.model_dump(mode="json")) for config in (was, now))
    changed = [
        key
        for key in dict.fromkeys((*after, *before))
        if before.get(key) != after.get(key)
        and not any(key == one or key.startswith(f"{one}.") for one in free)
    ]
    if changed:
        raise UserError(
            "a run goes on with the config it began with",
            where=now.out,
            got=", ".join(f"{key}: {after.get(key)}" for key in changed),
            expected=", ".join(f"{key}: {before.get(key)}" for key in changed),
            fix="give the values it began with (config.yaml in that folder), or choose another out",
        )


def _leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Every value that is no table and no list, by its dotted key."""
    if isinstance(value, Mapping):
        pairs = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {at: value}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _leaves(inner, f"{at}.{key}" if at else key)
    return found


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:  # transformers brings it, as of today
        raise MissingExtraError(
            "reading YAML needs PyYAML", fix='pip install "vpt-agent[train]"'
        ) from error
    return yaml


def _change(data: dict[str, Any], change: str) -> None:
    key, mark, value = change.partition("=")
    names = key.split(".")
    if not mark or not all(names):
        raise UserError("a change of the config is KEY=VALUE", got=change, expected="data.rows=2")
    yaml = _yaml()
    try:
        wanted = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError("the value of a change is no YAML", got=change) from error
    at: Any = data
    for number, name in enumerate(names):
        place: int | str = name
        if isinstance(at, list):
            if not (name.isdigit() and int(name) < len(at)):
                raise UserError("a list has no such place", where=key, expected=f"below {len(at)}")
            place = int(name)
        elif not isinstance(at, dict):
            raise UserError("a change reaches into a value", where=key, got=repr(at))
        if number + 1 == len(names):
            at[place] = wanted
        else:
            at = at.setdefault(name, {}) if isinstance(at, dict) else at[int(place)]


def _problems(kind: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        at = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(kind, problem["loc"])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            yield f"there is no key {at}{hint}"
        else:
            yield f"{at or 'config'}: {problem['msg'].removeprefix('Value error, ')}"


def _keys_at(kind: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys of the part in which ``place`` lies."""
    part = kind
    for name in place[:-1]:
        if isinstance(name, str) and name in part.model_fields:
            found = _models_in(part.model_fields[name].annotation)
            part = found[0] if found else part
    return list(part.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]
