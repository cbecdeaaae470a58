"""The shapes that the cost model needs (see :mod:`vtprune.core.cost`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """What one decoder layer does with a token.

    Attributes:
        row: multiply-adds if the token passes through (queries, output projection, MLP, router).
        key: multiply-adds for its keys and values.
        pair: multiply-adds per query and key.
        kept: numbers in the cache.
        mlp: of ``row``, those of the MLP (and router); ``None``: not known.
    """

    row: int
    key: int
    pair: int
    kept: int
    mlp: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Widths of a model.

    Attributes:
        vd: width of the vision tower.
        vf: width of its MLP.
        vheads: its attention heads.
        vdepth: its blocks that run.
        patch: multiply-adds per patch of the patch embedding.
        prefix: tokens in front of the patches.
        group: patches that one visual token stands for (merger, pixel shuffle).
        vmlp: matrices in the tower's MLP: 2, gated 3.
        window: patches that a block's attention spans at most (0: all), except in the blocks ``whole``.
        whole: blocks whose attention spans everything.
        proj: multiply-adds per token of the projector.
        d: width of the language model.
        vocab: its vocabulary.
        layers: its layers.
        held: tokens that each layer's cache keeps at most (0: all).
        bytes: of a number in the cache.
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
    vocab: int = 0
    layers: tuple[Layer, ...] = ()
    held: tuple[int, ...] = ()
    bytes: int = 2

    @property
    def depth(self) -> int:
        """Layers of the language model."""
        return len(self.layers)


def attention(d: int, heads: int, hd: int, kv: int, mlp: int) -> Layer:
    """A layer of width ``d`` with ``heads`` x ``hd`` queries, ``kv`` x ``hd`` keys and values, and ``mlp``
    multiply-adds per token behind them."""
    return Layer(row=2 * d * heads * hd + mlp, key=2 * d * kv * hd, pair=2 * heads * hd, kept=2 * kv * hd, mlp=mlp)
