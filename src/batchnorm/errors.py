"""The error of commands and files: something that the user can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence: what is wrong, and what to do."""
