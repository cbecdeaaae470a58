"""From a recipe to cuts: which adapter takes a model, what each stage's budget comes to, what can follow what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vtprune.models.base import ADAPTERS
from vtprune.models.engine.whole import of_prompts

from ..methods.base import METHODS, Method, make
from .composition import ORDER, Planned, compose
from .recipe import Recipe, Stage, resolve
from .recipes import RECIPES
from .types import Action, Geometry, UnsupportedError, VtpruneError
from .wrappers import unwrap

if TYPE_CHECKING:
    from torch import nn


ATTACH_OPTIONS = ("positions", "seed", "per")

LACKS = {
    "prompt": "per='prompt' does",
    "matrices": "parts of the width are known of towers whose blocks see each image by itself",
    "classifier": "what it puts into the sequence has no place in a prompt: it is for bare vision transformers",
    "insert": "its tokens are turned by their places, or folded from several patches, which inserted ones could not be",
}

FILES = (".json", ".yaml", ".yml")  # of recipes

TARGETS = ("effective_tokens", "flops")  # budgets that the solver turns into a schedule


def bind(model: nn.Module, per: str | None = None) -> Any:
    """The adapter for ``model``: of those that match it the one of the highest priority; with ``per="prompt"`` it
    offers the whole prompt.

    Raises:
        UnsupportedError: none matches (the families there are, are named), or two of the same priority do; a model
            without a language model for ``per="prompt"``.
    """
    model = unwrap(model)
    matching = [info for _, info in ADAPTERS.items() if info.matches(model)]
    highest = max((info.priority for info in matching), default=0)
    best = [info for info in matching if info.priority == highest]
    if len(best) > 1:
        raise UnsupportedError(
            f"{len(best)} adapters take a {type(model).__name__} with priority {highest}: "
            f"{', '.join(info.name for info in best)}; one of them needs a higher one"
        )
    if best:
        adapter = best[0].bind(model)
        return of_prompts(adapter) if per == "prompt" else adapter
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
    if text.endswith(FILES):
        return Recipe.load(text)
    if text not in RECIPES and os.path.exists(text):
        raise VtpruneError(f"{text} is no recipe file: one ends in {', '.join(FILES)}")
    return RECIPES.get(text)


def applies_to(geometry: Geometry, recipe: Recipe, per: str | None) -> str:
    """What budgets apply to: ``per``, or the model's default; with methods of videos all frames of one, where the model
    reads images alone all those of a prompt. Raises :class:`UnsupportedError` where such a method cannot have that."""
    video = next((s.method for s in recipe.stages if METHODS.get(s.method).video), None)
    if video is None:
        return per or geometry.per[0]
    if "prompt" in geometry.traits:
        why = "is asked for whole prompts" if geometry.per[0] == "prompt" else "reads text alone"
        raise UnsupportedError(f"{video} compares the frames of a video, and {geometry.family} ({geometry.arch}) {why}")
    joined = [name for name in ("video", "sample") if name in geometry.per]
    if not joined or not geometry.llm_layers:
        raise UnsupportedError(
            f"{video} compares the frames of a video, and {geometry.family} ({geometry.arch}) sees one image at a time"
        )
    if per not in (None, *joined):
        raise UnsupportedError(
            f"{video} compares the frames of a video, so its budget is for all of them: "
            f"per={' or '.join(map(repr, joined))}, not {per!r}"
        )
    return per or joined[0]


def check_tower_budgets(geometry: Geometry, stages: Sequence[Planned], per: str) -> None:
    """Raises :class:`VtpruneError` for numbers of tokens where a pass of the tower is not what they apply to."""
    for stage, method, cuts in stages:
        inside = any(c.kind in ("pixels", "vision") and c.action is not Action.NOTE for c in cuts)
        tiles = "tile" in geometry.per and per != "tile"
        if inside and tiles and isinstance(stage.keep, int):
            raise VtpruneError(
                f"{method.info.name} works in the vision tower, which sees one tile at a time: keep= takes a "
                "fraction, or with per='tile' tokens of a tile"
            )


def positions_of(geometry: Geometry, recipe: Recipe, positions: str | None) -> str:
    """How positions are counted: as the user says, or as the recipe's methods have it; original ones where the model
    has no other."""
    own = {METHODS.get(s.method).positions for s in recipe.stages} - {"original"}
    return positions or ("original" if geometry.mrope else next(iter(own), "original"))


def for_units(geometry: Geometry, per: str | None) -> Geometry:
    """``geometry`` as budgets see it: where several rasters may share one, the size of none of them bounds it."""
    several = per in ("sample", "video", "prompt") or ((per or geometry.per[0]) == "image" and "tile" in geometry.per)
    return replace(geometry, variable=True) if several else geometry


def for_rasters(geometry: Geometry, rasters: tuple[tuple[int, int], ...], frames: tuple[int, ...] = ()) -> Geometry:
    """``geometry`` of a unit that is made of these ``rasters``, which are a video of these ``frames`` (tokens of
    each)."""
    n, one = sum(r * c for r, c in rasters), len(rasters) == 1
    grid = rasters[0] if one else (n, 1)
    if frames:
        grid = frame_grid(rasters, frames)
    return replace(geometry, tokens=n, grid=grid, rasters=() if one else rasters, frames=len(frames), variable=True)


def frame_grid(rasters: tuple[tuple[int, int], ...], frames: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of each of a video's ``frames``; where one is made of several ``rasters``, they are one row."""
    rows, columns = rasters[0]
    return (rows, columns) if rows * columns == frames[0] else (1, frames[0])


