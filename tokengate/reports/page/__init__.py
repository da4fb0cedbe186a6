"""A report as one HTML file with its heatmap and samples.

May import what `reports` may; `report.py` asks for it. Open `html_page.py` first, which fills in
`page.html`, `page.css` and `page.js`.
"""
