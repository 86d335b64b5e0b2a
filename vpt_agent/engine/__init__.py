"""The engine: sessions on a pooled KV cache, and the loop that runs many of them together."""

from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import Turn, TurnRules, decode_turn
from vpt_agent.engine.intervention import Intervention
from vpt_agent.engine.options import EngineOptions
from vpt_agent.engine.parts import Tokens, Unconditioned, Visual
from vpt_agent.engine.plan import Measures
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.engine.session import Session

__all__ = [
    "Engine",
    "EngineOptions",
    "Intervention",
    "Measures",
    "Sampler",
    "Sampling",
    "Session",
    "Tokens",
    "Turn",
    "TurnRules",
    "Unconditioned",
    "Visual",
    "decode_turn",
]
