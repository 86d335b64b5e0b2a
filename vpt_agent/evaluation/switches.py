"""Counterfactual switches: is the perception that a model asks for also used?

Each switch takes one thing away from the forward pass of an agent's run and leaves the checkpoint
as it is. If answers stay as good without it, the model did not use it.

How the control state enters (paper arXiv 2502.17425 section 3.3, FACTS section 4): the final-norm
hidden state h before the action token is (1) the action token's input embedding, and (2) through
the projector ``c = W LN(h) + b`` the condition of the re-encoded features, ``f + (f . c) c``. So
there are three separate places to cut, and they are not the same cut:

| switch | what the forward pass computes instead |
|---|---|
| ``condition="zero"`` | c = 0: the features f stand as the encoder gave them |
| ``state="zero"`` | h = 0 before the projector: c = W LN(0) + b, the same for every question |
| ``state="swap"`` | h of another item before the projector |
| ``state="noise"`` | a random vector of h's length before the projector |
| ``token="ordinary"`` | the action token keeps its ordinary embedding; (2) is untouched |
| ``token="swap" / "noise" / "zero"`` | as above, at the action token's place |

And for what comes back (section 3.2 for crops):

| switch | what the forward pass computes instead |
|---|---|
| ``crop="random"`` | a region of the same size elsewhere in the same picture |
| ``crop="black"`` | a black picture of the same size |
| ``crop="true"`` | the true place, given by the data: how good could it get |
| ``result="empty"`` | placeholders keep their ordinary embeddings: places without features |
| ``result="markers"`` | no placeholder: the start and end of a picture with nothing between |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from vpt_agent.errors import UserError
from vpt_agent.tokens.grid import RegionPolicy, box_to_region, region_to_box
from vpt_agent.types import Box, ToolCall, ToolResult, View
from vpt_agent.vision.frames import crop_view

if TYPE_CHECKING:
    from torch import Tensor

    from vpt_agent.engine import Visual
    from vpt_agent.engine.intervention import Condition

ConditionSwitch = Literal["kept", "zero"]
StateSwitch = Literal["kept", "zero", "swap", "noise"]
TokenSwitch = Literal["kept", "ordinary", "zero", "swap", "noise"]
CropSwitch = Literal["kept", "random", "black", "true"]
ResultSwitch = Literal["kept", "empty", "markers"]


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Which switches are thrown; they combine. The table of the module's text says what each does.

    ``condition``, ``state`` and ``token`` concern calls with a control state, ``crop`` those that
    show a region, ``result`` both.
    """

    condition: ConditionSwitch = "kept"
    state: StateSwitch = "kept"
    token: TokenSwitch = "kept"
    crop: CropSwitch = "kept"
    result: ResultSwitch = "kept"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(hint)
            if value not in allowed:
                raise UserError(
                    "no such switch",
                    where=f"Switches.{name}",
                    got=repr(value),
                    expected=", ".join(allowed),
                )
        if self.condition == "zero" and self.state != "kept":
            raise UserError(
                "with the condition at zero, what the projector is given cannot matter",
                where="Switches",
                got=f"condition='zero', state={self.state!r}",
                fix="throw one of the two",
            )

    def __bool__(self) -> bool:
        return any(v != "kept" for v in asdict(self).values())

    def __str__(self) -> str:
        thrown = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(f"{k}={v}" for k, v in thrown.items() if v != "kept") or "nothing"

    @property
    def swaps(self) -> bool:
        """Whether another item's control state is needed."""
        return "swap" in (self.state, self.token)

    @property
    def places(self) -> bool:
        """Whether the item's true boxes are needed."""
        return self.crop == "true"


Donor = Callable[[str], "Tensor | None"]
"""Another item's control states [k, D] of a kind; None where there is none."""


def _no_donor(kind: str) -> Tensor | None:
    return None


