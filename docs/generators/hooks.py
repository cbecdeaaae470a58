"""What mkdocs calls while it builds the site: pages from the registries, pictures from the bundled model, and files of
the repository that pages link to."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import family_pages
import kept
import method_pages
import refusals
import repository
import torch
from facts import ROOT, every_method
from mkdocs.structure.files import File, Files, InclusionLevel

LOG = logging.getLogger("mkdocs.hooks.vtprune")
LINKS = ROOT / "build" / "api" / "vtprune"
SLOTS = {"METHODS": method_pages.nav, "FAMILIES": family_pages.nav}  # words of the navigation


def on_startup(**how: Any) -> None:
    """Shows mkdocstrings, before it looks for them, the packages as they are imported, under build/api."""
    LINKS.mkdir(parents=True, exist_ok=True)
    for part in (*(ROOT / "vtprune").iterdir(), *(ROOT / name for name in ("models", "kernels", "demos"))):
        link = LINKS / part.name
        if part.suffix == ".py":
            link.write_text(part.read_text(encoding="utf-8"), encoding="utf-8")
        elif part.is_dir() and not link.is_symlink():
            link.symlink_to(part)


def on_config(config: Any) -> Any:
    """Fills the navigation's slots."""
    torch.set_num_threads(1)
    config.nav = [{k: SLOTS[v]() if isinstance(v, str) and v in SLOTS else v for k, v in e.items()} for e in config.nav]
    return config


def texts() -> dict[str, str]:
    """Every generated page of methods and families, without pictures: ``uri -> Markdown``."""
    pages = {method_pages.uri(i.name): method_pages.page(i, None) for i in every_method()}
    pages["methods/index.md"] = method_pages.index()
    return pages | {family_pages.uri(name): family_pages.page(name) for name in family_pages.families()}


def on_files(files: Files, config: Any) -> Files:
    """Adds what is generated, and what pages link to outside of docs/."""
    pages, pictures = {"methods/index.md": method_pages.index()}, {"methods/img/original.webp": kept.original()}
    pages |= {family_pages.uri(name): family_pages.page(name) for name in family_pages.families()}
    for info in every_method():
        drawn = kept.of(info.name)
        pages[method_pages.uri(info.name)] = method_pages.page(info, drawn)
        if drawn is not None:
            pictures[f"methods/img/{info.name}.webp"] = drawn.file
    for uri, content in {**pages, **pictures, "assets/theatre.html": kept.theatre()}.items():
        _put(files, config, uri, content)
    known = {f.src_uri: f.content_string for f in files if f.is_documentation_page()}
    for path in sorted(repository.closure(known)):
        uri = repository.site_uri(path)
        text = path.suffix == ".md"
        # pages of the repository are reached by links, not by the navigation
        level = InclusionLevel.NOT_IN_NAV if text else InclusionLevel.INCLUDED
        _put(files, config, uri, path.read_text(encoding="utf-8") if text else path.read_bytes(), level)
    LOG.info("%d pages generated, %d files of the repository shown", len(pages), len(files))
    return files


def _put(files: Files, config: Any, uri: str, content: str | bytes, level: Any = InclusionLevel.INCLUDED) -> None:
    """One file of the site; another of its name, the hand-written part of a method's page, gives way."""
    if (old := files.get_file_from_path(uri)) is not None:
        files.remove(old)
    files.append(File.generated(config, uri, content=content, inclusion=level))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    if uri == "troubleshooting.md":
        markdown = refusals.page(markdown)
    if uri == "families/index.md":
        markdown = markdown.replace("<!-- families -->", family_pages.index())
    return repository.spaced(repository.rewritten(uri, markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """What the theme leaves out for those who do not see the page: the name of its dialog, heads without words."""
    dialog = 'data-md-component="search" role="dialog"'
    output = output.replace(dialog, f'{dialog} aria-label="Search"')
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", output)


def on_serve(server: Any, config: Any, builder: Any) -> Any:
    """``mkdocs serve`` builds again when a docstring or a result changes."""
    for folder in ("vtprune/methods", "benchmarks/results", "docs/generators"):
        server.watch(str(Path(ROOT) / folder))
    return server
