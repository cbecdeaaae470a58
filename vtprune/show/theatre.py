"""The token theatre: what happened to every visual token, layer by layer, as drawing data and as one self-contained
interactive page.

:func:`scene` turns a report into numbers, :func:`element` those into an HTML element, :func:`head` is what a page needs
once for such elements to live.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..core.types import VtpruneError
from . import token_states, web

if TYPE_CHECKING:
    from ..core.report import Report, StageReport

KEPT, MERGED, DROPPED, BACK, GONE = range(5)  # what a stage did to a token; the same numbers in theatre.js
LARGEST = 672  # pixels, longer side of a picture
FULL = 8  # so many pictures of a scene are stored in that size; more get as many pixels together


def scene(report: Report, views: Sequence[Image.Image] = (), *, sample: int = 0, title: str = "") -> dict[str, Any]:
    """The drawing data of one sample, JSON-safe; ``n`` original visual tokens, all indices are theirs (raster after
    raster, row by row).

    Args:
        views: one picture per raster (:func:`vtprune.show.pictures.views`); none: plain light grey.

    Returns:
        ``title`` · ``tokens`` n · ``rasters``: ``rows``, ``columns``, ``start`` (its first token), ``label``,
        ``picture`` (a data URL), ``film`` (the number of the video that it is a frame of, or ``None``) · ``states`` one
        more than stages, each ``[n]``: the token that stands for each token (itself, the one it was merged into, -1:
        gone), first before all stages, then behind each · ``steps`` in order: ``site`` (``"image"``, the sites of tower
        and projector, every ``"llm.<i>"``), ``label``, ``state`` (index into ``states``: what a language-model layer
        processes), ``stages`` (the numbers of those that acted here), ``tokens`` present · ``stages``: ``site``,
        ``method``, ``tokens_in``, ``tokens_out``, ``kept``, ``outcome`` ``[n]`` (0 kept, 1 merged into the token of the
        state behind, 2 dropped, 3 came back, 4 was gone), ``scores`` ``[n]`` with four digits or ``None``, ``rank``
        ``[n]`` (1 is best, 0 not ranked), ``unit`` ``[n]`` and ``units``, how many were ranked and kept in each. The
        last four are ``None`` for a stage without scores.

    Raises:
        VtpruneError: no such sample, a sample without visual tokens, or another number of views than rasters.
    """
    if not 0 <= sample < len(report.visual_tokens):
        raise VtpruneError(f"the report has {len(report.visual_tokens)} samples, there is no sample {sample}")
    grids = report.grids[sample]
    if not grids:
        raise VtpruneError(f"sample {sample} has no visual tokens")
    if views and len(views) != len(grids):
        raise VtpruneError(
            f"sample {sample} has {len(grids)} rasters, but there are {len(views)} pictures; give one for each"
        )
    bounds = token_states.starts(report, sample)
    states = [np.arange(bounds[-1]), *token_states.owners(report, sample)]
    rasters = []
    for i, (rows, columns) in enumerate(grids):
        label = views[i].info.get("label") if views else None
        default = "image" if len(grids) == 1 else f"raster {i + 1} of {len(grids)}"
        rasters.append(
            {
                "rows": rows,
                "columns": columns,
                "start": bounds[i],
                "label": label or default,
                "picture": _picture(views[i], len(views)) if views else None,
                "film": views[i].info.get("film") if views else None,
            }
        )
    return {
        "title": title,
        "tokens": bounds[-1],
        "rasters": rasters,
        "states": [s.tolist() for s in states],
        "steps": _steps(report, sample, states),
        "stages": [
            _stage(stage, sample, before, after)
            for stage, before, after in zip(report.stages, states, states[1:], strict=False)
        ],
    }


def dense(report: Report) -> Report:
    """The report of the same prompt without any stage: every layer sees every token. No second run of the model."""
    layers = [[n] * len(row) for n, row in zip(report.visual_tokens, report.layer_tokens, strict=True)]
    return replace(
        report, stages=(), layer_tokens=layers, flops=report.dense_flops, kv_bytes=report.dense_kv_bytes, recipe=""
    )


def present(scene: Mapping[str, Any], step: int) -> list[int]:
    """Ascending: the tokens that are there at ``scene["steps"][step]``; a token is there when it stands for itself."""
    return [i for i, owner in enumerate(scene["states"][scene["steps"][step]["state"]]) if owner == i]


def history(scene: Mapping[str, Any], token: int) -> list[str]:
    """When and why original token ``token`` went, one line per stage: ``"llm.3 fastv: rank 97 of 144, score 0.0012, 36
    kept: dropped"``; of a merged token the rank and score of the token that stands for it, and its frame if that is
    another one: ``"merged into token 5 (frame 1 of 4)"``.

    Raises :class:`VtpruneError` if there is no such token.
    """
    if not 0 <= token < scene["tokens"]:
        raise VtpruneError(f"there are {scene['tokens']} tokens, there is no token {token}")
    out = []
    for i, stage in enumerate(scene["stages"]):
        before, after = scene["states"][i][token], scene["states"][i + 1][token]
        who = before if before >= 0 else token  # a merged token goes the way of the one that it was merged into
        if stage["rank"] is not None and stage["rank"][who]:
            ranked, kept = stage["units"][stage["unit"][who]]
            other = "" if who == token else f"{_named(scene, who, token)} has "
            why = f"{other}rank {stage['rank'][who]} of {ranked}, score {stage['scores'][who]}, {kept} kept"
        else:
            why = f"{stage['tokens_in']} to {stage['tokens_out']} tokens"
        end = {
            KEPT: "kept",
            MERGED: f"{'still part of' if before == after else 'merged into'} {_named(scene, after, token)}",
            DROPPED: "dropped" if before == token else f"dropped with {_named(scene, before, token)}",
            BACK: "came back",
            GONE: "was already gone",
        }[stage["outcome"][token]]
        out.append(f"{stage['site']} {stage['method']}: {why}: {end}")
    return out or ["no stage: every layer sees this token"]


def _named(scene: Mapping[str, Any], token: int, seen_from: int) -> str:
    """``token``, and where it is if that is another raster than that of ``seen_from``."""

    def raster(number: int) -> Mapping[str, Any]:
        return next(r for r in reversed(scene["rasters"]) if number >= r["start"]) if number >= 0 else {}

    here = raster(token)
    return f"token {token}" + (f" ({here['label']})" if here and here is not raster(seen_from) else "")


def _picture(view: Image.Image, of: int) -> str:
    """As a JPEG: photographs as PNG would make pages of several megabytes. Of many in one scene smaller ones."""
    small = view.convert("RGB")
    side = round(LARGEST * min(1, FULL / of) ** 0.5)
    small.thumbnail((side, side))
    how: dict[str, Any] = {"quality": 92, "subsampling": 0} if of <= FULL else {"quality": 85}
    return web.data_url(small, "JPEG", **how)


def _steps(report: Report, sample: int, states: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    # a bare tower has no cache
    layered = any(s.site.startswith("llm.") for s in report.stages) or report.dense_kv_bytes > 0
    depth = len(report.layer_tokens[sample]) if layered else 0
    sites = list(dict.fromkeys(s.site for s in report.stages if not s.site.startswith("llm.")))
    out: list[dict[str, Any]] = []
    state = 0
    for site in ["image", *sites, *(f"llm.{i}" for i in range(depth))]:
        acted = [i for i, s in enumerate(report.stages) if s.site == site]
        state = acted[-1] + 1 if acted else state
        tokens = int((states[state] == np.arange(len(states[state]))).sum())
        out.append({"site": site, "label": _label(site), "state": state, "stages": acted, "tokens": tokens})
    return out


def _label(site: str) -> str:
    kind, _, number = site.partition(".")
    words = {
        "image": "the whole image",
        "pixels": "pixels",
        "projector": "projector",
        "vision": f"vision block {number}",
        "llm": f"layer {number}",
    }
    return words[kind]


def _stage(stage: StageReport, sample: int, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    itself = after == np.arange(len(after))
    outcome = np.select(
        [(before < 0) & (after < 0), before < 0, after < 0, itself], [GONE, BACK, DROPPED, KEPT], MERGED
    )
    kept = stage.kept[sample].tolist()
    out: dict[str, Any] = {
        "site": stage.site,
        "method": stage.method,
        "tokens_in": stage.tokens_in[sample],
        "tokens_out": stage.tokens_out[sample],
        "kept": kept,
        "outcome": outcome.tolist(),
        "scores": None,
        "rank": None,
        "unit": None,
        "units": None,
    }
    ranks = token_states.ranks(stage, sample)
    if ranks is None or stage.scores is None or stage.units is None:
        return out
    rank, _ = ranks
    units = stage.units[sample].cpu().numpy()
    numbers, unit = np.unique(np.where(rank > 0, units, -1), return_inverse=True)
    unit = unit - int((numbers < 0).any())  # -1: not ranked
    held = np.isin(np.arange(len(rank)), kept)
    out |= {
        "scores": [_rounded(s) if r else None for s, r in zip(stage.scores[sample].tolist(), rank, strict=True)],
        "rank": rank.tolist(),
        "unit": unit.tolist(),
        "units": [[int((unit == u).sum()), int(held[unit == u].sum())] for u in range(int(unit.max(initial=-1)) + 1)],
    }
    return out


def _rounded(score: float) -> float | str:
    """Four significant digits; JSON has no infinities."""
    return float(f"{score:.4g}") if np.isfinite(score) else str(score)


# -------------------------------------------------------------------------------------------------------------------
# HTML


def head() -> str:
    """Style and script that :func:`element` needs, once per page, for its head."""
    return f"<style>\n{web.source('theatre.css')}</style>\n<script>\n{web.source('theatre.js')}</script>\n"


def element(scenes: Sequence[Mapping[str, Any]]) -> str:
    """``<vt-theatre>`` with :func:`scene` data, side by side under one slider over all their steps; works wherever
    :func:`head` has been included, also when it is inserted through ``innerHTML``.

    Raises :class:`VtpruneError` if there are no scenes.
    """
    if not scenes:
        raise VtpruneError("a theatre needs at least one scene")
    # scenes mostly show the same ones
    pictures = list(dict.fromkeys(r["picture"] for s in scenes for r in s["rasters"] if r["picture"]))
    slim = [
        {
            **s,
            "rasters": [{**r, "picture": pictures.index(r["picture"]) if r["picture"] else None} for r in s["rasters"]],
            # most layers of a method that works in every layer change nothing
            "states": [a if i == 0 or a != s["states"][i - 1] else None for i, a in enumerate(s["states"])],
        }
        for s in scenes
    ]
    data = json.dumps({"pictures": pictures, "scenes": slim}, separators=(",", ":"), allow_nan=False)
    return f"<vt-theatre data-scenes='{html.escape(data, quote=False).replace(chr(39), '&#39;')}'></vt-theatre>"


def page(scenes: Sequence[Mapping[str, Any]], title: str = "vtprune", facts: str = "") -> str:
    """A complete HTML page that needs nothing from elsewhere: ``title``, the theatre, and ``facts`` below it."""
    body = f"<h1>{html.escape(title)}</h1>\n{element(scenes)}\n<footer>{html.escape(facts)}</footer>"
    css = web.style_sheet("web.css") + "\n" + web.source("theatre.css")
    return web.document(title, css, f"<script>\n{web.source('theatre.js')}</script>\n{body}")
