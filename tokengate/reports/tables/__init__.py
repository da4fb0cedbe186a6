"""What a report says as tables: of layers and projections, of modules, of two reports.

May import what `reports` may; `report.py` asks for it. Open `sparsity_table.py` first.
"""
