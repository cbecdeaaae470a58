"""The site: pages for everything that is registered, from what is registered; built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import family_pages
import method_pages
import pytest
import repository
import yaml
from facts import every_method, paper, plain, reasons, support
from vtprune.models.base import ADAPTERS

import vtprune
from browser import CHROMIUM, QUIET
from vtprune.methods.base import METHODS

ROOT = Path(__file__).resolve().parents[2]


def test_every_method_has_a_page_of_its_own_facts():
    assert sorted(i.name for i in every_method()) == list(METHODS)
    for info in every_method():
        page = method_pages.page(info, None)
        assert info.idea[1:] in page and page.startswith(f"# {info.name}\n")
        for option, text in info.option_help.items():
            assert f"| `{option}` |" in page and " ".join(plain(text).replace("|", "\\|").split()) in page
        if info.paper != "baseline":
            assert info.paper.removeprefix("arXiv ") in page and "archivePrefix" in page
        written = ROOT / "docs" / "methods" / f"{info.name}.md"
        assert not written.is_file() or written.read_text(encoding="utf-8").partition("\n")[2].strip() in page


def test_titles_are_those_that_docstrings_quote_beside_the_registered_source():
    sources = {i.name: paper(i) for i in every_method()}
    assert all((sources[i.name] is None) == (i.paper == "baseline") for i in every_method())
    without = {name for name, source in sources.items() if source is not None and not source.title}
    assert without == {"pixelprune", "tops", "turbo"}  # whose docstrings quote none, or an earlier version's
    assert sources["tome"].title == "Token Merging: Your ViT But Faster" and sources["tome"].venue == "ICLR 2023"


def test_every_family_has_a_page_and_an_example_that_it_takes():
    assert set(family_pages.EXAMPLES) == set(family_pages.families()) == set(support())
    for family, (_, method, _) in family_pages.EXAMPLES.items():
        assert support()[family][method] != "–"
        page = family_pages.page(family)
        assert all(f"../methods/{name}.md" in page for name in METHODS)  # works, works with an option, or refused


def test_the_table_of_pairs_is_read_whole():
    assert set(support()) == set(ADAPTERS)
    for family, row in support().items():
        assert set(row) == set(METHODS) and set(row.values()) <= {"●", "◐", "–"}
        noted = {name for _, names, _ in reasons().get(family, []) for name in names}
        assert noted == {name for name, sign in row.items() if sign != "●"}


def test_measured_numbers_are_those_of_the_committed_results():
    page = method_pages.page(vtprune.describe("divprune"), None)
    assert "| 25 % | 91.4 |" in page and "431 questions of `scenes`" in page  # as in the table of standings


def test_the_reference_shows_everything_public():
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"heading: vtprune\.(\w+),", reference))
    assert set(vtprune.__all__) <= shown


def test_links_out_of_the_docs_lead_into_the_site():
    code = "\n```\n[d](../README.md)\n```\n"
    text = "[a](../benchmarks/README.md#x) ![b](img/demo-dark.png) [c](../vtprune/core/types.py)"
    there = "[a](repository/benchmarks/README.md#x) ![b](img/demo-dark.png) c"
    assert repository.rewritten("engine.md", text + code) == there + code
    assert repository.rewritten("engine.md", "[e](../nothing.md)") == "[e](../nothing.md)"  # mkdocs says so
    back = repository.rewritten("repository/CHANGELOG.md", "[f](docs/engine.md#later-turns)")
    assert back == "[f](../engine.md#later-turns)"


def test_a_list_behind_a_paragraph_is_a_list():
    assert repository.spaced("a:\n* b\n* c") == "a:\n\n* b\n* c"
    assert repository.spaced("* a\n  more\n* b") == "* a\n  more\n* b"
    assert repository.spaced("```\na\n* b\n```\n") == "```\na\n* b\n```\n"


# --------------------------------------------------------------------------------------------------------- the build


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    place = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", place)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


class Page(HTMLParser):
    """What a page loads from elsewhere, and what those miss who do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.nameless: list[str] = []
        self.headings: list[int] = []
        self.heads = 0

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        source = given.get("src") or (given.get("href") if tag == "link" else None) or ""
        if tag != "a" and re.match(r"(https?:)?//", source):
            self.foreign.append(source)
        if tag == "img" and not given.get("alt"):
            self.nameless.append(str(given))
        if tag == "iframe" and not given.get("title"):
            self.nameless.append(str(given))
        self.heads += tag == "th"
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.mark.ci
def test_the_site_builds_without_a_warning_or_a_foreign_file(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 120
    for path in pages:
        page, text = Page(), path.read_text(encoding="utf-8")
        page.feed(text)
        assert page.foreign == [] and page.nameless == [], path
        assert "<table" not in text or page.heads, path
    assert (site / "search" / "search_index.js").is_file()  # inlined: search works without a server
    assert not any("unpkg" in p.read_text(encoding="utf-8") for p in pages)


@pytest.mark.ci
def test_pages_show_what_methods_keep(site):
    drawn = {p.stem for p in (site / "methods" / "img").glob("*.webp")}
    assert {"original", "divprune", "tome", "fastv", "holitom", "covipal"} <= drawn and len(drawn) > 40
    assert all(p.stat().st_size < 45_000 for p in (site / "methods" / "img").glob("*.webp"))
    assert "<canvas" in (site / "assets" / "theatre.html").read_text(encoding="utf-8") or (
        "data:image" in (site / "assets" / "theatre.html").read_text(encoding="utf-8")
    )


@pytest.mark.ci
@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_search_works_on_files_without_a_server(site):
    pytest.importorskip("playwright.sync_api")
    with ThreadPoolExecutor(1) as apart:  # the demo's tests may have a browser open in this thread
        apart.submit(search, site).result()


def search(site):
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto((site / "index.html").as_uri())
        page.wait_for_function("typeof __index === 'object'")
        page.keyboard.press("/")
        page.keyboard.type("prefill_chunk_size")
        page.get_by_role("link", name="Troubleshooting").first.wait_for()
        page.get_by_text("cannot be pruned exactly").first.wait_for()
        assert errors == []
        browser.close()


@pytest.mark.parametrize("page", ["[a](nowhere.md)", "[a](#nowhere)", "[a](index.md#nowhere)", "[a](/absolute.md)"])
def test_a_link_that_leads_nowhere_fails_the_build(page, tmp_path):
    """With the settings of mkdocs.yml, on a site of one page."""
    pytest.importorskip("mkdocs")
    own = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# one\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"site_name": "x", "validation": own["validation"]}), "utf-8")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode == 0
    (tmp_path / "docs" / "index.md").write_text(f"# one\n{page}\n", encoding="utf-8")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "nowhere" in done.stderr + page
