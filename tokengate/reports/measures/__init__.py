"""A patched model beside its base, on data: what the loss has of each layer, and how far both are.

Imports what `reports` does. Open `fisher_scores.py` first.
"""
