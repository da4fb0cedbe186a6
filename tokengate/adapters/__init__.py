"""An adapter on disk and off it: save, load, fold into the base, inspect, compare, plan.

May import every other wing. Open `saving.py` first, then `folder.py`, which says what is written.
"""

from tokengate.adapters.folding import Folding as Folding
