"""The documentation's site: the pages that are made at build time, and the build itself."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import site_pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_first_page_is_the_readme_with_links_that_lead_into_docs() -> None:
    text = site_pages.home()
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert len(targets) > 10
    assert [target for target in targets if not (DOCS / target).exists()] == []
    assert "Does this activation make a network robust?" in text


def test_links_out_of_docs_become_text() -> None:
    made = site_pages.on_page_markdown("see [conf/suite](../conf/suite) and [grids](grids.md#several)")
    assert made == "see conf/suite and [grids](grids.md#several)"
    for page in DOCS.glob("*.md"):
        assert "](../" not in site_pages.on_page_markdown(page.read_text()), page.name


def test_the_page_of_options_holds_every_file() -> None:
    text = site_pages.options()
    files = list((ROOT / "conf").rglob("*.yaml"))
    assert len(files) > 80
    assert all(path.read_text().rstrip() in text for path in files)


def test_the_page_of_python_names_what_can_be_imported() -> None:
    named = re.findall(r"^::: (\S+)$", site_pages.python(), re.MULTILINE)
    assert len(named) > 40
    for path in named:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path


def test_the_menu_names_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"(\w+\.md)$", menu, re.MULTILINE))
    assert listed == {page.name for page in DOCS.glob("*.md")} | {"index.md", "options.md", "python.md"}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="make docs installs it")
    pytest.importorskip("mkdocstrings", reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    silent = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=silent)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "python.html").read_text()
    assert "kwta_exp.activations.kwta.KWTA" in page
    assert not re.search(r'(?:src|href)="https?://', (tmp_path / "site" / "guide.html").read_text())
