"""A fuzzer: random recipes in random models on random inputs, run in random ways, against the dense model made to
compute the same (``dense.py``).

``python tests/fuzz.py --seeds 0:10000 [--jobs 2] [--seconds N] [--family llava,qwen2-vl] [--way generate]``. A seed is
one run and draws everything. It ends as ok (equal), refused (:class:`VtpruneError` from ``attach``), late (from a later
call), host (the unpruned model does the same wrong thing), MISMATCH (another answer, without a word) or RAW (another
exception, or a refusal in the words of a kernel). The last two are faults: each is printed with the line that repeats
it, and the exit code is 1.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import multiprocessing
import random
import re
import sys
import time
import traceback
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, os.path.dirname(__file__))

from vtprune.models.base import ADAPTERS
from vtprune.models.engine.layout import units
from vtprune.models.engine.whole import of_prompts

import vtprune
from dense import Dense, Done, NoReference
from vtprune.core import ledger
from vtprune.core.planning import bind, plan
from vtprune.core.recipe import Recipe, Stage
from vtprune.core.types import Action, VtpruneError
from vtprune.methods.base import METHODS

LIMITS = {torch.float32: 5e-5, torch.float64: 1e-5, torch.bfloat16: 8e-2}  # relative to the largest value (at least 1)
WORDS = range(8, 64)  # the tiny models' words; below are pad, start, end, placeholders
FAULTS = ("MISMATCH", "RAW")
KERNEL = re.compile(r"(match|energy|query_scores|flow_scores|merge|gather|maxmin|dpp|coverage): ")


class Mismatch(Exception):
    """Attached gives something else than it should."""


# ----------------------------------------------------------------------------------------------------------------
# models and inputs


@dataclass
class Bench:
    """A tiny model, built once: its adapter, the samples its inputs are made of, and what it is and gives untouched."""

    family: str
    variant: str
    model: Any
    adapter: Any
    samples: list[dict[str, Tensor]]
    example: dict[str, Tensor]
    clean: dict[str, Any] = field(default_factory=dict)
    answer: Tensor | None = None

    @property
    def mllm(self) -> bool:
        return self.adapter.geometry.llm_layers > 0

    @functools.cached_property
    def moving(self) -> bool:
        """Whether a prompt holds a video, or several pictures that can be its frames."""
        if not self.mllm:
            return False
        per = "video" if "video" in self.adapter.geometry.per else "sample"
        found = units(self.adapter.parts(self.example["input_ids"], self.example), per)
        return any(u.frames and len(set(u.frames)) == 1 for u in found)

    def output(self) -> Tensor:
        with torch.no_grad():
            return output(self.model(**self.example))


def output(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out["image_features"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out


HOST = ("_previous_max_cache_length",)  # what generate() itself leaves


def snapshot(model: Any) -> dict[str, Any]:
    out = ledger.snapshot(model)
    for name in HOST:
        out[""][2].pop(name, None)
    return out


BUILT: dict[tuple[str, str], tuple[Any, dict[str, Tensor]]] = {}
BENCHES: dict[tuple[str, str, torch.dtype, str], Bench] = {}


def variants() -> list[tuple[str, str]]:
    known = [ADAPTERS.get(name) for name in ADAPTERS]
    return [(info.name, v) for info in known if info.package is None or find_spec(info.package) for v in info.tiny]


def built(family: str, variant: str) -> tuple[Any, dict[str, Tensor]]:
    if (family, variant) not in BUILT:
        BUILT[family, variant] = ADAPTERS.get(family).tiny[variant]()
    return BUILT[family, variant]


def experts(model: Any) -> bool:
    """Whether its tokens are sent to some of several MLPs."""
    return any(".experts." in name for name, _ in model.named_parameters())


def bench(family: str, variant: str, dtype: torch.dtype, attention: str) -> Bench:
    key = family, variant, dtype, attention
    if key not in BENCHES:
        model, inputs = built(family, variant)
        model = copy.deepcopy(model).to(dtype)
        if attention != "sdpa":
            model.set_attn_implementation(attention)
        if dtype == torch.float64 and experts(model):  # torch's grouped product takes no float64
            model.set_experts_implementation("eager")
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        adapter = bind(model)
        made = Bench(family, variant, model, adapter, _samples(adapter, inputs), inputs)
        made.output()
        made.clean, made.answer = snapshot(model), made.output()
        BENCHES[key] = made
    return BENCHES[key]


def _samples(adapter: Any, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every sample of a batch alone, without padding."""
    if not adapter.geometry.llm_layers:
        return []
    found = adapter.parts(inputs["input_ids"], inputs)
    out = []
    for b in range(len(found)):
        real = inputs["attention_mask"][b].bool()
        along = {k: inputs[k][b : b + 1, real] for k in ("input_ids", *adapter.follows) if k in inputs}
        out.append({**along, **adapter.slice_(inputs, found, b)})
    return out


def compose(b: Bench, draw: random.Random) -> tuple[dict[str, Tensor], str]:
    """A batch for the model, and on which side it is padded ("none", "left", "right")."""
    seed = torch.Generator().manual_seed(draw.randrange(2**31))
    if not b.mllm:
        images = {k: v for k, v in b.example.items() if v.is_floating_point() and v.ndim == 4}
        (name, like), count = next(iter(images.items())), draw.choice((1, 1, 2, 3))
        return {**b.example, name: torch.randn(count, *like.shape[1:], generator=seed).to(like.dtype)}, "none"
    rows = []
    for _ in range(draw.choices((1, 2, 3), (4, 5, 2))[0]):
        if draw.random() < 0.12:
            ids = torch.randint(WORDS.start, WORDS.stop, (1, draw.randint(2, 20)), generator=seed)
            rows.append({"input_ids": ids, **{k: torch.zeros_like(ids) for k in b.adapter.follows if k in b.example}})
            continue
        row = dict(draw.choice(b.samples))
        if draw.random() < 0.2 and "batch_num_images" not in row:
            row = _joined(b, row, draw.choice(b.samples))
        end = draw.choices(("as-is", "more", "image-last", "image-near"), (6, 4, 0.5, 0.7))[0]
        seen = b.adapter.prunable(row)[0].nonzero()[:, 0]
        length = row["input_ids"].shape[1]
        if end == "more":
            length += draw.randint(1, 12)
        elif end != "as-is":
            length = int(seen[-1]) + 1 + (end == "image-near")
        for k in ("input_ids", *b.adapter.follows):
            if k in row:
                row[k] = torch.nn.functional.pad(
                    row[k], (0, max(length - row[k].shape[1], 0)), value=WORDS.start if k == "input_ids" else 0
                )[:, :length]
        if b.family == "paligemma":  # its suffix is the last two tokens
            row["token_type_ids"] = torch.zeros_like(row["input_ids"])
            row["token_type_ids"][:, max(int(seen[-1]) + 1, length - 2) :] = 1
        words = row["input_ids"] >= WORDS.start
        row["input_ids"] = torch.where(
            words, torch.randint(WORDS.start, WORDS.stop, words.shape, generator=seed), row["input_ids"]
        )
        for k, v in row.items():
            if v.is_floating_point() and k.startswith("pixel"):
                row[k] = torch.where(v != 0, torch.randn(v.shape, generator=seed).to(v.dtype), v)
        rows.append(row)
    side = draw.choices(("left", "right"), (4, 1))[0]
    batch = collate(b, rows, side)
    return batch, side if not bool(batch["attention_mask"].all()) else "none"


