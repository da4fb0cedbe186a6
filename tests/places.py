"""Where things are: the project's folders, and real data that may lie beside it."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = EXAMPLES / "recipes"
#: Not part of the project: tests that want it skip where it is absent.
SHARED = ROOT.parent / "shared" / "data"
