"""From targets to a patched model, and back: plan, check, then change.

May import `layers` and below. Open `patch.py` first, then `targets.py`.
"""
