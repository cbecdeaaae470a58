"""``vtprune report FOLDER``: the result files of a folder as one self-contained page, with every figure beside it as
PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..core.paths import output
from ..core.types import VtpruneError
from ..version import __version__
from . import web
from .bench_tables import refusals
from .drawings import drawings
from .figures import style
from .inline import inline
from .results import OVERHEAD, ResultFile, load
from .sections import how_html, section
from .tables import esc, table_html

HEADINGS = {
    "vtprune.Bench": "Accuracy and cost",
    "vtprune.Times": "Times",
    OVERHEAD: "Overhead",
    "vtprune.Vit": "Vision transformers",
}


def page_html(
    results: Sequence[ResultFile], unknown: Sequence[str], pictures: Mapping[str, Sequence[str]], title: str
) -> str:
    """The whole page. ``pictures``: stem -> figures, ready."""
    parts = list(_parts(results, pictures))
    how = how_html(results)
    links = [("how", "How to read it")] * bool(how) + [(name, text) for name, text, _ in parts]
    listed = "".join(f'<li><a href="#{name}">{esc(text)}</a></li>' for name, text in links)
    body = "\n".join(f'<section id="{name}"><h2>{esc(text)}</h2>\n{inside}\n</section>' for name, text, inside in parts)
    files = ", ".join(f.stem + ".json" for f in results)
    other = f" Not shown, of another type: {', '.join(unknown)}." if unknown else ""
    content = f"""<header><h1>{esc(title)}</h1></header>
<nav aria-label="Contents"><ul>{listed}</ul></nav>
<main>
{how}
{body}
</main>
<footer><p>Made by vtprune {esc(__version__)} from {esc(files)}.{esc(other)}</p></footer>"""
    return web.document(title, web.style_sheet("page.css"), content)


def _parts(results: Sequence[ResultFile], pictures: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, str]]:
    """Anchor, heading and contents of each section."""
    ordered = sorted(results, key=lambda f: list(HEADINGS).index(f.kind))
    for i, f in enumerate(ordered):
        anchor = f"{f.kind.split('.')[-1].lower()}-{i}"
        yield anchor, f"{HEADINGS[f.kind]}: {f.stem}", section(f, pictures.get(f.stem, ()))
    refused = refusals([f for f in ordered if f.kind == "vtprune.Bench"])
    if refused.rows:
        yield "refused", "What was refused, and why", table_html(refused)


def page(folder: Path, *, budget: float = 0.25, cost: str = "tokens", title: str | None = None) -> str:
    """The page that :func:`write` writes, figures as SVG inside. Raises :class:`VtpruneError` for what :func:`load`
    refuses and without matplotlib."""
    results, unknown = load(folder)
    style.library()
    pictures: dict[str, list[str]] = {}
    for f in results:
        for drawing in drawings(f, budget, cost):
            if (figure := drawing.draw()) is not None:
                pictures.setdefault(f.stem, []).append(inline(drawing, figure, style.encode(figure, "svg")))
    return page_html(results, unknown, pictures, title or _title(folder))


def _title(folder: Path) -> str:
    return f"vtprune report: {folder.resolve().name}"


def write(
    folder: Path, out: Path, *, budget: float = 0.25, cost: str = "tokens", title: str | None = None
) -> list[Path]:
    """Reads ``folder``, writes ``report.html`` and the figures into ``out`` (made if it is not there) and gives all
    paths written, the page first.

    Args:
        budget: for the figures that show one; the nearest of each file is taken.
        cost: ``"tokens"`` or ``"flops"``, the horizontal axis of accuracy figures.

    Raises:
        VtpruneError: what :func:`load` refuses, no matplotlib, or a file that cannot be written (told before anything
            is drawn).
    """
    results, unknown = load(folder)
    style.library()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VtpruneError(f"cannot write {out}: {e.strerror}") from e
    planned = {f.stem: drawings(f, budget, cost) for f in results}
    whole = out / "report.html"
    files = [whole, *(out / f"{d.name}.{kind}" for drawn in planned.values() for d in drawn for kind in ("png", "svg"))]
    for path in files:
        output(path)
    written = [whole]
    pictures: dict[str, list[str]] = {}
    for stem, listed in planned.items():
        for drawing in listed:
            if (figure := drawing.draw()) is None:
                continue
            for kind in ("png", "svg"):
                written.append(out / f"{drawing.name}.{kind}")
                web.write(written[-1], data := style.encode(figure, kind))
            pictures.setdefault(stem, []).append(inline(drawing, figure, data))
    web.write(whole, page_html(results, unknown, pictures, title or _title(folder)).encode())
    return written
