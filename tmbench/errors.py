"""Errors that a user can mend: one sentence each, naming the option and the remedy."""


class UserError(ValueError):
    """Bad input. The command line prints the sentence and exits with code 2; nothing measured is lost."""


class UnfinishedError(UserError):
    """What ended a run that had measured some of what was asked: that is kept. The exit code is 1."""


class UnsupportedModelError(UserError):
    """A model, or a way of calling it, that a pattern cannot serve correctly. Names the layer and the feature."""


def shortened(text: str, most: int = 60) -> str:
    """What a user gave, as a sentence can repeat it: its two ends where there are thousands of characters."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


class NotFiniteError(RuntimeError):
    """Logits or gradients that are no numbers: a measurement that failed. Says which, in which type, and the remedy."""
