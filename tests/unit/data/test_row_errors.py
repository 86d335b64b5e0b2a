"""Errors of rows come whole out of the workers that read them."""

from __future__ import annotations

import pickle
from pathlib import Path

from vpt_agent.data.rows import RowError
from vpt_agent.errors import UserError


def test_errors_come_whole_out_of_another_process() -> None:
    for error in (
        RowError("counts", "what", where=Path("a"), got=ValueError("no"), fix="so"),
        UserError("what", got=3),
    ):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.what == "what"
        assert again.got in ("no", 3)
        if isinstance(error, RowError):
            assert again.problem == error.problem
