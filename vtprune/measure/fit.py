"""What a method needs fitted to a model before it runs, as a recipe: the layer of VTW (arXiv 2405.05803), the counts of
FitPrune (arXiv 2409.10197), the sub-layers of AdaSkip (arXiv 2501.02336), the routed layers of γ-MoD (arXiv
2410.13859)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..check.attach import attach
from ..core.planning import bind
from ..core.recipe import Recipe, Stage, resolve
from ..core.types import Geometry, UnsupportedError, VtpruneError
from ..inputs.chats import prepare
from ..methods.base import make
from .arank import aranks
from .samples import Sample
from .similarity import similarities

THRESHOLD = 0.003  # nats; ours
Progress = Callable[[int], object] | None


@dataclass(frozen=True)
class Fit:
    """A recipe, and how it was found.

    Attributes:
        recipe: as :func:`vtprune.attach` takes it.
        facts: JSON-safe: ``prompts``, their number; of VTW ``kl`` by layer and the ``threshold``; of FitPrune ``left``,
            the tokens in each layer, their mean ``effective_tokens`` and the ``threshold`` that was found; of AdaSkip
            ``mean``, ``similarity`` and ``ratio`` of each sub-layer, and those ``left_out``; of γ-MoD ``arank`` of each
            layer, and those ``routed``.
    """

    recipe: Recipe
    facts: dict[str, Any]


@torch.no_grad()
def withdrawal(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    threshold: float = THRESHOLD,
    batch: int = 16,
    progress: Progress = None,
) -> Fit:
    """VTW's K: the first layer from 1 on before which all visual tokens can leave while the next token's distribution
    moves, averaged over the prompts, by less than ``threshold`` (KL(full || withdrawn), nats). The criterion is the
    paper's; that the search ascends from layer 1 and the default threshold are ours.

    Args:
        batch: prompts per forward.
        progress: called with the number of prompts after each.

    Raises:
        VtpruneError: no prompts, no layer is below the threshold, or whatever ``attach`` refuses.
    """
    inputs, depth = _inputs(processor, samples, batch), _geometry(model).llm_layers
    dense = [_next(model, some) for some in _told(inputs, progress)]
    found: dict[int, float] = {}
    for layer in range(1, depth):
        with attach(model, "vtw", layer=layer):
            moved = [divergence(p, _next(model, some)) for p, some in zip(dense, _told(inputs, progress), strict=True)]
        found[layer] = float(torch.cat(moved).mean())
        if found[layer] < threshold:
            why = f"KL {found[layer]:.2g} below {threshold:g}"
            facts = {"prompts": len(samples), "threshold": threshold, "kl": found}
            return Fit(_recipe("vtw", {"layer": layer}, model, samples, why), facts)
    if not found:
        raise VtpruneError(f"{type(model).__name__} has one layer, in front of which nothing was read yet")
    least = min(found, key=lambda i: found[i])
    raise VtpruneError(
        f"no layer's withdrawal stays below {threshold:g}: the least, in front of layer {least}, moves the next "
        f"token's distribution by {found[least]:.3g}"
    )


def _next(model: Any, inputs: Any) -> Tensor:
    """Log-probabilities of the next token, ``[B, vocabulary]``."""
    logits = model(**inputs.to(model.device, model.dtype), logits_to_keep=1).logits[:, -1]
    return logits.double().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)`` of log-probabilities, ``[B]``; what p excludes counts nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


@torch.no_grad()
def removals(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    keep: int | float | None = None,
    effective_tokens: float | None = None,
    batch: int = 16,
    progress: Progress = None,
) -> Fit:
    """FitPrune's counts. Each layer loses as many of its least important tokens as it can while of the attention that
    image tokens receive - from one another, and from the text - no more than a share ``alpha`` goes with them; the
    smallest alpha, the same for all layers, that meets the budget is found by bisection. This is the paper's idea;
    ours are: every image's tokens are sorted by its own importance and the shares lost are averaged over images; all
    comes from the dense model's attention, and a layer never has more tokens than the one before it, at least one.

    Args:
        keep: tokens left at the end, or their fraction.
        effective_tokens: of an image, averaged over layers; a float in (0, 1] is a fraction of the dense model's.
        batch: prompts per forward.
        progress: called with the number of prompts after each, twice for every prompt.

    Raises:
        VtpruneError: no prompts, not exactly one budget or one that cannot be met, or whatever ``attach`` refuses.
    """
    geometry = _geometry(model)
    n, depth = geometry.tokens, geometry.llm_layers
    enough, last = _budget(geometry, keep, effective_tokens)
    lost = _lost(model, _inputs(processor, samples, batch), geometry, progress)  # [depth - 1, n + 1]

    def left(alpha: float) -> list[int]:
        removed = (lost <= alpha + 1e-9).sum(1) - 1
        return (n - removed).clamp_min(last).cummin(0).values.tolist()

    low, high = 0.0, 1.0
    if depth < 2 or not enough(left(high)):
        raise VtpruneError(f"no removal between the {depth} layers can meet this budget")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(left(middle)) else (middle, high)
    counts = [n, *left(high)]
    layers = [i for i in range(1, depth) if counts[i] < counts[i - 1]]
    if not layers:
        raise VtpruneError("this budget leaves every token where it is: there is nothing to fit")
    kept = [min((counts[i] + 1e-6) / n, 1.0) if geometry.variable else counts[i] for i in layers]
    mean = sum(counts) / depth
    facts = {"prompts": len(samples), "threshold": high, "left": counts, "effective_tokens": mean}
    why = f"{100 * high:.2g} % of the attention goes, {mean:.1f} of {n} tokens a layer"
    return Fit(_recipe("fitprune", {"layers": layers, "counts": kept}, model, samples, why), facts)


def _budget(
    geometry: Geometry, keep: int | float | None, effective_tokens: float | None
) -> tuple[Callable[[list[int]], bool], int]:
    """Whether the counts of layers 1 and later are few enough, and the fewest that a layer may have."""
    wanted = keep if keep is not None else effective_tokens
    if wanted is None or None not in (keep, effective_tokens):
        raise VtpruneError("give exactly one of keep= and effective_tokens=")
    n, depth = geometry.tokens, geometry.llm_layers
    if geometry.variable and not (isinstance(wanted, float) and wanted <= 1):
        raise VtpruneError(f"images of {geometry.family} vary in size: give a fraction")
    if keep is not None:
        last = resolve(keep, n)
        return lambda counts: counts[-1] <= last, last
    if isinstance(wanted, bool) or not 0 < wanted <= n:
        raise VtpruneError(f"effective_tokens={wanted!r} must be above 0 and at most the {n} visual tokens of an image")
    most = wanted * n if isinstance(wanted, float) and wanted <= 1 else float(wanted)
    return lambda counts: n + sum(counts) <= most * depth * (1 + 1e-9), 1


def _lost(model: Any, inputs: Sequence[Any], geometry: Geometry, progress: Progress) -> Tensor:
    """``[layers - 1, N + 1]``: the share of the attention that goes with the k least important tokens in each layer
    but the last, the larger of both kinds, averaged over images; of images of other sizes at the same fractions."""
    n, images = geometry.tokens, 0
    total = torch.zeros(geometry.llm_layers - 1, 2, n + 1, dtype=torch.float64)
    for some in inputs:
        both = [_received(model, some, geometry, by) for by in ("visual", "text")]
        for visual, text in zip(*both, strict=True):
            order = (visual * text).argsort(dim=1, stable=True)
            gone = torch.stack([visual.gather(1, order), text.gather(1, order)], 1).cumsum(2)
            gone = torch.nn.functional.pad(gone / gone[..., -1:].clamp_min(torch.finfo(gone.dtype).tiny), (1, 0))
            total += torch.nn.functional.interpolate(gone, size=n + 1, mode="linear", align_corners=True)
            images += 1
        if progress is not None:
            progress(2 * len(some["input_ids"]))
    if not images:
        raise VtpruneError("the prompts hold no image")
    return (total / images).amax(1)


def _received(model: Any, inputs: Any, geometry: Geometry, by: str) -> Iterator[Tensor]:
    """Of each image ``[layers - 1, tokens]``: what FitPrune ranks ``by`` in every layer but the last of a model that
    keeps all tokens."""
    options = {"layers": list(range(1, geometry.llm_layers)), "by": by}
    watch = Recipe(name="fitprune", stages=(Stage(method="fitprune", keep=1.0, options=options),))
    with attach(model, watch) as handle:
        model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
        stages = handle.report().stages
    scores = [s.scores for s in stages if s.scores is not None]
    for b, units in enumerate(stages[0].units or ()):
        mine = torch.stack([layer[b] for layer in scores])
        for unit in units.unique().tolist():
            yield mine[:, units == unit]


@torch.no_grad()
def left_out(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    sublayers: int = 8,
    online: int = 0,
    mean: str = "tokens",
    batch: int = 16,
    progress: Progress = None,
) -> Fit:
    """AdaSkip's sub-layers: :func:`similarities` over the prompts, of which the ``sublayers`` most similar are left
    out.

    Args:
        online: how many of an answer's first tokens the recipe watches, to leave more MLPs out behind them.
        mean: see :func:`similarities`.
        batch: prompts per forward.
        progress: called with the number of prompts after each.

    Raises:
        VtpruneError: no prompts, more sub-layers than there are, or whatever ``attach`` or :func:`similarities` refuse.
    """
    geometry = _geometry(model)
    asked = {"sublayers": sublayers, **({"online": online} if online else {})}
    make("adaskip", {"similarity": [0.0] * (2 * geometry.llm_layers), **asked}).plan(geometry, None)
    similarity, ratio = similarities(model, _told(_inputs(processor, samples, batch), progress), mean=mean)
    options = {"similarity": similarity, "ratio": ratio, **asked}
    cuts = make("adaskip", options).plan(geometry, None)
    names = [f"{cut.site}.{cut.half}" for cut in cuts if not cut.watch]
    facts = {"prompts": len(samples), "mean": mean, "similarity": similarity, "ratio": ratio, "left_out": names}
    why = f"means over {mean}, left out are {' '.join(names) or 'none'}"
    recipe = _recipe("adaskip", options, model, samples, why)
    attach(model, recipe).remove()  # refused here, not when it is used
    return Fit(recipe, facts)


def routed(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    layers: int | None = None,
    keep: int | float = 0.5,
    progress: Progress = None,
) -> Fit:
    """γ-MoD's layers: the ``layers`` of the lowest rank of their attention maps (:func:`aranks`), of equal ones the
    deeper first. The measure is the paper's; how many layers its threshold takes is not known to us: by default as many
    as the official code's preset routes, all but four.

    Args:
        keep: of the recipe, tokens of an image that run in each of them, or their share.
        progress: called with 1 after each prompt.

    Raises:
        VtpruneError: no prompts, more layers than there are, or whatever ``attach`` or :func:`aranks` refuse.
    """
    depth = _geometry(model).llm_layers
    count = max(1, depth - 4) if layers is None else layers
    if not 1 <= count <= depth:
        raise VtpruneError(f"layers={count}: route at least one of the {depth} layers, and at most all")
    inputs = (some.to(model.device, model.dtype) for some in _told(_inputs(processor, samples, 1), progress))
    found = aranks(model, inputs)
    chosen = sorted(sorted(range(depth), key=lambda i: (found[i], -i))[:count])
    why = f"the {count} layers of the lowest attention rank"
    recipe = _recipe("gamma-mod", {"layers": chosen}, model, samples, why, keep)
    attach(model, recipe).remove()  # refused here, not when it is used
    return Fit(recipe, {"prompts": len(samples), "arank": found, "routed": chosen})


def _geometry(model: Any) -> Geometry:
    geometry = bind(model).geometry
    if not geometry.llm_layers:
        raise UnsupportedError(f"{type(model).__name__} has no language model, in whose layers this is fitted")
    return geometry


def _inputs(processor: Any, samples: Sequence[Sample], batch: int) -> list[Any]:
    if not samples or batch < 1:
        raise VtpruneError(f"nothing to fit on: {len(samples)} prompts in batches of {batch}")
    parts = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    return [prepare(processor, [s.picture() for s in part], [s.question for s in part]) for part in parts]


def _told(inputs: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """``inputs``, each told to ``progress`` when the next is asked for."""
    for some in inputs:
        yield some
        if progress is not None:
            progress(len(some["input_ids"]))


def _recipe(
    method: str,
    options: dict[str, Any],
    model: Any,
    samples: Sequence[Sample],
    why: str,
    keep: int | float | None = None,
) -> Recipe:
    source = f"vtprune fit {method}: {type(model).__name__}, {len(samples)} prompts, {why}"
    return Recipe(name=f"{method} (fitted)", stages=(Stage(method=method, keep=keep, options=options),), source=source)
