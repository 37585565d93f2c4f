"""What is asked of a model: prompts for timing, questions with known answers, and suites, RULER the first.

May import: ``tmbench.models``, ``tmbench.methods``, ``tmbench.results`` and ``ruler_tasks``.
"""
