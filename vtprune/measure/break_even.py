"""Where pruning pays: the budget below which the time to the first token shrinks by more than the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timing import spread


def pays_below(budgets: Sequence[float], ratios: Sequence[float], limit: float) -> float | None:
    """The largest budget from which on, downwards, every ratio stays below ``limit``: interpolated linearly between the
    last budget that pays and the next larger one; the largest measured if all pay; ``None`` if the smallest does
    not."""
    largest = None
    known = sorted(zip(budgets, ratios, strict=True))
    for (budget, ratio), (above, over) in zip(known, [*known[1:], *known[-1:]], strict=True):
        if ratio >= limit:
            return largest
        largest = budget if over < limit else budget + (above - budget) * (limit - ratio) / (over - ratio)
    return largest


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
    return [_entry(method, batch, images, mine) for (method, batch, images), mine in groups.items()]


def _entry(method: str, batch: int, images: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry of one group of rows."""
    done = [r for r in rows if "error" not in r]
    entry: dict[str, Any] = {"method": method, "batch": batch, "images": images}
    entry["tokens"] = done[0]["tokens"] if done else None
    entry["budgets"] = [r["budget"] for r in done]
    entry["ratios"] = [r["ratio"]["ttft"]["median"] for r in done]
    entry |= {"noise": None, "pays_below": None}
    if not done:
        size = f"{images} image{'s' * (images > 1)}"
        return {**entry, "verdict": f"{method} at batch {batch}, {size}: not measured: " + rows[0]["error"]}
    noise = spread([n for r in done for n in r["dense_over_dense"]])
    limit = 1 - max(1 - noise["p20"], noise["p80"] - 1, 0.0)
    entry["noise"] = [noise["p20"], noise["p80"]]
    entry["pays_below"] = pays_below(entry["budgets"], entry["ratios"], limit)
    size = f"{entry['tokens']:g} tokens"
    return {**entry, "verdict": f"{method} at batch {batch}, {size}: " + _verdict(entry, done, limit)}


def _verdict(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], limit: float) -> str:
    """In words. ``limit``: the ratio below which a gain is more than noise."""
    below = entry["pays_below"]
    best = min((r for r in rows if below is None or r["budget"] <= below), key=lambda r: r["ratio"]["ttft"]["median"])
    ratio = best["ratio"]["ttft"]["median"]
    facts = f"ttft {ratio:.2f}x at {100 * best['budget']:.0f} %, noise {100 * (1 - limit):.0f} %"
    if below is not None:
        every = below == max(entry["budgets"])
        where = f"at every measured budget, up to {100 * below:.0f}" if every else f"below {100 * below:.0f}"
        return f"pays {where} % of the tokens ({facts})"
    if ratio < limit:
        return (
            f"pays at {100 * best['budget']:.0f} % of the tokens, but not at the smallest measured budget: no "
            f"break-even ({facts})"
        )
    if ratio < 1:
        return f"no gain beyond the noise at any measured budget (at best {facts})"
    dense, pruned = best["dense"]["ttft_ms"]["median"], best["pruned"]["ttft_ms"]["median"]
    scorer = best["pruned"]["scorer_ms"]["median"]
    why = "the scorer costs more than the layers save" if pruned - scorer < dense else "fewer tokens save no time here"
    return f"does not pay at any measured budget: {why} (at best {facts})"
