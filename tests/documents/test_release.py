"""A release says one version, and an index shows what it can show."""

import datetime
import re

import pytest
from code_blocks import page, python_of

import tokengate

INDEX = page("docs/package_index.md")


def test_one_version_is_said_everywhere():
    yaml = pytest.importorskip("yaml", reason="comes with the transformers extra")
    citation = yaml.safe_load(page("CITATION.cff"))
    heading = re.search(r"^## \[([\d.]+)\] - (\S+)$", page("CHANGELOG.md"), re.MULTILINE)
    assert heading[1] == citation["version"] == tokengate.__version__
    assert heading[2] == citation["date-released"]
    datetime.date.fromisoformat(heading[2])
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


def test_the_package_takes_its_version_from_there():
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    settings = tomllib.loads(page("pyproject.toml"))
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == "tokengate/__init__.py"
    assert settings["project"]["readme"] == "docs/package_index.md"
    assert all(url.startswith("https://") for url in settings["project"]["urls"].values())


def test_changes_are_ordered_and_of_the_known_kinds():
    found = re.findall(r"^## \[([\d.]+)\]", page("CHANGELOG.md"), re.MULTILINE)
    numbers = [tuple(map(int, version.split("."))) for version in found]
    assert len(numbers) >= 2
    assert numbers == sorted(numbers, reverse=True)
    kinds = set(re.findall(r"^### (.*)$", page("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_an_index_shows_no_picture_and_no_link_that_leads_nowhere():
    assert "![" not in INDEX
    assert "<img" not in INDEX
    targets = re.findall(r"\]\(([^)]+)\)", INDEX)
    assert targets
    assert all(target.startswith("https://") for target in targets)


def test_an_index_says_what_readme_says():
    assert python_of(INDEX) == python_of(page("README.md"))[:1]
    sentences = page("README.md").split("![")[0].strip()
    assert INDEX.startswith(sentences.removesuffix("."))
