"""torchvision beside a torch for CPUs: its wheel is built for CUDA, its operators do not load, and importing it fails
at the first one that nobody has declared. Declared in front of that import, in every process of the environment, it
works as far as anything here needs it: images, no boxes.

``--install`` puts this file into the environment's ``site-packages`` and has Python read it at its start.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declare:
    """Finds no module: it is asked for ``torchvision`` first."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            import torch

            Declare.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                Declare.library.define(schema)


if __name__ == "__main__":
    site = Path(sysconfig.get_paths()["purelib"])
    (site / "torchvision_without_cuda.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (site / "torchvision_without_cuda.pth").write_text("import torchvision_without_cuda\n", encoding="utf-8")
else:
    sys.meta_path.insert(0, Declare())  # type: ignore[arg-type]
