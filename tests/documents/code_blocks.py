"""What stands in Markdown as Python, and how it is run: as it stands, in the order of the page."""

from places import ROOT


def python_of(text):
    """The Python of a page's blocks."""
    return [part.split("\n```")[0] for part in text.split("```python\n")[1:]]


def page(name):
    """The text of a page, by its path in the repository."""
    return (ROOT / name).read_text()


def run(name, scope):
    """Run all Python of a page, one block after another, as a reader would type it."""
    for number, code in enumerate(python_of(page(name)), 1):
        exec(compile(code, f"{name}, block {number}", "exec"), scope)
    return scope
