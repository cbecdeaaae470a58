"""``attach``: binds a recipe to one model instance, owns every change to it, and reports what the last prefill did. The
only place that sees methods and models."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from . import cost
from .ledger import UndoLedger, strip
from .methods.base import OWN_BUDGETS, Cut, Method, make
from .prove import prove
from .recipe import Recipe, Stage, resolve
from .recipes import RECIPES
from .select import from_mask, gather, join, merged, subview
from .types import Geometry, Recent, Report, Selection, StageReport, TokenView, UnsupportedError, VtpruneError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vtprune.models._request import Request
    from vtprune.models._tower import Record, Run

# The handle is kept alive by its hooks in the model: a strong value here would keep the model alive for good.
_live: WeakKeyDictionary[Any, ReferenceType[Handle]] = WeakKeyDictionary()
_attaching = threading.RLock()  # one attachment is made or removed at a time
_ORDER = {"pixels": 0, "vision": 1, "projector": 2, "llm": 3}
ATTACH_OPTIONS = ("positions", "seed", "per")
Rasters = tuple[tuple[int, int], ...]
TARGETS = ("effective_tokens", "flops")  # budgets that the solver turns into a schedule


def bind(model: nn.Module) -> Any:
    """The adapter for ``model``, or :class:`UnsupportedError` naming the families there are."""
    from vtprune.models.base import ADAPTERS

    check_model(model)
    for name in ADAPTERS:
        info = ADAPTERS.get(name)
        if info.matches(model):
            return info.bind(model)
    hint = "; pass the whole model, ...ForConditionalGeneration" if type(model).__name__.endswith("Model") else ""
    raise UnsupportedError(
        f"no adapter takes a {type(model).__name__}; there are {', '.join(ADAPTERS)} ('vtprune adapters' says "
        f"more){hint}"
    )


WRAPPERS = {
    "PeftModel": "base_model",
    "LoraModel": "model",
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
}
REPLICATING = {
    "DataParallel": "copies the model for every batch; use DistributedDataParallel",
    "FullyShardedDataParallel": "flattens the parameters that adapters look at; use fully_shard (FSDP2)",
}


def check_model(model: Any) -> None:
    """Raises :class:`UnsupportedError` for what is no module at all."""
    if not hasattr(type(model), "named_modules"):
        raise UnsupportedError(
            f"a model is a torch.nn.Module that has been loaded, got {type(model).__name__} {str(model)[:60]!r}"
        )


def unwrap(model: Any) -> Any:
    """The model inside a ``PeftModel``, a compiled model or ``DistributedDataParallel``: they call it with everything
    that is hooked into it. Raises :class:`UnsupportedError` for wrappers that call something else."""
    check_model(model)
    while True:
        kinds = [k.__name__ for k in type(model).__mro__]
        for name, why in REPLICATING.items():
            if name in kinds:
                raise UnsupportedError(f"{name} {why}")
        inner = next(
            (
                getattr(model, attribute)
                for name, attribute in WRAPPERS.items()
                if name in kinds and hasattr(model, attribute)
            ),
            None,
        )
        if inner is None:
            if "BaseTuner" in kinds and hasattr(model, "model"):  # peft's other tuners
                inner = model.model
            else:
                return model
        model = inner


def _overlap(model: nn.Module) -> str | None:
    """The class of a model that is attached and shares modules with ``model``."""
    mine = {id(m) for m in model.modules()}
    for other in list(_live):
        if any(id(m) in mine for m in other.modules()):
            return type(other).__name__
    return None


def load_recipe(recipe: str | os.PathLike | Recipe) -> Recipe:
    """A registered name, a path to a JSON / YAML file, or a recipe as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | os.PathLike):
        raise VtpruneError(f"a recipe is a registered name, a path or a vtprune.Recipe, not {recipe!r}")
    text = os.fspath(recipe)
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        return Recipe.load(text)
    return RECIPES.get(text)


def for_units(geometry: Geometry, per: str | None) -> Geometry:
    """``geometry`` as budgets see it: where several rasters may share one, the size of none of them bounds it."""
    several = per in ("sample", "video") or ((per or geometry.per[0]) == "image" and "tile" in geometry.per)
    return replace(geometry, variable=True) if several else geometry


