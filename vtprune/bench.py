"""Measures methods on questions with known answers: accuracy per ability, cost, prefill time against dense in the same
run, and where tokens are kept."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import __version__, cost, timing
from .answer import generate, open_image, prepare
from .attach import ATTACH_OPTIONS, TARGETS, attach, bind, load_recipe
from .figures import prefill_text
from .ledger import stopwatch
from .methods.base import METHODS, OWN_BUDGETS, make
from .recipe import Recipe
from .runs import Journal, RunError, alike, digest, fingerprint, read, slug, write
from .types import Report, VtpruneError

TIMED = 4  # questions in the batch whose prefill is timed
MAX_NEW_TOKENS = 5


@dataclass(frozen=True)
class Sample:
    """One question. ``image``: RGB picture or a path; ``boxes``: (left, top, right, bottom) pixels where the answer
    lies; ``source``: ``"<set>/<image>"``."""

    image: Image.Image | str | Path
    question: str
    answer: str
    ability: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    source: str = ""  # by default the picture itself

    def __post_init__(self) -> None:
        if not self.source:
            what = (
                self.image
                if not isinstance(self.image, Image.Image)
                else digest(self.image.size, self.image.tobytes().hex())
            )
            object.__setattr__(self, "source", f"questions/{what}")

    @property
    def set(self) -> str:
        return self.source.partition("/")[0]

    def picture(self) -> Image.Image:
        return self.image if isinstance(self.image, Image.Image) else open_image(self.image)


# ---------------------------------------------------------------------------------------------------------------
# samples


def easy_vqa_samples(n: int, split: str = "test") -> list[Sample]:
    """``n`` questions of easy-VQA: colour, shape, yes/no in turn (yes and no in turn); always the same. Raises
    :class:`VtpruneError` without the package."""
    from .data import easyvqa

    if n < 1:
        raise VtpruneError(f"the number of samples must be at least 1, got {n}")
    try:
        questions = easyvqa.questions(split)
    except ModuleNotFoundError as e:
        raise VtpruneError(str(e)) from e
    order = np.random.RandomState(0).permutation(len(questions))
    pools: dict[str, list] = {"color": [], "shape": [], "yes": [], "no": []}
    for i in order:
        q = questions[i]
        pools[q.answer if q.type == "yes/no" else q.type].append(q)
    binary = [q for pair in zip(pools["yes"], pools["no"], strict=False) for q in pair]
    turns = zip(pools["color"], pools["shape"], binary, strict=False)
    chosen = itertools.islice(itertools.chain.from_iterable(turns), n)
    return [Sample(q.image, q.text, q.answer, q.type, source=f"easy-vqa/{Path(q.image).stem}") for q in chosen]


def scenes_samples(n_scenes: int, split: str = "test") -> list[Sample]:
    """All questions (about 11 each, two per ability) of the first ``n_scenes`` scenes of ``split``."""
    from .data import scenes

    if n_scenes < 1:
        raise VtpruneError(f"the number of scenes must be at least 1, got {n_scenes}")
    out = []
    for i in range(n_scenes):
        scene = scenes.scene(i, split, per_ability=2)
        image = Image.fromarray(scene.image)
        out += [Sample(image, q.text, q.answer, q.ability, q.boxes, f"scenes/{i}") for q in scene.questions]
    return out


SETS: dict[str, Callable[[int], list[Sample]]] = {"easy-vqa": easy_vqa_samples, "scenes": scenes_samples}


def matches(answer: str, expected: str) -> bool:
    """Exact match, without spaces and case."""
    return "".join(answer.lower().split()) == "".join(expected.lower().split())


# -------------------------------------------------------------------------------------------------------------
# measuring


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    recipe: str | Recipe | None,
    *,
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    timing: int = 0,
    journal: Journal | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Answers ``samples`` with ``recipe`` attached (``None``: the unpatched model). In float32 the result does not
    depend on ``batch``.

    Args:
        batch: questions per forward.
        seed: methods that draw at random draw for sample i of its set with :func:`sample_seed` of ``seed`` and i.
        progress: called with the number of samples after each batch.
        timing: repeats of the prefill measurement (:func:`prefill`) on the first :data:`TIMED` samples; 0 leaves it
            out.
        journal: keeps what is done; samples that it holds already are not done again.
        **overrides: as for :func:`vtprune.attach`.

    Returns:
        ``answers`` and ``correct`` per sample; means over samples: ``effective_tokens`` of ``visual_tokens``,
        ``nominal_tokens`` behind the last stage, ``layer_tokens`` per language-model layer; ``flops``, ``kv_bytes`` and
        their ``dense_`` counterparts, sums over samples; ``rows`` and ``columns``: tokens kept by the last dropping
        stage per image row and column (``None`` if none dropped); ``recipe`` as used, ``key``; with ``timing`` what
        :func:`prefill` gives.

    Raises:
        VtpruneError: no samples, or whatever :func:`vtprune.attach` refuses; :class:`RunError` if a sample cannot be
            read, the model fails or the disk is
        full: its message says what is kept.
    """
    if not samples or batch < 1:
        raise VtpruneError(f"nothing to evaluate: {len(samples)} samples in batches of {batch}")
    journal = Journal(None, {}) if journal is None else journal
    first = len(journal.records)
    seeds = [sample_seed(seed, n) for n in numbers(samples)]
    handle = None if recipe is None else attach(model, recipe, seed=seed, **overrides)
    try:
        if progress is not None and first:
            progress(first)
        for lo in range(first, len(samples), batch):
            part = samples[lo : lo + batch]
            with journal.located(f"question{'' if len(part) == 1 else 's'} {_range(part, lo)}"):
                inputs = prepare(processor, [s.picture() for s in part], [s.question for s in part]).to(
                    model.device, model.dtype
                )
                if handle is not None:
                    handle.reseed(seeds[lo : lo + batch])
                answers = generate(model, processor, inputs, MAX_NEW_TOKENS)
                report = dense_report(model, inputs) if handle is None else handle.report()
                records = [_record(s, a, report, i) for i, (s, a) in enumerate(zip(part, answers, strict=True))]
            journal.add(records, **{name: getattr(report, name) for name in COSTS})
            if progress is not None:
                progress(len(part))
        used = None if handle is None else handle.recipe
    finally:
        if handle is not None:
            handle.remove()
    out = {**_total(journal), **identity(used)}
    if timing:
        out |= prefill(model, _timed(model, processor, samples), used, repeats=timing, seed=seed, **_placing(overrides))
    return out


