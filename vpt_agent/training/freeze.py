"""Which parameters learn: by parts of their names, as the published recipes say it.

The model's parts carry the published names (``visual``, ``model``, ``lm_head``,
``detection_model``, ``clip_projector``, ...), so the recipes' lists are used as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from torch import nn

ALL = "all"
"""As the first of ``frozen``: nothing learns (the published evaluation)."""


def trainable_names(
    names: Collection[str],
    *,
    frozen: Sequence[str] | None = None,
    trainable: Sequence[str] | None = None,
) -> frozenset[str]:
    """Those of the parameter ``names`` that learn (FACTS section 7, "freefreeze").

    Exactly one list is given: with ``frozen`` everything learns whose name holds none of its
    parts, with ``trainable`` everything whose name holds one. A part that is in no name is an
    error: it would freeze, or train, nothing.
    """
    if (frozen is None) == (trainable is None):
        raise UserError(
            "say either what is frozen or what is trainable",
            got="both" if frozen is not None else "neither",
            expected="one of frozen= and trainable=",
        )
    parts = list(frozen if frozen is not None else trainable or ())
    field = "frozen" if frozen is not None else "trainable"
    if not parts or any(not part for part in parts):
        raise UserError("a list of parameters holds parts of their names", where=field, got=parts)
    if frozen is not None and parts[0] == ALL:
        return frozenset()
    unknown = [part for part in parts if not any(part in name for name in names)]
    if unknown:
        raise UserError(
            "no parameter has this in its name",
            where=field,
            got=", ".join(unknown),
            expected="parts of: " + ", ".join(sorted({name.split(".")[0] for name in names})),
        )
    named = frozenset(name for name in names if any(part in name for part in parts))
    return named if frozen is None else frozenset(names) - named


def freeze(
    model: nn.Module,
    *,
    frozen: Sequence[str] | None = None,
    trainable: Sequence[str] | None = None,
) -> frozenset[str]:
    """Set ``requires_grad`` of the model's parameters; returns the names of those that learn."""
    parameters = dict(model.named_parameters())
    learning = trainable_names(parameters, frozen=frozen, trainable=trainable)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learning)
    return learning
