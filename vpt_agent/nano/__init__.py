"""A small domain in which looking again is needed: scene generator, recipe and evaluation."""
