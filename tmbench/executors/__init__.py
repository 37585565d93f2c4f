"""Executors of many workers: processes of one machine, or actors of a Ray cluster, one for each GPU.

``workers`` keeps account of what each measures, ``serving`` is what each does, the other two carry messages between them.

May import: ``tmbench.measure``, ``tmbench.models`` and ``tmbench.results``.
"""
