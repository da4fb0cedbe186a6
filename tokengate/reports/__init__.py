"""Which positions were modified: record it, report it, show it, choose by it.

May import `training`, `layers` and below. Open `recording.py` first, then `report.py`; `page` is
the report as a page for a browser, `measures` what the loss has of each layer, and how far a model
is from its base.
"""

from tokengate.reports.measures.drift import Drift as Drift
from tokengate.reports.modification_norms import ModificationNorms as ModificationNorms
