"""Serving: the registry's tools to other agents, over MCP. Needs the extra ``mcp``."""
