"""What is asked of a model: prompts for timing, questions with known answers, and RULER's tasks as a suite.

May import: ``tmbench.models``, ``tmbench.methods``, ``tmbench.results`` and ``ruler_tasks``.
"""
