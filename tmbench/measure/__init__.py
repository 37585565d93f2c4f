"""Measurements: time to first token, RULER, token agreement, loss, gradient probes, sweeps, and the pattern search.

May import: ``tmbench.engine``, ``tmbench.suites`` and what those may.
"""
