"""match: every source token's most similar target, by cosine. Steps 3 and 4 of ToMe's bipartite matching (arXiv
2210.09461, section 3), PiToMe's algorithm 1 (arXiv 2405.16148), Turbo's penalised edges (arXiv 2407.11717) and
VisionZip's assignment of context tokens (arXiv 2412.04467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import CHUNK, KernelInfo, check, kinds, per_image, register, rows, run, tokens, unit, wide

BLOCK = 32  # targets whose maximum is taken without its index: on a CPU a search for the index takes five times as long


def match(
    x: Tensor,
    sources: Tensor,
    targets: Tensor,
    *,
    protected: Tensor | None = None,
    penalty: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The most similar target of every source, ``max_j cos(x_i, x_j) - penalty_j``.

    Args:
        x: tokens ``[B, N, C]``.
        sources: positions in x, ``[M]`` for all images or ``[B, M]``, where -1 is padding.
        targets: likewise, ``[K]`` or ``[B, K]``.
        protected: ``[B, N]`` bool, tokens that neither merge nor absorb.
        penalty: ``[B, K]`` subtracted from the similarity with each target.
        backend: ``"triton"``, ``"reference"`` or ``None``: by device.

    Returns:
        score ``[B, M]`` (float32, float64 for float64) and index ``[B, M]`` into ``targets``; ties go to the lower one.
        -inf and -1 for padding, for protected sources and where there is no target. A token that is not finite has
        similarity 0 with everything. No gradient.

    Raises:
        VtpruneError: wrong shapes, or a backend that cannot run here.
    """
    b, n, _ = x.shape if x.ndim == 3 else (0, 0, 0)
    kinds("match", torch.bool, protected=protected)
    kinds("match", torch.int64, sources=sources, targets=targets)
    check("match", x, protected=(protected, (b, n)), penalty=(penalty, (b, targets.shape[-1])))
    padded = sources.ndim > 1 or targets.ndim > 1  # positions that all images share have none
    return run("match", backend, x, per_image(sources, b), per_image(targets, b), protected, penalty, padded)


@torch.no_grad()
def reference(
    x: Tensor, sources: Tensor, targets: Tensor, protected: Tensor | None, penalty: Tensor | None, padded: bool
) -> tuple[Tensor, Tensor]:
    b, m, k = len(x), sources.shape[1], targets.shape[1]
    if not b * m * k:
        return wide(x).new_full((b, m), -torch.inf), torch.full((b, m), -1, device=x.device)
    index = torch.cat([sources, targets], 1)
    if short := -k % BLOCK:
        index, penalty, k = (
            F.pad(index, (0, short), value=-1),
            None if penalty is None else F.pad(penalty, (0, short)),
            k + short,
        )
    free = not (padded or short) and protected is None  # every position is a token that may merge
    both = wide(rows(x, index))
    a, t = both[:, :m], both[:, m:].transpose(1, 2)  # [B, M, C], [B, C, K]
    norm = both.norm(dim=-1)
    both.masked_fill_(~norm.isfinite()[..., None], 0)  # similar to nothing
    # products are divided by the lengths, not tokens: less to write
    inverse = norm.clamp_min(torch.finfo(both.dtype).tiny).reciprocal().nan_to_num_(0)
    length, scale = inverse[:, :m], inverse[:, None, m:]
    closed = offset = None
    if not free:
        closed = index < 0 if protected is None else (index < 0) | protected.gather(1, index.clamp_min(0))
        offset = inverse.new_zeros(b, k).masked_fill_(closed[:, m:], -torch.inf)[:, None]
    if penalty is not None:
        offset = -penalty.to(both.dtype)[:, None] if offset is None else offset - penalty.to(both.dtype)[:, None]
    matches = []
    for i in range(0, m, step := max(1, CHUNK // (b * k))):
        s = torch.bmm(a[:, i : i + step], t).mul_(scale)
        if offset is not None:
            s = s.mul_(length[:, i : i + step, None]).add_(offset)
        matches.append(_best(s))
    score, best = (torch.cat(parts, 1) if len(matches) > 1 else parts[0] for parts in zip(*matches, strict=True))
    if offset is None:
        return score * length, best
    score = score if closed is None else score.masked_fill(closed[:, :m], -torch.inf)
    return score, best.masked_fill_(score == -torch.inf, -1)


def _best(s: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of every row of ``[B, M, K]`` and the lowest place where it stands."""
    b, m, _ = s.shape
    blocks = s.view(b * m, -1, BLOCK)
    block = blocks.amax(-1).max(-1).indices
    score, place = blocks[torch.arange(b * m, device=s.device), block].max(-1)
    return score.view(b, m), (place + BLOCK * block).view(b, m)


def plain(
    x: Tensor, sources: Tensor, targets: Tensor, protected: Tensor | None, penalty: Tensor | None, padded: bool
) -> tuple[Tensor, Tensor]:
    u = torch.nn.functional.normalize(x, dim=-1)
    s = rows(u, sources) @ rows(u, targets).transpose(1, 2)
    if penalty is not None:
        s = s - penalty[:, None]
    return s.max(-1)


def example(case: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    b = 2
    x = tokens(b, n, 48, dtype, generator)
    sources, targets = torch.arange(0, n, 2), torch.arange(1, n, 2)  # ToMe's halves
    protected = penalty = None
    if case == "ranked":  # PiToMe's: every image has its own order, padded
        order = torch.rand(b, n, generator=generator).argsort(1)
        sources, targets = order[:, : n // 2].clone(), order[:, n // 2 :].clone()
        sources[1, -1:], targets[0, -1:] = -1, -1
    if case == "protected":
        protected = torch.rand(b, n, generator=generator) < 0.3
        protected[1] = True
    if case == "penalty":
        penalty = torch.rand(b, len(targets), generator=generator)
    if case == "ties":  # exact in any order of summation: rows of +-1
        x = torch.randint(2, (b, 1, 64), generator=generator).mul(2).sub(1).to(dtype).expand(-1, n, -1)
    if case == "strided":
        x = torch.stack([x, x + 1], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    return x, per_image(sources, b), per_image(targets, b), protected, penalty, sources.ndim > 1


def close(arguments: tuple, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Same scores; the chosen targets need the same score, computed here once more."""
    x, sources, targets, _, penalty, _ = arguments
    torch.testing.assert_close(got[0], want[0].to(got[0].dtype), atol=1e-5, rtol=0)
    assert torch.equal(got[1] >= 0, want[1] >= 0) and bool((got[1] < targets.shape[1]).all())
    if not targets.shape[1]:
        return
    u = unit(x.double())
    at = got[1].clamp_min(0)
    mine = (rows(u, sources) * rows(u, targets.gather(1, at))).sum(-1)
    if penalty is not None:
        mine = mine - wide(penalty).gather(1, at)
    torch.testing.assert_close(mine[got[1] >= 0], want[0][got[1] >= 0].double(), atol=1e-5, rtol=0)
    if bool((x == x[:, :1]).all()):  # ties
        assert torch.equal(got[1], want[1])


def work(arguments: tuple) -> tuple[int, int]:
    x, sources, targets = arguments[:3]
    b, m, k, c = len(x), sources.shape[1], targets.shape[1], x.shape[2]
    return b * ((m + k) * c * x.element_size() + m * 12), 2 * b * m * k * c


register(
    KernelInfo(
        name="match",
        source="arXiv 2210.09461, section 3",
        function=match,
        reference=reference,
        example=example,
        cases=("halves", "ranked", "protected", "penalty", "ties", "strided"),
        close=close,
        plain=plain,
        work=work,
    )
)
