"""The table of perception kinds, the grammar of their calls, and the region grid. No torch."""

from vpt_agent.tokens.grammar import (
    Event,
    Grammar,
    GrammarState,
    ParsedCall,
    ParseError,
    call_tokens,
    read_text,
)
from vpt_agent.tokens.grid import (
    Cells,
    RegionPolicy,
    box_to_region,
    check_cells,
    region_to_box,
)
from vpt_agent.tokens.pattern import TextPattern
from vpt_agent.tokens.table import (
    PUBLISHED,
    PerceptionKind,
    PerceptionTable,
    ResolvedKind,
    ResolvedTable,
    own_kind,
)

__all__ = [
    "PUBLISHED",
    "Cells",
    "Event",
    "Grammar",
    "GrammarState",
    "ParseError",
    "ParsedCall",
    "PerceptionKind",
    "PerceptionTable",
    "RegionPolicy",
    "ResolvedKind",
    "ResolvedTable",
    "TextPattern",
    "box_to_region",
    "call_tokens",
    "check_cells",
    "own_kind",
    "read_text",
    "region_to_box",
]
