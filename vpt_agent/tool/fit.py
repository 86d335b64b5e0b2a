"""Arguments brought to the types of their schema, where a model's writing has one reading only.

``"12"`` for an integer, ``3.0`` for an integer, ``"[1, 2]"`` for a list, one value where a list of
such values is wanted, null for something that may be left out. Every change is said. What does not
fit is left as it is, for the strict check that follows.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from vpt_agent.tool.lenient import UnreadableError, read_json
from vpt_agent.tool.text import one_line

Schema = Mapping[str, JsonValue]

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_MOST_DEPTH = 24
_LONGEST = 400  # characters of a text that may be a number or a list
_MOST_STEPS = 5_000  # a schema can be made so that trying its alternatives never ends


def fit(values: Mapping[str, JsonValue], schema: Schema) -> tuple[dict[str, JsonValue], list[str]]:
    """``values`` as the JSON Schema wants them, and what was changed, one line for each change."""
    fitter = _Fitter(schema)
    try:
        fitted, _ = fitter.one(dict(values), schema, "", 0)
    except _TooMuch:
        return dict(values), []
    return (fitted if isinstance(fitted, dict) else dict(values)), fitter.repairs


class _TooMuch(Exception):  # noqa: N818 - ends the search, is never seen outside
    pass


@dataclass
class _Fitter:
    root: Schema
    repairs: list[str] = field(default_factory=list)
    steps: list[None] = field(default_factory=list)  # shared with the trials

    def one(
        self, value: JsonValue, schema: JsonValue | Schema, place: str, depth: int
    ) -> tuple[JsonValue, bool]:
        """The value, fitted, and whether it now looks right (types only, not bounds)."""
        if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
            return value, schema is not False
        self.steps.append(None)
        if len(self.steps) > _MOST_STEPS:
            raise _TooMuch
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return self.one(value, self.definition(reference), place, depth + 1)
        for key in ("anyOf", "oneOf"):
            choices = schema.get(key)
            if isinstance(choices, list):
                return self.choose(value, choices, place, depth)
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(listed, list):
            return self.listed(value, listed, place)
        wanted = schema.get("type")
        if isinstance(wanted, list):
            choices = [{**schema, "type": name} for name in wanted]
            return self.choose(value, choices, place, depth)
        return self.typed(value, schema, str(wanted or ""), place, depth)

    def definition(self, reference: str) -> JsonValue | Schema:
        here: JsonValue | Schema = self.root
        for part in reference.removeprefix("#").strip("/").split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(here, Mapping) or name not in here:
                return {}
            here = here[name]
        return here

    def choose(
        self, value: JsonValue, choices: list[JsonValue], place: str, depth: int
    ) -> tuple[JsonValue, bool]:
        """The first alternative that fits without a change, else the first that can be made to."""
        best: tuple[JsonValue, list[str]] | None = None
        for choice in choices:
            trial = _Fitter(self.root, steps=self.steps)
            fitted, right = trial.one(value, choice, place, depth + 1)
            if right and not trial.repairs:
                return fitted, True
            if right and best is None:
                best = fitted, trial.repairs
        if best is None:
            return value, False
        self.repairs += best[1]
        return best[0], True

    def listed(
        self, value: JsonValue, listed: list[JsonValue], place: str
    ) -> tuple[JsonValue, bool]:
        if any(_same(value, each) for each in listed):
            return value, True
        close: list[JsonValue] = []
        if isinstance(value, str):
            word = value.strip().casefold()
            close = [each for each in listed if str(each).casefold() == word]
        elif isinstance(value, float) and value.is_integer():
            close = [each for each in listed if _same(int(value), each)]
        if len(close) != 1:
            return value, False
        return self.changed(value, close[0], place), True

    def typed(
        self, value: JsonValue, schema: Schema, wanted: str, place: str, depth: int
    ) -> tuple[JsonValue, bool]:
        if wanted in ("object", "array") and isinstance(value, str):
            value = self.unpacked(value, dict if wanted == "object" else list, place)
        if wanted == "object":
            return self.object(value, schema, place, depth)
        if wanted == "array":
            return self.array(value, schema, place, depth)
        if wanted in ("integer", "number"):
            return self.number(value, wanted, place)
        if wanted == "boolean":
            words = {"true": True, "false": False}
            if isinstance(value, str) and value.strip().lower() in words:
                return self.changed(value, words[value.strip().lower()], place), True
            return value, isinstance(value, bool)
        if wanted == "string":
            if isinstance(value, int | float) and not isinstance(value, bool):
                return self.changed(value, str(value), place), True
            return value, isinstance(value, str)
        if wanted == "null":
            if isinstance(value, str) and value.strip() in ("null", "None"):
                return self.changed(value, None, place), True
            return value, value is None
        return value, True

    def number(self, value: JsonValue, wanted: str, place: str) -> tuple[JsonValue, bool]:
        given = value
        if isinstance(value, str) and len(value) < _LONGEST and _NUMBER.fullmatch(value.strip()):
            number = float(value)
            if math.isfinite(number):
                word = value.strip()
                value = int(word) if re.fullmatch(r"[+-]?\d+", word) else number
        if wanted == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        right = isinstance(value, int) or (wanted == "number" and isinstance(value, float))
        if isinstance(value, bool) or not right:
            return given, False
        return (value if value is given else self.changed(given, value, place)), True

    def object(
        self, value: JsonValue, schema: Schema, place: str, depth: int
    ) -> tuple[JsonValue, bool]:
        if not isinstance(value, dict):
            return value, False
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        required = schema.get("required")
        needed = required if isinstance(required, list) else []
        more = schema.get("additionalProperties", True)
        right = all(name in value for name in needed)
        fitted: dict[str, JsonValue] = {}
        for name, item in value.items():
            inner = f"{place}.{name}".lstrip(".")
            if name not in known and more is False:
                fitted[name], right = item, False
                continue
            part, fits = self.one(item, known.get(name, more), inner, depth + 1)
            if item is None and not fits and name not in needed:
                self.repairs.append(f"{one_line(inner, 60)}: null was left out")
                continue
            fitted[name], right = part, right and fits
        return fitted, right

    def array(
        self, value: JsonValue, schema: Schema, place: str, depth: int
    ) -> tuple[JsonValue, bool]:
        prefix, items = schema.get("prefixItems"), schema.get("items", True)
        if not isinstance(value, list):
            if value is None or isinstance(prefix, list):
                return value, False
            trial = _Fitter(self.root, steps=self.steps)
            part, fits = trial.one(value, items, place, depth + 1)
            if not fits or items is True:
                return value, False
            self.repairs += trial.repairs
            return self.changed(value, [part], place), True
        first = prefix if isinstance(prefix, list) else []
        fitted: list[JsonValue] = []
        right = _count_fits(value, schema)
        for index, item in enumerate(value):
            rule = first[index] if index < len(first) else items
            part, fits = self.one(item, rule, f"{place}.{index}".lstrip("."), depth + 1)
            fitted.append(part)
            right = right and fits
        return fitted, right

    def unpacked(self, value: str, kind: type, place: str) -> JsonValue:
        """A list or object that was written as text, with or without its brackets."""
        bare = value.strip()
        tries = [bare, f"[{bare}]"] if kind is list and len(bare) < _LONGEST else [bare]
        for text in tries:
            if not text or text[0] not in "[({":
                continue
            try:
                found = read_json(text, close=False)
            except UnreadableError:
                continue
            if isinstance(found.value, kind) and not text[found.end :].strip():
                return self.changed(value, found.value, place)
        return value

    def changed(self, old: JsonValue, new: JsonValue, place: str) -> JsonValue:
        """``new``, with a line that says so."""
        before, after = one_line(reprlib.repr(old), 40), one_line(reprlib.repr(new), 40)
        self.repairs.append(f"{one_line(place, 60)}: {before} was read as {after}")
        return new


def _count_fits(value: list[JsonValue], schema: Schema) -> bool:
    """Whether a list is as long as its schema says: that tells alternatives apart."""
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    low = least if isinstance(least, int) else 0
    return len(value) >= low and (not isinstance(most, int) or len(value) <= most)


def _same(a: JsonValue, b: JsonValue) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool) and type(a) is type(b)
