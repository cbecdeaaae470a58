"""``attach``: binds a recipe to one model instance, owns every change to it, and reports what the last prefill did. The only place that sees methods and
models."""

from __future__ import annotations

import os
import threading
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
from .types import Geometry, Report, Selection, StageReport, TokenView, UnsupportedError, VtpruneError

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

    for name in ADAPTERS:
        info = ADAPTERS.get(name)
        if info.matches(model):
            return info.bind(model)
    hint = "; pass the whole model, ...ForConditionalGeneration" if type(model).__name__.endswith("Model") else ""
    raise UnsupportedError(f"no adapter takes a {type(model).__name__}; there are {', '.join(ADAPTERS)} ('vtprune adapters' says more){hint}")


WRAPPERS = {"PeftModel": "base_model", "LoraModel": "model", "OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
REPLICATING = {
    "DataParallel": "copies the model for every batch; use DistributedDataParallel",
    "FullyShardedDataParallel": "flattens the parameters that adapters look at; use fully_shard (FSDP2)",
}


def unwrap(model: Any) -> Any:
    """The model inside a ``PeftModel``, a compiled model or ``DistributedDataParallel``: they call it with everything that is hooked into it. Raises
    :class:`UnsupportedError` for wrappers that call something else."""
    while True:
        kinds = [k.__name__ for k in type(model).__mro__]
        for name, why in REPLICATING.items():
            if name in kinds:
                raise UnsupportedError(f"{name} {why}")
        inner = next((getattr(model, attribute) for name, attribute in WRAPPERS.items() if name in kinds and hasattr(model, attribute)), None)
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
    text = os.fspath(recipe)
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        return Recipe.load(text)
    return RECIPES.get(text)


def plan(geometry: Geometry, recipe: Recipe) -> list[tuple[Stage, Method, tuple[Cut, ...]]]:
    """Every stage with its method and cuts, in execution order. Raises for unknown options, impossible budgets and needs that the model does not meet."""
    out = []
    for stage in recipe.stages:
        method = make(stage.method, stage.options)
        info = method.info
        kinds = [k for k in info.kinds if k in geometry.provides]
        if not kinds:
            why = "".join(f" ({k}: {geometry.refuses[k]})" for k in info.kinds if k in geometry.refuses)
            raise UnsupportedError(
                f"{info.name} works at {' / '.join(info.kinds)}; this model ({geometry.family}, {geometry.arch}) offers {' / '.join(geometry.provides)}{why}"
            )
        if info.raster and not geometry.raster:
            raise UnsupportedError(f"{info.name} works on the image plane, which is not known of this model ({geometry.family}, {geometry.arch})")
        if not info.budgeted and stage.keep is not None:
            raise VtpruneError(f"{info.name} takes no keep= (its options: {', '.join(info.options) or 'none'})")
        cuts = method.plan(geometry, budget(geometry, stage, method))
        for cut in cuts:
            missing = info.needs.get(cut.kind, frozenset()) - geometry.provides.get(cut.kind, frozenset())
            if cut.kind not in geometry.provides or missing:
                lacks = ", ".join(sorted(missing)) or f"{cut.kind} sites"
                why = "".join(f" ({geometry.refuses[n]})" for n in sorted(missing) if n in geometry.refuses)
                raise UnsupportedError(f"{info.name} needs {lacks}, which {geometry.family} ({geometry.arch}) does not provide{why}")
        out.append((stage, method, cuts))
    flat = [(_ORDER[c.kind], c.layer) for *_, cuts in out for c in cuts]
    starts = [(_ORDER[cuts[0].kind], cuts[0].layer) for *_, cuts in out if cuts]
    if starts != sorted(starts):
        raise VtpruneError(f"recipe {recipe.name!r}: stages must be listed in execution order (pixels, vision, projector, llm; then by layer)")
    if any(a[0] == b[0] == 0 for a, b in zip(flat, flat[1:], strict=False)):
        raise VtpruneError(f"recipe {recipe.name!r} resizes the pixels twice")
    return out


def budget(geometry: Geometry, stage: Stage, method: Method) -> int | None:
    """Tokens that ``stage`` keeps of a unit of ``geometry.tokens``; a unit that has fewer than asked for keeps all it has where sizes vary."""
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


def attach(model: nn.Module, recipe: str | os.PathLike | Recipe, **overrides: Any) -> Handle:
    """Puts ``recipe`` into ``model`` and returns the :class:`Handle` that takes it out again (also a context manager).

    Args:
        model: an unmodified Hugging Face MLLM or vision tower, or a timm ``VisionTransformer``.
        recipe: a registered name, a :class:`Recipe`, or a path to its JSON / YAML form.
        **overrides: ``keep=`` tokens per image after the last cut (int) or their fraction (float in (0, 1]); ``effective_tokens=`` / ``flops=`` let the
        budget solver
            derive the schedule; ``positions="original" | "compact"`` (in-LLM and projector cuts); ``seed=`` for random methods; ``per=`` what a budget
            applies to behind the projector: ``"image"`` (a video's frame), ``"tile"``, ``"video"`` (all its frames) or ``"sample"`` (everything in a
            prompt), the default being the family's first; all else are the last stage's options.

    Raises:
        VtpruneError: unknown recipe or option, impossible budget, a model that is attached already; :class:`UnsupportedError` if the model lacks what a
        method needs.
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
    check_seed(extra.get("seed", 0))
    if overrides:
        chosen = chosen.override(**overrides)
    with _attaching:
        if model in _live:
            raise VtpruneError("this model is attached already; call remove() on its handle first, or put all stages into one recipe")
        if (other := _overlap(model)) is not None:
            raise VtpruneError(f"parts of this model belong to a {other} that is attached already; call remove() on its handle first")
        strip(model)
        adapter = bind(model)
        prove(adapter.geometry.family)
        if target:
            from .solve import solve

            chosen = solve(model, chosen, **target)
        return Handle(model, chosen, adapter, **extra)


class _Decider:
    """Asks a method for its decision at one cut. Units of other sizes than the model's typical one have plans of their own: the method is called once per kind
    of unit. Decisions carry no gradient: it flows through what is kept (PyramidDrop, arXiv 2410.17247, trains this way)."""

    def __init__(self, geometry: Geometry, stage: Stage, method: Method, cuts: tuple[Cut, ...], number: int):
        self.geometry, self.stage, self.method, self.cuts, self.number = geometry, stage, method, cuts, number
        self.plans: dict[Rasters, Cut] = {(geometry.grid,): cuts[number]}

    def __call__(self, view: TokenView) -> Selection | None:
        import torch

        with torch.no_grad():
            if not view.rasters:
                return self.method.select(view, self.cuts[self.number])
            groups: dict[Rasters, list[int]] = {}
            for g, rasters in enumerate(view.rasters):
                groups.setdefault(rasters, []).append(g)
            shared: dict[Any, Any] = {}
            parts = []
            for rasters, rows in groups.items():
                cut, whole = self._cut(rasters), len(rasters) == 1
                part = subview(view, rows, rasters[0] if whole else (sum(r * c for r, c in rasters), 1), shared)
                parts.append((rows, self.method.select(part, cut) if whole or not self.method.info.raster else self._rasters(part, cut, rasters)))
            return join(view, parts)

    def _cut(self, rasters: Rasters) -> Cut:
        """The cut as planned for a unit made of ``rasters``."""
        if rasters not in self.plans:
            n = sum(r * c for r, c in rasters)
            geometry = replace(self.geometry, tokens=n, grid=rasters[0] if len(rasters) == 1 else (n, 1), variable=True)
            cuts = self.method.plan(geometry, budget(geometry, self.stage, self.method))
            if [c.site for c in cuts] != [c.site for c in self.cuts]:
                raise UnsupportedError(f"{self.method.info.name} would cut elsewhere for an image of {n} tokens than for one of {self.geometry.tokens}")
            self.plans[rasters] = cuts[self.number]
        return self.plans[rasters]

    def _rasters(self, view: TokenView, cut: Cut, rasters: Rasters) -> Selection:
        """A method of the image plane on units of several rasters: each raster has its share of the budget (largest remainders)."""
        import torch

        sizes = [r * c for r, c in rasters]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        exact = [(cut.keep or 0) * n / sum(sizes) for n in sizes]
        shares = [int(x) for x in exact]
        for i in sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])[: (cut.keep or 0) - sum(shares)]:
            shares[i] += 1
        keep = torch.zeros_like(view.valid)
        target, weight, merges = torch.full_like(view.index, -1), view.size.clone(), False
        score: Tensor | None = None
        for grid, n, start, share in zip(rasters, sizes, starts, shares, strict=True):
            mine = view.valid & (view.index >= start) & (view.index < start + n)
            count = mine.sum(1)
            if not share or not int(count.max()):
                continue
            at = torch.where(mine, torch.arange(mine.shape[1], device=mine.device), mine.shape[1]).sort(1).values[:, : int(count.max())]
            real, at = at < mine.shape[1], at.clamp_max(mine.shape[1] - 1)
            small = replace(
                view,
                features=gather(view.features, at),
                valid=real,
                index=torch.where(real, view.index.gather(1, at) - start, -1),
                size=view.size.gather(1, at),
                protected=view.protected.gather(1, at),
                grid=grid,
                memory=view.memory.setdefault(f"raster {start}", {}),
                sources={},
            )
            found = self.method.select(small, replace(cut, keep=share))
            if found is None:
                keep |= mine
                continue
            chosen = at.gather(1, found.kept.clamp_min(0))
            keep.scatter_(1, chosen, keep.gather(1, chosen) | (found.kept >= 0))
            if found.score is not None:
                score = torch.full(view.valid.shape, torch.nan, dtype=torch.float64, device=keep.device) if score is None else score
                score.scatter_(1, at, torch.where(real, found.score.double(), score.gather(1, at)))
            if found.target is not None:
                merges = True
                absorber = chosen.gather(1, found.target.clamp_min(0))
                target.scatter_(1, at, torch.where(real & (found.target >= 0), absorber, target.gather(1, at)))
                if found.weight is not None:
                    weight.scatter_(1, at, torch.where(real, found.weight, weight.gather(1, at)))
        return replace(merged(keep, target, weight) if merges else from_mask(keep), score=score)


class Handle:
    """Owns one attachment. Leaving its context, or :meth:`remove`, restores the model exactly, also after an exception."""

    def __init__(self, model: nn.Module, recipe: Recipe, adapter: Any, *, positions: str = "original", seed: int = 0, per: str | None = None):
        from vtprune.models._host import forget_compiled
        from vtprune.models.base import PlannedCut

        self.recipe, self.geometry, self._cost, self.adapter = recipe, adapter.geometry, adapter.cost, adapter
        # More than one image may share a budget: then no single image's size bounds it.
        stages = plan(replace(adapter.geometry, variable=True) if per in ("sample", "video") else adapter.geometry, recipe)
        if positions not in ("original", "compact"):
            raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
        if positions != "original" and adapter.geometry.llm_layers == 0:
            raise VtpruneError("positions= is for models with a language model")
        if positions != "original" and adapter.geometry.mrope:
            raise UnsupportedError(
                f"{adapter.geometry.family} places visual tokens by time, row and column; renumbering them is not defined: positions='original'"
            )
        if per is not None and per not in adapter.geometry.per:
            raise VtpruneError(f"per={per!r}: {adapter.geometry.family} takes {', '.join(map(repr, adapter.geometry.per))}")
        for stage, method, cuts in stages:
            inside = any(c.kind in ("pixels", "vision") for c in cuts)
            if inside and isinstance(stage.keep, int) and (per or adapter.geometry.per[0]) != "tile" and "tile" in adapter.geometry.per:
                raise VtpruneError(
                    f"{method.info.name} works in the vision tower, which sees one tile at a time: keep= takes a fraction, or with per='tile' tokens of a tile"
                )
        self._ledger = UndoLedger()
        self._methods: list[Method] = []
        self.modules: dict[str, Any] = {}
        planned: list[PlannedCut] = []
        self._inside = False
        for number, (stage, method, cuts) in enumerate(stages):
            module = method.build(adapter.branch, adapter.geometry) if method.info.routes else None
            if module is not None:
                self.modules[stage.method] = module
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
                        bring_back=lambda hidden, run, method=method, module=module: method.restore(hidden, run, module),
                    )
                )
        self._names = [stage.method for stage, *_ in stages]
        self._rasters = [method.info.raster for _, method, _ in stages]
        self._vision: deque[ReferenceType[Run]] = deque(maxlen=32)  # recent passes of the tower; who needs one holds it
        self._local = threading.local()
        self._threads: WeakKeyDictionary[threading.Thread, Any] = WeakKeyDictionary()  # each thread's most recent prefill
        self._requests: WeakKeyDictionary[Any, Request] | None = None
        try:
            adapter.install(planned, self._ledger, self, positions=positions, per=per or adapter.geometry.per[0], seed=seed)
        except BaseException:
            self._ledger.undo()
            raise
        forget_compiled()
        self._model: Any = model
        _live[model] = ref(self)

    # recorder -------------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> Any:
        """The calling thread's most recent prefill ``(run, request)``; that of the only thread there was, for a thread that has read none itself."""
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
        """Restores the model; may be called more than once. Caches of prompts that were pruned are closed: the model alone cannot go on with them."""
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
        """The seed of the next forwards (methods that draw at random): one for all, or one for each sample of the batch (in the vision tower: of each image or
        tile); a forward of another size then raises :class:`VtpruneError`."""
        self.adapter.reseed(seed if isinstance(seed, int) else tuple(seed))

    def report(self, of: Any = None) -> Report:
        """What a prefill did: the calling thread's most recent one, or that of the request which the key-value cache ``of`` belongs to (as the model or
        ``generate`` returned it). Raises :class:`VtpruneError` where there was none."""
        if of is not None:
            request = self.adapter.decoder.requests.get(of) if self.geometry.llm_layers else None
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
        """The vision tower's own books of the most recent prefill: ``(run, row)`` of every pass, in the prompt's order; empty without stages there."""
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
        flops = sum(cost.vision(s, 1, self._patches(run), row, self._inside, float(run.valid[g].sum())) for g, row in enumerate(per))
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
        return StageReport(r.site, self._names[r.stage], r.tokens_in, r.tokens_out, r.kept, r.assignment, r.scores, r.units)

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
                flops += cost.vision(s, 1, self._patches(run), [row[g] for row in lengths[id(run)]], self._inside, projected)
        layers = [list(row) for row in zip(*request.layer_tokens, strict=True)]  # per sample, per layer
        total = [sum(len(p.columns) for p in parts) for parts in request.parts]
        text = request.text_tokens
        dense = [[total[b] + text[b]] * s.depth for b in range(samples)]
        real = [[c + text[b] for c in layers[b]] for b in range(samples)]  # whose keys and values the layer holds
        whole = [[c - request.keys_only.get(i, [0] * samples)[b] for i, c in enumerate(real[b])] for b in range(samples)]  # that pass through it
        for stage, counts in request.branched.items():  # a routing method's side branch
            flops += sum(len(self.modules[self._names[stage]]) * cost.decoder_layer(s, n) for n in counts)
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
