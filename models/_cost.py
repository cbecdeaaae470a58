"""The shapes that the cost model needs (see :mod:`vtprune.cost`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Widths of a model.

    Vision: ``vd`` width, ``vf`` MLP width, ``vdepth`` blocks run, ``vmlp`` matrices in its MLP (2, gated 3), ``patch`` multiply-adds per patch of the patch
    embedding, ``group`` patches that one visual token stands for (merger, pixel shuffle), ``window`` patches that a block's attention spans at most except
    in the blocks ``whole``. Projector: ``proj`` multiply-adds per token. Language model: ``d`` width, ``heads`` x ``hd``, ``kv`` heads, ``f`` MLP width,
    ``depth`` layers, ``vocab``, ``held`` tokens that each layer's cache keeps at most (0: all).
    """

    vd: int
    vf: int
    vheads: int
    vdepth: int
    patch: int
    prefix: int
    group: int = 1
    vmlp: int = 2
    window: int = 0
    whole: tuple[int, ...] = ()
    proj: int = 0
    d: int = 0
    heads: int = 0
    hd: int = 0
    kv: int = 0
    f: int = 0
    depth: int = 0
    vocab: int = 0
    held: tuple[int, ...] = ()
    bytes: int = 2