Planned = tuple[Stage, Method, tuple[Cut, ...]]


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
            missing = (
                info.needs.get(cut.kind, frozenset()) - geometry.provides.get(cut.kind, frozenset()) - geometry.traits
            )
            if cut.kind not in geometry.provides or missing:
                lacks = ", ".join(sorted(missing)) or f"{cut.kind} sites"
                why = "".join(f" ({geometry.refuses[n]})" for n in sorted(missing) if n in geometry.refuses)
                raise UnsupportedError(
                    f"{info.name} needs {lacks}, which {geometry.family} ({geometry.arch}) does not provide{why}"
                )
        out.append((stage, method, cuts))
    flat = [(_ORDER[c.kind], c.layer) for *_, cuts in out for c in cuts]
    starts = [(_ORDER[cuts[0].kind], cuts[0].layer) for *_, cuts in out if cuts]
    if starts != sorted(starts):
        raise VtpruneError(
            f"recipe {recipe.name!r}: stages must be listed in execution order (pixels, vision, projector, llm; then "
            "by layer)"
        )
    if any(a[0] == b[0] == 0 for a, b in zip(flat, flat[1:], strict=False)):
        raise VtpruneError(f"recipe {recipe.name!r} resizes the pixels twice")
    compose(geometry, out)
    return out


def compose(geometry: Geometry, stages: Sequence[Planned]) -> list[str]:
    """Follows the tokens of an image through all cuts. Answers with a sentence for every stage that changes nothing;
    raises :class:`VtpruneError` for stages that cannot follow each other: one that finds no tokens, needs the whole
    raster, equal counts or the attention in front of its cut behind a stage that leaves none of these, remembers tokens
    that are merged meanwhile, or cuts while others are put aside."""

    def when(
        at: tuple[int, int],
    ) -> tuple[
        int, int, bool
    ]:  # within a block what is inside comes first, within a decoder layer what is context last
        cut = stages[at[0]][2][at[1]]
        return _ORDER[cut.kind], cut.layer, cut.context or (cut.kind == "vision" and not cut.inside)

    order = sorted(((s, i) for s, (*_, cuts) in enumerate(stages) for i in range(len(cuts))), key=when)
    first, last = {s: n for n, (s, _) in reversed(list(enumerate(order)))}, {s: n for n, (s, _) in enumerate(order)}
    names = [method.info.name for _, method, _ in stages]
    most = least = full = geometry.tokens  # an image has so many when a cut decides
    reducer, merger, aside, idle = "", -1, 0, dict.fromkeys(first, 0)
    ints = (
        False  # budgets of whole tokens in the tower: one of its passes need not be what a budget behind it applies to
    )
    for n, (s, i) in enumerate(order):
        stage, method, cuts = stages[s]
        cut, info = cuts[i], method.info
        if cut.kind in ("projector", "llm") and ints and geometry.variable:
            most, ints = full, False
        busy = next((t for t in first if t != s and stages[t][1].info.routes and first[t] < n <= last[t]), None)
        if busy is not None:
            where = "in front of all its sites or behind them"
            raise VtpruneError(
                f"{info.name} cuts at {cut.site}, where {names[busy]} has put the visual tokens aside: place it {where}"
            )
        if most == 0 and n == first[s]:
            raise VtpruneError(f"{info.name} at {cut.site} finds no visual tokens: {reducer} has taken them all")
        if info.whole and reducer:
            raise VtpruneError(
                f"{info.name} needs the whole raster; it cannot follow {reducer}, which drops or merges tokens"
            )
        if info.even and least < most:
            raise VtpruneError(
                f"{info.name} needs the same number of tokens in every image; {reducer} keeps different numbers in "
                f"front of {cut.site}"
            )
        if info.carries and first[s] < merger < n and order[merger][0] != s:
            raise VtpruneError(
                f"{info.name} averages each token's score over the blocks, which {names[order[merger][0]]} in between "
                "would merge"
            )
        looks = cut.observe or "projections" in info.needs.get(cut.kind, ())
        if looks and n and stages[order[n - 1][0]][2][order[n - 1][1]].site == cut.site:
            raise VtpruneError(
                f"{names[order[n - 1][0]]} and {info.name} both cut at {cut.site}; the second cannot use attention "
                "from before the first: move one"
            )
        before = most
        if cut.restore or cut.context:
            most = least = aside
            continue
        if cut.stash:
            aside = most
        if cut.keep is None:
            continue
        least = min(least, cut.keep)
        most = most if cut.adaptive else min(most, cut.keep)
        idle[s] += cut.keep >= before
        wanted = info.keep if stage.keep is None else stage.keep
        ints |= cut.kind in ("pixels", "vision") and isinstance(wanted, int)
        if not (isinstance(wanted, float) and wanted == 1 if geometry.variable else cut.keep >= full):
            reducer = info.name
            merger = n if info.merges else merger
    return [
        _idle(geometry, stages, s)
        for s, count in idle.items()
        if count == len(stages[s][2]) and _wants(geometry, stages[s])
    ]


