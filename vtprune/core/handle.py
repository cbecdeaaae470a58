"""Binds a recipe to one model instance, owns every change to it, and reports what the last prefill did."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from vtprune.models.base import PlannedCut
from vtprune.models.engine.books import by_sample, carry, told, tower_record
from vtprune.models.engine.host import forget_compiled

from ..methods.base import OWN_BUDGETS, Method
from . import cost
from .decider import Decider
from .ledger import UndoLedger, strip
from .planning import ATTACH_OPTIONS, TARGETS, bind, check_options, compose, for_units, load_recipe, plan
from .recipe import Recipe
from .report import Report, StageReport
from .solve import solve
from .types import Action, VtpruneError
from .wrappers import unwrap

if TYPE_CHECKING:
    from torch import nn

    from vtprune.models.engine.request import Request
    from vtprune.models.engine.run import Record, Run

# The handle is kept alive by its hooks in the model: a strong value here would keep the model alive for good.
_live: WeakKeyDictionary[Any, ReferenceType[Handle]] = WeakKeyDictionary()

_attaching = threading.RLock()  # one attachment is made or removed at a time


def _overlap(model: nn.Module) -> str | None:
    """The class of a model that is attached and shares modules with ``model``."""
    mine = {id(m) for m in model.modules()}
    for other in list(_live):
        if any(id(m) in mine for m in other.modules()):
            return type(other).__name__
    return None


def put(
    model: nn.Module,
    recipe: str | os.PathLike | Recipe,
    overrides: dict[str, Any],
    proof: Callable[[str], object] = lambda family: None,
    level: int = 2,
) -> Handle:
    """:func:`vtprune.attach` with its keywords as ``overrides``; ``proof`` is called with the family's name before
    anything changes, and raises if the family does not compute right here. ``level``: whose line warnings name, as in
    :func:`warnings.warn`."""
    model, overrides = unwrap(model), dict(overrides)
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
        proof(adapter.geometry.family)
        if target:
            chosen = solve(model, chosen, **target, **extra)
        geometry = for_units(adapter.geometry, extra.get("per"))
        for told in compose(geometry, plan(geometry, chosen)):
            warnings.warn(told, stacklevel=level)
        return Handle(model, chosen, adapter, **extra)


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
            n: cut.layer for n, (_, _, cuts) in enumerate(stages) for cut in cuts if cut.action is Action.STASH
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
                        cut=cut,
                        stage=number,
                        select=Decider(adapter.geometry, stage, method, cuts, i),
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
