"""The error of commands and files: a problem that the user can fix."""

__all__ = ["InputError"]


class InputError(ValueError):
    """The user's input cannot be used. The message is one sentence: what is wrong, and what to do."""
