"""Words for rows of no meaning, with which a recipe can be tried."""

WORDS = ("cat", "dog", "barn", "mat", "sat", "ran", "a", "the", "on", "past", "old", "red")
