"""conformance, what a user gave wrongly."""


class UsageError(ValueError):
    """What the user gave cannot be used; the text says what and why. Exit status 4."""
