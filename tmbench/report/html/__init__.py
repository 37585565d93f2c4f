"""The report as pages to look at: files that a browser opens without a server, a network or anything beside them.

Every figure on them is that of a typed cell of the report, and the words of a point are written here. The scripts choose
what is shown and draw it. Templates escape all that they are given, data go into the pages as JSON without a ``<``, and the
pages' own policy lets nothing be fetched.
"""
