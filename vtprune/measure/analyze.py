"""For this model, device, batch and number of visual tokens, does a recipe pay, and from which
budget on?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.planning import bind, load_recipe
from ..core.recipe import Recipe
from ..core.types import UnsupportedError, VtpruneError
from ..data import scenes
from ..inputs.chats import prepare
from . import timing
from .bench import environment
from .runs import write
from .timing import spread

REPEATS = 3  # rounds at least: fewer do not tell the noise
BUDGETS = (0.75, 0.5, 0.25, 0.11)


# -------------------------------------------------------------------------------------------------------------
# measuring


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


def _seen(adapter: Any, inputs: Any, images: int) -> None:
    """Raises :class:`UnsupportedError` unless every prompt of ``inputs`` has places for ``images`` images."""
    for parts in adapter.parts(inputs["input_ids"], inputs):
        found = len({p.image for p in parts})
        if found < images:
            raise UnsupportedError(f"the processor's chat template puts {found} of {images} images into a prompt")


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
        what :func:`vtprune.measure.timing.measure` gives, or the reason (``error``) why there is nothing;
        ``break_even`` what :func:`break_even` makes of them.

    Raises:
        VtpruneError: nothing to measure, recipes of the same name, or fewer than three ``repeats``.
    """
    import torch

    chosen = check(recipes, repeats)
    if not budgets or not batches or not images:
        raise VtpruneError("name at least one budget, one batch size and one number of images")
    adapter = bind(model)
    if adapter.geometry.llm_layers == 0:
        raise UnsupportedError(f"{type(model).__name__} has no language model; times are those of generate()")
    timer = "CPU" if timing.timer is time.thread_time else "wall-clock"
    facts = {
        "type": "vtprune.Times",
        "version": 1,
        "command": command,
        **environment(model),
        "timer": timer,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    rows: list[dict[str, Any]] = []
    how: dict[str, Any] = {"seed": seed, **(options or {})}
    each = len(chosen) * len(budgets)
    result: dict[str, Any] = {**facts, "planned": each * len(batches) * len(images), "rows": rows, "break_even": []}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        result["break_even"] = break_even(rows)
        if saved is not None:
            saved(result)

    for batch, count in [(b, i) for i in images for b in batches]:
        where = {"batch": batch, "images": count}
        if progress is not None:
            progress(f"prompts, batch {batch}")
        try:
            inputs = prompts(processor, pictures or _scene, batch, count, question).to(model.device, model.dtype)
            _seen(adapter, inputs, count)
        except UnsupportedError as e:
            result["planned"] -= each - 1
            add({"method": "dense", "budget": 1.0, **where, "error": str(e)})
            continue
        for recipe, budget in [(r, b) for r in chosen for b in budgets]:
            if progress is not None:
                progress(f"{recipe.name} {100 * budget:g} %, batch {batch}")
            row: dict[str, Any] = {"method": recipe.name, "budget": budget, **where}
            try:
                row |= timing.measure(
                    model, inputs, recipe, new_tokens=new_tokens, repeats=repeats, effective_tokens=float(budget), **how
                )
            except VtpruneError as e:
                row["error"] = str(e)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            add(row)
    return result


def _scene(i: int) -> Any:
    from PIL import Image

    return Image.fromarray(scenes.scene(i, "test").image)


# ------------------------------------------------------------------------------------------------------------
# break-even


def pays_below(budgets: Sequence[float], ratios: Sequence[float], limit: float) -> float | None:
    """The largest budget from which on, downwards, every ratio stays below ``limit``: interpolated linearly between the
    last budget that pays and the next larger one; the largest measured if all pay; ``None`` if the smallest does
    not."""
    found = None
    known = sorted(zip(budgets, ratios, strict=True))
    for (budget, ratio), (above, over) in zip(known, [*known[1:], *known[-1:]], strict=True):
        if ratio >= limit:
            return found
        found = budget if over < limit else budget + (above - budget) * (limit - ratio) / (over - ratio)
    return found


def break_even(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per method, batch size and number of images in ``rows``.

    ``ratios`` are the medians of pruned over dense ``ttft``, one for each of ``budgets``; ``noise`` the 20th and 80th
    percentile of dense over dense in the same rounds, all budgets together. A budget pays if its ratio is below 1 by
    more than the noise reaches to either side; ``pays_below`` is the largest from which on downwards all do
    (:func:`pays_below`), ``verdict`` that in a sentence.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["batch"], row["images"]), []).append(row)
    out = []
    for (method, batch, images), mine in groups.items():
        done = [r for r in mine if "error" not in r]
        entry: dict[str, Any] = {
            "method": method,
            "batch": batch,
            "images": images,
            "tokens": done[0]["tokens"] if done else None,
        }
        entry |= {
            "budgets": [r["budget"] for r in done],
            "ratios": [r["ratio"]["ttft"]["median"] for r in done],
            "noise": None,
            "pays_below": None,
        }
        said = f"{method} at batch {batch}, " + (
            f"{entry['tokens']:g} tokens: " if done else f"{images} image{'s' * (images > 1)}: "
        )
        if not done:
            out.append({**entry, "verdict": said + "not measured: " + mine[0]["error"]})
            continue
        noise = spread([n for r in done for n in r["dense_over_dense"]])
        limit = 1 - max(1 - noise["p20"], noise["p80"] - 1, 0.0)
        entry["noise"] = [noise["p20"], noise["p80"]]
        entry["pays_below"] = pays_below(entry["budgets"], entry["ratios"], limit)
        out.append({**entry, "verdict": said + _verdict(entry, done, limit)})
    return out