def _wants(geometry: Geometry, planned: Planned) -> bool:
    """Whether a stage's budget is less than everything."""
    stage, method, cuts = planned
    wanted = method.info.keep if stage.keep is None else stage.keep
    if geometry.variable:  # tokens of one image, of which there may be more or larger ones: only fractions compare
        return isinstance(wanted, float) and wanted < 1
    return any(c.keep is not None and c.keep < geometry.tokens for c in cuts)


def _idle(geometry: Geometry, stages: Sequence[Planned], s: int) -> str:
    stage, method, cuts = stages[s]
    keep = cuts[-1].keep
    return (
        f"{method.info.name} changes nothing: its budget is {keep} of an image's {geometry.tokens} visual tokens, and "
        "no more than that are left in front of it"
        " (a fraction keep= counts from the original tokens)"
    )


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


def check_options(geometry: Geometry, *, positions: Any = "original", seed: Any = 0, per: Any = None) -> None:
    """Raises :class:`VtpruneError` for values of :data:`ATTACH_OPTIONS` that a model of this ``geometry`` does not
    take."""
    if positions not in ("original", "compact"):
        raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
    if positions != "original" and geometry.llm_layers == 0:
        raise VtpruneError("positions= is for models with a language model")
    if positions != "original" and geometry.mrope:
        raise UnsupportedError(
            f"{geometry.family} places visual tokens by time, row and column; renumbering them is not defined: "
            "positions='original'"
        )
    check_seed(seed)
    if per is not None and per not in geometry.per:
        raise VtpruneError(f"per={per!r}: {geometry.family} takes {', '.join(map(repr, geometry.per))}")


