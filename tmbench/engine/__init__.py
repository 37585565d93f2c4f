"""How a model runs: a method's attention inside of it, prefill, decoding, and what bounds their time.

Every measurement runs models through this package, so that a score belongs to the path whose time is quoted.
May import: ``tmbench.models``, ``tmbench.methods``, ``tmbench.results`` and ``tmbench_kernels``.
"""
