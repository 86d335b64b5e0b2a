"""Every public name says what it is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import vpt_agent

NAMES = sorted(set(vpt_agent.__all__) - {"__version__"})


def own_methods(cls: type) -> list[tuple[str, Any]]:
    """Public methods and properties that the class defines itself; fields are no methods."""
    fields = vars(cls).get("__annotations__", {})
    return [
        (name, value)
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and name not in fields
        and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring(name: str) -> None:
    value = getattr(vpt_agent, name)
    doc = value.__doc__ or ""
    assert doc.strip()
    # dataclasses write a signature of their own when there is no docstring
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", NAMES)
def test_its_methods_have_docstrings_too(name: str) -> None:
    value = getattr(vpt_agent, name)
    methods = own_methods(value) if isinstance(value, type) else []
    bare = [method for method, function in methods if not (function.__doc__ or "").strip()]
    assert bare == []
