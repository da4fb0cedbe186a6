"""Which positions were modified: record it, report it, show it, choose by it.

May import `training`, `layers` and below. Open `recording.py` first, then `report.py`; `page` is
the report as a page for a browser.
"""

from tokengate.reports.modification_norms import ModificationNorms as ModificationNorms