def attach(model: nn.Module, recipe: str | os.PathLike | Recipe, **overrides: Any) -> Handle:
    """Puts ``recipe`` into ``model`` and returns the :class:`Handle` that takes it out again (also a context manager).

    Args:
        model: an unmodified Hugging Face MLLM or vision tower, or a timm ``VisionTransformer``.
        recipe: a registered name, a :class:`Recipe`, or a path to its JSON / YAML form.
        **overrides: ``keep=`` tokens per image after the last cut (int) or their fraction (float in (0, 1]);
        ``effective_tokens=`` / ``flops=`` let the budget solver
            derive the schedule; ``positions="original" | "compact"`` (in-LLM and projector cuts); ``seed=`` for random
            methods; ``per=`` what a budget applies to behind the projector: ``"image"`` (a video's frame), ``"tile"``,
            ``"video"`` (all its frames) or ``"sample"`` (everything in a prompt), the default being the family's first;
            all else are the last stage's options.

    Raises:
        VtpruneError: unknown recipe or option, impossible budget, a model that is attached already;
        :class:`UnsupportedError` if the model lacks what a method needs.
    """
    model = unwrap(model)
    chosen = load_recipe(recipe)
    extra = {name: overrides.pop(name) for name in ATTACH_OPTIONS if name in overrides}
    target = {name: overrides.pop(name) for name in TARGETS if overrides.get(name) is not None}
    budgets = [*target, *(n for n in ("keep", *OWN_BUDGETS) if overrides.get(n) is not None)]
    if len(budgets) > 1:
        raise VtpruneError(f"give one budget, not {' and '.join(f'{n}=' for n in budgets)}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in target.values()):
        raise VtpruneError(f"{next(iter(target))}={next(iter(target.values()))!r} is not a number")
    if overrides:
        chosen = chosen.override(**overrides)
    with _attaching:
        if model in _live:
            raise VtpruneError(
                "this model is attached already; call remove() on its handle first, or put all stages into one recipe"
            )
        if (other := _overlap(model)) is not None:
            raise VtpruneError(
                f"parts of this model belong to a {other} that is attached already; call remove() on its handle first"
            )
        strip(model)
        adapter = bind(model)
        check_options(adapter.geometry, **extra)
        prove(adapter.geometry.family)
        if target:
            from .solve import solve

            chosen = solve(model, chosen, **target, **extra)
        geometry = for_units(adapter.geometry, extra.get("per"))
        for told in compose(geometry, plan(geometry, chosen)):
            warnings.warn(told, stacklevel=2)
        return Handle(model, chosen, adapter, **extra)


class _Decider:
    """Asks a method for its decision at one cut. Units of other sizes than the model's typical one have plans of their
    own: the method is called once per kind of unit. Decisions carry no gradient: it flows through what is kept
    (PyramidDrop, arXiv 2410.17247, trains this way)."""

    def __init__(self, geometry: Geometry, stage: Stage, method: Method, cuts: tuple[Cut, ...], number: int):
        self.geometry, self.stage, self.method, self.cuts, self.number = geometry, stage, method, cuts, number
        self.plans: Recent[Rasters, Cut] = Recent(256)
        self.plans[(geometry.grid,)] = cuts[number]

    def __call__(self, view: TokenView) -> Selection | None:
        import torch

        promised = self.geometry.provides.get(self.cuts[self.number].kind, frozenset())
        view = replace(view, sources={name: source for name, source in view.sources.items() if name in promised})
        with torch.no_grad():
            if not view.rasters:
                return self.method.select(view, self.cuts[self.number])
            kinds: dict[Rasters, list[int]] = {}
            for g, rasters in enumerate(view.rasters):
                kinds.setdefault(rasters, []).append(g)
            groups: dict[tuple[Rasters, tuple[int, ...]], list[int]] = {}
            for rasters, rows in kinds.items():
                left = (
                    self._left(view, rasters, rows)
                    if self.method.info.raster and len(rasters) > 1
                    else [()] * len(rows)
                )
                for row, counts in zip(rows, left, strict=True):
                    groups.setdefault((rasters, counts), []).append(row)
            shared: dict[Any, Any] = {}
            parts = []
            for (rasters, counts), rows in groups.items():
                cut, whole = self._cut(rasters), len(rasters) == 1
                part = subview(view, rows, rasters[0] if whole else (sum(r * c for r, c in rasters), 1), shared)
                if not whole:
                    part = replace(part, rasters=(rasters,) * len(rows))
                parts.append(
                    (rows, self._rasters(part, cut, rasters, counts) if counts else self.method.select(part, cut))
                )
            return join(view, parts)

    def _cut(self, rasters: Rasters) -> Cut:
        """The cut as planned for a unit made of ``rasters``."""
        if rasters not in self.plans:
            n = sum(r * c for r, c in rasters)
            one = len(rasters) == 1
            geometry = replace(
                self.geometry,
                tokens=n,
                grid=rasters[0] if one else (n, 1),
                rasters=() if one else rasters,
                variable=True,
            )
            cuts = self.method.plan(geometry, budget(geometry, self.stage, self.method))
            if [c.site for c in cuts] != [c.site for c in self.cuts]:
                raise UnsupportedError(
                    f"{self.method.info.name} would cut elsewhere for an image of {n} tokens than for one of "
                    f"{self.geometry.tokens}"
                )
            self.plans[rasters] = cuts[self.number]
        return self.plans[rasters]

    @staticmethod
    def _left(view: TokenView, rasters: Rasters, rows: list[int]) -> list[tuple[int, ...]]:
        """How many tokens are left in each of the ``rasters`` of the units ``rows``."""
        import torch

        at = torch.tensor(rows, device=view.index.device)
        ends = torch.tensor([r * c for r, c in rasters], device=at.device).cumsum(0)
        valid = view.valid[at]
        number = torch.bucketize(torch.where(valid, view.index[at], 0), ends, right=True)
        counts = torch.zeros(len(rows), len(rasters), dtype=torch.long, device=at.device).scatter_add_(
            1, number, valid.long()
        )
        return [tuple(row) for row in counts.tolist()]

    def _rasters(self, view: TokenView, cut: Cut, rasters: Rasters, left: tuple[int, ...]) -> Selection:
        """A method of the image plane on units of several rasters, of which ``left`` tokens are there: each raster's
        share of the budget is that of its tokens (largest remainders)."""
        import torch

        b, n = view.index.shape
        sizes = [r * c for r, c in rasters]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        budget = min(cut.keep or 0, sum(left))
        exact = [budget * m / max(sum(left), 1) for m in left]
        shares = [int(x) for x in exact]
        for i in sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])[: budget - sum(shares)]:
            shares[i] += 1
        keep = torch.zeros(b, n + 1, dtype=torch.bool, device=view.valid.device)  # the last column takes the padding
        target, weight, merges = torch.full_like(view.index, -1), view.size.clone(), False
        score: Tensor | None = None
        for grid, m, start, share in zip(rasters, left, starts, shares, strict=True):
            if not share:
                continue
            at = (
                (view.valid & (view.index >= start) & (view.index < start + grid[0] * grid[1]))
                .nonzero()[:, 1]
                .view(b, m)
            )
            small = replace(
                view,
                features=gather(view.features, at),
                valid=torch.ones_like(at, dtype=torch.bool),
                index=view.index.gather(1, at) - start,
                size=view.size.gather(1, at),
                protected=view.protected.gather(1, at),
                grid=grid,
                rasters=(),
                memory=view.memory.setdefault(f"raster {start}", {}),
                sources={},
            )
            found = self.method.select(small, replace(cut, keep=share))
            chosen = at if found is None else torch.where(found.kept >= 0, at.gather(1, found.kept.clamp_min(0)), n)
            keep.scatter_(1, chosen, True)
            if found is not None and found.score is not None:
                score = (
                    torch.full(view.valid.shape, torch.nan, dtype=torch.float64, device=keep.device)
                    if score is None
                    else score
                )
                score.scatter_(1, at, found.score.double())
            if found is None or found.target is None:  # what stays is its own slot
                target.scatter_(1, at, torch.where(keep.gather(1, at), at, -1))
                continue
            merges = True
            target.scatter_(1, at, torch.where(found.target >= 0, chosen.gather(1, found.target.clamp_min(0)), -1))
            if found.weight is not None:
                weight.scatter_(1, at, found.weight)
        keep = keep[:, :n]
        return replace(merged(keep, target, weight) if merges else from_mask(keep), score=score)


