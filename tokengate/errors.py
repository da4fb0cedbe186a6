"""The one error this library raises for what a user asked of it."""


class TokenGateError(ValueError):
    """What was asked cannot be done.

    The message is one sentence: what was asked, what was found, what to do. Whatever
    was to be changed is as it was.
    """
