"""A hook of MkDocs: the site's pages that are files of the repository, and links that hold in both.

README.md, ARCHITECTURE.md and others are read where they lie, so that nothing stands twice. Links
are written as a code host follows them, from the file on. On the site a link to a page leads to the
page, and a link to a file that is none, such as a script, becomes the file's name.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: {page of the site: file of the repository}
PAGES = {
    "index.md": "README.md",
    "integrations.md": "integrations/README.md",
    "benchmarks.md": "examples/benchmarks/README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]*)(#[^)\s]*)?\)|(!\[[^\]]*\])\(([^):\s]+)\)")


def on_files(files, config):
    """Add the files of `PAGES`."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead each relative link to where its file is on the site."""
    here = page.file.src_uri
    source = PAGES.get(here, f"docs/{here}")
    pages = {file: name for name, file in PAGES.items()}

    def on_the_site(target):
        """The page or picture of the site that a file of the repository is, if any."""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = pages.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if name is None or files.get_file_from_path(name) is None:
            return file, None
        return file, posixpath.relpath(name, posixpath.dirname(here) or ".")

    def led(match):
        text, target, anchor, picture, shown = match.groups()
        if picture:
            return f"{picture}({on_the_site(shown)[1] or shown})"
        if not target:
            return match[0]  # within the page
        file, name = on_the_site(target)
        if name is not None:
            return f"[{text}]({name}{anchor or ''})"
        return f"`{file}`" if text.strip("`") == file else f"{text} (`{file}`)"

    return LINK.sub(led, markdown)