def _verdict(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], limit: float) -> str:
    """In words. ``limit``: the ratio below which a gain is more than noise."""
    below = entry["pays_below"]
    best = min((r for r in rows if below is None or r["budget"] <= below), key=lambda r: r["ratio"]["ttft"]["median"])
    ratio = best["ratio"]["ttft"]["median"]
    facts = f"ttft {ratio:.2f}x at {100 * best['budget']:.0f} %, noise {100 * (1 - limit):.0f} %"
    if below is not None:
        where = (
            f"at every measured budget, up to {100 * below:.0f}"
            if below == max(entry["budgets"])
            else f"below {100 * below:.0f}"
        )
        return f"pays {where} % of the tokens ({facts})"
    if ratio < limit:
        return (
            f"pays at {100 * best['budget']:.0f} % of the tokens, but not at the smallest measured budget: no "
            f"break-even ({facts})"
        )
    if ratio < 1:
        return f"no gain beyond the noise at any measured budget (at best {facts})"
    dense, pruned, scorer = (
        best[side][name]["median"]
        for side, name in (("dense", "ttft_ms"), ("pruned", "ttft_ms"), ("pruned", "scorer_ms"))
    )
    why = "the scorer costs more than the layers save" if pruned - scorer < dense else "fewer tokens save no time here"
    return f"does not pay at any measured budget: {why} (at best {facts})"


# ----------------------------------------------------------------------------------------------------------------
# tables


HEADS = [
    "method",
    "budget",
    "batch",
    "images",
    "tokens",
    "dense ms",
    "pruned ms",
    "ttft x",
    "e2e x",
    "prefill x",
    "decode x",
    "scorer ms",
    "noise",
    "note",
]


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text, header first: medians; ratios with their 20th and 80th percentile."""

    def ranged(entry: Mapping[str, float] | None) -> str:
        return "-" if entry is None else f"{entry['median']:.2f} [{entry['p20']:.2f}, {entry['p80']:.2f}]"

    out = [HEADS]
    for row in result["rows"]:
        start = [row["method"], f"{100 * row['budget']:g}%", str(row["batch"]), str(row["images"])]
        if "error" in row:
            out.append([*start, *["-"] * (len(HEADS) - 5), "not possible: " + row["error"]])
            continue
        ratios = [ranged(row["ratio"][name]) for name in ("ttft", "e2e", "prefill", "decode")]
        both = [f"{row[side]['ttft_ms']['median']:.1f}" for side in ("dense", "pruned")]
        scorer, noise = f"{row['pruned']['scorer_ms']['median']:.2f}", ranged(spread(row["dense_over_dense"]))
        out.append([*start, f"{row['effective_tokens']:.1f} of {row['tokens']:g}", *both, *ratios, scorer, noise, ""])
    return out


def markdown(result: Mapping[str, Any]) -> str:
    """The verdicts, and below them the table."""
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    table = ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in cells(result)]
    how = (
        f"{result['new_tokens']} new tokens, {result['repeats']} rounds of dense, pruned, dense; {result['timer']} time"
    )
    missing = result["planned"] - len(result["rows"])
    how += f"; **unfinished: {len(result['rows'])} of {result['planned']} rows**" if missing else ""
    lines = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} threads, {about['dtype']}; {versions}; {how}",
        "",
        *(f"* {entry['verdict']}" for entry in result["break_even"]),
        "",
        "Milliseconds are medians; dense and pruned those of the ttft. A ratio is the median over rounds of pruned "
        "over the mean of the two dense turns around",
        "it [20th, 80th percentile]; noise: the second of these over the first. ttft: generate() of one token, e2e: of "
        "all; prefill and decode: the language",
        "model's passes; scorer: time in the library's own hooks and decisions, part of the ttft.",
        "",
        table[0],
        "|---" + "|--:" * (len(HEADS) - 1) + "|",
        *table[1:],
    ]
    return "\n".join(lines) + "\n"


def save(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON, or as Markdown if the name ends in ``.md``; an interruption leaves the file before.
    Raises :class:`VtpruneError` if it cannot be written."""
    write(path, markdown(result) if path.suffix == ".md" else json.dumps(result) + "\n")
