"""What modifications do: to the distribution of every token, and to every layer's output.

May import what `reports` may. Open `comparison.py` first; `effect.py` is its arithmetic.
"""
