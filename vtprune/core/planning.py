"""From a recipe to cuts: which adapter takes a model, what each stage's budget comes to, what can follow what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.models.base import ADAPTERS

from ..methods.base import Cut, Method, make
from .recipe import Recipe, Stage, resolve
from .recipes import RECIPES
from .types import Geometry, UnsupportedError, VtpruneError
from .wrappers import check_model

if TYPE_CHECKING:
    from torch import nn

_ORDER = {"pixels": 0, "vision": 1, "projector": 2, "llm": 3}

ATTACH_OPTIONS = ("positions", "seed", "per")

TARGETS = ("effective_tokens", "flops")  # budgets that the solver turns into a schedule


def bind(model: nn.Module) -> Any:
    """The adapter for ``model``: of those that match it the one of the highest priority.

    Raises:
        UnsupportedError: none matches (the families there are, are named), or two of the same priority do.
    """
    check_model(model)
    matching = [info for _, info in ADAPTERS.items() if info.matches(model)]
    highest = max((info.priority for info in matching), default=0)
    best = [info for info in matching if info.priority == highest]
    if len(best) > 1:
        raise UnsupportedError(
            f"{len(best)} adapters take a {type(model).__name__} with priority {highest}: "
            f"{', '.join(info.name for info in best)}; one of them needs a higher one"
        )
    if best:
        return best[0].bind(model)
    hint = "; pass the whole model, ...ForConditionalGeneration" if type(model).__name__.endswith("Model") else ""
    raise UnsupportedError(
        f"no adapter takes a {type(model).__name__}; there are {', '.join(ADAPTERS)} ('vtprune adapters' says "
        f"more){hint}"
    )


def load_recipe(recipe: str | os.PathLike | Recipe) -> Recipe:
    """A registered name, a path to a JSON / YAML file, or a recipe as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | os.PathLike):
        raise VtpruneError(f"a recipe is a registered name, a path or a vtprune.Recipe, not {recipe!r}")
    text = os.fspath(recipe)
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        return Recipe.load(text)
    return RECIPES.get(text)


def for_units(geometry: Geometry, per: str | None) -> Geometry:
    """``geometry`` as budgets see it: where several rasters may share one, the size of none of them bounds it."""
    several = per in ("sample", "video") or ((per or geometry.per[0]) == "image" and "tile" in geometry.per)
    return replace(geometry, variable=True) if several else geometry


Planned = tuple[Stage, Method, tuple[Cut, ...]]


def plan(geometry: Geometry, recipe: Recipe) -> list[Planned]:
    """Every stage with its method and cuts, in execution order. Raises for unknown options, impossible budgets, needs
    that the model does not meet and stages that cannot follow each other."""
    out = []
    for stage in recipe.stages:
        method = make(stage.method, stage.options)
        info = method.info
        kinds = [k for k in info.kinds if k in geometry.provides]
        if not kinds:
            why = "".join(f" ({k}: {geometry.refuses[k]})" for k in info.kinds if k in geometry.refuses)
            raise UnsupportedError(
                f"{info.name} works at {' / '.join(info.kinds)}; this model ({geometry.family}, {geometry.arch}) "
                f"offers {' / '.join(geometry.provides)}{why}"
            )
        if info.raster and not geometry.raster:
            raise UnsupportedError(
                f"{info.name} works on the image plane, which is not known of this model ({geometry.family}, "
                f"{geometry.arch})"
            )
        if not info.budgeted and stage.keep is not None:
            raise VtpruneError(f"{info.name} takes no keep= (its options: {', '.join(info.options) or 'none'})")
        cuts = method.plan(geometry, budget(geometry, stage, method))
        for cut in cuts:
            if cut.kind not in info.kinds:
                raise UnsupportedError(f"{info.name} works at {' / '.join(info.kinds)}, not at {cut.site}")
            missing = (
                info.needs.get(cut.kind, frozenset()) - geometry.provides.get(cut.kind, frozenset()) - geometry.traits
            )
            if cut.kind not in geometry.provides or missing:
                lacks = ", ".join(sorted(missing)) or f"{cut.kind} sites"
                why = "".join(f" ({geometry.refuses[n]})" for n in sorted(missing) if n in geometry.refuses)
                raise UnsupportedError(
                    f"{info.name} needs {lacks}, which {geometry.family} ({geometry.arch}) does not provide{why}"
                )
        out.append((stage, method, cuts))
    flat = [(_ORDER[c.kind], c.layer) for *_, cuts in out for c in cuts]
    starts = [(_ORDER[cuts[0].kind], cuts[0].layer) for *_, cuts in out if cuts]
    if starts != sorted(starts):
        raise VtpruneError(
            f"recipe {recipe.name!r}: stages must be listed in execution order (pixels, vision, projector, llm; then "
            "by layer)"
        )
    if any(a[0] == b[0] == 0 for a, b in zip(flat, flat[1:], strict=False)):
        raise VtpruneError(f"recipe {recipe.name!r} resizes the pixels twice")
    compose(geometry, out)
    return out


