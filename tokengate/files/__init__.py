"""Files as they are written and read: whole or not at all, strict JSON, tables in plain text.

Imports nothing of tokengate but what lies in its root. Open `atomic_write.py` first.
"""
