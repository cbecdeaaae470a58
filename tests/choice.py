"""Which pairs of method and family every run of the tests checks: their number grows with methods plus families."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import nn
from vtprune.models.base import ADAPTERS

import vtprune

# Families of different kinds: a class token and a plain prompt, three rotary axes and merged patches, sliding windows,
# a bare tower, tiles, text alone.
DIFFERENT = ("llava", "qwen2.5-vl", "gemma3", "timm-vit", "llava-next", "causal-lm")
MEET = 3  # families of different kinds that every method meets, with all its cases among them


def pairs() -> list[tuple[str, str, str, int]]:
    """(family, variant, method, case number) of everything registered."""
    return [
        (family, variant, name, case)
        for family in ADAPTERS
        for variant in ADAPTERS.get(family).tiny
        for name in vtprune.methods()
        for case in range(len(vtprune.describe(name).cases))
    ]


@functools.cache
def kinds() -> tuple[tuple[str, ...], ...]:
    """Methods by what the engine has to do for them: where they cut, whether they merge, route or fuse, and in the
    language model whether they look into a layer. What else they need is any view's (tests/models/test_views.py)."""
    groups: dict[Any, list[str]] = {}
    for name in vtprune.methods():
        info = vtprune.describe(name)
        reads = (
            bool(info.needs.get("llm", frozenset()) & {"query_attention", "products", "keys"})
            and info.kinds[0] == "llm"
        )
        deeds = (info.merges, info.routes, info.skips, info.fuses, info.nests)
        groups.setdefault((info.kinds[0], reads, *deeds), []).append(name)
    return tuple(map(tuple, groups.values()))


@functools.cache
def refused() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("refused_pairs.json").read_text(encoding="utf-8"))


def of_pictures(name: str) -> bool:
    """Whether a method has something to say about the pictures that the bundled VLM is asked about."""
    return not vtprune.describe(name).video and name not in refused()["llava/dinov2-llama"]


def budget_of(model: nn.Module, name: str) -> dict[str, float]:
    """A quarter of the effective tokens, or nothing where the method meets no such budget with its other options."""
    try:
        vtprune.solve(model, name, effective_tokens=0.25)
    except vtprune.VtpruneError as e:
        if "cannot reach" in str(e) or "meets no budget" in str(e):
            return {}
        raise
    return {"effective_tokens": 0.25}


def taken(pair: tuple[str, str, str, int]) -> bool:
    """Whether the checked-in table of refused pairs lets the pair work."""
    family, variant, name, case = pair
    listed = refused().get(f"{family}/{variant}", {})
    return name not in listed and f"{name} {case}" not in listed


@functools.cache
def covering() -> frozenset[tuple[str, str, str, int]]:
    """The pairs that every run checks; the rest runs under the slow marker.

    Every family's first variant meets every kind of method, and its other variants one in the tower or in front of
    it, or one behind, by turns. Every method meets :data:`MEET` families of different kinds, in each of its cases at
    least once.
    """
    chosen: set[tuple[str, str, str, int]] = set()
    groups = kinds()
    first = {family: next(iter(ADAPTERS.get(family).tiny)) for family in ADAPTERS}
    turn = 0
    for f, family in enumerate(ADAPTERS):
        for group in groups:
            name = group[f % len(group)]
            chosen.add((family, first[family], name, f % len(vtprune.describe(name).cases)))
        for variant in list(ADAPTERS.get(family).tiny)[1:]:
            turn += 1
            able = [
                (family, variant, name, case)
                for name in vtprune.methods()
                for case in range(len(vtprune.describe(name).cases))
                if taken((family, variant, name, case))
            ]
            ahead = [pair for pair in able if vtprune.describe(pair[2]).kinds[0] in ("pixels", "vision")]
            behind = [pair for pair in able if pair not in ahead]
            some = (ahead or behind) if turn % 2 else (behind or ahead)
            chosen.add(some[5 * turn % len(some)])
    for m, name in enumerate(vtprune.methods()):
        cases = range(len(vtprune.describe(name).cases))
        order = DIFFERENT[m % len(DIFFERENT) :] + DIFFERENT[: m % len(DIFFERENT)]
        order += tuple(family for family in ADAPTERS if family not in DIFFERENT)
        able = [family for family in order if any(taken((family, first[family], name, case)) for case in cases)]
        met: set[str] = set()
        for n in range(max(MEET, len(cases))):
            wanted = [(family, first[family], name, n % len(cases)) for family in able[n % len(able) :] + able]
            wanted = sorted(filter(taken, wanted), key=lambda pair: (pair[0] in met, pair not in chosen))
            chosen.update(wanted[:1])
            met.update(pair[0] for pair in wanted[:1])
    return frozenset(chosen)
