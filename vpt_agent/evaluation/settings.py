"""The settings that ask "is perception used?", made for what a checkpoint can do.

A forced kind is called in one turn and nothing after it (``rounds=1``): a second, free look would
hide what a switch took away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from vpt_agent.evaluation.switches import Setting, Switches
from vpt_agent.tokens.table import PerceptionKind

NO_TOOLS = Setting(name="no tools", tool_choice="none")
FREE = Setting(name="free choice", tool_choice="auto")


def crop_settings(kind: PerceptionKind) -> list[Setting]:
    """A kind that shows regions: forced, and with each switch that concerns crops."""
    thrown = {
        "": Switches(),
        "random region": Switches(crop="random"),
        "black": Switches(crop="black"),
        "true box": Switches(crop="true"),
        "no features": Switches(result="empty"),
        "markers only": Switches(result="markers"),
    }
    return [_setting(kind, name, switches) for name, switches in thrown.items()]


def control_settings(kind: PerceptionKind) -> list[Setting]:
    """A re-encoding kind: forced, and with each switch that concerns its control state."""
    thrown = {
        "condition zero": Switches(condition="zero"),
        "state zero": Switches(state="zero"),
        "ordinary token": Switches(token="ordinary"),
        "no control at all": Switches(condition="zero", token="ordinary"),
        "noise": Switches(state="noise", token="noise"),
        "no features": Switches(result="empty"),
        "markers only": Switches(result="markers"),
    }
    plain = _setting(kind, "", Switches(), states=True)
    swap = Switches(state="swap", token="swap")
    whose: tuple[Literal["same", "another"], ...] = ("same", "another")
    swaps = [
        Setting(
            name=f"{kind.name}, state of {rule} type".replace("of same", "of the same"),
            tool_choice=kind.tool,
            kind=kind.name,
            switches=swap,
            donors=plain.name,
            donor_type=rule,
            rounds=1,
        )
        for rule in whose
    ]
    return [plain, *(_setting(kind, name, s) for name, s in thrown.items()), *swaps]


def _setting(
    kind: PerceptionKind, name: str, switches: Switches, *, states: bool = False
) -> Setting:
    full = f"{kind.name}, {name}" if name else kind.name
    return Setting(
        name=full,
        tool_choice=kind.tool,
        kind=kind.name,
        switches=switches,
        states=states,
        rounds=1,
    )


def standard_settings(
    kinds: Iterable[PerceptionKind], *, untrained: Collection[str] = ()
) -> list[Setting]:
    """No tools, free choice, and every trained kind with its switches.

    ``untrained`` kinds run but mean nothing, so nothing is measured with them.
    """
    settings = [NO_TOOLS, FREE]
    for kind in kinds:
        if kind.name in untrained:
            continue
        if kind.payload == "grid":
            settings += crop_settings(kind)
        elif kind.payload == "control":
            settings += control_settings(kind)
        else:
            settings.append(_setting(kind, "", Switches()))
    return settings