def plan_for(geometry: Geometry, recipe: Recipe, per: str | None) -> list[Planned]:
    """:func:`plan` for a model of this ``geometry`` whose budgets apply to ``per`` (:func:`applies_to`)."""
    return plan(for_units(geometry, applies_to(geometry, recipe, per)), recipe)


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
            offers = geometry.provides.get(cut.kind)
            if cut.action is Action.NOTE:
                offers = geometry.notes if cut.kind == "vision" and geometry.notes else None
            missing = info.needs.get(cut.kind, frozenset()) - (offers or frozenset()) - geometry.traits
            if offers is None or missing:
                lacks = ", ".join(sorted(missing)) or f"{cut.kind} sites"
                known = {**LACKS, **geometry.refuses}
                reasons = dict.fromkeys(known[n] for n in sorted(missing) if n in known)
                why = "".join(f" ({reason})" for reason in reasons)
                raise UnsupportedError(
                    f"{info.name} needs {lacks}, which {geometry.family} ({geometry.arch}) does not provide{why}"
                )
        out.append((stage, method, cuts))
    flat = [(ORDER[c.kind], c.layer) for *_, cuts in out for c in cuts]
    starts = [(ORDER[cuts[0].kind], cuts[0].layer) for *_, cuts in out if cuts]
    if starts != sorted(starts):
        raise VtpruneError(
            f"recipe {recipe.name!r}: stages must be listed in execution order (pixels, vision, projector, llm; then "
            "by layer)"
        )
    if any(a[0] == b[0] == 0 for a, b in zip(flat, flat[1:], strict=False)):
        raise VtpruneError(f"recipe {recipe.name!r} resizes the pixels twice")
    compose(geometry, out)
    return out


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


def check_options(geometry: Geometry, *, positions: Any = None, seed: Any = 0, per: Any = None) -> None:
    """Raises :class:`VtpruneError` for values of :data:`ATTACH_OPTIONS` that a model of this ``geometry`` does not
    take."""
    if positions not in (None, "original", "compact"):
        raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
    if positions == "compact" and geometry.llm_layers == 0:
        raise VtpruneError("positions= is for models with a language model")
    if positions == "compact" and geometry.mrope:
        raise UnsupportedError(
            f"{geometry.family} places visual tokens by time, row and column; renumbering them is not defined: "
            "positions='original'"
        )
    check_seed(seed)
    if per is not None and per not in geometry.per:
        names = dict.fromkeys((*geometry.per, *(("prompt",) if geometry.llm_layers else ())))
        raise VtpruneError(f"per={per!r}: {geometry.family} takes {', '.join(map(repr, names))}")
