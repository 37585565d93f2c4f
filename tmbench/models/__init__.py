"""On what: checkpoints and presets by name, checked before a figure is made with them, and the facts of their geometry.

``tiny`` is the embedded model; ``structured`` makes weights whose attention looks like a trained model's.
May import: ``tmbench.methods``, ``tmbench.results`` and ``tmbench_kernels``.
"""
