"""flow_scores: attention of a global token, similarity of its value to all values, and the strength of the values, in
one pass (FlowCut, arXiv 2505.19536, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.types import VtpruneError
from .base import KernelInfo, kinds, register, run, wide


def flow_scores(
    query: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    value_scale: float = 1.0,
    bias: Tensor | None = None,
    value_seen: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers per token.

    Args:
        query, value: the global token's, ``[B, H, d]``.
        k, v: of all tokens, ``[B, H, N, d]``.
        scale: of the attention logits; ``value_scale`` of the value products.
        bias: ``[B, N]`` added to the attention logits: log sizes, -inf for what is not seen.
        value_seen: ``[B, N]`` bool, what the softmax of the values runs over; default: all.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        attention ``mean_h softmax_j(query . k_j scale)``, similarity ``mean_h softmax_j(value . v_j value_scale)`` and
        strength ``|mean_h v_j|_1``, each ``[B, N]`` float32 (float64 for float64). No gradient.

    Raises:
        VtpruneError: wrong shapes, or a backend that cannot run here.
    """
    b, h, n, d = k.shape if k.ndim == 4 else (0, 0, 0, 0)
    for what, tensor, shape in (
        ("query", query, (b, h, d)),
        ("value", value, (b, h, d)),
        ("v", v, (b, h, n, d)),
        ("k", k, (b, h, n, d)),
    ):
        if tuple(tensor.shape) != shape:
            raise VtpruneError(
                f"flow_scores: {what} must be {list(shape)} as k [B, H, N, d] is, got {list(tensor.shape)}"
            )
    for what, mask in (("bias", bias), ("value_seen", value_seen)):
        if mask is not None and tuple(mask.shape) != (b, n):
            raise VtpruneError(f"flow_scores: {what} must be {[b, n]}, got {list(mask.shape)}")
    kinds("flow_scores", torch.bool, value_seen=value_seen)
    return run("flow_scores", backend, query, value, k, v, scale, value_scale, bias, value_seen)


@torch.no_grad()
def reference(
    query: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    value_scale: float,
    bias: Tensor | None,
    value_seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    v = wide(v)
    attention = _row(wide(query), wide(k), scale, bias)
    hidden = None if value_seen is None else v.new_zeros(value_seen.shape).masked_fill(~value_seen, -torch.inf)
    return attention, _row(wide(value), v, value_scale, hidden), v.mean(1).abs().sum(-1)


def _row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    logits = torch.matmul(k, (q * scale)[..., None])[..., 0]  # [B, H, N]
    if bias is not None:
        logits = logits + bias[:, None]
    return torch.nan_to_num(logits.softmax(-1)).mean(1)


def plain(
    query: Tensor,
    value: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    value_scale: float,
    bias: Tensor | None,
    value_seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole attention map and the whole map of values, of which one row each is read."""
    every, values = torch.cat([query[:, :, None], k[:, :, 1:]], 2), torch.cat([value[:, :, None], v[:, :, 1:]], 2)
    attention = ((every @ k.transpose(2, 3)) * scale).float().softmax(-1)[:, :, 0].mean(1)
    return (
        attention,
        ((values @ v.transpose(2, 3)) * value_scale).float().softmax(-1)[:, :, 0].mean(1),
        v.float().mean(1).abs().sum(-1),
    )


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b, h, d = 2, 3, 24 if case != "wide" else 72
    query, value = (torch.randn(b, h, d, generator=generator).to(dtype) for _ in "qv")
    k, v = (torch.randn(b, h, n, d, generator=generator).to(dtype) for _ in "kv")
    bias = value_seen = None
    if case == "masked":
        seen = torch.rand(b, n, generator=generator) < 0.7
        value_seen = seen & (torch.arange(n) > 0)
        bias = torch.rand(b, n, generator=generator).masked_fill(~seen, -torch.inf)
        bias[1] = -torch.inf
    if case == "strided":
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    return query, value, k, v, d**-0.5, 0.5 if case == "masked" else 1.0, bias, value_seen


def close(arguments: tuple, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-5, rtol=1e-4)


def work(arguments: tuple) -> tuple[int, int]:
    k = arguments[2]
    return 2 * k.numel() * k.element_size() + 12 * k.shape[0] * k.shape[2], 5 * k.numel()


register(
    KernelInfo(
        name="flow_scores",
        source="arXiv 2505.19536, section 3.3",
        function=flow_scores,
        reference=reference,
        example=example,
        cases=("plain", "masked", "wide", "strided"),
        close=close,
        plain=plain,
        work=work,
    )
)
