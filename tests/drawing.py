"""How many examples hypothesis draws, and whether by chance.

The suite is derandomised: every run draws the same. `pytest --hypothesis-profile long` draws others
each time, and 25 times as many.
"""

from hypothesis import Phase, settings


def is_long():
    return settings.get_current_profile_name() == "long"


def many(examples):
    """So many examples, or 25 times as many in a long run."""
    return examples * (25 if is_long() else 1)


def only_listed():
    """The phases of a test that draws in a long run alone: else its `@example`s are all."""
    return tuple(Phase) if is_long() else (Phase.explicit,)
