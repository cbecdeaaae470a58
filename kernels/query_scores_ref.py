"""query_scores: the attention of a few query rows to many keys, averaged over heads and rows, without the map. What
FastV (arXiv 2403.06764, section 4.1), PyramidDrop (arXiv 2410.17247, section 3.2) and every other method that reads one
row of attention needs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import VtpruneError
from .base import CHUNK, KernelInfo, kinds, register, rotate, run, wide


def query_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    weight: Tensor | None = None,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``s_j = sum_r w_r mean_h softmax_j(q_hr . k_hj * scale)``.

    Args:
        q: query rows ``[B, H, R, d]``, rotated where positions matter.
        k: keys ``[B, G, N, d]``; head h looks at key head ``h * G // H`` (grouped-query attention).
        scale: default ``d ** -0.5``.
        weight: of each row, ``[B, R]``; default ``1 / R``.
        seen: ``[B, R or 1, N]`` bool, the keys that a row's softmax runs over: causality, padding, a subset. Default:
            all. A row that sees none gives nothing.
        bias: ``[B, N]`` added to the logits (proportional attention).
        rotary: cosines and sines ``[B or 1, N, d]`` that rotate the keys, coordinate i paired with i + d / 2; default:
            k is rotated already, or not at all.
        cap: ``tanh(logit / cap) * cap`` (Gemma 2).
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        ``[B, N]`` float32 (float64 for float64). No gradient.

    Raises:
        VtpruneError: wrong shapes, or a backend that cannot run here.
    """
    if (
        q.ndim != 4
        or k.ndim != 4
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[1] % max(k.shape[1], 1)
    ):
        raise VtpruneError(
            f"query_scores: q [B, H, R, d] and k [B, G, N, d] with G a divisor of H are needed, got {list(q.shape)} "
            f"and {list(k.shape)}"
        )
    b, _, r, d = q.shape
    n = k.shape[2]
    table: list[tuple[int, ...]] = [(b, n, d), (1, n, d)]
    declared: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("weight", weight, [(b, r)]),
        ("seen", seen, [(b, r, n), (b, 1, n)]),
        ("bias", bias, [(b, n)]),
        *[("rotary", t, table) for t in rotary or ()],
    ]
    for what, tensor, shapes in declared:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise VtpruneError(
                f"query_scores: {what} must be {' or '.join(str(list(s)) for s in shapes)}, got {list(tensor.shape)}"
            )
    kinds("query_scores", torch.bool, seen=seen)
    if weight is None:
        weight = torch.full((b, r), 1 / max(r, 1), device=q.device)
    cos, sin = rotary if rotary is not None else (None, None)
    return run("query_scores", backend, q, k, d**-0.5 if scale is None else scale, weight, seen, bias, cos, sin, cap)


@torch.no_grad()
def reference(
    q: Tensor,
    k: Tensor,
    scale: float,
    weight: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cap: float | None,
) -> Tensor:
    q, k = wide(q), wide(k)
    b, h, r, d = q.shape
    g, n = k.shape[1:3]
    if cos is not None and sin is not None:
        k = rotate(k, cos, sin)
    if not n:
        return k.new_zeros(b, 0)
    keys = k.transpose(2, 3)  # [B, G, d, N]
    score = k.new_zeros(b, n)
    for i in range(0, r, step := max(1, CHUNK // max(b * h * n, 1))):
        part = (q[:, :, i : i + step] * scale).reshape(b, g, -1, d)
        logits = (part @ keys).view(b, h, -1, n)  # [B, H, step, N]
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if bias is not None:
            logits = logits + bias[:, None, None]
        if seen is not None:
            logits = logits.masked_fill(~(seen if seen.shape[1] == 1 else seen[:, i : i + step])[:, None], -torch.inf)
        p = torch.nan_to_num(logits.softmax(-1))
        score += torch.einsum("bhrn,br->bn", p, weight[:, i : i + step].to(p.dtype)) / h
    return score


def plain(
    q: Tensor,
    k: Tensor,
    scale: float,
    weight: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cap: float | None,
) -> Tensor:
    """What the field's codes do: the whole layer's attention map, of which one row is read."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    n = k.shape[2]
    if cos is not None and sin is not None:
        first, second = k.chunk(2, dim=-1)
        k = k * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    # queries of all positions, of which the last are the asked ones
    every = torch.cat([k[:, :, : n - q.shape[2]], q], dim=2)
    return ((every @ k.transpose(2, 3)) * scale).float().softmax(-1)[:, :, -1].mean(1)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b, h, g, r, d = 2, 4, 2, 1, 24
    if case == "rows":
        r = 9
    if case == "heads":
        h, g, r, d = 3, 3, 2, 72
    if case == "many":  # several blocks of rows per key head, a wide one (Gemma)
        h, g, r, d = 4, 2, 70, 256
    q, k = (torch.randn(b, heads, m, d, generator=generator) for heads, m in ((h, r), (g, n)))
    weight = torch.rand(b, r, generator=generator)
    seen = bias = cos = sin = cap = None
    if case in ("subset", "rows"):
        seen = torch.rand(b, r, n, generator=generator) < 0.6
        seen[0, 0] = False  # a row that sees nothing
    if case == "padded":
        seen = (torch.arange(n) < torch.tensor([n, (n + 1) // 2])[:, None])[:, None]
    if case == "bias":
        bias, cap = torch.rand(b, n, generator=generator).log(), 5.0
    if case in ("rotary", "rows", "many"):
        angle = torch.rand(b if case == "rows" else 1, n, d // 2, generator=generator).mul(6.3).tile(2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if case == "strided":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        q = q.transpose(1, 3).contiguous().transpose(1, 3)
    if case == "last":  # as in a layer, of which the last token asks
        q, weight = q.contiguous(), torch.ones(b, r)
    return q.to(dtype), k.to(dtype), d**-0.5, weight, seen, bias, cos, sin, cap


def close(arguments: tuple, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), atol=2e-6, rtol=2e-4)


def work(arguments: tuple) -> tuple[int, int]:
    q, k = arguments[:2]
    rows = q.shape[1] * q.shape[2] // k.shape[1]
    return k.numel() * k.element_size() + 4 * k.shape[0] * k.shape[2], 2 * k.numel() * rows


register(
    KernelInfo(
        name="query_scores",
        source="arXiv 2403.06764, section 4.1",
        function=query_scores,
        reference=reference,
        example=example,
        cases=("last", "rotary", "rows", "subset", "padded", "heads", "many", "bias", "strided"),
        close=close,
        plain=plain,
        work=work,
    )
)
