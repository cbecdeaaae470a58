"""The notebooks in demos/ and examples/: run one as a reader would. ``python tests/notebooks.py`` (``make notebooks``)
saves what they put out."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

THEATRE = "<p>The token theatre stands here once the cell is run.</p>"
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for folder in ("demos", "examples") for path in (ROOT / folder).glob("*.ipynb"))


def run(path: Path, folder: Path) -> Any:
    """The notebook with the outputs of a fresh kernel in ``folder``, without what differs from run to run. Raises
    ``CellExecutionError``."""
    book = nbformat.read(path, 4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/jpeg" in output.get("data", {}):  # the same picture twice
                    output["data"].pop("image/png", None)
                # pages are large and do not live where they are not trusted
                if "<vt-theatre" in html.unescape(output.get("data", {}).get("text/html", "")):
                    output["data"] = {"text/html": THEATRE, "text/plain": "the token theatre"}
    book.metadata["language_info"] = {"name": "python"}
    return book


def said(book: Any) -> list[str]:
    """What each cell prints; a busy machine delivers it in several pieces."""
    cells = (c for c in book.cells if c.cell_type == "code")
    texts = ("".join(o.text for o in cell.outputs if o.output_type == "stream") for cell in cells)
    return [text for text in texts if text]


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(run(path, path.parent), path)
        print(f"wrote {path.name}")