class Handle:
    """Owns one attachment. Leaving its context, or :meth:`remove`, restores the model exactly, also after an
    exception."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        adapter: Any,
        *,
        positions: str = "original",
        seed: int = 0,
        per: str | None = None,
    ):
        from vtprune.models._host import forget_compiled
        from vtprune.models.base import PlannedCut

        self.recipe, self.geometry, self._cost, self.adapter = recipe, adapter.geometry, adapter.cost, adapter
        stages = plan(for_units(adapter.geometry, per), recipe)
        check_options(adapter.geometry, positions=positions, seed=seed, per=per)
        for stage, method, cuts in stages:
            inside = any(c.kind in ("pixels", "vision") for c in cuts)
            if (
                inside
                and isinstance(stage.keep, int)
                and (per or adapter.geometry.per[0]) != "tile"
                and "tile" in adapter.geometry.per
            ):
                raise VtpruneError(
                    f"{method.info.name} works in the vision tower, which sees one tile at a time: keep= takes a "
                    "fraction, or with per='tile' tokens of a tile"
                )
        self._ledger = UndoLedger()
        self._methods: list[Method] = []
        self.modules: dict[
            str, Any
        ] = {}  # by method; behind the first of one method, by method and number of the stage
        self._modules: dict[int, Any] = {}  # by number of the stage
        self._splits = {
            n: cut.layer for n, (_, _, cuts) in enumerate(stages) for cut in cuts if cut.stash
        }  # which layer side branches are copies of
        planned: list[PlannedCut] = []
        self._inside = False
        for number, (stage, method, cuts) in enumerate(stages):
            module = method.build(adapter.branch, adapter.geometry) if method.info.routes else None
            if module is not None:
                self._modules[number] = module
                self.modules[stage.method if stage.method not in self.modules else f"{stage.method}.{number}"] = module
            for i, cut in enumerate(cuts):
                self._methods.append(method)
                self._inside |= cut.inside
                planned.append(
                    PlannedCut(
                        site=cut.site,
                        layer=cut.layer,
                        inside=cut.inside,
                        restore=cut.restore,
                        stash=cut.stash,
                        context=cut.context,
                        proportional=cut.proportional,
                        observe=cut.observe,
                        stage=number,
                        memory_key=number,
                        select=_Decider(adapter.geometry, stage, method, cuts, i),
                        bring_back=lambda hidden, run, method=method, module=module: method.restore(
                            hidden, run, module
                        ),
                    )
                )
        self._names = [stage.method for stage, *_ in stages]
        self._rasters = [method.info.raster for _, method, _ in stages]
        self._vision: deque[ReferenceType[Run]] = deque(maxlen=32)  # recent passes of the tower; who needs one holds it
        self._local = threading.local()
        # each thread's most recent prefill
        self._threads: WeakKeyDictionary[threading.Thread, Any] = WeakKeyDictionary()
        self._requests: WeakKeyDictionary[Any, Request] | None = None
        try:
            adapter.install(
                planned, self._ledger, self, positions=positions, per=per or adapter.geometry.per[0], seed=seed
            )
        except BaseException:
            self._ledger.undo()
            raise
        forget_compiled()
        self._model: Any = model
        _live[model] = ref(self)

    # recorder -------------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> Any:
        """The calling thread's most recent prefill ``(run, request)``; that of the only thread there was, for a thread
        that has read none itself."""
        found = self._threads.get(threading.current_thread())
        known = list(self._threads.values())
        return known[0] if found is None and len(known) == 1 else found

    @_last.setter
    def _last(self, found: Any) -> None:
        self._threads[threading.current_thread()] = found

    def vision(self, run: Run) -> None:
        """Called by the adapter after each pass of the vision side."""
        self._vision.append(ref(run))
        if self.geometry.llm_layers == 0:
            self._last = (run, None)

    def arrived(self, request: Request) -> Run:
        """Called by the adapter before stages behind the projector: their books, begun with what the tower did."""
        from vtprune.models._books import carry

        return carry(request)

    def finished(self, request: Request) -> None:
        """Called by the adapter after each prefill of the language model."""
        self._last = (None, request)

    # the user's side --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model; may be called more than once. Caches of prompts that were pruned are closed: the model
        alone cannot go on with them."""
        from vtprune.models._host import forget_compiled

        with _attaching:
            if self._model is None:
                return
            self._ledger.undo()
            for engine in getattr(self.adapter, "engines", ()):
                getattr(engine, "end", lambda: None)()
            forget_compiled()
            _live.pop(self._model, None)
            self._model = None

    def reseed(self, seed: int | Sequence[int]) -> None:
        """The seed of the next forwards (methods that draw at random): one for all, or one for each sample of the batch
        (in the vision tower: of each image or tile); a forward of another size then raises :class:`VtpruneError`."""
        self.adapter.reseed(seed if isinstance(seed, int) else tuple(seed))

    def report(self, of: Any = None) -> Report:
        """What a prefill did: the calling thread's most recent one, or that of the request which the key-value cache
        ``of`` belongs to (as the model or ``generate`` returned it). Raises :class:`VtpruneError` where there was
        none."""
        if of is not None:
            known = self.adapter.decoder.requests.items() if self.geometry.llm_layers else ()
            request = next((request for cache, request in list(known) if cache is of), None)
            if request is None:
                raise VtpruneError("no prompt with visual tokens was read into this cache by this attachment")
            return self._report_mllm(request)
        last = self._last
        if last is None:
            more = "; several threads have run some: report(of=cache) tells of one" if len(self._threads) > 1 else ""
            raise VtpruneError(f"no prefill with visual tokens has run yet{' in this thread' if more else ''}{more}")
        run, request = last
        return self._report_vit(run) if request is None else self._report_mllm(request)

    @property
    def passes(self) -> list[tuple[Run, int]]:
        """The vision tower's own books of the most recent prefill: ``(run, row)`` of every pass, in the prompt's order;
        empty without stages there."""
        last = self._last
        if last is None:
            return []
        run, request = last
        if request is None:
            return [(run, g) for g in range(run.images)]
        return [found for rows in request.vision or [] for found in rows]

    def _report_vit(self, run: Run) -> Report:
        from vtprune.models._books import told

        s, n = self._cost, run.tokens
        per = list(zip(*run.layer_tokens, strict=True))  # per image, per block
        flops = sum(
            cost.vision(s, 1, self._patches(run), row, self._inside, float(run.valid[g].sum()))
            for g, row in enumerate(per)
        )
        stages = tuple(self._stage(told(r, n)) for r in run.records)
        return Report(
            visual_tokens=[n] * run.images,
            stages=stages,
            layer_tokens=[list(row) for row in per],
            flops=flops,
            dense_flops=run.images * cost.vision(s, 1, n, [n] * s.vdepth),
            kv_bytes=0,
            dense_kv_bytes=0,
            recipe=self.recipe.key(),
            grids=[[run.grid or self.geometry.grid]] * run.images,
        )

    def _patches(self, run: Run) -> int:
        """Patches embedded: fewer if the pixels were reduced."""
        return run.records[0].tokens_out[0] if run.records and run.records[0].site == "pixels" else run.tokens

    def _stage(self, record: Record) -> StageReport:
        r = record
        return StageReport(
            r.site, self._names[r.stage], r.tokens_in, r.tokens_out, r.kept, r.assignment, r.scores, r.units
        )

    def _report_mllm(self, request: Request) -> Report:
        from vtprune.models._books import by_sample, tower_record

        s = self._cost
        samples = len(request.parts)
        tower = [run.records for rows in request.vision or [] for run, _ in rows]
        stages = [self._stage(tower_record(request, i)) for i in range(len(tower[0]) if tower else 0)]
        behind = (*(request.entry.records if request.entry else ()), *request.records)
        stages += [self._stage(by_sample(request, r, self._rasters[r.stage])) for r in behind]
        sizes = [n for parts in request.parts for p in parts for n in p.passes]  # tokens of each pass of the tower
        dense_vision = sum(cost.vision(s, 1, n, [n] * s.vdepth) for n in sizes)
        flops = dense_vision
        if request.vision is not None:
            flops = 0
            lengths = {id(run): run.layer_tokens for run, _ in self.passes}
            for run, g in self.passes:
                out = [r for r in run.records if r.site.startswith(("vision", "pixels"))]
                projected = float(out[-1].tokens_out[g] if out else run.tokens)
                flops += cost.vision(
                    s, 1, self._patches(run), [row[g] for row in lengths[id(run)]], self._inside, projected
                )
        layers = [list(row) for row in zip(*request.layer_tokens, strict=True)]  # per sample, per layer
        total = [sum(len(p.columns) for p in parts) for parts in request.parts]
        text = request.text_tokens
        dense = [[total[b] + text[b]] * s.depth for b in range(samples)]
        real = [[c + text[b] for c in layers[b]] for b in range(samples)]  # whose keys and values the layer holds
        whole = [
            [c - request.keys_only.get(i, [0] * samples)[b] for i, c in enumerate(real[b])] for b in range(samples)
        ]  # that pass through it
        for stage, counts in request.branched.items():  # a routing method's side branch
            flops += sum(len(self._modules[stage]) * cost.decoder_layer(s, self._splits[stage], n) for n in counts)
        return Report(
            visual_tokens=total,
            stages=tuple(stages),
            layer_tokens=layers,
            flops=flops + sum(cost.prefill(s, w, r) for w, r in zip(whole, real, strict=True)),
            dense_flops=dense_vision + sum(cost.prefill(s, r) for r in dense),
            kv_bytes=sum(cost.kv_bytes(s, r) for r in real),
            dense_kv_bytes=sum(cost.kv_bytes(s, r) for r in dense),
            recipe=self.recipe.key(),
            grids=[[p.grid for p in parts] for parts in request.parts],
        )