def compose(geometry: Geometry, stages: Sequence[Planned]) -> list[str]:
    """Follows the tokens of an image through all cuts. Answers with a sentence for every stage that changes nothing;
    raises :class:`VtpruneError` for stages that cannot follow each other: one that finds no tokens, needs the whole
    raster, equal counts or the attention in front of its cut behind a stage that leaves none of these, remembers tokens
    that are merged meanwhile, or cuts while others are put aside."""

    def when(
        at: tuple[int, int],
    ) -> tuple[
        int, int, bool
    ]:  # within a block what is inside comes first, within a decoder layer what is context last
        cut = stages[at[0]][2][at[1]]
        return _ORDER[cut.kind], cut.layer, cut.context or (cut.kind == "vision" and not cut.inside)

    order = sorted(((s, i) for s, (*_, cuts) in enumerate(stages) for i in range(len(cuts))), key=when)
    first, last = {s: n for n, (s, _) in reversed(list(enumerate(order)))}, {s: n for n, (s, _) in enumerate(order)}
    names = [method.info.name for _, method, _ in stages]
    most = least = full = geometry.tokens  # an image has so many when a cut decides
    reducer, merger, aside, idle = "", -1, 0, dict.fromkeys(first, 0)
    ints = (
        False  # budgets of whole tokens in the tower: one of its passes need not be what a budget behind it applies to
    )
    for n, (s, i) in enumerate(order):
        stage, method, cuts = stages[s]
        cut, info = cuts[i], method.info
        if cut.kind in ("projector", "llm") and ints and geometry.variable:
            most, ints = full, False
        busy = next((t for t in first if t != s and stages[t][1].info.routes and first[t] < n <= last[t]), None)
        if busy is not None:
            where = "in front of all its sites or behind them"
            raise VtpruneError(
                f"{info.name} cuts at {cut.site}, where {names[busy]} has put the visual tokens aside: place it {where}"
            )
        if most == 0 and n == first[s]:
            raise VtpruneError(f"{info.name} at {cut.site} finds no visual tokens: {reducer} has taken them all")
        if info.whole and reducer:
            raise VtpruneError(
                f"{info.name} needs the whole raster; it cannot follow {reducer}, which drops or merges tokens"
            )
        if info.even and least < most:
            raise VtpruneError(
                f"{info.name} needs the same number of tokens in every image; {reducer} keeps different numbers in "
                f"front of {cut.site}"
            )
        if info.carries and first[s] < merger < n and order[merger][0] != s:
            raise VtpruneError(
                f"{info.name} averages each token's score over the blocks, which {names[order[merger][0]]} in between "
                "would merge"
            )
        looks = cut.observe or "projections" in info.needs.get(cut.kind, ())
        if looks and n and stages[order[n - 1][0]][2][order[n - 1][1]].site == cut.site:
            raise VtpruneError(
                f"{names[order[n - 1][0]]} and {info.name} both cut at {cut.site}; the second cannot use attention "
                "from before the first: move one"
            )
        before = most
        if cut.restore or cut.context:
            most = least = aside
            continue
        if cut.stash:
            aside = most
        if cut.keep is None:
            continue
        least = min(least, cut.keep)
        most = most if cut.adaptive else min(most, cut.keep)
        idle[s] += cut.keep >= before
        wanted = info.keep if stage.keep is None else stage.keep
        ints |= cut.kind in ("pixels", "vision") and isinstance(wanted, int)
        if not (isinstance(wanted, float) and wanted == 1 if geometry.variable else cut.keep >= full):
            reducer = info.name
            merger = n if info.merges else merger
    return [
        _idle(geometry, stages, s)
        for s, count in idle.items()
        if count == len(stages[s][2]) and _wants(geometry, stages[s])
    ]


def _wants(geometry: Geometry, planned: Planned) -> bool:
    """Whether a stage's budget is less than everything."""
    stage, method, cuts = planned
    wanted = method.info.keep if stage.keep is None else stage.keep
    if geometry.variable:  # tokens of one image, of which there may be more or larger ones: only fractions compare
        return isinstance(wanted, float) and wanted < 1
    return any(c.keep is not None and c.keep < geometry.tokens for c in cuts)


def _idle(geometry: Geometry, stages: Sequence[Planned], s: int) -> str:
    stage, method, cuts = stages[s]
    keep = cuts[-1].keep
    return (
        f"{method.info.name} changes nothing: its budget is {keep} of an image's {geometry.tokens} visual tokens, and "
        "no more than that are left in front of it"
        " (a fraction keep= counts from the original tokens)"
    )


def budget(geometry: Geometry, stage: Stage, method: Method) -> int | None:
    """Tokens that ``stage`` keeps of a unit of ``geometry.tokens``; a unit that has fewer than asked for keeps all it
    has where sizes vary."""
    wanted = method.info.keep if stage.keep is None else stage.keep
    if wanted is None or not method.info.budgeted:
        return None
    if geometry.variable and isinstance(wanted, int) and not isinstance(wanted, bool):
        if wanted < 1:
            raise VtpruneError(f"keep={wanted}: keep at least one token, or a fraction in (0, 1]")
        wanted = min(wanted, geometry.tokens)
    return resolve(wanted, geometry.tokens)


def check_seed(seed: Any) -> None:
    """Raises :class:`VtpruneError` for anything but a whole number from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise VtpruneError(f"seed={seed!r} is not a whole number from 0 to 2**63 - 1")


def check_options(geometry: Geometry, *, positions: Any = "original", seed: Any = 0, per: Any = None) -> None:
    """Raises :class:`VtpruneError` for values of :data:`ATTACH_OPTIONS` that a model of this ``geometry`` does not
    take."""
    if positions not in ("original", "compact"):
        raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
    if positions != "original" and geometry.llm_layers == 0:
        raise VtpruneError("positions= is for models with a language model")
    if positions != "original" and geometry.mrope:
        raise UnsupportedError(
            f"{geometry.family} places visual tokens by time, row and column; renumbering them is not defined: "
            "positions='original'"
        )
    check_seed(seed)
    if per is not None and per not in geometry.per:
        raise VtpruneError(f"per={per!r}: {geometry.family} takes {', '.join(map(repr, geometry.per))}")
