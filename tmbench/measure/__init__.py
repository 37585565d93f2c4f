"""Measurements: time to first token, accuracy, token agreement, loss, gradient probes, sweeps, and the pattern search.

Each is a spec of its own; ``loop`` runs them all, ``executor`` measures their items, and ``keeping`` keeps what comes of it.

May import: ``tmbench.engine``, ``tmbench.suites`` and what those may.
"""