class Counterfactual:
    """The :class:`~vpt_agent.engine.Intervention` of one run.

    ``seed`` decides random regions and noise: the same for the same item, whatever ran before.
    ``shown`` are the true places in pixels of the original, taken in turn by the crops of a run.
    With ``grid`` they are first rounded to cells and made pixels by ``policy``, as the best call
    that the model could make. A swap without a donor, or a true box without a place, is a
    :class:`UserError`.
    """

    def __init__(
        self,
        switches: Switches,
        *,
        seed: str | int = 0,
        donor: Donor = _no_donor,
        shown: tuple[Box, ...] = (),
        grid: int | None = None,
        policy: RegionPolicy = "published",
    ) -> None:
        if switches.places and not shown:
            raise UserError(
                "crop='true' needs the true boxes",
                where="Counterfactual",
                fix="give the item boxes, or leave this setting out for it",
            )
        self.switches, self.seed, self.donor = switches, str(seed), donor
        self.shown, self.grid, self.policy = shown, grid, policy
        self.lacking: list[str] = []
        """Kinds that were called though the donor had no state for them."""
        self._crops = 0

    @property
    def name(self) -> str:
        """What is changed."""
        return str(self.switches)

    # --- the control state ----------------------------------------------------------------

    def control_embedding(self, kind: str, state: Tensor) -> Tensor | None:
        """See :class:`~vpt_agent.engine.Intervention`: ``token`` of the switches."""
        how = self.switches.token
        if how == "ordinary":
            return None
        # A call has k control tokens; each takes the first state of the donor: with k = 1 the one.
        return self._other(how, kind, state[None])[0]

    def condition(self, kind: str, features: Tensor, control: Tensor, plain: Condition) -> Tensor:
        """See :class:`~vpt_agent.engine.Intervention`: ``condition`` and ``state``."""
        if self.switches.condition == "zero":
            return features  # f + (f . 0) 0
        return plain(kind, features, self._other(self.switches.state, kind, control))

    def _other(self, how: str, kind: str, state: Tensor) -> Tensor:
        """``state`` [n, D], or what the switch puts in its place."""
        import torch

        if how == "kept":
            return state
        if how == "zero":
            return torch.zeros_like(state)
        if how == "swap":
            given = self.donor(kind)
            if given is None or given.shape[-1] != state.shape[-1]:
                self.lacking.append(kind)
                raise UserError(
                    "there is no control state of another item to swap with",
                    where=kind,
                    got=None if given is None else tuple(given.shape),
                    expected=f"[k, {state.shape[-1]}]",
                )
            return given[: len(state)].to(state)
        # Drawn on the CPU from the item's own seed: the same noise on every device.
        generator = torch.Generator().manual_seed(
            random.Random(f"{self.seed}:{kind}").getrandbits(63)
        )
        drawn = torch.randn(state.shape, generator=generator, dtype=torch.float32)
        wanted = state.float().norm(dim=-1, keepdim=True).cpu()
        noise: Tensor = drawn / drawn.norm(dim=-1, keepdim=True) * wanted  # [n, D]
        return noise.to(state)

    # --- what comes back ------------------------------------------------------------------

    def result(self, call: ToolCall, result: ToolResult, views: Mapping[str, View]) -> ToolResult:
        """See :class:`~vpt_agent.engine.Intervention`: ``crop`` of the switches."""
        if self.switches.crop == "kept" or not result.views:
            return result
        return replace(result, views=tuple(self._crop(view, views) for view in result.views))

    def _crop(self, view: View, views: Mapping[str, View]) -> View:
        number, self._crops = self._crops, self._crops + 1
        root = views[view.root]
        if self.switches.crop == "black":
            from PIL import Image

            return replace(view, image=Image.new("RGB", view.size))
        box = self._true(number, root) if self.switches.crop == "true" else None
        if box is None:
            rng = random.Random(f"{self.seed}:crop:{number}")
            width, height = int(view.box.width), int(view.box.height)
            left = rng.randint(0, max(0, root.size[0] - width))
            top = rng.randint(0, max(0, root.size[1] - height))
            box = Box(left, top, left + width, top + height)
        return replace(
            crop_view(root, box, id=view.id, origin=view.origin), parent=view.parent or root.id
        )

    def _true(self, number: int, root: View) -> Box:
        box = self.shown[number % len(self.shown)]
        if self.grid is None:
            return box
        cells = box_to_region(box, root.size, self.grid)
        return region_to_box(cells, root.size, self.grid, self.policy)

    def visual(self, part: Visual, empty: Callable[[int], Tensor]) -> Visual | None:
        """See :class:`~vpt_agent.engine.Intervention`: ``result`` of the switches."""
        if self.switches.result == "markers":
            return None
        if self.switches.result == "empty":
            row = empty(part.placeholder)  # [D]
            return replace(part, features=row.expand(part.features.shape[0], -1))  # [V, D]
        return part


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to ask every item: a name, the tools allowed, the switches thrown.

    ``tool_choice`` is ``none`` (no tools), ``auto`` (free choice), ``required``, or a tool's name:
    a forced kind, which ``kind`` then names. ``donors`` names the setting whose control states a
    swap takes, ``donor_type`` whether from a question of the ``same`` or ``another`` type.
    ``states`` keeps the control states of this setting's runs: for swaps and for
    :mod:`vpt_agent.evaluation.states`. ``most`` asks only the first so many items, up to whole
    chunks: switches cost as much as what they change, and need fewer items to show a large effect.
    ``rounds`` limits the turns that may call: without it, a model that finds one look empty takes
    another, and what the switch took away is hidden.
    """

    name: str
    tool_choice: str = "auto"
    kind: str = ""
    switches: Switches = Switches()
    donors: str = ""
    donor_type: Literal["any", "same", "another"] = "any"
    states: bool = False
    most: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("a setting needs a name: its figures stand under it", where="Setting")
        if self.switches.swaps and not self.donors:
            raise UserError(
                "a swap needs control states to take",
                where=self.name,
                fix="name a setting with states=True in donors=",
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
