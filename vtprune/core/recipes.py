"""Named recipes. Every method has one of its own name with the paper's defaults; the presets below are published
settings, as data with their source."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..methods.base import METHODS
from .plugins import hand_on, listed
from .recipe import Recipe, Stage
from .registry import Registry
from .types import VtpruneError

FILES = "VTPRUNE_RECIPES"  # in the environment: recipe files that are registered in a process and all that it starts


class Recipes(Registry[Recipe]):
    """The recipes registered here, for every method, whenever it was registered, one of its name, and those of
    :data:`FILES`."""

    def reserve(self, name: str, owner: str, what: str, module: str) -> None:
        METHODS.reserve(name, owner, what, module)  # so that no method takes the name, nor this recipe a method's
        super().reserve(name, owner, what, module)

    def _ready(self) -> dict[str, Recipe]:
        own = {name: Recipe(name=name, stages=(Stage(method=name),), source=m.paper) for name, m in METHODS.items()}
        return {**_of_files(*listed(FILES)), **own, **super()._ready()}

    def get(self, name: str) -> Recipe:
        """The record of ``name``; ``"NAME@BUDGET"`` is the recipe NAME with that budget in its last stage: a number of
        tokens per image (``visionzip@64``), a fraction (``@0.25``) or two numbers (``@640/2880``, as papers say it of
        tiled images). Raises :class:`VtpruneError` naming close matches."""
        base, at, budget = name.rpartition("@")
        if not at or name in self._ready():
            return super().get(name)
        return replace(super().get(base).override(keep=_budget(name, budget)), name=name)

    def distribution(self, name: str) -> str | None:
        name = name if name in self._ready() else name.rpartition("@")[0] or name
        return METHODS.distribution(name) if name in METHODS else super().distribution(name)


@lru_cache(maxsize=1)
def _of_files(*paths: str) -> dict[str, Recipe]:
    recipes = [Recipe.load(path) for path in paths]
    return {recipe.name: recipe for recipe in recipes}


def offer(path: str | Path) -> str:
    """Registers the recipe of a file under its own name, which it returns, here and in every process that this one
    starts. Raises :class:`VtpruneError` for a name that is taken."""
    recipe = Recipe.load(path)
    if RECIPES._ready().get(recipe.name, recipe) != recipe:
        raise VtpruneError(f"{path}: another recipe is named {recipe.name!r}; give this one a name of its own")
    hand_on(FILES, str(Path(path).resolve()))
    return recipe.name


def offered(name: str) -> Recipe | None:
    """The recipe that a file gave this name; a program elsewhere does not know it."""
    return _of_files(*listed(FILES)).get(name)


def _budget(name: str, text: str) -> int | float:
    """What stands behind the ``@`` of ``name``. Raises :class:`VtpruneError`."""
    above, slash, below = text.partition("/")
    try:
        keep: int | float = int(above) / int(below) if slash else int(text) if text.isdecimal() else float(text)
    except (ValueError, ZeroDivisionError):
        raise VtpruneError(
            f"{name!r}: behind the @ stands a budget: tokens per image (64), a fraction (0.25) or two numbers "
            "(640/2880)"
        ) from None
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise VtpruneError(f"{name!r}: a fraction lies in (0, 1]")
    return keep


RECIPES = Recipes("recipe")

# (name, source, (method, keep, options) ...)
PRESETS: tuple = (
    ("fastv-k2-r50", "arXiv 2403.06764, table 1: K=2, R=50 %", ("fastv", 0.5, {"layer": 2})),
    ("fastv-k3-r75", "arXiv 2403.06764, table 1: K=3, R=75 %", ("fastv", 0.25, {"layer": 3})),
    ("fastv-norope", "arXiv 2412.13180: FastV's ranking without rotary positions", ("fastv", 0.5, {"rope": False})),
    (
        "pitome-llava-7b",
        "arXiv 2405.16148, LLaVA-1.5-7B at ratio 0.9",
        ("pitome", None, {"ratio": 0.9, "variant": "hf-clip"}),
    ),
    (
        "flowcut-then-fastv",
        "vtprune: a vision stage and a language-model stage together",
        ("flowcut", 0.5, {}),
        ("fastv", 0.25, {}),
    ),
    (
        "pyramiddrop-64",
        "arXiv 2410.17247, the authors on the 64-token row: lambda = 0.19, 62.9 of 576 tokens a layer",
        ("pyramiddrop", None, {"layers": (2, 8, 16), "ratios": (0.19, 0.19**2, 0.19**3)}),
    ),
    *(
        (f"sparsevlm-{row}", f"arXiv 2410.04417, its {row}-token row of 576", ("sparsevlm", left / 576, {}))
        for row, left in ((192, 113), (128, 39), (64, 18))
    ),
    (
        "divprune-then-pyramiddrop",
        "vtprune: far apart behind the projector, then what the question attends to",
        ("divprune", 0.5, {}),
        ("pyramiddrop", 0.125, {}),
    ),
    (
        "scope-then-pyramiddrop",
        "vtprune: what covers most of the picture, then what the question attends to",
        ("scope", 0.5, {}),
        ("pyramiddrop", 0.125, {}),
    ),
    (
        "mmtok-then-pyramiddrop",
        "vtprune: what covers most of the question's words and of the picture, then what the question attends to",
        ("mmtok", 0.5, {}),
        ("pyramiddrop", 0.125, {}),
    ),
    (
        "vispruner-then-v2drop",
        "vtprune: what the class token attends to, then what the language model still changes",
        ("vispruner", 0.5, {}),
        ("v2drop", 0.05, {}),
    ),
    (
        "flowcut-then-v2drop",
        "vtprune: the class token's information flow, then what the language model still changes",
        ("flowcut", 0.5, {}),
        ("v2drop", 0.05, {}),
    ),
)
for _name, _source, *_stages in PRESETS:
    RECIPES.register(
        _name,
        Recipe(name=_name, stages=tuple(Stage(method=m, keep=k, options=o) for m, k, o in _stages), source=_source),
    )
