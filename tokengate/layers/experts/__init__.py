"""Experts whose projections are 3-D parameters: their module, what it reads, the patched layers.

As the rest of `layers`; open `owner.py` first.
"""
