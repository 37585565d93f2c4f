"""From rows to what people read: comparable rows become sections, sections become Markdown, CSV, JSON and pictures.

The statistics are here too: intervals of differences, and what may be said of them. A report reads result files alone.
May import: ``tmbench.methods``, ``tmbench.results``, ``ruler_tasks`` and ``tmbench_kernels``.
"""
