"""CDPruner: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv
2506.10967, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..core import resources
from ..core.types import Action, Geometry, Selection, Text, TokenView, UnsupportedError, VtpruneError
from ._turns import SCORE, chosen
from .base import Cut, Method, MethodInfo, option, register

LEAST = 1e-6  # added to the relevance above the least relevant token's (official code)


@register(
    MethodInfo(
        name="cdpruner",
        paper="arXiv 2506.10967",
        idea="keeps the tokens that are most diverse and most relevant to the question, by a determinantal process",
        kinds=("projector", "vision"),
        needs={"projector": frozenset({"text"})},
        keep=64 / 576,
        score=SCORE,
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class CDPruner(Method):
    """Section 3: greedy MAP of the process ``L_ij = r_i cos(f_i, f_j) r_j`` over projected tokens f. Relevance r is
    their cosine with the mean of the question's input embeddings, scaled to 0..1 over the tokens of what one budget
    applies to, which is one pool (the official code scales over the batch, and shares the budget out evenly among
    crops).

    With ``clip=`` it is the cosine between CLIP's embeddings of each patch, taken from the tower's states, and of the
    question, mean over the segments into which long ones are cut. The question is the prompt's text behind the image,
    up to the answer; without one every token is as relevant. Tokens that the tower did not make are as relevant as its
    least."""

    text: str = option(
        "after",
        "the question: text 'after' the last visual token of what the budget applies to, or 'all' of the prompt",
        choices=("after", "all"),
    )
    clip: str | None = option(
        None, "folder of the whole CLIP model that the vision tower was taken from: relevance by CLIP's embeddings"
    )
    tokenizer: str | None = option(
        None, "with clip=: folder of the language model's tokenizer, which reads the question"
    )
    sign: str = option(
        "paper",
        "with clip=: relevance is the cosine ('paper'), or minus it ('official' code; its authors call this specific "
        "to CLIP)",
        choices=("paper", "official"),
    )

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        if "projector" not in geometry.provides:
            raise UnsupportedError(
                f"cdpruner works at projector; this model ({geometry.family}, {geometry.arch}) offers "
                f"{' / '.join(geometry.provides)}"
            )
        if self.clip is None:
            for name, given in (("tokenizer", self.tokenizer is not None), ("sign", self.sign != "paper")):
                if given:
                    raise VtpruneError(f"cdpruner: {name}= says how to read CLIP's embeddings; give clip= too")
            return (Cut(site="projector", keep=keep),)
        if self.tokenizer is None:
            raise VtpruneError("cdpruner: clip= needs the question's words; give tokenizer= too")
        if geometry.arch != "clip" or not geometry.seen_layers:
            raise UnsupportedError(
                f"cdpruner: clip= looks at the states of a CLIP tower, which {geometry.family} ({geometry.arch}) does "
                "not show; leave it out"
            )
        self._clip()  # what is wrong with the folders is said at once
        self._words()
        seen = f"vision.{geometry.seen_layers - 1}"
        return (Cut(site=seen, action=Action.NOTE), Cut(site="projector", keep=keep, data={"seen": seen}))

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        return self._clip().image(view.features)

    def select(self, view: TokenView, cut: Cut) -> Selection:
        text: Text = view.source("text")
        asking = text.after if self.text == "after" else text.valid
        if self.clip is None:
            hidden = text.hidden.to(torch.promote_types(text.hidden.dtype, torch.float32))
            towards = hidden.masked_fill(~asking[..., None], 0).sum(1)  # [B, C], the direction of the mean
            relevance, made = cosines(view.features, towards), view.valid
        else:
            patches = view.noted(cut.data["seen"])  # [B, N, d]
            made = view.valid & ~patches.isnan().any(-1)
            relevance = self._by_clip(patches, text, asking)
        weight = scaled(relevance, made)
        return chosen(view, kernels.dpp(view.features, cut.keep or 0, relevance=weight, valid=view.valid))

    def _by_clip(self, patches: Tensor, text: Text, asking: Tensor) -> Tensor:
        """``[B, N]``: the mean over the question's segments of each patch's cosine with them."""
        clip, words = self._clip(), self._words()
        assert text.ids is not None
        questions = [words(ids[mine].tolist()) for ids, mine in zip(text.ids, asking, strict=True)]
        known = {q: self._direction(clip.text(q, patches.device)) for q in dict.fromkeys(questions) if q.strip()}
        nothing = patches.new_zeros(patches.shape[-1], dtype=torch.float32)
        towards = torch.stack([known.get(q, nothing) for q in questions])  # [B, d]
        similar = cosines(patches, towards) * towards.norm(dim=-1, keepdim=True)
        return similar if self.sign == "paper" else -similar

    @staticmethod
    def _direction(segments: Tensor) -> Tensor:
        """``[d]``, the mean of the segments' ``[M, d]`` directions: a cosine with it, times its length, is the mean of
        the cosines."""
        return torch.nn.functional.normalize(segments, dim=-1).mean(0)

    def _clip(self) -> resources.Clip:
        assert self.clip is not None
        return resources.clip("clip", self.clip)

    def _words(self) -> resources.Words:
        assert self.tokenizer is not None
        return resources.words("tokenizer", self.tokenizer)


def cosines(x: Tensor, towards: Tensor) -> Tensor:
    """``[B, N]``: the cosine of every row of ``x`` ``[B, N, C]`` with ``towards`` ``[B, C]``; 0 where one of the two is
    zero or not finite."""
    n = torch.arange(x.shape[1] + 1, device=x.device)
    both = torch.cat([x.to(torch.promote_types(x.dtype, towards.dtype)), towards[:, None]], 1)
    return kernels.match(both, n[:-1], n[-1:])[0]


def scaled(relevance: Tensor, made: Tensor) -> Tensor:
    """``relevance`` ``[B, N]`` from just above 0 to 1 over the tokens ``made`` ``[B, N]``; the others have the least.
    Only ratios matter: where all are equal, all are 1."""
    low = relevance.masked_fill(~made, torch.inf).amin(1, keepdim=True)
    high = relevance.masked_fill(~made, -torch.inf).amax(1, keepdim=True)
    above = torch.where(made, relevance - low, 0)
    return (above + LEAST) / (high - low).clamp_min(LEAST)
