"""What can be wrong with a user's input, one class each; every message is one sentence."""

from __future__ import annotations


class RulerError(ValueError):
    """Any of the errors below."""


class UnknownTaskError(RulerError):
    """A name that is none of the thirteen tasks."""


class TaskLengthError(RulerError):
    """A length in which a task's smallest prompt and its answer do not fit."""


class SeedError(RulerError):
    """A seed that the generators which a drawing needs do not take."""


class WordingError(RulerError):
    """A wording that cannot be found, read or used."""


class SourceError(RulerError):
    """A local file of essays or questions that is not in its published format."""


class DatasetError(RulerError):
    """A prepared data set that is missing, or a line of it that cannot be used."""
