"""Evaluation: what an answer is worth, and whether the perception behind it was used."""

from vpt_agent.evaluation.boxes import iogt, iou, is_small, match
from vpt_agent.evaluation.intervals import (
    Difference,
    Interval,
    difference,
    mcnemar,
    mean,
    share,
)
from vpt_agent.evaluation.items import Item, items_of_rows
from vpt_agent.evaluation.judge import Verdict, published_score, read_verdict
from vpt_agent.evaluation.loop import evaluate, exact_match
from vpt_agent.evaluation.settings import (
    FREE,
    NO_TOOLS,
    control_settings,
    crop_settings,
    standard_settings,
)
from vpt_agent.evaluation.states import StateFigures, describe_states
from vpt_agent.evaluation.store import Called, Outcome, State, read_rows, read_states
from vpt_agent.evaluation.summary import figures_of, summarise
from vpt_agent.evaluation.switches import Counterfactual, Setting, Switches
from vpt_agent.evaluation.tables import Table, tables_of

__all__ = [
    "FREE",
    "NO_TOOLS",
    "Called",
    "Counterfactual",
    "Difference",
    "Interval",
    "Item",
    "Outcome",
    "Setting",
    "State",
    "StateFigures",
    "Switches",
    "Table",
    "Verdict",
    "control_settings",
    "crop_settings",
    "describe_states",
    "difference",
    "evaluate",
    "exact_match",
    "figures_of",
    "iogt",
    "iou",
    "is_small",
    "items_of_rows",
    "match",
    "mcnemar",
    "mean",
    "published_score",
    "read_rows",
    "read_states",
    "read_verdict",
    "share",
    "standard_settings",
    "summarise",
    "tables_of",
]
