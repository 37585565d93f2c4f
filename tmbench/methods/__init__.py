"""What is run: the table of methods, their settings, and plans, which give every layer of a model its pattern.

Torch is imported when a plan is made, not before: the command line's help reads the table.
May import: ``tmbench.results`` and ``tmbench_kernels``.
"""
