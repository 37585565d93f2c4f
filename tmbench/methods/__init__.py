"""What is run: the table of methods and plans, which give every layer of a model its pattern.

A method's parameters are declared by its patterns, in ``tmbench_kernels``. Torch is imported when a method is first used,
not before: the command line's help reads the table.
May import: ``tmbench.results`` and ``tmbench_kernels``.
"""