def _joined(b: Bench, a: dict[str, Tensor], c: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two samples as one conversation."""
    out = {}
    for k in {**a, **c}:
        rows = k in ("input_ids", *b.adapter.follows) or (b.family == "smolvlm" and k.startswith("pixel"))
        out[k] = torch.cat([x[k] for x in (a, c) if k in x], int(rows))
    return out


def collate(b: Bench, rows: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    width = max(r["input_ids"].shape[1] for r in rows)
    out: dict[str, Tensor] = {}

    def padded(x: Tensor) -> Tensor:
        gap = width - x.shape[1]
        return torch.nn.functional.pad(x, (gap, 0) if side == "left" else (0, gap))

    for k in ("input_ids", *b.adapter.follows):
        if k in rows[0]:
            out[k] = torch.cat([padded(r[k]) for r in rows])
    out["attention_mask"] = torch.cat([padded(torch.ones_like(r["input_ids"])) for r in rows])
    names = [k for k in b.example if k not in out and any(k in r for r in rows)]
    if b.family == "smolvlm" and names:  # one row of tiles per sample
        tiles = max(r["pixel_values"].shape[1] for r in rows if "pixel_values" in r)
        for k in names:
            like = b.example[k]
            row = [r.get(k, like[:1, :0]) for r in rows]
            fill = [
                torch.full((1, tiles - x.shape[1], *like.shape[2:]), int(k != "pixel_values"), dtype=like.dtype)
                for x in row
            ]
            out[k] = torch.cat([torch.cat(pair, 1) for pair in zip(row, fill, strict=True)])
        return out
    return out | {k: torch.cat([r[k] for r in rows if k in r]) for k in names}


# --------------------------------------------------------------------------------------------------------------------
# recipes


def layer(draw: random.Random, b: Bench, kind: str = "llm") -> int:
    return draw.randrange(max(1, b.adapter.geometry.llm_layers if kind == "llm" else b.adapter.geometry.vision_layers))


def site(draw: random.Random, b: Bench) -> str:
    kinds = [k for k in b.adapter.geometry.provides if k != "pixels"]
    return within(draw, b, draw.choice(kinds))


def within(draw: random.Random, b: Bench, kind: str) -> str:
    """A site of this kind."""
    return kind if kind == "projector" else f"{kind}.{layer(draw, b, kind)}"


def ascending(draw: random.Random, b: Bench) -> tuple[int, ...]:
    return tuple(sorted(draw.sample(range(b.adapter.geometry.llm_layers), draw.randint(1, 3)))) if b.mllm else (1,)


DRAWN: dict[str, Callable[[random.Random, Bench], Any]] = {
    "site": site,
    "layer": layer,
    "layers": ascending,
    "split": layer,
    "fusion": lambda d, b: d.choice((0, 1, 1, 2, 3)),
    "grid": lambda d, b: d.choice((1, 1, 2, 2, 3)),
    "branch_layers": lambda d, b: d.choice((1, 1, 2)),
    "every": lambda d, b: d.choice((1, 2, 3)),
    "ratio": lambda d, b: d.choice((0.5, 0.7, 0.85, 1.0)),
    "ratios": lambda d, b: tuple(sorted((round(d.uniform(0.05, 1), 2) for _ in range(d.randint(1, 3))), reverse=True)),
    "r": lambda d, b: d.choice((0, 1, 2, 3, 5)),
    "attention": ascending,
    "mlp": ascending,
    "similarity": lambda d, b: tuple(round(d.uniform(-1, 1), 2) for _ in range(2 * b.adapter.geometry.llm_layers)),
    "scales": lambda d, b: d.choice(((1, 2), (1, 2, 4), (1, 3), (2, 4))),
    "truncate": lambda d, b: d.choice((0, 1, -1)),
    "beta": lambda d, b: d.choice((-1.0, -1.0, 1.0)),  # no rounding decides
    "inflect": lambda d, b: d.choice((-1.0, 0.0, 0.5, 1.0)),
}
EXTREME = (
    math.nan,
    math.inf,
    -math.inf,
    0,
    -1,
    0.0,
    -0.5,
    1e-9,
    2,
    10**9,
    1e300,
    "",
    "nonsense",
    True,
    (),
    (0, 0),
    None,
    [1, 2],
)


def options(draw: random.Random, b: Bench, name: str) -> dict[str, Any]:
    """Random options of a method: each left alone, or drawn within its kind."""
    info = METHODS.get(name)
    assert info.cls is not None
    hints = typing.get_type_hints(info.cls)
    out: dict[str, Any] = {}
    for key in info.options:
        if key == "weights" or draw.random() < (
            0.4 if key in ("site", "layer", "layers", "split", "variant") else 0.75
        ):
            continue
        kinds = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        if words := _words(info, key):
            out[key] = draw.choice(words)
        elif key in DRAWN:
            out[key] = DRAWN[key](draw, b)
        elif bool in kinds:
            out[key] = draw.random() < 0.5
        elif float in kinds or int in kinds:  # mostly of those that are allowed
            limits = _declared(info, key) if draw.random() < 0.95 else {}
            low = max((v for k in ("least", "above") if (v := limits.get(k)) is not None), default=0)
            if float in kinds:
                high = min((v for k in ("most", "below") if (v := limits.get(k)) is not None), default=low + 1)
                out[key] = round(draw.uniform(low, high), 2)
            else:
                out[key] = int(low) + draw.randint(0, 6)
    if info.fitted and draw.random() < 0.7:  # mostly with what it cannot do without
        out = {**info.elsewhere, **out}
    if "online" in out or "beta" in out and draw.random() < 0.9:  # neither without the other
        out = {"beta": -1.0, "online": draw.randint(1, 4), **out}
    if "ratios" in out:
        out["layers"] = tuple(sorted(draw.sample(range(max(b.adapter.geometry.llm_layers, 3)), len(out["ratios"]))))
    return out


def keep(draw: random.Random, b: Bench) -> int | float | None:
    n = b.adapter.geometry.tokens
    kind = draw.choices(("default", "fraction", "count", "all", "one"), (2, 5, 4, 0.7, 0.7))[0]
    if kind == "default":
        return None
    if kind == "fraction":
        return round(draw.uniform(0.05, 1), 3)
    return {"count": draw.randint(1, min(n, 20)), "all": 1.0, "one": 1}[kind]


ORDER = {"pixels": 0, "vision": 1, "projector": 2, "llm": 3}


def _declared(info: Any, option: str) -> Any:
    return next(f.metadata for f in dataclasses.fields(info.cls) if f.name == option)


def _words(info: Any, option: str) -> list:
    """What an option may be, where it is one of a few words."""
    return [w for w in _declared(info, option).get("choices") or () if w is not None]


def _shown(info: Any, geometry: Any) -> bool:
    there = geometry.provides | {"vision": geometry.provides.get("vision", frozenset()) | geometry.notes}
    return all(names <= there.get(kind, frozenset()) | geometry.traits for kind, names in info.needs.items())


def method(draw: random.Random, b: Bench) -> tuple[str, dict[str, Any]]:
    """A registered method that works here, by where and what it does first, so that few methods of a kind are drawn as
    often as many; with options that put it there."""
    if draw.random() < 0.03:
        return draw.choice(list(METHODS)), {}
    kind = draw.choice([k for k in b.adapter.geometry.provides if any(k in METHODS.get(m).kinds for m in METHODS)])
    able = [METHODS.get(m) for m in METHODS if kind in METHODS.get(m).kinds]
    if not b.moving or draw.random() < 0.5:  # where all that a method of videos could do is leave pictures whole
        able = [i for i in able if not i.video] or able
    deed = draw.choice(sorted({(i.merges, i.routes, i.skips, i.nests) for i in able}))
    alike = [i for i in able if (i.merges, i.routes, i.skips, i.nests) == deed]
    info = draw.choice(alike)
    if draw.random() < 0.9:  # whose sources are there
        info = draw.choice([i for i in alike if _shown(i, b.adapter.geometry)] or alike)
    if kind == info.kinds[0] or "site" not in info.options or _words(info, "site"):
        return info.name, {}
    return info.name, {"site": within(draw, b, kind)}


def recipe(draw: random.Random, b: Bench) -> Recipe:
    """One to three stages, mostly in the order of their places."""
    stages = []
    for _ in range(draw.choices((1, 2, 3), (6, 3, 1))[0]):
        name, at = method(draw, b)
        info = METHODS.get(name)
        given = options(draw, b, name) | at
        own = any(k in given for k in ("r", "ratio", "ratios"))
        stages.append(Stage(method=name, keep=None if own or not info.budgeted else keep(draw, b), options=given))

    def place(s: Stage) -> tuple[int, int]:
        kind, _, number = str(s.options.get("site") or METHODS.get(s.method).kinds[0]).partition(".")
        first = s.options.get("layer", s.options.get("split", number or 0))
        first = (s.options.get("layers") or (first,))[0]
        return ORDER.get(kind, 0), int(first) if str(first).isdigit() else 0

    if draw.random() < 0.95:
        stages.sort(key=place)
    return Recipe(name="fuzz", stages=tuple(stages))


def overrides(draw: random.Random, b: Bench, chosen: Recipe) -> dict[str, Any]:
    out: dict[str, Any] = {}
    geometry = b.adapter.geometry
    if b.mllm and draw.random() < 0.2:
        out["positions"] = "compact" if not geometry.mrope or draw.random() < 0.1 else "original"
    tiled = "tile" in geometry.per[1:]
    if draw.random() < (0.5 if tiled else 0.25):
        out["per"] = draw.choice(geometry.per)
    if "prompt" in geometry.traits and b.family != "causal-lm":
        out["per"] = "prompt"
    if draw.random() < 0.2:
        out["seed"] = draw.randrange(1000)
    info = METHODS.get(chosen.stages[-1].method)
    if draw.random() < 0.06 and info.budgeted:
        out[draw.choice(("effective_tokens", "flops"))] = round(draw.uniform(0.4, 1), 2)
    return out


# ---------------------------------------------------------------------------------------------------------------- one
# run's tools


@dataclass
class Case:
    """One seed: everything drawn, and what the ways of running share. ``on``: attached, or the control without."""

    b: Bench
    draw: random.Random
    inputs: dict[str, Tensor]
    side: str
    chosen: Recipe
    overrides: dict[str, Any]
    dtype: torch.dtype
    on: bool = True
    handle: Any = None
    entered: list[tuple[Tensor, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return self.b.model

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"]

    def equal(self, got: Tensor, want: Tensor, what: str, times: float = 1.0) -> None:
        if got.shape != want.shape:
            raise Mismatch(f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)}")
        if not got.numel():
            return
        finite = want.isfinite()
        if not torch.equal(finite, got.isfinite()):
            raise Mismatch(f"{what}: not finite where the dense model is, or the other way round")
        error = (
            float((got.double() - want.double())[finite].abs().max() / want.double()[finite].abs().max().clamp_min(1))
            if bool(finite.any())
            else 0.0
        )
        if not error <= LIMITS[self.dtype] * times:
            raise Mismatch(f"{what}: {error:.1e} off")

    def placed(self, mask: Tensor) -> dict[str, Tensor]:
        """Positions as ``generate`` gives them; families with three axes derive theirs."""
        if self.b.adapter.geometry.mrope:
            return {}
        return {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0) + self.b.adapter.first_position}

    def done(self, rows: list[int] | None = None, labels: Tensor | None = None) -> Done:
        """What the last prefill did, for the dense model; nothing without an attachment. ``rows``: the report's sample
        of each row of the inputs."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        count = 0 if ids is None else len(ids)
        if not self.on:
            return Done(ids, rows=list(range(count)), mask=mask)
        try:
            report = self.handle.report()
        except VtpruneError as e:
            raise Mismatch(f"it ran, and the report says: {e}") from e
        self.check(report, self._needed(labels, len(report.visual_tokens)))
        planned = plan(self.handle.geometry, self.handle.recipe)
        cuts = [(n, c) for n, (_, _, cs) in enumerate(planned) for c in cs]
        passes = list({(id(run), g): (run, g) for run, g in self.handle.passes}.values())
        given = None
        if self.entered and any(s.site == "pixels" for s in report.stages):
            given = self.entered[0]
        return Done(
            ids,
            report.stages,
            passes,
            cuts,
            [m for _, m, _ in planned],
            rows or list(range(count)),
            self.handle.modules,
            self.handle.positions,
            given,
            mask,
            labels,
            report.skipped,
            report.grids,
            self._moving(),
        )

    def _moving(self) -> bool:
        """Whether there are frames of videos among the inputs' rasters."""
        if not self.b.mllm:
            return False
        return any(p.video >= 0 for sample in self.b.adapter.parts(self.ids, self.inputs) for p in sample)

    def _needed(self, labels: Tensor | None, rows: int) -> list[set[int]]:
        """Per sample the visual tokens that stay whatever their score: what an answer follows at once."""
        if not self.b.mllm:
            return [set()] * rows
        out = []
        for b, ids in enumerate(self.ids):
            told = None if labels is None else labels[b : b + 1]
            one = {"input_ids": ids[None], "attention_mask": self.mask[b : b + 1], "labels": told}
            columns = self.b.adapter.prunable(one)[0].nonzero()[:, 0].tolist()
            ends = {int(self.mask[b].nonzero()[-1])}
            if labels is not None:
                ends |= set(((labels[b, 1:] != -100) & (labels[b, :-1] == -100)).nonzero()[:, 0].tolist())
            out += [{columns.index(e) for e in ends if e in columns}] * max(rows // len(self.ids), 1)
        return out

    def check(self, report: Any, needed: list[set[int]]) -> None:
        """What a report must say whatever was done: indices in order, the counts they have, the best kept where tokens
        were ranked; and it is plain data."""
        report.to_dict()
        for s in report.stages:
            for i, k in enumerate(s.kept):
                if len(k) != s.tokens_out[i] or (
                    len(k) and (bool((k.diff() <= 0).any()) or int(k[0]) < 0 or int(k[-1]) >= report.visual_tokens[i])
                ):
                    raise Mismatch(
                        f"report: {s.site} of {s.method} keeps {k.tolist()} and says {s.tokens_out[i]} of "
                        f"{report.visual_tokens[i]}"
                    )
                if s.scores is None or s.units is None or s.assignment is not None or METHODS.get(s.method).merges:
                    continue
                more = ("go first", "tile by tile", "frame by frame")
                if any(words in METHODS.get(s.method).score for words in more):
                    continue  # its score is not all that decides
                score, unit = s.scores[i].nan_to_num(-math.inf, posinf=math.inf, neginf=-math.inf), s.units[i]
                chosen = torch.zeros(len(score), dtype=torch.bool)
                chosen[k] = True
                unit = unit.clone()
                unit[sorted(needed[i])] = -1
                for u in unit[unit >= 0].unique().tolist():
                    left, gone = score[(unit == u) & chosen], score[(unit == u) & ~chosen]
                    if len(left) and len(gone) and float(left.min()) < float(gone.max()):
                        raise Mismatch(
                            f"report: {s.site} of {s.method} dropped a score of {float(gone.max()):.3g} and kept "
                            f"{float(left.min()):.3g}"
                        )

    def ranked(self, dense: Dense) -> None:
        """The reported scores are those of the definition."""
        for place, want in dense.scores:
            stage = dense.done.stages[place]
            for b, row in enumerate(dense.done.rows):
                mine, told = want[b, dense.visual[b]], stage.scores[row]
                both = mine.isfinite() & told.isfinite()
                if bool(both.any()):
                    error = float((mine - told)[both].abs().max() / mine[both].abs().max().clamp_min(1e-3))
                    if error > 40 * LIMITS[self.dtype]:
                        raise Mismatch(
                            f"{stage.method} at {stage.site} ranks sample {b} by other scores than its own "
                            f"({error:.1e} off)"
                        )

    def dense(self, done: Done, inputs: dict[str, Tensor], model: Any = None, grad: bool = False) -> tuple[Any, Dense]:
        """The masked dense model's output for ``inputs``, and what it hid."""
        if "attention_mask" in inputs:
            done.mask = inputs["attention_mask"]
        self.detach()
        with Dense(self.model, self.b.adapter, done) as d, torch.set_grad_enabled(grad):
            return (model or self.model)(**inputs, **({"use_cache": False} if self.b.mllm else {})), d

    def attach(self) -> None:
        if self.on and self.handle is None:
            self.entered.clear()
            hook = self.b.adapter.lm.register_forward_pre_hook(self._enter, with_kwargs=True) if self.b.mllm else None
            try:
                self.handle = vtprune.attach(self.model, self.chosen, **self.overrides)
            except BaseException:
                if hook is not None:
                    hook.remove()
                raise
            self.hook, self.attached = hook, True
            self.entered.clear()  # of toy prompts

    hook: Any = None
    attached: bool = False
    residue: bool = False

    def _enter(self, module: Any, args: tuple, kwargs: dict) -> None:
        if kwargs.get("inputs_embeds") is not None:  # a model without images makes them itself
            embeds, planes = kwargs["inputs_embeds"].detach().clone(), []
            for plane in kwargs.get("deepstack_visual_embeds") or ():
                planes.append(embeds.new_zeros(*embeds.shape[:2], plane.shape[-1]))
                planes[-1][kwargs["visual_pos_masks"]] = plane.detach()
            self.entered.append((embeds, *planes))

    def detach(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def whole(self, answer: Tensor) -> dict[str, Tensor]:
        """The inputs with an answer ``[B, n]`` behind the prompt."""
        follows = {
            k: torch.cat([self.inputs[k], torch.full_like(answer, v)], 1)
            for k, v in self.b.adapter.follows.items()
            if k in self.inputs
        }
        mask = torch.cat([self.mask, torch.ones_like(answer)], 1)
        return {
            **self.inputs,
            **follows,
            "input_ids": torch.cat([self.ids, answer], 1),
            "attention_mask": mask,
            **self.placed(mask),
        }

    def words(self, n: int) -> Tensor:
        return torch.randint(
            WORDS.start,
            WORDS.stop,
            (len(self.ids), n),
            generator=torch.Generator().manual_seed(self.draw.randrange(2**31)),
        )

    def rows(self, d: Dense) -> Tensor:
        """Rows of the prompt whose output must be right: no padding, left at the end; of a routed prompt the text."""
        out = d.present & self.mask.bool()
        return out & ~d.visual if d.routed is not None else out


def cache_name() -> str:
    from transformers.models.llama.modeling_llama import LlamaModel

    return "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


CACHE = cache_name()


# --------------------------------------------------------------------------------------------------------------- ways
# of running


def forward(c: Case) -> None:
    """One forward, with and without positions, cache and an explicit mask; dropped rows of the output are zero."""
    ways = {**c.inputs, **(c.placed(c.mask) if c.draw.random() < 0.5 else {}), "use_cache": c.draw.random() < 0.7}
    c.attach()
    with torch.no_grad():
        out = c.model(**ways)
    got = out.logits
    done = c.done()
    cache = getattr(out, CACHE, None)
    if c.on and cache is not None and (done.stages or any(done.skipped)):
        _lengths(c, cache)
    ways.pop("use_cache")
    want, d = c.dense(done, ways)
    rows = c.rows(d)
    c.equal(got[rows], want.logits[rows], "forward")
    c.ranked(d)
    gone = ~d.present & c.mask.bool()
    if c.on and d.routed is None and bool((got[gone] != 0).any()):
        raise Mismatch("forward: dropped rows are not zero")


def _lengths(c: Case, cache: Any) -> None:
    report = c.handle.report()
    text = (c.mask.sum(1) - torch.tensor(report.visual_tokens)).tolist()
    planned = [cut for *_, cuts in plan(c.handle.geometry, c.handle.recipe) for cut in cuts]
    beside = {cut.layer for cut in planned if cut.action is Action.CONTEXT}
    evicting = sorted(cut.layer for cut in planned if cut.evict)
    left = {s.site: s.tokens_out for s in report.stages}
    for i, held in enumerate(cache.layers):
        counts = [row[i] for row in report.layer_tokens]
        behind = next((f"llm.{at}" for at in evicting if at > i), None)  # the cut that thins this cache out
        counts = left.get(behind, counts)
        want = max(t + n for t, n in zip(text, counts, strict=True))
        if all(f"llm.{i}.attention" in halves for halves in report.skipped):
            want = 0
        if i in beside:  # rows of visual tokens beside rows that go on, each as wide as its widest sample
            put = [s for s in report.stages if METHODS.get(s.method).routes and any(s.tokens_in)]
            put = [s for s in put if int(s.site.partition(".")[2]) <= i]
            stayed = put[-1].tokens_out if put else [row[i] for row in report.layer_tokens]
            want = max(t + n for t, n in zip(text, stayed, strict=True))
            want += max(row[i] - n for row, n in zip(report.layer_tokens, stayed, strict=True))
        if not getattr(held, "is_sliding", False) and held.get_seq_length() not in (want, want and c.ids.shape[1]):
            raise Mismatch(f"layer {i} caches {held.get_seq_length()} tokens, the report says {want}")


def _labels(c: Case) -> Tensor:
    """Answers somewhere in the text, in most samples."""
    labels = torch.full_like(c.ids, -100)
    for b in range(len(c.ids)):
        images = c.b.adapter.visual(c.ids)[b] & (c.b.family != "causal-lm")
        text = (c.mask[b].bool() & ~images).nonzero()[:, 0].tolist()
        for _ in range(c.draw.choice((0, 1, 1, 1, 2))):
            start = c.draw.choice(text)
            stop = start + c.draw.randint(1, 5)
            labels[b, start:stop] = torch.where(c.mask[b, start:stop].bool(), c.ids[b, start:stop], -100)
        labels[b, images] = -100
        labels[b, int(c.mask[b].nonzero()[0])] = -100  # in front of the first token is padding, which predicts nothing
    return labels


def _loss(logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    wanted = labels[:, 1:].masked_fill(~present[:, :-1], -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=-100)


def labels(c: Case) -> None:
    """A forward with labels: the loss and the logits."""
    wanted = _labels(c)
    c.attach()
    with torch.no_grad():
        out = c.model(**c.inputs, **c.placed(c.mask), labels=wanted.clone())
    want, d = c.dense(c.done(labels=wanted), {**c.inputs, **c.placed(c.mask)})
    rows = c.rows(d)
    c.equal(out.logits[rows], want.logits[rows], "labels: logits")
    c.ranked(d)
    if d.routed is None and bool((wanted[:, 1:] != -100)[d.present[:, :-1]].any()):
        c.equal(out.loss[None].float(), _loss(want.logits, wanted, d.present)[None], "labels: loss", 4)


def training(c: Case) -> None:
    """A training step: gradients are those of the masked dense model, with and without gradient checkpointing."""
    if c.dtype == torch.bfloat16:
        return labels(c)
    wanted = _labels(c)
    if not bool((wanted[:, 1:] != -100).any()):
        return
    checkpointing, reentrant = c.draw.random() < 0.6, c.draw.random() < 0.3
    model = c.model
    ends = ("layers.0.self_attn.q_proj.weight", "layers.5.mlp.down_proj.weight", "linear_1.weight")
    parameters = {n: p for n, p in model.named_parameters() if n.endswith(ends)}
    model.train()
    c.residue = True  # transformers leaves what checkpointing needs
    try:
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
                {"use_reentrant": reentrant}
            )
            model.enable_input_require_grads()
        before = snapshot(model)
        c.attach()
        out = model(**c.inputs, **c.placed(c.mask), labels=wanted.clone(), use_cache=False)
        if out.loss.isnan():
            return
        out.loss.backward()
        got = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        done = c.done(labels=wanted)
        c.detach()
        if snapshot(model) != before:
            raise Mismatch("training: not restored")
    finally:
        c.detach()
        if checkpointing:
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
            model.disable_input_require_grads()
        model.zero_grad()
        model.eval()
    want, d = c.dense(done, {**c.inputs, **c.placed(c.mask)}, grad=True)
    c.ranked(d)
    if d.routed is not None:
        return
    loss = _loss(want.logits, wanted, d.present)
    if not bool(loss.isfinite()):
        return
    c.equal(out.loss.detach()[None], loss.detach()[None], "training: loss", 4)
    for (n, g), w in zip(
        got.items(), torch.autograd.grad(loss, [parameters[n] for n in got], allow_unused=True), strict=True
    ):
        if w is not None and (
            done.given is None or "language_model" in n
        ):  # a tower whose pixels were reduced is not run again
            scale = float(w.abs().max().clamp_min(1e-4))
            c.equal(g / scale, w / scale, f"training: gradient of {n}", 20)


def generate(c: Case) -> None:
    """``generate`` in one of its modes, against one forward over prompt and answer."""
    if c.side == "right":
        c.side = "none"
        keep_first = int(c.mask.sum(1).argmax())
        c.inputs = _one(c, keep_first)
    modes: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sample": {"do_sample": True, "top_k": 20, "temperature": 1.3},
        "beams": {"num_beams": c.draw.choice((2, 3))},
        "beam-sample": {"num_beams": 2, "do_sample": True},
        "answers": {"do_sample": True, "num_return_sequences": c.draw.choice((2, 3))},
        "no-cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "static-beams": {"cache_implementation": "static", "num_beams": 2},
        "offloaded": {"cache_implementation": "offloaded"},
        "given": {},
        "keep-logits": {"logits_to_keep": 1},
        "quantised": {},
    }
    mode = c.draw.choices(list(modes), (6, 3, 3, 1, 2, 2, 3, 1, 1, 1, 1, 1))[0]
    c.notes.append(mode)
    how, steps = modes[mode], c.draw.choice((1, 2, 4))
    if mode in ("given", "quantised"):
        from transformers import DynamicCache, QuantizedCache

        config = c.model.config.get_text_config()
        if mode == "quantised":
            try:
                how = {CACHE: QuantizedCache(backend="fp8", config=config)}
            except ValueError:  # releases before this backend
                return
        else:
            how = {CACHE: DynamicCache(config=config)}
    rules = {
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "do_sample": False,
        "suppress_tokens": list(range(8)),
        **how,
    }
    c.attach()
    torch.manual_seed(1)
    with torch.no_grad(), _inline_streams():
        out = c.model.generate(
            **c.inputs, **rules, return_dict_in_generate=True, output_logits=True, output_scores=True
        )
    t, b = c.ids.shape[1], len(c.ids)
    times = len(out.sequences) // b
    which = c.draw.randrange(times)
    answer = out.sequences[which::times, t:]
    rows = len(c.handle.report().visual_tokens) // b if c.on else 1
    if mode == "no-cache" and c.on:  # the report is that of the last step
        with torch.no_grad():
            c.model(**c.inputs, **c.placed(c.mask))
        rows = 1
    want, d = c.dense(c.done([i * rows for i in range(b)]), c.whole(answer))
    c.ranked(d)
    reference = want.logits[:, t - 1 : -1]
    if "num_beams" in how:
        if "do_sample" not in how:
            score = reference.double().log_softmax(-1).gather(-1, answer[..., None]).sum((1, 2)) / steps
            c.equal(out.sequences_scores[which::times].double(), score, f"generate ({mode}): scores of the answers")
        else:
            c.equal(out.logits[0][:: how["num_beams"]], reference[:, 0], f"generate ({mode}): first step")
        return
    logits = torch.stack(out.logits, 1)[which::times]
    c.equal(logits[:, 0], reference[:, 0], f"generate ({mode}): first step")
    if mode != "quantised":
        c.equal(logits, reference, f"generate ({mode})")
        if mode == "greedy":
            best = reference[..., WORDS.start :].max(-1).values - reference.gather(-1, answer[..., None])[..., 0]
            if float(best.max()) > LIMITS[c.dtype] * float(reference.abs().max().clamp_min(1)) * 4:
                raise Mismatch("generate (greedy): not the best tokens")


class _Stream(contextlib.nullcontext):
    """A stream that runs everything at once."""

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextlib.contextmanager
def _inline_streams() -> Iterator[None]:
    """transformers copies offloaded caches on an accelerator's streams; without one, in line."""
    if torch.accelerator.is_available():
        yield
        return
    kept = torch.Stream, torch.cuda.default_stream
    torch.Stream = torch.cuda.default_stream = _Stream  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.Stream, torch.cuda.default_stream = kept  # type: ignore[misc]


def _one(c: Case, b: int) -> dict[str, Tensor]:
    """Sample ``b`` of the batch alone, without padding."""
    found = c.b.adapter.parts(c.ids, c.inputs)
    real = c.mask[b].bool()
    along = {
        k: c.inputs[k][b : b + 1, real] for k in ("input_ids", "attention_mask", *c.b.adapter.follows) if k in c.inputs
    }
    pixels = any(k.startswith("pixel") for k in c.inputs)
    return {**along, **(c.b.adapter.slice_(c.inputs, found, b) if pixels else {})}


def by_hand(c: Case) -> None:
    """A prompt is read, then tokens follow one at a time or several at once, with and without positions."""
    if c.side == "right" and c.b.adapter.geometry.mrope:
        c.inputs, c.side = _one(c, 0), "none"
    pieces = [c.draw.choice((1, 1, 1, 2, 3)) for _ in range(c.draw.choice((1, 2, 3)))]
    answer = c.words(sum(pieces))
    from transformers import DynamicCache, StaticCache

    config = c.model.config.get_text_config()
    kind = c.draw.choices(("own", "dynamic", "static"), (3, 1, 1))[0]
    c.notes.append(kind)
    cache = {
        "own": lambda: None,
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=c.ids.shape[1] + 16),
    }[kind]()
    placed, at = c.draw.random() < 0.7 or c.side != "none", c.ids.shape[1]
    c.attach()
    got = []
    with torch.no_grad():
        out = c.model(
            **c.inputs,
            **(c.placed(c.mask) if placed else {}),
            use_cache=True,
            **({CACHE: cache} if cache is not None else {}),
        )
        prompt, cache = out.logits, getattr(out, CACHE)
        for n in pieces:
            mask = torch.cat([c.mask, torch.ones_like(answer[:, : at - c.ids.shape[1] + n])], 1)
            where = {k: v[:, at : at + n] for k, v in c.placed(mask).items()} if placed else {}
            extra = {
                k: torch.full((len(c.ids), n), v)
                for k, v in c.b.adapter.follows.items()
                if k in c.inputs and k != "mm_token_type_ids"
            }
            out = c.model(
                input_ids=answer[:, at - c.ids.shape[1] :][:, :n],
                attention_mask=mask,
                **where,
                **extra,
                use_cache=True,
                **{CACHE: cache},
            )
            got.append(out.logits)
            cache, at = getattr(out, CACHE), at + n
    whole = c.whole(answer)
    if not placed:
        whole.pop("position_ids", None)
    want, d = c.dense(c.done(), whole)
    rows = c.rows(d)
    c.equal(prompt[rows], want.logits[:, : c.ids.shape[1]][rows], "by hand: the prompt")
    c.equal(torch.cat(got, 1), want.logits[:, c.ids.shape[1] :], f"by hand: pieces of {pieces}")


def second_turn(c: Case) -> None:
    """``generate``, then ``generate`` again with the cache and a longer text."""
    if c.side != "none":
        c.inputs, c.side = _one(c, int(c.mask.sum(1).argmax())), "none"
    rules = {
        "do_sample": False,
        "suppress_tokens": list(range(8)),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    more, t = c.words(c.draw.choice((1, 3))), c.ids.shape[1]
    c.attach()
    with torch.no_grad():
        first = c.model.generate(**c.inputs, **rules, max_new_tokens=2, min_new_tokens=2)
        answer = torch.cat([first.sequences[:, t:], more], 1)
        whole = c.whole(answer)
        rest = {k: whole[k] for k in ("input_ids", "attention_mask", *c.b.adapter.follows) if k in whole}
        done = c.done()
        out = c.model.generate(**rest, **{CACHE: getattr(first, CACHE)}, **rules, max_new_tokens=2, min_new_tokens=2)
    answer = out.sequences[:, t:]
    want, _ = c.dense(done, c.whole(answer))
    c.equal(torch.stack(out.logits, 1), want.logits[:, -3:-1], "second turn")


def interleaved(c: Case) -> None:
    """Two requests whose steps alternate give what each gives alone; the reports are those of their own prompts."""
    a, b = _one(c, 0), _one(c, len(c.ids) - 1)
    b = {
        **b,
        "input_ids": torch.where(
            b["input_ids"] >= WORDS.start, b["input_ids"].flip(1).clamp_min(WORDS.start), b["input_ids"]
        ),
    }
    answer = c.words(3)[:1]

    def steps(one: dict[str, Tensor]) -> Iterator[Tensor]:
        mask, cache = one["attention_mask"], None
        for i in range(3):
            with torch.no_grad():
                if cache is None:
                    out = c.model(**one, **c.placed(mask), use_cache=True)
                else:
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                    where = {k: v[:, -1:] for k, v in c.placed(mask).items()}
                    out = c.model(
                        input_ids=answer[:, i : i + 1], attention_mask=mask, **where, use_cache=True, **{CACHE: cache}
                    )
            cache = getattr(out, CACHE)
            yield out.logits[:, -1]

    c.attach()
    alone = [list(steps(a)), list(steps(b))]
    both = list(zip(steps(a), steps(b), strict=True))
    for i, pair in enumerate(both):
        for got, want in zip(pair, (alone[0][i], alone[1][i]), strict=True):
            c.equal(got, want, "interleaved")


def singles(c: Case) -> None:
    """A batch gives what its samples give alone: the same tokens kept, the same logits."""
    seeds = c.draw.random() < 0.3
    c.attach()
    if (
        c.on
        and seeds
        and not any(
            cut.kind in ("vision", "pixels") for *_, cs in plan(c.handle.geometry, c.handle.recipe) for cut in cs
        )
    ):
        c.handle.reseed(list(range(len(c.ids))))
    else:
        seeds = False
    with torch.no_grad():
        out = c.model(**c.inputs, **c.placed(c.mask)).logits
        report = c.handle.report() if c.on else None
        for b in range(len(c.ids)):
            one = _one(c, b)
            if c.on and seeds:
                c.handle.reseed([b])
            got = c.model(**one, **c.placed(one["attention_mask"])).logits
            if report is not None:
                alone = c.handle.report()
                if report.visual_tokens[b] != alone.visual_tokens[0]:
                    raise Mismatch(
                        f"singles: sample {b} has {report.visual_tokens[b]} visual tokens in the batch, "
                        f"{alone.visual_tokens[0]} alone"
                    )
                for s, t in zip(report.stages, alone.stages, strict=False) if report.visual_tokens[b] else ():
                    if not torch.equal(s.kept[b], t.kept[0]) and not (_tie(s, b, t, c.dtype) or _by_batch(c)):
                        raise Mismatch(
                            f"singles: sample {b} keeps {s.kept[b].tolist()} at {s.site} of {s.method} in the batch, "
                            f"{t.kept[0].tolist()} alone"
                        )
                    if not torch.equal(s.kept[b], t.kept[0]):
                        return
            c.equal(got[0], out[b, c.mask[b].bool()], f"singles: sample {b}")


def _by_batch(c: Case) -> bool:
    """Whether a stage is told to go by the whole batch (FlowCut's ``batch="max"``, as its official code does)."""
    return "max" in [stage.options.get("batch") for stage in c.chosen.stages]


def _tie(s: Any, b: int, t: Any, dtype: torch.dtype) -> bool:
    """Whether two selections differ only in tokens of the same score up to rounding."""
    if s.scores is None or len(s.kept[b]) != len(t.kept[0]):
        return False
    other = set(s.kept[b].tolist()) ^ set(t.kept[0].tolist())
    values = s.scores[b][sorted(other)]
    return float(values.max() - values.min()) <= 2 * LIMITS[dtype] * float(values.abs().max().clamp_min(1e-9))


def core_call(c: Case) -> None:
    """The inner model, without the head."""
    ways = {**c.inputs, **c.placed(c.mask)}
    c.attach()
    with torch.no_grad():
        got = c.model.base_model(**ways).last_hidden_state
    done = c.done()
    want, d = c.dense(done, ways, c.model.base_model)
    rows = c.rows(d)
    c.equal(got[rows], want.last_hidden_state[rows], "inner model")


def features(c: Case) -> None:
    """The image features asked for by themselves, then handed in."""
    core = c.model.base_model
    if "pixel_values" not in c.inputs or not hasattr(core, "get_image_features"):
        return
    names = inspect.signature(core.get_image_features).parameters
    given = {k: v for k, v in c.inputs.items() if k in names and k not in ("input_ids", "attention_mask")}
    handed = (
        "mm_encoder_outputs" in inspect.signature(c.model.forward).parameters and "pixel_values_videos" not in c.inputs
    )
    c.attach()
    with torch.no_grad():
        made = core.get_image_features(**given, return_dict=True)
        found = getattr(made, "pooler_output", made)
        rows = torch.cat(list(found)) if isinstance(found, list | tuple) else found
        if not bool(rows.isfinite().all()):
            raise Mismatch("image features: rows of infinities in the caller's hands")
        if not handed:
            return
        rest = {k: v for k, v in c.inputs.items() if not k.startswith("pixel")}
        got = c.model(**rest, **c.placed(c.mask), mm_encoder_outputs={"image": made}).logits
    want, d = c.dense(c.done(), {**c.inputs, **c.placed(c.mask)})
    rows = c.rows(d)
    c.equal(got[rows], want.logits[rows], "image features handed in")


def twice(c: Case) -> None:
    """The same again is bitwise the same, also after an exception in the middle of a forward, and in a copy of the
    inputs."""
    layers = c.b.adapter.all_layers()
    c.attach()
    with torch.no_grad():
        first = output(c.model(**c.inputs))
        trap = layers[c.draw.randrange(len(layers))].register_forward_pre_hook(_raise)
        try:
            c.model(**c.inputs)
        except KeyboardInterrupt:
            pass
        finally:
            trap.remove()
        if not torch.equal(output(c.model(**{k: v.clone() for k, v in c.inputs.items()})), first):
            raise Mismatch("twice: another answer the second time")


def _raise(*_: Any) -> None:
    raise KeyboardInterrupt


BAD = (
    *("short-mask", "long-mask", "no-mask", "bool-mask", "4d-mask"),
    *("placeholder-less", "placeholder-more", "image-less", "half-pixels", "no-pixels"),
)


def bad_inputs(c: Case) -> None:
    """Inputs that are not quite right: refused by somebody, or right."""
    kind = c.draw.choice(BAD)
    c.notes.append(kind)
    x = dict(c.inputs)
    if kind == "short-mask":
        x["attention_mask"] = c.mask[:, :-1]
    elif kind == "long-mask":
        x["attention_mask"] = torch.cat([c.mask, c.mask[:, -1:]], 1)
    elif kind == "bool-mask":
        x["attention_mask"] = c.mask.bool()
    elif kind == "no-mask":
        del x["attention_mask"]
    elif kind == "4d-mask":
        t = c.ids.shape[1]
        if bool(
            ((c.mask.sum(1) == t - 1) & (c.mask[:, -1] == 0)).any()
        ):  # that mask is one of a prompt without padding
            raise NoReference(kind)
        seen = torch.ones(t, t, dtype=torch.bool).tril() & c.mask[:, None, None].bool() | torch.eye(t, dtype=torch.bool)
        x["attention_mask"] = torch.zeros(seen.shape, dtype=c.dtype).masked_fill(~seen, torch.finfo(c.dtype).min)
    elif kind.startswith("placeholder"):
        ids = c.ids.clone()
        marks = c.b.adapter.visual(ids).nonzero()
        if len(marks):
            b, at = marks[0].tolist() if kind.endswith("less") else marks[-1].tolist()
            if kind.endswith("less"):
                ids[b, at] = WORDS.start
            elif at + 1 < ids.shape[1]:
                ids[b, at + 1] = ids[b, at]
        x["input_ids"] = ids
    elif (
        kind == "image-less"
        and "pixel_values" in x
        and c.b.family not in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
    ):
        x["pixel_values"] = x["pixel_values"][:-1]
    elif kind == "half-pixels":
        x = {k: v.half() if v.is_floating_point() else v for k, v in x.items()}
    elif kind == "no-pixels":
        x = {k: v for k, v in x.items() if not k.startswith("pixel")}
    with torch.no_grad():
        try:
            c.model(**x)
        except Exception:
            dense = False
        else:
            dense = True
    c.attach()
    try:
        with torch.no_grad():
            got = c.model(**x).logits
    except VtpruneError:
        raise
    except Exception:
        if dense:
            raise
        return
    if not dense:
        if c.on and kind not in ("no-pixels",):
            raise Mismatch(f"bad inputs ({kind}): answered, and the dense model raises")
        return
    visual = bool(c.b.adapter.visual(x["input_ids"]).any()) and c.b.family != "causal-lm"
    if visual and kind in ("short-mask", "long-mask"):
        raise Mismatch(f"bad inputs ({kind}): answered")
    if (visual and kind == "no-pixels") or kind.endswith("-mask") and kind.startswith(("short", "long")):
        raise NoReference(kind)
    if kind == "no-mask":
        c.inputs = {**x, "attention_mask": torch.ones_like(c.mask)}
    done = c.done()
    done.ids = x["input_ids"]
    c.detach()
    with Dense(c.model, c.b.adapter, done) as d, torch.no_grad():
        want = c.model(**x, use_cache=False).logits
    rows = c.rows(d)
    c.equal(got[rows], want[rows], f"bad inputs ({kind})")


def extreme(c: Case) -> None:
    """One option at a value that makes no sense, or nearly: refused when attached, or right."""
    stage = c.chosen.stages[-1]
    info = METHODS.get(stage.method)
    names = [*info.options, "keep", "seed", "per", "positions", "effective_tokens", "flops"]
    name, value = c.draw.choice(names), c.draw.choice(EXTREME)
    c.notes.append(f"{name}={value!r}")
    if name in info.options:
        rest = {k: v for k, v in stage.options.items() if k != name}
        c.chosen = Recipe(
            name="fuzz",
            stages=(*c.chosen.stages[:-1], Stage(method=stage.method, keep=stage.keep, options={**rest, name: value})),
        )
    else:
        c.overrides = {k: v for k, v in c.overrides.items() if k not in ("effective_tokens", "flops")} | {name: value}
    if not c.on:
        return
    (forward if c.b.mllm else tower)(c)


def tower(c: Case) -> None:
    """A bare tower: what leaves its last block, and what is read from a class token."""
    c.attach()
    got, rows = _last_block(c)
    done = c.done() if c.on else Done()
    c.detach()
    done.ids = None
    with Dense(c.model, c.b.adapter, done):
        want, whole = _last_block(c)
    p = c.b.adapter.geometry.prefix
    kept = done.stages[-1].kept if done.stages else [torch.arange(whole.shape[1] - p)] * len(whole)
    for g, (row, dense, k) in enumerate(zip(rows, whole, kept, strict=True)):
        layout = done.passes[g][0].index[g] if done.passes else k
        places = layout[layout >= 0].argsort()  # raster order, whatever the order in the tower
        c.equal(torch.cat([row[:p], row[p:][places]]), torch.cat([dense[:p], dense[p:][k]]), f"tower: image {g}")
    merges = any(s.assignment is not None for s in done.stages)
    if got.ndim == 2 and (c.b.adapter.class_readout or not done.stages) and not merges:
        c.equal(got, want, "tower: output")


def _last_block(c: Case) -> tuple[Tensor, Tensor]:
    last: list[Tensor] = []
    hook = c.b.adapter.tower_blocks()[-1].register_forward_hook(
        lambda m, a, o: last.append(o[0] if isinstance(o, tuple) else o)
    )
    try:
        with torch.no_grad():
            return output(c.model(**c.inputs)), last[-1]
    finally:
        hook.remove()


def tower_singles(c: Case) -> None:
    """A batch of images gives what each gives alone, bare tower."""
    (name, images), *_ = [(k, v) for k, v in c.inputs.items() if v.is_floating_point() and v.ndim == 4]
    c.attach()
    with torch.no_grad():
        both = c.model(**c.inputs)
        both = (
            both.logits
            if hasattr(both, "logits")
            else getattr(both, "pooler_output", None)
            if hasattr(both, "pooler_output")
            else output(both)
        )
        report = c.handle.report() if c.on else None
        for g in range(len(images)):
            one = c.model(**{**c.inputs, name: images[g : g + 1]})
            one = (
                one.logits
                if hasattr(one, "logits")
                else getattr(one, "pooler_output", None)
                if hasattr(one, "pooler_output")
                else output(one)
            )
            if report is not None:
                for s, t in zip(report.stages, c.handle.report().stages, strict=True):
                    if not torch.equal(s.kept[g], t.kept[0]):
                        if _tie(s, g, t, c.dtype) or c.dtype == torch.bfloat16:
                            return
                        if _by_batch(c):
                            return
                        raise Mismatch(f"singles: image {g} keeps other tokens at {s.site} of {s.method} than alone")
            if one is not None and one.ndim == 2:
                c.equal(one[0], both[g], f"singles: image {g}")


def tower_methods(c: Case) -> None:
    """A tower's other ways in: they are pruned like the forward, or refuse."""
    model = c.model
    (name, images), *_ = [(k, v) for k, v in c.inputs.items() if v.is_floating_point() and v.ndim == 4]
    c.attach()
    with torch.no_grad():
        whole = output(model(**c.inputs))
        if hasattr(model, "forward_features"):
            way = c.draw.choice(("features", "intermediates", "layers"))
            c.notes.append(way)
            if way == "features":
                c.equal(model.forward_head(model.forward_features(images)), whole, "forward_head(forward_features)")
            elif way == "intermediates":
                c.equal(
                    model.forward_head(model.forward_intermediates(images)[0]),
                    whole,
                    "forward_head(forward_intermediates)",
                )
            else:
                found = model.get_intermediate_layers(images, n=1)[0]
                stages = c.handle.report().stages if c.on else ()
                if stages and len(stages[-1].kept[0]) < found.shape[1] == c.b.adapter.geometry.tokens:
                    raise Mismatch("get_intermediate_layers: as many tokens as without pruning")
        elif hasattr(model, "encode_image"):
            c.equal(model.encode_image(images, normalize=True), whole, "encode_image")
        else:
            states = model(**c.inputs, output_hidden_states=True).hidden_states
            if states is not None and not bool(states[-1].isfinite().all()):
                raise Mismatch("hidden states: not finite")


WAYS: dict[str, tuple[Callable[[Case], None], float]] = {
    "forward": (forward, 6),
    "labels": (labels, 3),
    "training": (training, 1),
    "generate": (generate, 7),
    "by-hand": (by_hand, 4),
    "second-turn": (second_turn, 2),
    "interleaved": (interleaved, 1),
    "singles": (singles, 4),
    "core": (core_call, 1),
    "features": (features, 1),
    "twice": (twice, 1),
    "bad-inputs": (bad_inputs, 1.5),
    "extreme": (extreme, 1.5),
}
TOWER_WAYS: dict[str, tuple[Callable[[Case], None], float]] = {
    "tower": (tower, 5),
    "tower-singles": (tower_singles, 3),
    "tower-methods": (tower_methods, 1),
    "twice": (twice, 1),
    "extreme": (extreme, 1.5),
}


# --------------------------------------------------------------------------------------------------------------------
# one seed


@dataclass(frozen=True)
class Outcome:
    seed: int
    kind: str
    family: str
    way: str
    recipe: str
    detail: str = ""


def run(seed: int, families: tuple[str, ...] = (), ways: tuple[str, ...] = ()) -> Outcome:
    """One seed from the drawing to the model as it was. The restrictions belong to the seed: other ones draw other
    things."""
    draw = random.Random(seed)
    pool = [v for v in variants() if not families or v[0] in families]
    weights = [0.4 if f in ("hf-vit", "timm-vit", "open-clip", "generic") else 1.0 for f, _ in pool]
    family, variant = draw.choices(pool, weights)[0]
    dtype = draw.choices((torch.float32, torch.float64, torch.bfloat16), (85, 8, 7))[0]
    attention = (
        draw.choices(("sdpa", "eager"), (4, 1))[0] if family not in ("timm-vit", "open-clip", "hf-vit") else "sdpa"
    )
    if attention == "eager" and dtype == torch.float64:  # stock eager attention gives NaN there for left padding
        dtype = torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype == torch.bfloat16 and experts(
            built(family, variant)[0]
        ):  # nearly equal experts: rounding sends the token elsewhere
            dtype = torch.float32
        b = bench(family, variant, dtype, attention)
        known = {k: v for k, v in (WAYS if b.mllm else TOWER_WAYS).items() if not ways or k in ways}
        if not known:
            return Outcome(seed, "ok", family, "-", "")
        if b.mllm and draw.random() < 0.08:
            b = dataclasses.replace(b, adapter=of_prompts(b.adapter))
        way = draw.choices(list(known), [w for _, w in known.values()])[0]
        inputs, side = compose(b, draw)
        chosen = recipe(draw, b)
        case = Case(b, random.Random(seed + 1), inputs, side, chosen, overrides(draw, b, chosen), dtype)
        kind, detail = _try(known[way][0], case)
        if kind in FAULTS and way != "extreme":
            control = Case(b, random.Random(seed + 1), dict(inputs), side, chosen, {}, dtype, on=False)
            other = _try(known[way][0], control)[0]
            if other in FAULTS:
                kind, detail = "host", detail
        if kind not in FAULTS:
            after = snapshot(b.model)
            if case.residue:
                BENCHES.pop((family, variant, dtype, attention))
            elif after != b.clean:
                kind, detail = "MISMATCH", f"not restored: {[k for k in b.clean if b.clean[k] != after.get(k)][:2]}"
            elif not torch.equal(b.output(), b.answer):
                kind, detail = "MISMATCH", "not restored: another answer than before"
    if kind in FAULTS or kind == "host":
        BENCHES.pop((family, variant, dtype, attention), None)  # it may be dirty
    parts = [
        [*([f"keep={s.keep}"] if s.keep is not None else []), *(f"{k}={v!r}" for k, v in s.options.items())]
        for s in chosen.stages
    ]
    stages = " + ".join(f"{s.method}({', '.join(part)})" for s, part in zip(chosen.stages, parts, strict=True))
    told = f"{stages} {case.overrides or ''} {attention} {str(dtype)[6:]} {side} x{len(next(iter(inputs.values())))}"
    return Outcome(seed, kind, f"{family}/{variant}", " ".join([way, *case.notes]), told, detail)


def _try(way: Callable[[Case], None], case: Case) -> tuple[str, str]:
    if hasattr(case.model.base_model if case.b.mllm else None, "rope_deltas"):
        case.model.base_model.rope_deltas = None  # the last prompt's, which a prompt of text alone would go by
    try:
        way(case)
    except NoReference as e:
        return "ok", f"no reference: {e}"
    except VtpruneError as e:
        if KERNEL.match(str(e)):
            return "RAW", f"refused in the words of a kernel: {e}"
        return "late" if case.attached else "refused", str(e)
    except Mismatch as e:
        return "MISMATCH", str(e)
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        return (
            "RAW",
            f"{type(e).__name__}: {str(e)[:150]} ({os.path.basename(where.filename)}:{where.lineno} {where.name})".replace(  # noqa: E501
                "\n", " "
            ),
        )
    finally:
        case.detach()
    return "ok", ""


# --------------------------------------------------------------------------------------------------------------------
# command


def _work(job: tuple[list[int], tuple[str, ...], tuple[str, ...], float]) -> list[Outcome]:
    torch.set_num_threads(1)
    seeds, families, ways, until = job
    out = []
    for seed in seeds:
        if time.time() > until:
            break
        out.append(run(seed, families, ways))
    return out


def sweep(
    seeds: range,
    *,
    jobs: int = 1,
    seconds: float = math.inf,
    families: tuple[str, ...] = (),
    ways: tuple[str, ...] = (),
) -> Iterator[Outcome]:
    until = time.time() + seconds
    if jobs <= 1:
        for seed in seeds:
            if time.time() > until:
                return
            yield run(seed, families, ways)
        return
    chunks = [(list(seeds)[i : i + 50], families, ways, until) for i in range(0, len(seeds), 50)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for found in pool.imap(_work, chunks):
            yield from found


def table(outcomes: list[Outcome]) -> str:
    kinds = ("ok", "refused", "late", "host", *FAULTS)
    lines = []
    for title, of in (("family", lambda o: o.family.partition("/")[0]), ("way", lambda o: o.way.partition(" ")[0])):
        lines.append(f"{title:18}" + "".join(f"{k:>10}" for k in kinds))
        for name in sorted({of(o) for o in outcomes}):
            found = Counter(o.kind for o in outcomes if of(o) == name)
            lines.append(f"{name:18}" + "".join(f"{found[k]:>10}" for k in kinds))
    total = Counter(o.kind for o in outcomes)
    lines.append(f"{'all':18}" + "".join(f"{total[k]:>10}" for k in kinds))
    refusals = Counter(re.sub(r"[0-9.]+", "#", o.detail)[:150] for o in outcomes if o.kind == "late")
    lines += [
        "",
        "refused by the forward, not by attach:",
        *(f"{n:>6}  {text}" for text, n in refusals.most_common(25)),
    ]
    return "\n".join(lines)


def line(o: Outcome, more: str = "") -> str:
    return (
        f"{o.kind} python tests/fuzz.py --seeds {o.seed}:{o.seed + 1}{more}  # {o.family} {o.way}: {o.recipe}: "
        f"{o.detail}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:1000", help="FIRST:END")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--family", default="", help="of these families only, with commas between")
    parser.add_argument(
        "--way", default="", help=f"in these ways only: {', '.join(dict.fromkeys([*WAYS, *TOWER_WAYS]))}"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    first, _, end = given.seeds.partition(":")
    only = {"families": tuple(filter(None, given.family.split(","))), "ways": tuple(filter(None, given.way.split(",")))}
    more = "".join(f" --{k} {v}" for k, v in (("family", given.family), ("way", given.way)) if v)
    outcomes, began = [], time.time()
    for o in sweep(range(int(first), int(end or int(first) + 1)), jobs=given.jobs, seconds=given.seconds, **only):
        outcomes.append(o)
        if o.kind in FAULTS or given.seeds.endswith(f":{int(first) + 1}"):
            print(line(o, more), flush=True)
    print(table(outcomes))
    print(f"{len(outcomes)} seeds in {time.time() - began:.0f} s")
    return int(any(o.kind in FAULTS for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
