"""What a pass over rows found: counts, and the first examples of each fault."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vpt_agent.data.rows import Problem, RowError

EXAMPLES = 5


@dataclass
class CheckReport:
    """The outcome of a check.

    ``rows`` were read, ``good`` of them without a fault; ``counts`` says how often each
    :data:`~vpt_agent.data.rows.Problem` was met (a row can have several), ``examples`` holds the
    first messages of each. ``pictures`` counts the different files that were looked at;
    ``unused_remaps`` are prefixes that no path had.
    """

    name: str = "rows"
    rows: int = 0
    good: int = 0
    counts: Counter[Problem] = field(default_factory=Counter)
    examples: dict[Problem, list[str]] = field(default_factory=dict)
    pictures: int = 0
    unused_remaps: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no row has a fault."""
        return self.good == self.rows

    def add(self, *errors: RowError) -> None:
        """Count one row and its faults."""
        self.rows += 1
        self.good += not errors
        for error in errors:
            self.counts[error.problem] += 1
            shown = self.examples.setdefault(error.problem, [])
            if len(shown) < EXAMPLES:
                shown.append(str(error))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "name": self.name,
            "rows": self.rows,
            "good": self.good,
            "pictures": self.pictures,
            "problems": {
                problem: {"count": count, "examples": self.examples[problem]}
                for problem, count in self.counts.most_common()
            },
            "unused_remaps": list(self.unused_remaps),
        }

    def __str__(self) -> str:
        """As a person wants to read it."""
        lines = [f"{self.name}: {self.rows} rows, {self.good} good, {self.pictures} pictures seen"]
        for problem, count in self.counts.most_common():
            lines.append(f"  {problem.replace('_', ' ')}: {count}")
            lines += [f"    {example}" for example in self.examples[problem]]
            if count > len(self.examples[problem]):
                lines.append(f"    ... and {count - len(self.examples[problem])} more")
        lines += [f"  no path begins with {prefix}" for prefix in self.unused_remaps]
        return "\n".join(lines)
