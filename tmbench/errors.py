"""Errors that a user can mend: one sentence each, naming the option and the remedy."""


class UserError(ValueError):
    """Bad input. The command line prints the sentence and exits with code 2; nothing measured is lost."""


class UnsupportedModelError(UserError):
    """A model, or a way of calling it, that a pattern cannot serve correctly. Names the layer and the feature."""


class NotFiniteError(RuntimeError):
    """Logits or gradients that are no numbers: a measurement that failed. Says which, in which type, and the remedy."""
