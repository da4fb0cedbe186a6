"""A report as one HTML file with its heatmap and samples.

May import what `reports` may; `report.py` asks for it. Open `html_page.py` first, which fills in
`page.html` and `page.css`; `1_state.js` to `9_start.js` are one script.
"""
