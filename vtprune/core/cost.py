"""FLOPs and cache bytes from what the layers really processed. A multiply-add counts 2; attention is counted whole, not
halved for causality.

Matrix products only, as ``torch.utils.flop_counter.FlopCounterMode`` counts them (a test compares the two); a
selector's own arithmetic is not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.models.engine.shapes import Shapes


def tower_row(s: Shapes) -> int:
    """The projections and the MLP of one vision block for one token."""
    return 2 * (4 * s.vd * s.vd + s.vmlp * s.vd * s.vf)


def tower_block(s: Shapes, n: int, after: int | None = None, seen: float | None = None) -> int:
    """One vision block over ``n`` tokens (prefix included); ``after`` tokens reach its MLP if a merge happens inside
    it; each sees ``seen`` tokens (default all, of windows their mean)."""
    attention = 4 * n * s.vd * s.vd + 2 * round(n * (n if seen is None else min(seen, n))) * s.vd
    return 2 * (attention + s.vmlp * (n if after is None else after) * s.vd * s.vf)


def exchange(s: Shapes, m: int, seen: int) -> int:
    """An attention of the tower's width over ``m`` inserted tokens, each of which sees ``seen`` of them."""
    return 2 * (4 * m * s.vd * s.vd + 2 * m * seen * s.vd)


def vision(
    s: Shapes,
    images: int,
    patches: int,
    per_block: Sequence[float],
    inside: bool = False,
    projected: float | None = None,
    seen: Sequence[float] | None = None,
    fed: Sequence[float] | None = None,
) -> int:
    """Patch embedding, blocks and projector for ``images`` images; ``per_block`` patch tokens entering each block,
    ``projected`` tokens through the projector. ``seen``: the patches that each one attends to, block by block (default:
    all, or what is in a window of the model); ``fed``: those that its MLP reads, where they are not those of the next
    block.

    Blocks beyond ``per_block`` (run, but not used by LLaVA) see what is projected.
    """
    counts: list[float] = [n * s.group for n in per_block or [patches]]
    total = 2 * patches * s.group * s.patch
    counts += [counts[-1] if projected is None else projected * s.group] * (s.vdepth - len(counts))
    for i, n in enumerate(counts):
        after = counts[i + 1] if inside and i + 1 < len(counts) else n
        after = fed[i] * s.group if fed is not None and i < len(fed) else after
        windowed = s.window if s.window and i not in s.whole else None
        total += tower_block(s, round(n) + s.prefix, round(after) + s.prefix, seen[i] if seen else windowed)
    total += 2 * round(counts[-1] / s.group if projected is None else projected) * s.proj
    return images * total


def decoder_layer(s: Shapes, layer: int, n: int, keys: int | None = None) -> int:
    """Decoder layer ``layer`` over ``n`` tokens: projections, the full attention, the MLP (of experts those that a
    token is sent to). ``keys`` (default ``n``) counts the tokens with keys and values."""
    at, seen = s.layers[layer], n if keys is None else keys
    return 2 * (n * at.row + seen * at.key + n * seen * at.pair)


def onward(s: Shapes, layer: int, n: int, held: int) -> int:
    """Decoder layer ``layer`` over ``n`` tokens more, of ``held`` that its cache then holds."""
    at = s.layers[layer]
    return 2 * (n * (at.row + at.key) + n * held * at.pair)


def half(s: Shapes, layer: int, which: str, n: int) -> int:
    """What of :func:`decoder_layer` over ``n`` tokens is its ``"mlp"``, or its ``"attention"``."""
    mlp = s.layers[layer].mlp
    assert mlp is not None
    return 2 * n * mlp if which == "mlp" else decoder_layer(s, layer, n) - 2 * n * mlp


def prefill(s: Shapes, per_layer: Sequence[int], keys: Sequence[int] | None = None) -> int:
    """Decoder layers over ``per_layer`` tokens (text and visual) and the head for one position; ``keys`` as for
    :func:`decoder_layer`."""
    return (
        sum(decoder_layer(s, i, n, k) for i, (n, k) in enumerate(zip(per_layer, keys or per_layer, strict=True)))
        + 2 * s.d * s.vocab
    )


def kv_bytes(s: Shapes, per_layer: Sequence[int]) -> int:
    """Bytes of keys and values that the prefill leaves behind; a sliding window's cache keeps the last of them only."""
    held = s.held or [0] * len(per_layer)
    return sum(
        (min(n, most) if most else n) * at.kept * s.bytes for at, n, most in zip(s.layers, per_layer, held, strict=True)
    )
