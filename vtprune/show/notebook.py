"""A report where it is asked for: in a notebook, or in Pillow's viewer."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ..core.types import VtpruneError
from . import theatre
from .pictures import sheet
from .token_states import check_sample
from .views import blank

if TYPE_CHECKING:
    from ..core.report import Report


def show(
    report: Report, image: Image.Image | Sequence[Image.Image] | None, *, sample: int, heat: bool, interactive: bool
) -> None:
    """What :meth:`vtprune.Report.show` does."""
    check_sample(report, sample)
    grids = report.grids[sample]
    if not grids:
        raise VtpruneError(f"sample {sample} has no visual tokens")
    if image is None:
        image = blank(report, sample)
    pictures = [image] if isinstance(image, Image.Image) else list(image)
    if len(pictures) != len(grids):
        raise VtpruneError(
            f"sample {sample} has {len(grids)} rasters, but there are {len(pictures)} pictures; give one for each "
            "(vtprune.show.pictures.views)"
        )
    notebook = _in_notebook()
    if interactive:
        if not notebook:
            raise VtpruneError(
                "interactive=True needs a notebook; 'vtprune run --picture OUT.html' writes the same as a page"
            )
        from IPython.display import HTML, display

        page = theatre.page([theatre.scene(report, pictures, sample=sample)], report.recipe or "dense")
        display(
            HTML(
                f'<div><iframe srcdoc="{html.escape(page)}" title="token theatre" style="width: 100%; height: 900px; '
                'border: 0"></iframe></div>'
            )
        )
        return
    out = sheet(pictures, report, sample, heat=heat)
    if notebook:
        from IPython.display import display

        display(out)
    else:
        out.show()


def _in_notebook() -> bool:
    """Whether IPython's front end shows pictures and pages: a terminal prints their names only."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and all(c.__name__ != "TerminalInteractiveShell" for c in type(shell).__mro__)
