"""What one prefill did, stage by stage: the only thing that a user gets back besides the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import shown


@dataclass(frozen=True)
class StageReport:
    """One stage of one prefill. Lists have one entry per sample of the batch.

    Attributes:
        site: ``"vision.3"``, ``"projector"``, ``"llm.8"``, ``"pixels"``.
        method: name of the method.
        tokens_in: visual tokens in front of the stage.
        tokens_out: visual tokens behind it.
        kept: ascending indices into the sample's visual tokens of the dense model (images in order, raster order within
            an image).
        assignment: of merging methods, for every visual token the position in ``kept`` of the slot that absorbed it; -1
            if it was dropped.
        scores: ``[n]`` float64 per sample, what the stage ranked its visual tokens by: higher stays, NaN for those it
            did not rank; ``None`` for stages that rank nothing.
        units: ``[n]`` int64 per sample: tokens with the same number shared one budget and were ranked against each
            other; -1 for those not ranked.
    """

    site: str
    method: str
    tokens_in: list[int]
    tokens_out: list[int]
    kept: list[Tensor]
    assignment: list[Tensor] | None = None
    scores: list[Tensor] | None = None
    units: list[Tensor] | None = None

    def __repr__(self) -> str:
        return f"<StageReport {shown.stage(self)}>"


@dataclass(frozen=True)
class Report:
    """What one prefill really did. Lists have one entry per sample of the batch.

    Attributes:
        visual_tokens: what the dense model would have given the language model (bare ViT: its patches).
        stages: in execution order.
        layer_tokens: visual tokens that each layer of the language model (bare ViT: each block) processed. A token that
            only gives a layer keys and values counts, as the text sees it.
        flops, dense_flops: tower, projector, prefill and what methods run of their own, two per multiply-add, attention
            counted in full.
        kv_bytes, dense_kv_bytes: of the key-value cache behind the prefill.
        recipe: its key.
        grids: the rasters (rows, columns) that a sample's visual tokens form, in order.
        skipped: the halves of layers that were left out, as ``"llm.5.attention"`` (of a bare ViT empty). One that some
            sample of the batch needs runs for all of them, and counts in ``flops`` and ``kv_bytes``.
        skipped_online: the MLPs that were left out of an answer by what its first tokens showed, as ``"llm.5.mlp"``, up
            to when the report is made.
        shelved_bytes: of what is kept for turns that choose again (``shelve=True``), answers included, when the report
            is made. Of such a turn ``flops`` and ``dense_flops`` are what it runs itself: the layers in front of the
            first cut over its new tokens, those behind over the conversation; the dense model over its new tokens.
    """

    visual_tokens: list[int]
    stages: tuple[StageReport, ...]
    layer_tokens: list[list[int]]
    flops: int
    dense_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    recipe: str = ""
    grids: list[list[tuple[int, int]]] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)
    shelved_bytes: int = 0
    skipped_online: list[list[str]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Report {self.recipe}: {shown.report(self)}; {shown.stages(self)}>"

    @property
    def effective_tokens(self) -> float:
        """Mean of ``layer_tokens`` over layers and samples."""
        flat = [n for row in self.layer_tokens for n in row]
        return sum(flat) / max(len(flat), 1)

    def show(self, image: Any = None, *, sample: int = 0, heat: bool = False, interactive: bool = False) -> None:
        """Draws what became of a sample's visual tokens: a picture per stage, in a notebook or else in Pillow's viewer.

        Args:
            image: a PIL picture as the model sees it, or one per raster (:func:`vtprune.show.pictures.views`); default:
                plain light grey.
            heat: patches are coloured by the ranks of their scores. interactive: the token theatre, layer by layer;
                notebooks only.

        Raises:
            VtpruneError: no such sample or no visual tokens in it, another number of pictures than rasters,
                ``interactive`` outside of a notebook, ``heat`` without scores.
        """
        from ..show.notebook import show

        show(self, image, sample=sample, heat=heat, interactive=interactive)

    def to_dict(self, *, scores: bool = False) -> dict[str, Any]:
        """JSON-safe form; index tensors become lists. ``scores``: with what every stage ranked by, ``null`` where it
        did not."""

        def ranking(s: StageReport) -> dict[str, Any]:
            known = (
                None
                if s.scores is None
                else [[x if math.isfinite(x) else None for x in row.tolist()] for row in s.scores]
            )
            return (
                {"scores": known, "units": None if s.units is None else [u.tolist() for u in s.units]} if scores else {}
            )

        return {
            "recipe": self.recipe,
            "visual_tokens": self.visual_tokens,
            "grids": [[list(grid) for grid in sample] for sample in self.grids],
            "stages": [
                {
                    "site": s.site,
                    "method": s.method,
                    "tokens_in": s.tokens_in,
                    "tokens_out": s.tokens_out,
                    "kept": [k.tolist() for k in s.kept],
                    "assignment": None if s.assignment is None else [a.tolist() for a in s.assignment],
                    **ranking(s),
                }
                for s in self.stages
            ],
            "layer_tokens": self.layer_tokens,
            "skipped": self.skipped,
            "skipped_online": self.skipped_online,
            "effective_tokens": self.effective_tokens,
            "flops": self.flops,
            "dense_flops": self.dense_flops,
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "shelved_bytes": self.shelved_bytes,
        }
