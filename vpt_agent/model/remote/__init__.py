"""Models behind an OpenAI-compatible server: vLLM, SGLang, transformers serve, a hosted one.

Loads neither torch nor the official client; the client is loaded with the first request.
"""

from vpt_agent.model.remote.options import Prices, RemoteOptions

__all__ = ["Prices", "RemoteOptions"]
