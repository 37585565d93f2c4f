"""Triangle attention inside a serving engine: what the engine's plug-in reads, and the plug-in itself.

``settings`` is the file that says which layers have it, ``sglang`` fits it into SGLang. An engine is imported where its
plug-in is asked for, and nowhere else.

May import: ``tmbench.methods``, ``tmbench.results`` and ``tmbench_kernels``.
"""
