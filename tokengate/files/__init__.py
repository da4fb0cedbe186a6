"""Files as they are written and read: regular, whole or not at all, strict JSON, tables of text.

Imports nothing of tokengate but what lies in its root. Open `atomic_write.py` first.
"""
