"""``vtprune analyze``: for this model, device, batch and number of visual tokens, does a recipe pay, and from which
budget on?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..core.planning import bind, load_recipe
from ..core.recipe import Recipe
from ..core.types import UnsupportedError, VtpruneError
from ..data import scenes
from ..inputs.chats import prepare
from . import generation, timing
from .break_even import break_even
from .environment import environment
from .run import of_images

REPEATS = 3  # rounds at least: fewer do not tell the noise
BUDGETS = (0.75, 0.5, 0.25, 0.11)


def prompts(processor: Any, pictures: Callable[[int], Any], batch: int, images: int, question: str) -> Any:
    """Inputs for ``batch`` prompts with ``images`` images each, ``pictures(i)`` the i-th of all, and the same question.
    Raises :class:`VtpruneError` for a processor that does not take so many images."""
    shown = [[pictures(b * images + i) for i in range(images)] for b in range(batch)]
    try:
        return prepare(processor, [s[0] for s in shown] if images == 1 else shown, [question] * batch)
    except VtpruneError as e:
        if images == 1 or e.__cause__ is None:  # a refusal of ours is told as it is
            raise
        cause = " ".join(str(e.__cause__).split())[:200]
        raise UnsupportedError(
            f"{type(processor).__name__} does not take {images} images in one prompt: {cause}"
        ) from e


def _check_places(adapter: Any, inputs: Any, images: int) -> None:
    """Raises :class:`UnsupportedError` unless every prompt of ``inputs`` has places for ``images`` images."""
    for parts in adapter.parts(inputs["input_ids"], inputs):
        places = len({p.image for p in parts})
        if places < images:
            raise UnsupportedError(f"the processor's chat template puts {places} of {images} images into a prompt")


def check(recipes: Sequence[Any], repeats: int) -> list[Recipe]:
    """The recipes, loaded. Raises :class:`VtpruneError` for none, for two of one name, and for fewer than
    :data:`REPEATS` rounds."""
    chosen = [load_recipe(r) for r in recipes]
    names = [r.name for r in chosen]
    if not names or len({*names}) < len(names):
        raise VtpruneError(f"recipes must be named, each once; got {', '.join(names) or 'none'}")
    if repeats < REPEATS:
        raise VtpruneError(f"{repeats} repeats are too few: at least {REPEATS} rounds tell the noise")
    return chosen


def times(
    model: Any,
    processor: Any,
    recipes: Sequence[Any],
    budgets: Sequence[float],
    *,
    batches: Sequence[int] = (1,),
    images: Sequence[int] = (1,),
    new_tokens: int = 8,
    repeats: int = 5,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    pictures: Callable[[int], Any] | None = None,
    question: str = "how many red shapes are there ?",
    command: str = "",
    saved: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Every recipe at every budget (a fraction of the dense effective tokens), batch size and number of images per
    prompt.

    Args:
        options: of ``attach`` and of the recipes' last methods, for all recipes.
        pictures: the i-th picture of a batch (default: generated scenes).
        saved: called with the result after every row, so that an interruption loses one row at most.
        progress: called with the name of every row before it is measured.

    Returns:
        A JSON-safe dict of ``"type": "vtprune.Times"``: ``planned`` the number of rows once all is done; ``rows`` hold
        what :func:`vtprune.measure.generation.measure` gives, or the reason (``error``) why there is nothing;
        ``break_even`` what :func:`.break_even.break_even` makes of them.

    Raises:
        VtpruneError: nothing to measure, recipes of the same name, or fewer than three ``repeats``.
    """
    chosen = check(recipes, repeats)
    of_images(options or {})
    if not budgets or not batches or not images:
        raise VtpruneError("name at least one budget, one batch size and one number of images")
    adapter = bind(model)
    if adapter.geometry.llm_layers == 0:
        raise UnsupportedError(f"{type(model).__name__} has no language model; times are those of generate()")
    facts = {"type": "vtprune.Times", "version": 1, "command": command, **environment(model)}
    facts |= {"timer": "CPU" if timing.timer is time.thread_time else "wall-clock"}
    facts |= {"new_tokens": new_tokens, "repeats": repeats}
    each = [(recipe, budget) for recipe in chosen for budget in budgets]
    groups = [(b, i) for i in images for b in batches]
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {**facts, "planned": len(each) * len(groups), "rows": rows, "break_even": []}
    how = dict(new_tokens=new_tokens, repeats=repeats, **{"seed": seed, **(options or {})})
    made = _rows(model, processor, adapter, groups, each, pictures or _scene, question, how, progress)
    for row, stands_for in made:
        result["planned"] -= stands_for - 1
        rows.append(row)
        result["break_even"] = break_even(rows)
        if saved is not None:
            saved(result)
    return result


def _rows(
    model: Any,
    processor: Any,
    adapter: Any,
    groups: Sequence[tuple[int, int]],
    each: Sequence[tuple[Recipe, float]],
    pictures: Callable[[int], Any],
    question: str,
    how: Mapping[str, Any],
    progress: Callable[[str], object] | None,
) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of every group (batch size, images), and for how many planned ones each stands: a processor's refusal
    for all of its group."""
    for batch, images in groups:
        where = {"batch": batch, "images": images}
        if progress is not None:
            progress(f"prompts, batch {batch}")
        try:
            inputs = prompts(processor, pictures, batch, images, question).to(model.device, model.dtype)
            _check_places(adapter, inputs, images)
        except UnsupportedError as e:
            yield {"method": "dense", "budget": 1.0, **where, "error": str(e)}, len(each)
            continue
        for recipe, budget in each:
            if progress is not None:
                progress(f"{recipe.name} {100 * budget:g} %, batch {batch}")
            measured = _measured(model, inputs, recipe, budget, how)
            yield {"method": recipe.name, "budget": budget, **where, **measured}, 1


def _measured(model: Any, inputs: Any, recipe: Recipe, budget: float, how: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`.generation.measure` gives, or why it gives nothing."""
    import torch

    try:
        return generation.measure(model, inputs, recipe, effective_tokens=float(budget), **how)
    except VtpruneError as e:
        return {"error": str(e)}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}


def _scene(i: int) -> Any:
    from PIL import Image

    return Image.fromarray(scenes.scene(i, "test").image)


def counts(text: str) -> list[int]:
    """``1,8``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers of at least 1, such as 1,8")
    return list(dict.fromkeys(map(int, parts)))
