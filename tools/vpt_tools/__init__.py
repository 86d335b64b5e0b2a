"""The tools that ship with the library: one tool, one file, found through entry points."""
