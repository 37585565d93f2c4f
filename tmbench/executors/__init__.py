"""Executors of many workers: processes of one machine, or actors of a Ray cluster, one for each GPU.

``workers`` keeps account of what each measures, ``worker_loop`` is what each does, ``processes`` and ``ray_actors`` carry
messages between them. In ``ranks`` all measure the same with one model.

May import: ``tmbench.measure``, ``tmbench.models`` and ``tmbench.results``.
"""
