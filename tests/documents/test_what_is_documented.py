"""Every public name is in the table and in the API; every link leads somewhere; no page is lost."""

import json
import posixpath
import re
import sys

import pytest
from code_blocks import page
from places import ROOT

import tokengate
from tokengate import errors

PUBLIC = {
    name
    for name in dir(tokengate)
    if name[0] != "_" and not isinstance(getattr(tokengate, name), type(sys))
}
WARNINGS = {name for name in vars(errors) if name.endswith("Warning")}
ANYWHERE = [
    path.relative_to(ROOT).as_posix()
    for top in (ROOT, ROOT / "docs", ROOT / "integrations", ROOT / "examples")
    for path in (top.glob("*.md") if top == ROOT else top.rglob("*.md"))
]


def test_every_public_name_is_in_the_table():
    table = page("docs/names.md")
    assert len(PUBLIC) > 35
    assert [name for name in sorted(PUBLIC) if not re.search(rf"`{name}[`(]", table)] == []
    assert [name for name in sorted(WARNINGS) if f"`errors.{name}`" not in table] == []


def test_every_public_name_is_in_the_api():
    # The function, not the wing of that name.
    asked = page("docs/reference.md").replace("tokengate.layers.patched.layers", "tokengate.layers")
    described = set(re.findall(r"^::: ([\w.]+)$", asked, re.MULTILINE))
    named = {f"tokengate.{name}" for name in PUBLIC}
    named |= {f"tokengate.errors.{name}" for name in WARNINGS}
    assert named - described == set()
    assert {name for name in described if name.count(".") == 1} - named == set()


def links(text):
    """The relative targets of a page's links and pictures, without their anchors."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text)
    return [target for target in found if "/" in target or "." in target]


@pytest.mark.parametrize("name", ANYWHERE)
def test_links_lead_to_files(name):
    here = posixpath.dirname(name)
    found = links(page(name))
    assert [target for target in found if not (ROOT / here / target).exists()] == []


@pytest.mark.parametrize("name", ANYWHERE)
def test_files_that_are_named_are_there(name):
    found = re.findall(
        r"\b((?:tests|examples|docs)/[\w/*.]+\.(?:pyi?|jsonl?|md|png))\b", page(name)
    )
    assert [path for path in found if not list(ROOT.glob(path))] == []


def test_links_are_found():
    assert links("[a](b/c.md#d) ![e](f.png) [g](https://h.i) [j](#k)") == ["b/c.md", "f.png"]
    assert len(links(page("README.md"))) > 15


def test_the_site_has_every_page():
    """What MkDocs would only mention: a page that no navigation leads to."""
    navigation = page("mkdocs.yml").split("\nnav:")[1].split("\nmarkdown_extensions:")[0]
    listed = set(re.findall(r": ([\w/]+\.(?:md|ipynb))$", navigation, re.MULTILINE))
    from_elsewhere = set(re.findall(r'"(\w+\.md)": "', page("docs/pages_from_elsewhere.py")))
    files = {
        path.relative_to(ROOT / "docs").as_posix()
        for pattern in ("*.md", "tutorials/*.ipynb")
        for path in (ROOT / "docs").glob(pattern)
    }
    assert len(from_elsewhere) > 5
    assert listed == (files | from_elsewhere) - {"package_index.md"}


def test_notebooks_are_kept_without_what_they_print():
    """MkDocs executes them; what stands in git is what was written."""
    notebooks = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
    assert len(notebooks) >= 2
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert len(code) > 5
        assert all(c["outputs"] == [] and c["execution_count"] is None for c in code), path


def test_the_integrations_are_imported_as_their_page_says():
    """Where each heading says; what it describes lies deeper in a package."""
    described = re.findall(
        r"^::: integrations\.([\w.]+)\n +options:\n +heading: ([\w.]+)$",
        page("docs/reference_integrations.md"),
        re.MULTILINE,
    )
    assert len(described) == page("docs/reference_integrations.md").count("\n:::") > 20
    for path, heading in described:
        module, name = heading.rsplit(".", 1)
        source = ROOT / "integrations" / module.replace(".", "/")
        file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        assert path.endswith(f".{name}")
        assert re.search(rf"\b{name}\b", file.read_text()), heading
