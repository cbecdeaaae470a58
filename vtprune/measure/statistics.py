"""Accuracy per ability with intervals: bootstraps over images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..core.types import VtpruneError
from .samples import Sample


def bootstrap(
    correct_a: Sequence[float],
    correct_b: Sequence[float],
    n: int = 2000,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Paired bootstrap: the 95 % interval of ``mean(a) - mean(b)`` over ``n`` resamples. ``groups``: samples with the
    same name (one image) are drawn together; one image alone has no spread.

    Raises :class:`VtpruneError` for empty or unequal lists.
    """
    if not len(correct_a) or len(correct_a) != len(correct_b) or (groups is not None and len(groups) != len(correct_a)):
        raise VtpruneError(f"paired results are needed, got {len(correct_a)} and {len(correct_b)}")
    gap = np.asarray(correct_a, float) - np.asarray(correct_b, float)
    where = np.arange(len(gap)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    total, size = np.bincount(where, weights=gap), np.bincount(where)
    rng = np.random.RandomState(seed)
    draws = (rng.randint(len(total), size=len(total)) for _ in range(n))
    means = [total[draw].sum() / size[draw].sum() for draw in draws]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def interval(
    correct: Sequence[float], n: int = 2000, seed: int = 0, groups: Sequence[str] | None = None
) -> tuple[float, float]:
    """The 95 % bootstrap interval of an accuracy; see :func:`bootstrap`."""
    return bootstrap(correct, [0.0] * len(correct), n, seed, groups)


def average_interval(
    correct: Sequence[float], samples: Sequence[Sample], n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over abilities; images are drawn as a whole, abilities that a draw misses
    are left out of it."""
    images, image = np.unique([s.source for s in samples], return_inverse=True)
    abilities, ability = np.unique([s.ability for s in samples], return_inverse=True)
    right, asked = np.zeros((2, len(images), len(abilities)))
    np.add.at(right, (image, ability), correct)
    np.add.at(asked, (image, ability), 1)
    rng = np.random.RandomState(seed)
    averages = np.empty(n)
    for i in range(n):
        draw = rng.randint(len(images), size=len(images))
        got, all_ = right[draw].sum(0), asked[draw].sum(0)
        averages[i] = (got[all_ > 0] / all_[all_ > 0]).mean()
    low, high = np.percentile(averages, (2.5, 97.5))
    return float(low), float(high)


def means(values: Sequence[float], keys: Iterable[str]) -> dict[str, float]:
    """The mean of the values under each key."""
    by_key: dict[str, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        by_key.setdefault(key, []).append(value)
    return {key: sum(v) / len(v) for key, v in by_key.items()}


def score(correct: Sequence[float], samples: Sequence[Sample], dense: Sequence[float] | None = None) -> dict[str, Any]:
    """``sets``: per question set ``accuracy``, ``interval`` and, against ``dense``, ``difference`` with its interval;
    ``abilities`` and their intervals; their ``average`` and ``worst``; with ``dense`` the mean and the least share of
    its accuracy, ``relative_average`` and ``relative_worst``."""
    sets: dict[str, Any] = {}
    for name, accuracy in means(correct, (s.set for s in samples)).items():
        mine = [i for i, s in enumerate(samples) if s.set == name]
        values, groups = [correct[i] for i in mine], [samples[i].source for i in mine]
        sets[name] = {"accuracy": accuracy, "samples": len(mine), "interval": interval(values, groups=groups)}
        if dense is not None:
            base = [dense[i] for i in mine]
            sets[name] |= {
                "difference": accuracy - sum(base) / len(base),
                "difference_interval": bootstrap(values, base, groups=groups),
            }
    abilities = means(correct, (s.ability for s in samples))
    worst = min(abilities, key=lambda a: abilities[a])
    out = {
        "sets": sets,
        "abilities": abilities,
        "average": sum(abilities.values()) / len(abilities),
        "worst": abilities[worst],
        "worst_ability": worst,
    }
    out["average_interval"] = average_interval(correct, samples)
    out["ability_intervals"] = {
        a: _part(correct, samples, [i for i, s in enumerate(samples) if s.ability == a])["interval"] for a in abilities
    }
    if dense is not None:
        full = means(dense, (s.ability for s in samples))
        shares = [abilities[a] / full[a] for a in abilities if full[a]]
        out |= {
            "relative_average": sum(shares) / len(shares) if shares else None,
            "relative_worst": min(shares, default=None),
        }
    return out


def _part(correct: Sequence[float], samples: Sequence[Sample], which: Sequence[int]) -> dict[str, Any]:
    """Accuracy, number and interval of some of the samples."""
    values = [correct[i] for i in which]
    return {
        "accuracy": sum(values) / len(values),
        "samples": len(values),
        "interval": interval(values, groups=[samples[i].source for i in which]),
    }


def add_group_a(rows: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> None:
    """Gives every row ``group_a``: its accuracy on the samples that the dense model answers and plain down-sampling at
    the same budget does not, where being clever can pay (VTC-Bench, arXiv 2510.07143); ``None`` where down-sampling was
    not measured or nothing is left."""
    dense = rows[0]["correct"]
    small = {r["budget"]: r["correct"] for r in rows if r["method"] == "downsample" and "error" not in r}
    for row in rows:
        hard = [i for i, right in enumerate(small.get(row["budget"], ())) if dense[i] and not right]
        row["group_a"] = _part(row["correct"], samples, hard) if hard and "error" not in row else None
