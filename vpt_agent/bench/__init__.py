"""Measurements that a user can repeat: each a ratio within one run against a named baseline.

One module a measurement (``answer``, ``throughput``, ``kernels``, ``start``), and what they share:
``machine`` (what it can do, measured), ``timing`` (in turn, medians), ``limits`` (what the machine
would need at least), ``shapes`` (models of random weights), ``published`` (the baseline). Nothing
else imports this package, and nothing here runs unless it is asked to: ``vpt-agent bench``.
"""
