"""HoliTom: "HoliTom: Holistic Token Merging for Fast Video Large Language Models" (arXiv 2505.21334, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..core.select import from_mask, marked, merged, placed, top
from ..core.types import Action, Geometry, Mix, Selection, TokenView
from ..kernels.base import wide
from ..kernels.density import nearest, prominence
from ._tower import class_attention, last_seen
from ._video import begins, framed, loose, scenes, shape, spread, summed, unit
from .base import Cut, Method, MethodInfo, layers, option, register


@register(
    MethodInfo(
        name="holitom",
        paper="arXiv 2505.21334",
        idea="merges what is static over the frames of a scene, clusters what is left; later the prompt prunes",
        kinds=("projector", "llm", "vision"),
        needs={"vision": frozenset({"projections"}), "llm": frozenset({"query_attention"})},
        keep=0.075,
        exact=False,
        merges=True,
        video=True,
        whole=True,
        score="class attention of the last block that is used; in the language model the last prompt token's",
        cases=({"keep": 0.5}, {"keep": 0.2, "clustered": 0.4, "threshold": 0.5}),
    )
)
@dataclass(frozen=True, kw_only=True)
class HoliTom(Method):
    """Section 3. Behind the projector a token is static in a scene if the cosine of its place stays above ``threshold``
    from frame to frame; the scenes are those that save most: they maximise ``sum (frames - 1) * static``, by dynamic
    programming over windows of at most ``window`` frames. Static tokens become their mean over the scene. With the
    budget's share rho of what that leaves, capped at 1, each scene's n static means are clustered (DPC-KNN) into
    ``round(rho n)``, one at least; of the n others of a frame ``ceil(rho n)`` stay: ``1 - clustered`` of them (rounded)
    by class attention, the rest as clusters of what is left. A cluster is ``beta`` times its centre plus the rest of
    the mean of its other members.

    In the language model ``keep`` tokens are left, by the last prompt token's attention; every other one is averaged
    into the most similar one that stays, one after the other: ``h <- (h + x) / 2``.

    ``keep`` counts what is left in the end (the paper's retain ratio is that behind the projector: ``first * keep``).
    A merged token stands in the first frame of its scene. Ties go to the earlier token (the official code adds noise of
    1e-6)."""

    first: float = option(2.0, "tokens behind the projector for each that is left in the end", least=1)
    threshold: float = option(0.8, "cosine above which a place is static (official: 0.65 at 10 %)", least=-1, most=1)
    window: int = option(1024, "frames of a scene at most", least=1)
    clustered: float = option(0.0, "share D of the tokens that are not static kept as clusters", least=0, most=1)
    neighbours: int = option(7, "nearest tokens that the density is of, the token itself among them", least=1)
    beta: float = option(0.6, "weight of a cluster's centre", least=0, most=1)
    layer: int | None = option(None, "first layer with keep tokens (default: 18 of 28, in proportion)", least=1)

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        assert keep is not None
        n, frames = geometry.tokens, max(geometry.frames, 1)
        (layer,) = layers("holitom", self.layer, geometry, (max(18 * geometry.llm_layers // 28, 1),))
        site, outer = f"vision.{last_seen('holitom', geometry)}", min(n, int(self.first * keep + 1e-9))
        most = min(n, max(outer, loose(geometry)) + 2 * frames)  # scenes and frames round up by less than one
        return (
            Cut(site=site, action=Action.NOTE),
            Cut(site="projector", keep=1, adaptive=True, most=most, data={"note": site, "outer": outer}),
            Cut(site=f"llm.{layer}", keep=keep, observe=(layer - 1,)),
        )

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return class_attention(view)

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        if cut.kind == "llm":
            return self._asked(view, cut)
        (f, p), n = shape(view), view.valid.shape[1]
        if cut.data["outer"] >= n:
            return None
        return self._scened(view, cut.data["note"], max(cut.data["outer"] - (n - f * p), 0) / (f * p))

    def _scened(self, view: TokenView, note: str, rho: float) -> Selection:
        """Scenes, what is static in them, clusters."""
        f, p = shape(view)
        x = wide(framed(view.features, view))  # [B, F, P, C]
        attention, way = framed(view.noted(note), view), unit(x)
        held = framed(view.protected, view)
        same = (way[:, 1:] * way[:, :-1]).sum(-1) > self.threshold  # [B, F - 1, P]
        same &= ~(held[:, 1:] | held[:, :-1])  # what must stay is merged with nothing
        starts = torch.from_numpy(np.stack([best_scenes(s, self.window) for s in same.cpu().numpy()])).to(x.device)
        scene, size = scenes(starts)
        changes = torch.nn.functional.pad((~same).long(), (0, 0, 1, 0)) * ~starts[..., None]  # within a scene
        static = (summed(changes, scene) == 0) & (size > 1)[..., None]  # [B, scenes, P]
        saved = ((size - 1).clamp_min(0) * static.sum(-1)).sum(1)  # [B]
        share = (rho * f * p / (f * p - saved).clamp_min(1).double()).clamp_max(1)[:, None]
        still = static.gather(1, scene[..., None].expand(-1, -1, p))  # [B, F, P]
        # each scene's static means
        means = summed(x, scene) / size.clamp_min(1)[..., None, None]
        some = static.sum(-1)
        count = torch.where(some > 0, (share * some).round().long().clamp_min(1), 0)
        centre = placed(prominence(means, static, self.neighbours), static) < count[..., None]
        centre &= static
        to = nearest(means, centre)
        # the others, frame by frame
        other = ~still
        total = torch.ceil(share * other.sum(-1) - 1e-9).long()
        ranked = (total.double() * (1 - self.clustered)).round().long().maximum(held.sum(-1))
        total = total.maximum(ranked)
        rank = placed(attention.masked_fill(held, torch.inf), other)
        salient = other & (rank < ranked[..., None])
        rest = other & ~salient
        middle = rest & (placed(prominence(x, rest, self.neighbours), rest) < (total - ranked)[..., None])
        into = nearest(x, middle)
        return self._joined(view, scene, size, still, centre, to, salient, rest, middle, into, attention)

    def _joined(
        self,
        view: TokenView,
        scene: Tensor,
        size: Tensor,
        still: Tensor,
        centre: Tensor,
        to: Tensor,
        salient: Tensor,
        rest: Tensor,
        middle: Tensor,
        into: Tensor,
        attention: Tensor,
    ) -> Selection:
        """The selection of what :meth:`_scened` has found: ``[B, scenes, P]`` the ``centre`` s of static means and
        where each goes ``to``, ``[B, F, P]`` which tokens are ``still``, ``salient``, neither (``rest``), the
        ``middle`` s of these clusters and where each goes ``into``."""
        f, p = shape(view)
        n, device = view.valid.shape[1], scene.device
        frame = torch.arange(f, device=device)[:, None]
        begin = begins(scene, size)[..., None]  # the first frame of each frame's scene
        central = centre.gather(1, scene[..., None].expand(-1, -1, p)) & still
        goes = torch.where(still, begin * p + to.gather(1, scene[..., None].expand(-1, -1, p)), frame * p + into)
        clustered = still | (rest & middle.any(-1, keepdim=True))
        kept = (central & (frame == begin)) | salient | middle
        own = frame * p + torch.arange(p, device=device)
        goes = torch.where(salient, own, torch.where(clustered, goes, -1))
        # how many members besides the centre, and how many frames each stands for
        heart = central | middle
        times = torch.where(still, size.gather(1, scene)[..., None], 1).double()
        slot = torch.where(clustered, goes, f * p).flatten(1)
        others = torch.zeros(len(slot), f * p + 1, dtype=torch.double, device=device)
        others.scatter_add_(1, slot, ((clustered & ~heart) / times).flatten(1))
        alone = others.gather(1, slot).view_as(times) < 0.5
        mine = torch.where(heart, torch.where(alone, times.new_ones(()), self.beta), 1 - self.beta)
        mass = torch.where(heart, 1.0, others.gather(1, slot).view_as(times))
        weight = torch.where(clustered, mine / mass.clamp_min(1e-9) / times, 1.0)
        flat, every = spread(kept, view, True), torch.arange(n, device=device).expand(len(kept), n)
        destination = torch.cat([goes.flatten(1), every[:, f * p :]], 1)
        chosen = merged(flat, destination)
        assert chosen.target is not None
        score = spread(attention.masked_fill(still, torch.nan), view, torch.nan)
        return replace(chosen, mix=Mix(every, chosen.target, spread(weight, view, 1.0)), score=score)

    def _asked(self, view: TokenView, cut: Cut) -> Selection | None:
        """``keep`` by the prompt; the others averaged into them."""
        score = view.source("query_attention", layer="previous")
        keep = torch.where(view.source("queried"), cut.keep or 0, view.counts)  # an unanswered sample stays whole
        chosen = top(score, keep, view.valid, view.protected)
        n, k = view.valid.shape[1], chosen.kept.shape[1]
        if not k:
            return chosen
        mask = marked(chosen.kept, n)
        every = torch.arange(n, device=mask.device).expand_as(mask)
        rest = from_mask(view.valid & ~mask).kept
        _, best = kernels.match(view.features, rest, chosen.kept)
        closest = every.new_full((len(every), n + 1), -1).scatter_(1, torch.where(rest >= 0, rest, n), best)[:, :n]
        column = torch.where(mask, mask.long().cumsum(1) - 1, closest)
        # h <- (h + x) / 2 in turn: the m-th of M members has the weight 2^(m - M - 1), the kept token 2^-M
        turn, members = _turns(torch.where(mask | (column < 0), k, column), k)
        left = members.gather(1, column.clamp_min(0))
        power = torch.where(mask, -left, turn - left - 1)
        weight = torch.pow(2.0, power.double())
        mix = Mix(every, column, weight)
        home = torch.where(column >= 0, chosen.kept.gather(1, column.clamp_min(0)), -1)
        return replace(merged(mask, home), mix=mix, score=score)


def _turns(slot: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """For each of the tokens that go to a ``slot`` ``[B, N]`` how many go there up to it, and how many in all, ``[B,
    slots + 1]``; the last slot is for those that go nowhere."""
    members = torch.zeros(len(slot), slots + 1, dtype=torch.long, device=slot.device)
    members.scatter_add_(1, slot, torch.ones_like(slot))
    order = slot.argsort(dim=1, stable=True)
    begin = (members.cumsum(1) - members).gather(1, slot.gather(1, order))
    turn = torch.arange(slot.shape[1], device=slot.device) - begin + 1
    members[:, -1] = 0
    return torch.empty_like(turn).scatter_(1, order, turn), members


def best_scenes(same: np.ndarray, window: int) -> np.ndarray:
    """``[F]`` bool, the frames that begin a scene, for ``same`` ``[F - 1, P]``: whether each place is alike in two
    neighbouring frames. They maximise the sum of ``(frames - 1) * places that are alike all through``; of equal ones
    the last scene is the longest."""
    f = len(same) + 1
    value = np.zeros(f + 1)  # of the first t frames
    origin = np.zeros(f + 1, dtype=int)
    run = np.zeros(same.shape[1], dtype=int)  # how many frames in front of this one each place has been alike
    for end in range(f):
        run = np.where(same[end - 1], run + 1, 0) if end else run
        starts = np.arange(max(0, end - window + 1), end + 1)
        static = (run[None] >= (end - starts)[:, None]).sum(1)  # alike since each start
        total = value[starts] + (end - starts) * static
        best = int(total.argmax())
        value[end + 1], origin[end + 1] = total[best], starts[best]
    begins, at = np.zeros(f, dtype=bool), f
    while at:
        at = origin[at]
        begins[at] = True
    return begins
