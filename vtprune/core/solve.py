"""The budget solver: turns a target of effective tokens or FLOPs into a schedule, so that methods can be compared at
equal cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vtprune.models.engine.layout import units

from ..methods.base import METHODS, OWN_BUDGETS
from . import cost
from .planning import applies_to, bind, check_options, for_rasters, for_units, load_recipe, plan
from .recipe import Recipe
from .types import Action, Cut, Geometry, UnsupportedError, VtpruneError


def _predict(geometry: Geometry, shapes: Any, recipe: Recipe, text: int, passes: int = 1) -> tuple[float, int]:
    """Effective tokens and FLOPs that the planned cuts give for one image (adaptive cuts count as the most that they
    leave), of which the tower makes its share in ``passes`` equal passes."""
    n = geometry.tokens
    tower: list[float] = []
    llm: list[float] = []
    through_llm: list[float] = []
    stages = plan(geometry, recipe)
    cuts = [c for *_, cs in stages for c in cs]
    pixels = [c for c in cuts if c.kind == "pixels"]
    patches = (pixels[0].keep or n) if pixels else n
    now, aside = float(patches), float(n)
    inside = any(c.inside for c in cuts)
    told = replace(geometry, vision_width=shapes.vd)
    work = {id(c): partial(method.work, cut=c, geometry=told) for _, method, own in stages for c in own}
    own_work = 0

    def outcome(c: Cut, now: float) -> float:
        if c.action is Action.RESTORE:
            return aside
        return now if c.bound is None else min(float(c.bound), now)

    for i in range(geometry.vision_layers):
        tower.append(now)
        for c in cuts:
            if c.site == f"vision.{i}":
                own_work += work[id(c)](round(now), text)
                now = outcome(c, now)
    through = now if geometry.fold == 1 else float(n)  # what is folded is folded from the whole raster
    if geometry.unmade:  # every patch that is left may keep the new-line token of its row
        now = sum(now * (1 - share) + n * share * min(1.0, width * now / n) for share, width in geometry.unmade) / len(
            geometry.unmade
        )
    for c in cuts:
        if c.kind == "projector":
            own_work += work[id(c)](round(now), text)
            now = outcome(c, now)
    for i in range(geometry.llm_layers):
        for c in cuts:
            if c.site == f"llm.{i}":
                aside = now if c.action is Action.STASH else aside
                own_work += work[id(c)](round(now), text)
                now = outcome(c, now)
        through_llm.append(now)
        llm.append(aside if any(c.action is Action.CONTEXT and c.site == f"llm.{i}" for c in cuts) else now)
    means = [c.mean for c in cuts if c.mean is not None]
    if means and min(means) * len(llm) < sum(through_llm):  # most FLOPs: all of it in the first layers
        top = max(through_llm)
        llm = through_llm = [min(max(min(means) * len(llm) - i * top, 1.0), top) for i in range(len(llm))]
    rows = llm or tower
    flops = passes * cost.vision(
        shapes, 1, round(patches / passes), [t / passes for t in tower], inside, through / passes
    )
    spared = sum(c.spared for c in cuts) * geometry.vision_layers
    flops -= round(spared * shapes.group * cost.tower_row(shapes)) if spared else 0
    if llm:
        flops += cost.prefill(shapes, [round(k) + text for k in through_llm], [round(k) + text for k in llm])
        for c in cuts:  # layers that are read ahead of their turn, by all tokens
            flops += sum(cost.decoder_layer(shapes, i, n + text) for i in range(c.layer, c.ahead or c.layer))
        for stage, _, own in stages:  # the side branches of routing stages
            if any(c.returns for c in own):
                split = next(c.layer for c in own if c.action is Action.STASH)
                own_layers = METHODS.get(stage.method).options.get("branch_layers", 0)
                flops += stage.options.get("branch_layers", own_layers) * cost.decoder_layer(
                    shapes, split, round(aside)
                )
    return sum(rows) / len(rows), int(flops + own_work)


def solve(
    model: Any,
    recipe: Any,
    *,
    effective_tokens: float | None = None,
    flops: float | None = None,
    inputs: dict[str, Any] | None = None,
    positions: str | None = None,
    seed: int = 0,
    per: str | None = None,
    **overrides: Any,
) -> Recipe:
    """A recipe like ``recipe`` whose last stage meets a budget as closely as whole tokens (or layers, for methods
    without ``keep``) allow, without passing it.

    A budget below what the method's default layers can reach moves its cuts to half their depth, again if need be;
    layers that the recipe states stay.

    Args:
        model: the model that will run it.
        recipe: name, path or :class:`Recipe`.
        effective_tokens: visual tokens averaged over language-model layers (bare ViT: blocks); a float in (0, 1] is a
            fraction of the dense model's (1.0 all of them, the integer 1 one token).
        flops: tower, projector and prefill of one image; a float in (0, 1] is a fraction of the dense model's.
        inputs: a prompt, for the number of text tokens that ``flops`` counts (default: 32) and, in families whose
            images vary in size, of visual ones.
        positions: as for :func:`attach`, which takes the recipe that comes out with the same ``positions``, ``seed``
            and ``per``.
        seed: as for :func:`attach`.
        per: as for :func:`attach`.
        **overrides: as for :func:`attach`.

    There the schedule keeps fractions, so that it serves other images too; without ``inputs`` budgets are fractions as
    well. A stage in the tower leaves the new-line tokens of rows that keep a patch: with ``inputs`` the most that can
    be of them; without, of the mean over the shapes that the model's configuration names, which a single image may
    pass.

    Raises:
        VtpruneError: not exactly one target, a method that leaves out layers or fuses text, or none of the schedules
            meets it (the smallest reachable budget is named, or why there is none).
    """
    if (effective_tokens is None) == (flops is None):
        raise VtpruneError("give exactly one of effective_tokens= and flops=")
    adapter, chosen = bind(model, per), load_recipe(recipe)
    check_options(adapter.geometry, positions=positions, seed=seed, per=per)
    chosen = chosen.override(**overrides) if overrides else chosen
    other = next((i for s in chosen.stages if (i := METHODS.get(s.method)).skips or i.fuses), None)
    if other is not None:
        # attach's own reasons come first
        plan(for_units(adapter.geometry, applies_to(adapter.geometry, chosen, per)), chosen)
        deed = "drops no token and leaves out halves of layers instead"
        if other.fuses:
            deed = "makes as many tokens of each image as its options say, and reads the text once more"
        raise VtpruneError(f"{other.name} {deed}: it meets no budget of tokens or FLOPs")
    if flops is not None and adapter.geometry.per[0] == "prompt":
        raise UnsupportedError(
            "flops= counts what a tower does for an image, and per='prompt' plans for whole prompts: give "
            "effective_tokens= or keep="
        )
    image = _image(adapter, chosen, inputs, per)
    if flops is None:
        target = _target(image, effective_tokens, 0, known=inputs is not None)
        return _search(image, chosen, target, 0)
    return _search(image, chosen, _target(image, flops, 1, known=inputs is not None), 1)


@dataclass(frozen=True)
class _Image:
    """What a schedule is planned for: one image in its prompt.

    Attributes:
        geometry: with the image's own number of tokens, where it is known.
        shapes: of the model.
        text: tokens of the prompt that are not visual.
        passes: of the tower.
    """

    geometry: Geometry
    shapes: Any
    text: int = 32
    passes: int = 1

    def predict(self, recipe: Recipe) -> tuple[float, int]:
        """Effective tokens and FLOPs of ``recipe``. Raises :class:`VtpruneError` where it cannot be planned."""
        return _predict(self.geometry, self.shapes, recipe, self.text, self.passes)

    def dense(self) -> tuple[float, int]:
        """The same without pruning."""
        g, each = self.geometry, self.geometry.tokens / self.passes
        tower = self.passes * cost.vision(self.shapes, 1, round(each), [each] * g.vision_depth)
        language = cost.prefill(self.shapes, [g.tokens + self.text] * g.llm_layers) if g.llm_layers else 0
        return float(g.tokens), tower + language


def _image(adapter: Any, recipe: Recipe, inputs: dict[str, Any] | None, per: str | None) -> _Image:
    """The first sample of ``inputs``; without any, a typical image."""
    per = applies_to(adapter.geometry, recipe, per)
    geometry = for_units(adapter.geometry, per)
    if inputs is None or not geometry.llm_layers:
        return _Image(geometry, adapter.cost)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    samples = adapter.parts(ids, inputs)
    visual = sum(len(p.columns) for p in samples[0])
    text = int(ids.shape[1] if mask is None else mask[0].sum()) - visual
    if not geometry.variable or not visual:
        return _Image(geometry, adapter.cost, text)
    passes = max(sum(len(p.passes) for p in samples[0]), 1)
    unmade = _unmade(adapter, recipe, inputs, samples)
    own = replace(geometry, tokens=visual, grid=(visual, 1), unmade=unmade)
    (unit, *others) = units(samples[:1], per)
    if unit.frames and not others:  # one video
        own = replace(for_rasters(geometry, unit.rasters, unit.frames), unmade=unmade)
    return _Image(own, adapter.cost, text, passes)


def _target(image: _Image, wanted: Any, column: int, *, known: bool) -> float:
    """The budget ``wanted`` as effective tokens (``column`` 0) or FLOPs (1); ``known``: an image was given. Raises
    :class:`VtpruneError` for what is no budget of it."""
    geometry = image.geometry
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted < 1e300:
        raise VtpruneError(f"the budget must be a positive number, got {wanted!r}")
    fraction = isinstance(wanted, float) and wanted <= 1
    if geometry.variable and geometry.llm_layers and not known and not fraction:
        what = "prompts" if "prompt" in geometry.traits else "images"
        raise VtpruneError(
            f"{what} of {geometry.family} vary in size: give a fraction of the dense budget, or solve(..., inputs=) "
            "with a prompt of yours"
        )
    if column == 0 and wanted > geometry.tokens:
        raise VtpruneError(
            f"effective_tokens={float(wanted):g} is above the {geometry.tokens} visual tokens of an image"
        )
    return float(wanted) * image.dense()[column] if fraction else float(wanted)


def _search(image: _Image, chosen: Recipe, target: float, column: int) -> Recipe:
    """The schedule that spends most of ``target`` without passing it. Raises :class:`VtpruneError` if none is small
    enough."""
    smallest, why, sound = float("inf"), VtpruneError(f"{chosen.name} has no schedule here"), chosen
    for start in _schedules(image.geometry, chosen):
        best: Recipe | None = None
        candidates = _candidates(image.geometry, start)
        low, high = 0, len(candidates) - 1
        # more tokens, or a later layer, cost more; a budget that cannot be planned is too small for its method
        while low <= high:
            middle = (low + high) // 2
            try:
                value = image.predict(candidates[middle])[column]
            except VtpruneError as e:
                low, why = middle + 1, e
                continue
            smallest, sound = min(smallest, value), candidates[middle]
            if value <= target * (1 + 1e-9):
                best, low = candidates[middle], middle + 1
            else:
                high = middle - 1
        if best is not None:
            return best
    if smallest == float("inf"):
        raise why
    what = "effective tokens" if column == 0 else "FLOPs"
    inside = any(c.kind in ("pixels", "vision") for *_, cuts in plan(image.geometry, sound) for c in cuts)
    lines = image.geometry.unmade and inside
    also = " (new-line tokens among them, which stay while their row has a patch)" if lines else ""
    raise VtpruneError(
        f"{chosen.name} cannot reach {target:.4g} {what} here; its smallest schedule has {smallest:.4g}{also}"
    )


def _unmade(adapter: Any, recipe: Recipe, inputs: dict[str, Any], samples: Any) -> tuple[tuple[float, float], ...]:
    """:attr:`Geometry.unmade` of the first sample; nothing for recipes without a stage in the tower."""
    if (
        not any({"pixels", "vision"} & set(METHODS.get(s.method).kinds) for s in recipe.stages)
        or not adapter.geometry.unmade
    ):
        return ()
    sources, lines, patches, at = adapter.sources(inputs, samples)[0], 0, 0.0, 0
    for part in samples[0]:
        mine = int((sources[at : (at := at + len(part.columns))] < 0).sum())
        bare = mine == len(part.columns)  # one that ends a whole image always stays
        lines, patches = lines + mine, patches + (math.inf if bare else len(part.columns) - mine if mine else 0)
    return ((lines / len(sources), patches / lines),) if lines else ()


def _schedules(geometry: Geometry, recipe: Recipe) -> list[Recipe]:
    """``recipe``, then the same with the last stage's cuts at 1/2, 1/4 ... of their depth if it has default layers in
    the language model."""
    last, info = recipe.stages[-1], METHODS.get(recipe.stages[-1].method)
    name = next((n for n in ("layers", "layer") if n in info.options), None)
    if not info.budgeted or name is None or name in last.options or geometry.llm_layers == 0:
        return [recipe]
    cuts = plan(
        geometry, replace(recipe, stages=(*recipe.stages[:-1], replace(last, keep=1, options=_free(last.options))))
    )[-1][2]
    # a cut that a budget of one token does not shorten only looks
    recipes, depths = [recipe], [c.layer for c in cuts if c.keep is None or c.keep < geometry.tokens]
    while all(c.kind == "llm" for c in cuts) and max(depths, default=0) > 0:
        depths = sorted({d // 2 for d in depths})
        options = {**_free(last.options), name: tuple(depths) if name == "layers" else depths[0]}
        recipes.append(replace(recipe, stages=(*recipe.stages[:-1], replace(last, options=options))))
    return recipes


def _free(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without those that would replace ``keep``."""
    return {k: v for k, v in options.items() if k not in OWN_BUDGETS}


def _candidates(geometry: Geometry, recipe: Recipe) -> list[Recipe]:
    last = recipe.stages[-1]
    info = METHODS.get(last.method)
    n = geometry.tokens
    if info.mean is not None:
        shares = (k / n for k in range(1, n + 1))
        stages = [replace(last, keep=None, options={**_free(last.options), info.mean: share}) for share in shares]
    elif info.budgeted:
        counts: list[int | float] = (
            [min((k + 1e-6) / n, 1.0) for k in range(1, n + 1)] if geometry.variable else list(range(1, n + 1))
        )
        stages = [replace(last, keep=k, options=_free(last.options)) for k in counts]
    elif info.count is not None:
        if last.options.get(info.count) is not None or last.options.get("weights") is not None:  # a fixed number
            return [recipe]
        stages = [replace(last, options={**last.options, info.count: k}) for k in range(1, n)]
    else:
        name = "layer" if "layer" in info.options else "split"
        if name not in info.options or last.options.get(name) is not None or not geometry.llm_layers:
            return [recipe]
        stages = [replace(last, options={**last.options, name: i}) for i in range(geometry.llm_layers)]
    return [replace(recipe, stages=(*recipe.stages[:-1], s)) for s in stages]
