"""The shipped model's world, second version: marks too small for the first look, and questions

that need a region, two regions, the whole picture encoded again, or nothing at all. What needs
what, and how it was checked, stands in ``docs/nano-domain.md``.
"""

from vpt_agent.nano.domain.ask import GROUPS, TYPES, Asked, QuestionType, ask, types_of
from vpt_agent.nano.domain.marks import MARKS
from vpt_agent.nano.domain.scene import DomainScene, MarkedTag, make_domain_scene
from vpt_agent.nano.domain.sight import AGAIN, again_view, global_view, scale_of, window_of

__all__ = [
    "AGAIN",
    "GROUPS",
    "MARKS",
    "TYPES",
    "Asked",
    "DomainScene",
    "MarkedTag",
    "QuestionType",
    "again_view",
    "ask",
    "global_view",
    "make_domain_scene",
    "scale_of",
    "types_of",
    "window_of",
]
