"""What the commands share: where results, errors and progress go, and the exit codes.

Results go to standard output, all else to standard error. Exit codes: 0 it worked, 1 the run
failed, 2 bad input or usage.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer

from vpt_agent.errors import UserError, VPTError

RUN_FAILED = 1
BAD_INPUT = 2

Progress = Callable[[str], None]
P = ParamSpec("P")
R = TypeVar("R")


def print_json(value: object) -> None:
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def note(kind: str, text: str) -> None:
    """Print one line about the run on standard error."""
    typer.echo(f"{kind}: {text}", err=True)


def clear_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: the library's errors become one message and an exit code.

    Other exceptions are ours to repair, and keep their traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except VPTError as error:
            note("error", str(error))
            raise typer.Exit(BAD_INPUT if isinstance(error, UserError) else RUN_FAILED) from error

    return run


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, ``path`` is written; if the system refuses, that is bad input, and said so."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "the file cannot be written", where=path, got=error.strerror or error
        ) from error


@contextmanager
def progress(first: str) -> Iterator[Progress]:
    """Show what is going on, on a terminal's standard error only; gives a function to change it."""
    from rich.console import Console

    with Console(stderr=True).status(first) as status:
        yield status.update
