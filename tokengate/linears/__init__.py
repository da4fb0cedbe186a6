"""What can be patched: linear-like layers, slices of fused ones, quantised ones; and what cannot.

May import `files` and the root's modules; knows nothing of gates or methods. Open `linear_like.py`
first.
"""
