"""Where visual tokens come from: which image, and which pass of the vision tower."""

from __future__ import annotations

import torch
from torch import Tensor

from .request import Call


def origin_at(call: Call, index: Tensor) -> Tensor:
    """Of the units' tokens ``index`` ``[G, n]`` (-1: padding) the image, or frame, and the pass of the tower that made
    them, both counted over the sample: ``[G, n, 2]``; -1 for padding, and as the pass of tokens that none made (new
    lines)."""
    request, visual = call.request, call.visual
    assert request is not None and visual is not None
    sources = request.sources or call.told()
    values = []
    for parts, made in zip(request.parts, sources, strict=True):
        if not parts:
            continue
        image = torch.cat([torch.full_like(p.columns, p.image) for p in parts])
        ends = torch.tensor([n for p in parts for n in p.passes]).cumsum(0)
        number = torch.where(made >= 0, torch.bucketize(made.cpu(), ends, right=True), -1)
        values.append(torch.stack([image.cpu(), number], -1))
    whole = torch.full((*visual.shape, 2), -1)
    whole[visual.cpu()] = torch.cat(values)
    units = whole.to(index.device)[request.owner.to(index.device)[:, None], request.table.to(index.device).clamp_min(0)]
    rows = units[torch.arange(len(units), device=index.device)[:, None], index.clamp_min(0)]
    return rows.masked_fill(index[..., None] < 0, -1)
