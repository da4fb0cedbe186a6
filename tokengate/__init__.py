"""tokengate decides which tokens a fine-tuning method may touch.

The public names are in `public.py`, which is imported when the first of them is asked for: who has
mistyped an argument of the command `tokengate` does not wait for torch. What they are made of lives
in wings, one folder each: see ARCHITECTURE.md.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tokengate.public import *  # noqa: F403
else:

    class _Package(ModuleType):
        """`tokengate.layers` is the public function, not the wing that Python would put there."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name != "layers" or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({"__version__", *vars(import_module("tokengate.public"))})

    sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str) -> Any:
        if not name.startswith("_") or name == "__all__":  # of `from tokengate import *`
            found = vars(import_module("tokengate.public"))
            public = {k: v for k, v in found.items() if not k.startswith("_")}
            globals().update(public, __all__=sorted(public))
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]
