"""What a patched model does to its data, measured: how much of the loss hangs on each layer, and how
far the whole is from its base. Imports what `reports` does. Open `fisher_scores.py` first."""
