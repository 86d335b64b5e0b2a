"""How an engine runs many answers together: what a user may set, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from vpt_agent.engine.plan import Measures, whole
from vpt_agent.errors import UserError


@dataclass(frozen=True)
class EngineOptions:
    """At most ``max_runs`` runs go on at once, others wait. ``measures`` say how much of prompts
    goes into one step, and how long one waits for tools. The cache is given out in blocks of
    ``block`` tokens. ``feature_cache`` pictures' features are kept for later questions.

    Anything that is no whole number from 1 on is a :class:`UserError`.
    """

    max_runs: int = 64
    measures: Measures = Measures()  # noqa: RUF009 - frozen
    block: int = 16
    feature_cache: int = 64

    def __post_init__(self) -> None:
        for name in ("max_runs", "block", "feature_cache"):
            whole(name, getattr(self, name), where="EngineOptions")
        if not isinstance(self.measures, Measures):
            raise UserError(
                "measures must be Measures(...)", where="EngineOptions", got=repr(self.measures)
            )
