"""Rows of several sources in stated shares: shuffled, repeatable by seed, resumable by position."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, cast

from vpt_agent.errors import UserError

T = TypeVar("T")
Stop = Literal["first", "all", "never"]
_Take = Callable[[], T]
_OF_ROWS = ("sizes", "contents")


class Mixture(Iterable[T], Generic[T]):
    """One stream out of several sources, drawn by weight.

    ``sources`` are pairs of a source and its weight: ``Mixture([(rows, 3), (more, 1)], seed=0)``
    draws three rows of the first to one of the second. A source is anything that can be iterated
    again from its start (a list, :class:`vpt_agent.data.Rows`, :class:`vpt_agent.data.RowStream`);
    one that can be indexed is read only where its rows are given out, so that skipping is cheap.
    One that has a ``fingerprint()`` is known again by it after a resume. Weights need not sum to 1;
    a source of weight 0 is left out.

    ``buffer`` is the size of the shuffle buffer of a source that is streamed (1: no shuffling at
    all). A source that can be indexed is shuffled as a whole, anew in each pass over it; in every
    pass each row comes once.
    ``stop`` says when a pass ends: when the ``first`` source runs out, when ``all`` were read to
    their end (the shorter ones begin again), or ``never``.

    The same arguments give the same stream, pass after pass; :meth:`set_epoch` gives another order.
    :meth:`state_dict` says how far the pass is; after :meth:`load_state_dict` the next iteration
    goes on behind that row. ``drawn`` counts the rows given out, by source. Each wrong argument is
    a :class:`UserError`.
    """

    def __init__(
        self,
        sources: Iterable[tuple[Iterable[T], float]],
        *,
        seed: int = 0,
        buffer: int = 1024,
        stop: Stop = "all",
    ) -> None:
        pairs = list(sources)
        _check_weights([weight for _, weight in pairs])
        if buffer < 1:
            raise UserError("a shuffle buffer holds at least one row", where="buffer", got=buffer)
        if stop not in ("first", "all", "never"):
            raise UserError("unknown end of a mixture", got=stop, expected="first, all or never")
        for index, (source, _) in enumerate(pairs):
            if isinstance(source, Iterator):
                raise UserError(
                    "a source of a mixture must be able to begin again",
                    where=f"source {index}",
                    got=type(source).__name__,
                    fix="pass what it iterates over: a list, or an object with __iter__",
                )
        self.sources = tuple(pairs)
        self.seed, self.buffer, self.stop = seed, buffer, stop
        self.epoch = 0
        self.drawn: list[int] = [0] * len(pairs)
        self._position = 0
        self._resume = 0
        self._shard = (0, 1)

    # --- where it stands ----------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Another order; accelerate and transformers' Trainer call this before each pass."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume = epoch, 0, 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """How far the pass is, as JSON: ``position`` rows of the whole stream are done.

        Give ``position`` where another process draws the rows (workers of a data loader).
        """
        return {**self._identity(), "epoch": self.epoch,
                "position": self._position if position is None else position}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; a state of another mixture, or of other rows
        in its sources (as far as their sizes and fingerprints tell), is refused."""
        for name, value in self._identity().items():
            if state.get(name) == value:
                continue
            if name in _OF_ROWS and isinstance(state.get(name), list):
                raise self._changed(name, state[name], value)
            raise UserError(
                "this state was taken from another mixture",
                where=name,
                got=state.get(name),
                expected=value,
                fix="build the mixture with the arguments it had, or start anew",
            )
        self.epoch = int(state["epoch"])
        self.seek(int(state["position"]))

    def seek(self, position: int) -> None:
        """The next iteration begins behind ``position`` rows of the whole stream."""
        self._resume = self._position = position

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "buffer": self.buffer,
            "stop": self.stop,
            "weights": [float(weight) for _, weight in self.sources],
            "sizes": [len(s) if isinstance(s, Sequence) else None for s, _ in self.sources],
            "contents": [_fingerprint(source) for source, _ in self.sources],
        }

    def _changed(self, name: str, had: Sequence[Any], have: Sequence[Any]) -> UserError:
        # As many as there are weights, which were compared before.
        at = next(i for i, (a, b) in enumerate(zip(had, have, strict=True)) if a != b)
        said = "{} rows" if name == "sizes" else "rows with the fingerprint {}"
        return UserError(
            "the rows have changed since this state was taken",
            where=getattr(self.sources[at][0], "name", f"source {at}"),
            got=said.format(have[at]),
            expected=said.format(had[at]),
            fix="put the rows back as they were, or start anew",
        )

    def shard(self, index: int, count: int) -> Mixture[T]:
        """The same stream, of which only rows ``index``, ``index + count``, ... are given out.

        For workers and processes. Positions stay those of the whole stream.
        """
        if not 0 <= index < count:
            raise UserError(
                "there is no such shard", got=f"{index} of {count}", expected=f"0..{count - 1}"
            )
        part = Mixture(self.sources, seed=self.seed, buffer=self.buffer, stop=self.stop)
        part.epoch, part._position, part._resume = self.epoch, self._position, self._resume
        part._shard = (index, count)
        return part

    # --- the stream ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[T]:
        skip, self._resume = self._resume, 0
        self._position, self.drawn = skip, [0] * len(self.sources)
        index, count = self._shard
        for number, (source, take) in enumerate(self._mixed()):
            if number < skip:
                continue
            self._position = number + 1
            if number % count == index:
                self.drawn[source] += 1
                yield take()

    def _mixed(self) -> Iterator[tuple[int, _Take[T]]]:
        """(number of the source, what gives its row), in shares by chance."""
        chance = random.Random(f"shares {self.seed} {self.epoch}")
        live = [i for i, (_, weight) in enumerate(self.sources) if weight > 0]
        weights = [self.sources[i][1] for i in live]
        passes = dict.fromkeys(live, 0)
        streams = {i: self._pass(i, 0) for i in live}
        unfinished = set(live)
        while True:
            (i,) = chance.choices(live, weights)
            take = next(streams[i], None)
            if take is None:
                unfinished.discard(i)
                if self.stop == "first" or (self.stop == "all" and not unfinished):
                    return
                passes[i] += 1
                streams[i] = self._pass(i, passes[i])
                take = next(streams[i], None)
                if take is None:
                    raise UserError("a source of a mixture has no rows", where=f"source {i}")
            yield i, take

    def _pass(self, number: int, again: int) -> Iterator[_Take[T]]:
        """Every row of a source once. Nothing is held over, so that no row comes twice before
        another has come once."""
        source = self.sources[number][0]
        chance = random.Random(f"rows {self.seed} {self.epoch} {number} {again}")
        if isinstance(source, Sequence):
            rows = cast("Sequence[T]", source)
            order = list(range(len(rows)))
            if self.buffer > 1:
                chance.shuffle(order)
            for index in order:
                yield lambda index=index: rows[index]  # type: ignore[misc]
            return
        held: list[_Take[T]] = []
        for row in source:
            held.append(lambda row=row: row)  # type: ignore[misc]
            if len(held) >= self.buffer:
                place = chance.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()
        chance.shuffle(held)
        yield from held


def _fingerprint(source: object) -> str | None:
    ask = getattr(source, "fingerprint", None)
    found = ask() if callable(ask) else None
    return None if found is None else str(found)


def _check_weights(weights: Sequence[float]) -> None:
    for index, weight in enumerate(weights):
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise UserError(
                "a weight of a mixture is a number, 0 or more",
                where=f"source {index}",
                got=repr(weight),
            )
    if not sum(weights) > 0:
        raise UserError(
            "the weights of a mixture sum to nothing",
            got=list(weights) or "no source",
            expected="at least one source with a weight above 0",
        )
