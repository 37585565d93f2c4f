"""What is kept: rows and the files that hold them, the samples behind a score, the record of the environment.

Every file survives a kill: a line is appended whole, a file is replaced whole. Rows of older versions are read for ever.
May import: ``tmbench.errors``.
"""