def _placing(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What ``attach`` has to be told again of a recipe whose budget is solved."""
    return {k: v for k, v in overrides.items() if k in ATTACH_OPTIONS and k != "seed"}


COSTS = ("flops", "dense_flops", "kv_bytes", "dense_kv_bytes")


def sample_seed(seed: int, number: int) -> int:
    """The seed of the ``number``-th sample of a set, in every harness: a sample's draw depends on nothing else."""
    return seed * 1_000_003 + number


def numbers(samples: Sequence[Sample]) -> list[int]:
    """The place of every sample within its set."""
    seen: Counter[str] = Counter()
    out = []
    for s in samples:
        out.append(seen[s.set])
        seen[s.set] += 1
    return out


def _range(part: Sequence[Sample], first: int) -> str:
    """Which questions, for messages."""
    last = first + len(part) - 1
    return f"{first}" if last == first else f"{first} to {last}"


def _timed(model: Any, processor: Any, samples: Sequence[Sample]) -> Any:
    part = samples[:TIMED]
    return prepare(processor, [s.picture() for s in part], [s.question for s in part]).to(model.device, model.dtype)


def _record(sample: Sample, answer: str, report: Report, i: int) -> dict[str, Any]:
    """What is kept of sample ``i`` of a batch."""
    layers = report.layer_tokens[i]
    places = kept_places(report, i)
    return {
        "answer": answer,
        "correct": matches(answer, sample.answer),
        "visual": report.visual_tokens[i],
        "nominal": report.stages[-1].tokens_out[i] if report.stages else report.visual_tokens[i],
        "layers": layers,
        "rows": None if places is None else places[0].tolist(),
        "columns": None if places is None else places[1].tolist(),
    }


def _total(journal: Journal) -> dict[str, Any]:
    """The whole run; sums go over samples in order, so that batches do not matter."""
    records = journal.records
    n = len(records)
    layers = np.sum([r["layers"] for r in records], axis=0)
    out: dict[str, Any] = {
        "answers": [r["answer"] for r in records],
        "correct": [r["correct"] for r in records],
        "effective_tokens": float(layers.mean() / n),
        "visual_tokens": sum(r["visual"] for r in records) / n,
        "nominal_tokens": sum(r["nominal"] for r in records) / n,
        "layer_tokens": (layers / n).tolist(),
    }
    for name in ("rows", "columns"):
        found = [r[name] for r in records if r[name] is not None]
        out[name] = np.sum(found, axis=0).tolist() if found and len({len(f) for f in found}) == 1 else None
    return out | {name: sum(b[name] for b in journal.batches) for name in COSTS}


def identity(recipe: Recipe | None) -> dict[str, Any]:
    """``recipe`` as used and its ``key``, the same on every machine; ``None`` is the unpatched model."""
    told = None if recipe is None else portable(recipe)
    return {"recipe": told, "key": "dense" if told is None else Recipe.from_dict(told).key()}


def portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a dict; of a file with weights only the name, since result files travel."""
    out = recipe.to_dict()
    for stage in out["stages"]:
        if stage["options"].get("weights"):
            stage["options"]["weights"] = Path(stage["options"]["weights"]).name
    return out


def dense_report(model: Any, inputs: Any) -> Report:
    """What one prefill of ``inputs`` costs without pruning."""
    adapter = bind(model)
    s, found = adapter.cost, adapter.parts(inputs["input_ids"], inputs)
    visual = [sum(len(p.columns) for p in parts) for parts in found]
    layers = [[n] * s.depth for n in inputs["attention_mask"].sum(1).tolist()]
    passes = [n for parts in found for p in parts for n in p.passes]
    flops = sum(cost.vision(s, 1, n, [n] * s.vdepth) for n in passes) + sum(cost.prefill(s, row) for row in layers)
    held = sum(cost.kv_bytes(s, row) for row in layers)
    return Report(
        visual_tokens=visual,
        stages=(),
        layer_tokens=[[n] * s.depth for n in visual],
        flops=flops,
        dense_flops=flops,
        kv_bytes=held,
        dense_kv_bytes=held,
        recipe="dense",
        grids=[[p.grid for p in parts] for parts in found],
    )


def kept_places(report: Report, i: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens of sample ``i`` kept per image row and per image column, by the last stage that dropped some but not all
    (``None``: none did, or the sample's images have several shapes). A merged group is spread over its members."""
    grids = {*report.grids[i]}
    partial = [s for s in report.stages if 0 < s.tokens_out[i] < report.visual_tokens[i]]
    if len(grids) != 1 or not partial:
        return None
    height, width = next(iter(grids))
    where = partial[-1].kept[i].cpu().numpy()
    share = np.ones(len(where))
    if (assignment := partial[-1].assignment) is not None:
        slot = assignment[i].cpu().numpy()
        where = np.flatnonzero(slot >= 0)
        share = 1 / np.bincount(slot[where])[slot[where]]
    where = where % (height * width)
    return np.bincount(where // width, weights=share, minlength=height), np.bincount(
        where % width, weights=share, minlength=width
    )


@torch.no_grad()
def prefill(
    model: Any,
    inputs: Any,
    recipe: Recipe | None,
    *,
    repeats: int = 5,
    seed: int = 0,
    cpu_time: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    """Times of one prefill. Dense and pruned take turns, so that a busy machine slows both, and every pruned one stands
    between two dense ones: a round's ratio is pruned over their mean. Attaching and the first prefill behind it, which
    plans for the pictures' sizes, are in no time.

    Args:
        repeats: rounds, after one dense prefill that is thrown away. cpu_time: one thread's CPU time, for machines that
            others use as well.

    Returns:
        ``prefill_ms`` and ``dense_prefill_ms``, medians in milliseconds; ``prefill_ratio`` the median of the rounds'
        ratios, ``prefill_range`` the smallest and largest; ``prefill_verdict`` what they tell
        (:func:`vtprune.timing.verdict`). Of ``recipe`` ``None`` the dense time alone.
    """
    with timing.cpu_time() if cpu_time else nullcontext():
        moments = timing.Moments(model)

        def once() -> float:
            return timing.clock(lambda: model(**inputs, logits_to_keep=1, use_cache=True), model.device)

        once()
        dense, pruned, own = [once()], [], []
        for _ in range(repeats):
            if recipe is not None:
                with stopwatch(moments.now) as watch, attach(model, recipe, seed=seed, **extra):
                    once()
                    watch.laps.clear()
                    pruned.append(once())
                    own.append(moments.ms(watch.laps))
            dense.append(once())
    if recipe is None:
        alone = statistics.median(dense)
        return {"prefill_ms": alone, "dense_prefill_ms": alone, "prefill_ratio": 1.0}
    both = [(a + b) / 2 for a, b in itertools.pairwise(dense)]
    ratios = [p / d for p, d in zip(pruned, both, strict=True)]
    rest = [(p - o) / d for p, o, d in zip(pruned, own, both, strict=True)]
    out: dict[str, Any] = {"prefill_ms": statistics.median(pruned), "dense_prefill_ms": statistics.median(dense)}
    out |= {"prefill_ratio": statistics.median(ratios), "prefill_range": [min(ratios), max(ratios)]}
    return {**out, "prefill_verdict": timing.verdict(ratios, [b / a for a, b in itertools.pairwise(dense)], rest)}


# ------------------------------------------------------------------------------------------------------------
# statistics


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
    found = np.empty(n)
    for i in range(n):
        draw = rng.randint(len(images), size=len(images))
        got, all_ = right[draw].sum(0), asked[draw].sum(0)
        found[i] = (got[all_ > 0] / all_[all_ > 0]).mean()
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def means(values: Sequence[float], keys: Iterable[str]) -> dict[str, float]:
    """The mean of the values under each key."""
    found: dict[str, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key, []).append(value)
    return {key: sum(v) / len(v) for key, v in found.items()}


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


# -----------------------------------------------------------------------------------------------------------------
# table


def environment(model: Any) -> dict[str, Any]:
    """Versions and hardware, for result files."""
    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.device.type == "cuda" else _cpu()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "vtprune": __version__,
        },
        "device": {
            "type": parameter.device.type,
            "name": device,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "dtype": dtype,
        },
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def protocol(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a run was asked and how; the same questions in another order are another protocol."""
    asked = [[s.question, s.answer, s.ability, s.source] for s in samples]
    return {
        "harness": "vtprune bench",
        "model": {
            "name": Path(str(model.config._name_or_path)).name,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
        },
        "sets": dict(Counter(s.set for s in samples)),
        "questions": digest(asked),
        "chat_template": digest(processor.chat_template),
        "decoding": f"greedy, {MAX_NEW_TOKENS} new tokens",
        "scoring": "exact match without spaces and case",
        "seeds": "sample i of a set draws with seed * 1000003 + i",
    }


def _kept_run(
    path: Path | None, head: Mapping[str, Any], measure: Callable[[Journal], dict[str, Any]], done: Callable[[], object]
) -> dict[str, Any]:
    """The run in ``path`` if it is finished there, else measured (going on from its journal) and put there."""
    if path is None:
        return measure(Journal(None, {}))
    if path.exists():
        found = read(path)
        alike(path, found, head)
        done()
        return found
    notes = path.with_suffix(".jsonl")
    try:
        with Journal(notes, head) as journal:
            out = {**head, **measure(journal)}
            write(path, json.dumps(out) + "\n")
            notes.unlink(missing_ok=True)
    except RunError:
        raise
    except VtpruneError:  # the method refuses: nothing to go on with
        notes.unlink(missing_ok=True)
        raise
    return out


def table(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str | Recipe],
    budgets: Sequence[float],
    *,
    seeds: int = 3,
    seed: int = 0,
    batch: int = 16,
    timing: int = 5,
    cpu_time: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Mapping[str, str] | None = None,
    fixed: Sequence[tuple[Recipe, str]] = (),
    folder: Path | None = None,
    progress: Callable[[int], object] | None = None,
    started: Callable[[str], object] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Every method at every budget, after the dense model. A budget is a fraction of dense effective tokens: equal
    cost.

    Args:
        methods: recipe names or recipes; those that draw at random are run with ``seeds`` seeds from ``seed`` on and
            averaged per sample.
        timing: rounds of :func:`prefill`, 0 for none; cpu_time: see there.
        options: method name -> its own options and those of ``attach``. labels: method name -> a remark for its rows.
        fixed: recipes with a remark, run once on their own schedule (their ``budget`` is ``None``).
        folder: where every run leaves ``<method>-<budget>-<seed>.json``, and ``.time.json`` with the measured times;
            runs that lie there are not done again, one that broke off goes on. ``None``: in memory.
        progress: called with numbers of samples, :func:`runs` times all of them. started: called with the name of each
            row.

    Returns:
        A JSON-safe dict. A budget that a method cannot reach gives a row with ``error``.

    Raises:
        VtpruneError: wrong arguments, or runs in ``folder`` that were made in another way; :class:`RunError` if a run
            breaks off, see :func:`evaluate`.
    """
    options, labels = options or {}, labels or {}
    recipes = [load_recipe(m) for m in methods]
    names = [r.name for r in recipes]
    if not names or len({*names}) < len(names):
        raise VtpruneError(f"methods must be named, each once; got {', '.join(names) or 'none'}")
    for recipe in recipes:  # a wrong option is told before the long work
        own = {k: v for k, v in options.get(recipe.name, {}).items() if k not in ATTACH_OPTIONS}
        if doubled := {"keep", *TARGETS, *OWN_BUDGETS} & own.keys():
            raise VtpruneError(
                f"{doubled.pop()}= is a budget of its own; the table's are fractions of the dense effective tokens"
            )
        make(recipe.stages[-1].method, {**recipe.stages[-1].options, **own})
    if timing < 0 or seeds < 1:
        raise VtpruneError(f"timing={timing} must not be negative and seeds={seeds} must be at least 1")
    if not budgets or any(not 0 < b <= 1 for b in budgets):
        raise VtpruneError(f"budgets are fractions of the dense tokens in (0, 1], got {list(budgets)}")
    about = environment(model)
    common = {"type": "vtprune.Run", "version": 1, "protocol": protocol(model, processor, samples), **about}

    def measured(
        recipe: Recipe | None, budget: float | None, s: int, extra: Mapping[str, Any], timed: bool
    ) -> dict[str, Any]:
        name = "dense" if recipe is None else recipe.name
        asked = None if recipe is None else portable(recipe)
        head = {**common, "method": name, "budget": budget, "seed": s, "asked": asked, "overrides": dict(extra)}
        spot = (
            None
            if folder is None
            else folder
            / ("dense" if recipe is None else f"{slug(name)}-{'own' if budget is None else repr(budget)}-{s}")
        )
        how: dict[str, Any] = {"batch": batch, "seed": s, "progress": progress, **extra}
        out = _kept_run(
            None if spot is None else Path(f"{spot}.json"),
            head,
            lambda journal: evaluate(model, processor, samples, recipe, journal=journal, **how),
            lambda: progress and progress(len(samples)),
        )
        if not timed or recipe is None:
            return out

        def clocked(journal: Journal) -> dict[str, Any]:
            with attach(model, recipe, seed=s, **extra) as handle:  # solved once, not in every turn
                used = handle.recipe
            with journal.located("timing the prefill"):
                return prefill(
                    model,
                    _timed(model, processor, samples),
                    used,
                    repeats=timing,
                    seed=s,
                    cpu_time=cpu_time,
                    **_placing(extra),
                )

        how = {"repeats": timing, **({"timer": "CPU"} if cpu_time else {})}
        return out | _kept_run(
            None if spot is None else Path(f"{spot}.time.json"), {**head, **how}, clocked, lambda: None
        )

    if started is not None:
        started("dense")
    dense = measured(None, 1.0, 0, {}, False)
    correct = [float(c) for c in dense["correct"]]
    rows = [{"method": "dense", "budget": 1.0, "note": "", **_row([dense], samples, None)}]
    plan: list[tuple[Recipe, float | None, str]] = [
        (r, b, labels.get(r.name, _untrained(r, options.get(r.name, {})))) for r in recipes for b in budgets
    ]
    for recipe, budget, note in [*plan, *((r, None, note) for r, note in fixed)]:
        if started is not None:
            started(recipe.name)
        extra = {} if budget is None else {**options.get(recipe.name, {}), "effective_tokens": float(budget)}
        row: dict[str, Any] = {"method": recipe.name, "budget": budget, "note": note}
        times = seeds if draws(recipe) else 1
        try:
            results = [
                measured(recipe, budget, s, extra, bool(timing) and s == seed) for s in range(seed, seed + times)
            ]
            row |= _row(results, samples, correct)
            row["note"] = ", ".join(filter(None, (note, _solved(recipe, row["recipe"]))))
        except RunError:
            raise
        except VtpruneError as e:
            row["error"] = str(e)
            if progress is not None:
                progress(times * len(samples))
        rows.append(row)
    add_group_a(rows, samples)
    facts: dict[str, Any] = {"timer": "CPU" if cpu_time else "wall-clock"} if timing else {}
    facts |= {
        "abilities": sorted({s.ability for s in samples}),
        "sets": sorted({s.set for s in samples}),
        "samples": len(samples),
        "batch": batch,
    }
    asked = {"protocol": common["protocol"], "budgets": list(budgets), "seeds": seeds}
    asked["questions"] = [[s.source, s.ability, s.question, s.answer] for s in samples]
    return {"type": "vtprune.Bench", "version": 2, "command": command, **about, **facts, **asked, "rows": rows}


def baselines() -> list[str]:
    """The registered methods that every table holds."""
    return [name for name in METHODS if METHODS.get(name).paper == "baseline"]


def runs(methods: Sequence[str | Recipe], budgets: Sequence[float], seeds: int, fixed: int = 0) -> int:
    """Passes over the samples that :func:`table` makes."""
    return 1 + fixed + len(budgets) * sum(seeds if draws(load_recipe(m)) else 1 for m in methods)


def draws(recipe: Recipe) -> bool:
    """Whether a stage draws at random, so that the seed matters."""
    return any(METHODS.get(s.method).draws for s in recipe.stages)


def _untrained(recipe: Recipe, options: Mapping[str, Any]) -> str:
    """A remark on a routing method whose side branch was never trained."""
    last = recipe.stages[-1]
    return (
        "untrained side branch"
        if METHODS.get(last.method).routes and not {**last.options, **options}.get("weights")
        else ""
    )


def _solved(asked: Recipe, used: Mapping[str, Any]) -> str:
    """The layers that the budget solver chose, in words; empty if they are the recipe's or the method's own."""
    before, after = asked.stages[-1].options, used["stages"][-1].get("options", {})
    found = {k: v for k, v in after.items() if k in ("layer", "layers", "split") and k not in before}
    return ", ".join(f"{k} {' '.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in found.items())


def _row(runs: list[dict[str, Any]], samples: Sequence[Sample], dense: list[float] | None) -> dict[str, Any]:
    """One table row from the runs of all seeds; costs are those of the first."""
    first = runs[0]
    correct = [sum(r["correct"][i] for r in runs) / len(runs) for i in range(len(samples))]
    return {
        **score(correct, samples, dense),
        "seed_accuracies": [sum(r["correct"]) / len(samples) for r in runs],
        "effective_tokens": first["effective_tokens"],
        **{name: first[name] for name in ("visual_tokens", "nominal_tokens", "layer_tokens")},
        "flops": first["flops"],
        "flops_share": first["flops"] / first["dense_flops"],
        "kv_bytes": first["kv_bytes"],
        "kv_share": first["kv_bytes"] / first["dense_kv_bytes"],
        **{
            k: first[k]
            for k in ("prefill_ms", "dense_prefill_ms", "prefill_ratio", "prefill_range", "prefill_verdict")
            if k in first
        },
        **{name: _summed([r[name] for r in runs]) for name in ("rows", "columns")},
        "key": first["key"],
        "recipe": first["recipe"],
        "correct": correct,
    }


def _summed(found: Sequence[Sequence[float] | None]) -> list[float] | None:
    known = [f for f in found if f is not None]
    return np.sum(known, axis=0).tolist() if len(known) == len(found) else None


def cells(result: Mapping[str, Any], *, abilities: bool = True) -> list[list[str]]:
    """The table as text, header first; ``abilities`` adds a column for each, what :func:`_overall` gives, and the
    difference to dense with its 95 % interval. ``kept`` tokens are nominal, behind the last cut; ``tokens`` effective,
    the mean over layers."""
    sets, kinds = result["sets"], result["abilities"] if abilities else []
    gaps = sets if abilities else []
    head = [
        "method",
        "budget",
        *(f"{s} %" for s in sets),
        *(f"{s} vs dense" for s in gaps),
        *kinds,
        *(OVERALL if abilities else []),
    ]
    out = [[*head, *COLUMNS, "note"]]
    for row in result["rows"]:
        start = [row["method"], "own" if row["budget"] is None else f"{100 * row['budget']:g}%"]
        if "error" in row:
            out.append([*start, *["-"] * (len(out[0]) - 3), "not possible: " + row["error"]])
            continue
        values = [f"{100 * row['sets'][s]['accuracy']:.1f}" for s in sets] + [_gap(row["sets"][s]) for s in gaps]
        if abilities:
            values += [*(f"{100 * row['abilities'][k]:.1f}" for k in kinds), *_overall(row)]
        out.append([*start, *values, *_costs(row), row["note"]])
    return out


OVERALL = ("average", "worst", "relative", "worst rel.", "group A")
COLUMNS = ("kept", "tokens", "FLOPs %", "prefill x", "KV %")


def _overall(row: Mapping[str, Any]) -> list[str]:
    """In percent: average and worst ability; the same as shares of dense; the samples that plain down-sampling
    loses."""
    hard = row.get("group_a")
    found = [
        row["average"],
        row["worst"],
        row.get("relative_average"),
        row.get("relative_worst"),
        hard and hard["accuracy"],
    ]
    return ["-" if v is None else f"{100 * v:.1f}" for v in found]


def _costs(row: Mapping[str, Any]) -> list[str]:
    """What :data:`COLUMNS` names: nominal and effective tokens, FLOPs in percent, prefill time as a ratio, cache in
    percent."""
    ratio = prefill_text(row) or ("1.00" if row["method"] == "dense" else "-")
    return [
        f"{row['nominal_tokens']:.1f}",
        f"{row['effective_tokens']:.1f}",
        f"{100 * row['flops_share']:.1f}",
        ratio,
        f"{100 * row['kv_share']:.1f}",
    ]


def _timer(result: Mapping[str, Any]) -> str:
    return "; prefill in one thread's CPU time" if result.get("timer") == "CPU" else ""


def markdown(result: Mapping[str, Any]) -> str:
    """Accuracy against tokens: for each question set methods x budgets, accuracy in percent and its difference to dense
    with the paired 95 % interval; then each ability at each budget; then what the solver chose and what is not
    possible."""
    by = {(r["method"], r["budget"]): r for r in result["rows"] if r["method"] != "dense"}
    names, budgets, dense = list(dict.fromkeys(m for m, _ in by)), result["budgets"], result["rows"][0]
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    out = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} threads, {about['dtype']}; {versions}{_timer(result)}",
    ]
    heads = [f"{100 * b:g} %" for b in budgets] + (["own schedule"] if any(b is None for _, b in by) else [])

    def cell(entry: Mapping[str, Any] | None, set_name: str) -> str:
        if entry is None or "error" in entry:
            return "–" if entry is None else "not possible"
        e = entry["sets"][set_name]
        own = f" at {entry['effective_tokens']:.1f} tokens" if entry["budget"] is None else ""
        return f"{100 * e['accuracy']:.1f} ({_gap(e)}){own}"

    columns: list[float | None] = [*budgets, *([None] if len(heads) > len(budgets) else [])]
    for s in result["sets"]:
        e = dense["sets"][s]
        low, high = e["interval"]
        out += [
            "",
            f"**{s}**, {e['samples']} questions, dense {100 * e['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
            "",
        ]
        out += _lines([["method", *heads], *([m, *(cell(by.get((m, b)), s) for b in columns)] for m in names)])
    kinds = result["abilities"]
    rows = [["method", "budget", *kinds, *OVERALL, *COLUMNS, "remarks"]]
    for r in result["rows"]:
        budget = "own" if r["budget"] is None else f"{100 * r['budget']:g} %"
        if "error" in r:
            rows.append([r["method"], budget, *["–"] * (len(rows[0]) - 3), "not possible: " + r["error"]])
            continue
        rows.append(
            [
                r["method"],
                budget,
                *(f"{100 * r['abilities'][k]:.1f}" for k in kinds),
                *_overall(r),
                *_costs(r),
                r["note"],
            ]
        )
    return "\n".join([*out, "", *LEGEND, "", *_lines(rows)]) + "\n"


LEGEND = (
    "Per ability, in percent. average, worst: over abilities; relative, worst rel.: the same as shares of dense; group "
    "A: questions that dense answers and",
    "plain down-sampling at the same budget does not (VTC-Bench, arXiv 2510.07143). kept: tokens behind the last cut; "
    "tokens: effective, the mean over",
    "layers; prefill x: time of a prefill over dense, in turns, with the least and most of its rounds; noise: they "
    "tell nothing; ?: slower for less work,",
    "which neither the library's own code nor the spread of dense runs explains.",
)


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, header first; every column but the first to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|---" + "|--:" * (len(table[0]) - 1) + "|", *lines[1:]]


def kept_per_row(result: Mapping[str, Any], near: float = 0.25) -> dict[str, list[float]]:
    """Label -> tokens kept in each image row, for every method that drops some, at the budget nearest to ``near``:
    FEATHER's question (arXiv 2412.13180)."""
    budget = min(result["budgets"], key=lambda b: abs(b - near))
    return {
        f"{r['method']} {100 * budget:g}%": r["rows"] for r in result["rows"] if r["budget"] == budget and r.get("rows")
    }


def _gap(entry: Mapping[str, Any]) -> str:
    if "difference" not in entry:
        return "-"
    low, high = entry["difference_interval"]
    return f"{100 * entry['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def text(table: Sequence[Sequence[str]]) -> str:
    """Cells (header first) as aligned plain text; columns of numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    right = [all(row[i][:1] in "+-0123456789" or row[i] == "own" for row in table[1:]) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()

    return "\n".join([line(table[0]), "  ".join("-" * w for w in widths), *map(line, table[1:])])


def save(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes a result as JSON, or as Markdown if the name ends in ``.md``. Raises :class:`VtpruneError` if the file
    cannot be written."""
    write(Path(path), markdown(result) if str(path).endswith(".md") else json.dumps(result) + "\n")
