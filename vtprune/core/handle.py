"""Binds a recipe to one model instance, owns every change to it, and reports what the last prefill did."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from logging import DEBUG
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from vtprune.models.base import PlannedCut
from vtprune.models.engine.books import carry
from vtprune.models.engine.host import forget_compiled

from ..methods.base import OWN_BUDGETS, Method
from . import backbone, shown
from .accounts import Accounts, passes_of
from .composition import compose
from .decider import Decider
from .ledger import UndoLedger, strip
from .live import STEERED, attached, changing, handle_of, lifted, steered
from .log import LOG
from .planning import (
    ATTACH_OPTIONS,
    TARGETS,
    applies_to,
    bind,
    check_options,
    check_tower_budgets,
    for_units,
    load_recipe,
    plan,
    positions_of,
)
from .recipe import Recipe
from .report import Report
from .solve import solve
from .types import Action, Cut, Geometry, UnsupportedError, VtpruneError
from .wrappers import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vtprune.models.engine.request import Request
    from vtprune.models.engine.run import Run


def _overlap(model: nn.Module) -> str | None:
    """The class of a model that is attached and shares modules with ``model``."""
    mine = {id(m) for m in model.modules()}
    for other in list(attached):
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
    shelve = overrides.pop("shelve", False)
    if not isinstance(shelve, bool):
        raise VtpruneError(f"shelve={shelve!r} is not True or False")
    budgets = [*target, *(n for n in ("keep", *OWN_BUDGETS) if overrides.get(n) is not None)]
    if len(budgets) > 1:
        raise VtpruneError(f"give one budget, not {' and '.join(f'{n}=' for n in budgets)}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in target.values()):
        raise VtpruneError(f"{next(iter(target))}={next(iter(target.values()))!r} is not a number")
    if overrides:
        chosen = chosen.override(**overrides)
    with changing, lifted(model):
        if shelve and handle_of(steered, model) is not None:
            raise UnsupportedError(STEERED)
        if model in attached:
            raise VtpruneError(
                "this model is attached already; call remove() on its handle first, or put all stages into one recipe"
            )
        if (other := _overlap(model)) is not None:
            raise VtpruneError(
                f"parts of this model belong to a {other} that is attached already; call remove() on its handle first"
            )
        strip(model)
        adapter = bind(model, extra.get("per"))
        check_options(adapter.geometry, **extra)
        proof(adapter.geometry.family)
        if target:
            chosen = solve(model, chosen, **target, **extra)
        geometry = for_units(adapter.geometry, applies_to(adapter.geometry, chosen, extra.get("per")))
        for sentence in compose(geometry, plan(geometry, chosen)):
            warnings.warn(sentence, stacklevel=level)
        return Handle(model, chosen, adapter, shelve=shelve, **extra)


def _fuse(method: Method, module: Any, hidden: Tensor, run: Callable[..., Tensor]) -> Tensor:
    return method.fuse(hidden, run, module)


def _skip(method: Method, cut: Cut, module: Any, rows: Tensor, prompt: Tensor) -> Tensor:
    return method.skip(rows, prompt, cut, module)


def _gate(method: Method, cut: Cut, module: Any, rows: Tensor, prompt: Tensor) -> Tensor | None:
    return method.gate(rows, prompt, cut, module)


def _built(method: Method, branch: Callable[[int], Any], geometry: Geometry) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):  # layers draw as they are made, and the caller's numbers stay his
        return method.build(branch, geometry)


def _exchange(method: Method, cut: Cut, module: Any, rows: Tensor, images: Tensor) -> Tensor:
    return method.exchange(rows, images, cut, module)


def _joined(parts: list[Tensor]) -> Tensor:
    """``[B, ...]`` of all images; where they have several widths, NaN behind the narrower."""
    import torch

    if parts[0].ndim == 2:
        most = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, most - part.shape[1]), value=torch.nan) for part in parts]
    return torch.cat(parts)


def _learn(method: Method, cut: Cut, similarity: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    return method.learn(similarity, ratio, cut)


def _shelve(adapter: Any, positions: str) -> None:
    """Later turns choose again from what the prompt left on a shelf."""
    if adapter.geometry.llm_layers == 0:
        raise VtpruneError("shelve= is for models with a language model")
    if adapter.geometry.per[0] == "prompt":
        raise UnsupportedError("shelve=True: the images of earlier turns are not known beside per='prompt'")
    if positions == "compact":
        raise UnsupportedError("shelve=True: positions='compact' renumbers each turn's tokens otherwise")
    adapter.decoder.shelve()


class Handle:
    """Owns one attachment. Leaving its context, or :meth:`remove`, restores the model exactly, also after an
    exception."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        adapter: Any,
        *,
        positions: str | None = None,
        seed: int = 0,
        per: str | None = None,
        shelve: bool = False,
    ):
        self.recipe, self.geometry, self.adapter = recipe, adapter.geometry, adapter
        per = applies_to(adapter.geometry, recipe, per)
        stages = plan(for_units(adapter.geometry, per), recipe)
        check_options(adapter.geometry, positions=positions, seed=seed, per=per)
        self.positions = positions = positions_of(adapter.geometry, recipe, positions)
        check_tower_budgets(adapter.geometry, stages, per)
        self.seed: int | tuple[int, ...] = seed  # of the next forwards
        self._ledger = UndoLedger()
        # by method; behind the first of one method, by method and number of the stage
        self.modules: dict[str, Any] = {}
        branches: dict[int, Any] = {}  # by number of the stage
        planned: list[PlannedCut] = []
        sized = replace(adapter.geometry, vision_width=adapter.cost.vd)
        for number, (stage, method, cuts) in enumerate(stages):
            info = method.info
            built = info.routes or info.skips or info.learns
            module = _built(method, adapter.branch, sized) if built else None
            if module is not None:
                if stage.options.get("weights") is not None:
                    backbone.check(stage.method, stage.options["weights"], backbone.layers(adapter), model)
                if not any(cut.action is Action.LEND for cut in cuts):  # what lends is no layer
                    branches[number] = module
                self.modules[stage.method if stage.method not in self.modules else f"{stage.method}.{number}"] = module
            for i, cut in enumerate(cuts):
                decider = Decider(adapter.geometry, stage, method, cuts, i, module if info.learns else None, self._tell)
                planned.append(
                    PlannedCut(
                        cut=cut,
                        stage=number,
                        select=decider,
                        note=decider.note,
                        nest=decider.nest,
                        merges=method.info.merges,
                        bring_back=lambda hidden, run, method=method, module=module: method.restore(
                            hidden, run, module
                        ),
                        fuse=partial(_fuse, method, module),
                        skip=partial(_skip, method, cut, module),
                        gate=partial(_gate, method, cut, module),
                        learn=partial(_learn, method, cut),
                        insert=decider.insert,
                        answer=decider.answer,
                        exchange=partial(_exchange, method, cut, module),
                        trains=decider.trains,
                        lender=method.lend(cut, module),
                    )
                )
        self._cuts = [p.cut for p in planned]
        self._accounts = Accounts(adapter.geometry, adapter.cost, recipe.key(), stages, branches)
        # each thread's most recent prefill
        self._threads: WeakKeyDictionary[threading.Thread, Any] = WeakKeyDictionary()
        self._said: WeakKeyDictionary[threading.Thread, dict[str, dict[str, list[Tensor]]]] = WeakKeyDictionary()
        try:
            adapter.install(planned, self._ledger, self, positions=positions, per=per, seed=seed)
            if shelve:
                _shelve(adapter, positions)
        except BaseException:
            self._ledger.undo()
            raise
        if any(method.info.learns for _, method, _ in stages):  # what a forward told that failed is no other's
            self._ledger.before(model, self._untold, first=True)
        forget_compiled()
        self._model: Any = model
        attached[model] = ref(self)
        LOG.info("vtprune: attached %s", self._named())

    def _named(self, word: str = "to") -> str:
        return f"{shown.recipe(self.recipe)} {word} {type(self._model).__name__} (family {self.geometry.family})"

    def __repr__(self) -> str:
        told = f"{shown.recipe(self.recipe)}, taken out" if self._model is None else self._named()
        return f"<Handle {told}{'' if self._last is None else f'; last prefill {shown.report(self.report())}'}>"

    # recorder -------------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> Any:
        """The calling thread's most recent prefill ``(run, request)``; that of the only thread there was, for a thread
        that has read none itself."""
        mine = self._threads.get(threading.current_thread())
        known = list(self._threads.values())
        return known[0] if mine is None and len(known) == 1 else mine

    @_last.setter
    def _last(self, last: Any) -> None:
        self._threads[threading.current_thread()] = last

    def vision(self, run: Run) -> None:
        """Called by the adapter of a bare tower after each pass."""
        self._last = (run, None)
        self._log()

    def arrived(self, request: Request) -> Run:
        """Called by the adapter before stages behind the projector: their books, begun with what the tower did."""
        return carry(request)

    def finished(self, request: Request) -> None:
        """Called by the adapter after each prefill of the language model."""
        self._last = (None, request)
        self._log()

    def _log(self) -> None:
        if LOG.isEnabledFor(DEBUG):
            report = self.report()
            LOG.debug("vtprune: prefill %s; %s", shown.report(report), shown.stages(report))

    # the user's side --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model; may be called more than once. Caches of prompts that were pruned are closed: the model
        alone cannot go on with them."""
        with changing:
            if self._model is None:
                return
            with lifted(self._model):
                self._ledger.undo()
                for engine in getattr(self.adapter, "engines", ()):
                    getattr(engine, "end", lambda: None)()
                forget_compiled()
                attached.pop(self._model, None)
                LOG.info("vtprune: took out %s", self._named("of"))
                self._model = None

    def reseed(self, seed: int | Sequence[int]) -> None:
        """The seed of the next forwards (methods that draw at random): one for all, or one for each sample of the batch
        (in the vision tower: of each image or tile); a forward of another size then raises :class:`VtpruneError`."""
        self.seed = seed if isinstance(seed, int) else tuple(seed)
        self.adapter.reseed(self.seed)

    def report(self, of: Any = None) -> Report:
        """What a prefill did: the calling thread's most recent one, or that of the request which the key-value cache
        ``of`` belongs to (as the model or ``generate`` returned it). Raises :class:`VtpruneError` where there was
        none."""
        if of is not None:
            known = self.adapter.decoder.requests.items() if self.geometry.llm_layers else ()
            request = next((request for cache, request in list(known) if cache is of), None)
            if request is None:
                raise VtpruneError("no prompt with visual tokens was read into this cache by this attachment")
            return self.report_of(request)
        last = self._last
        if last is None:
            more = "; several threads have run some: report(of=cache) tells of one" if len(self._threads) > 1 else ""
            raise VtpruneError(f"no prefill with visual tokens has run yet{' in this thread' if more else ''}{more}")
        run, request = last
        return self._accounts.of_run(run) if request is None else self.report_of(request)

    def gates(self) -> dict[str, Tensor]:
        """Of the calling thread's most recent prefill, with gradients enabled and a method that is being trained: by
        what each half of a layer was multiplied, ``[B]``, 0 or 1 with the gradient of what decides, as
        ``{"llm.5.attention": ...}``."""
        last = self._last
        request = None if last is None else last[1]
        return {} if request is None else {f"llm.{i}.{half}": g for (i, half), g in request.gates.items()}

    def _tell(self, site: str, name: str, values: Tensor) -> None:
        mine = self._said.setdefault(threading.current_thread(), {})
        mine.setdefault(site, {}).setdefault(name, []).append(values)

    def _untold(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._said.pop(threading.current_thread(), None)

    def told(self) -> dict[str, dict[str, Tensor]]:
        """What methods that are being trained told for their losses in the calling thread's most recent forward of the
        model, once: by site and name, ``[B, ...]`` of all images (or whatever else one budget applies to, kind by
        kind), as ``{"llm.3": {"balance": ...}}``."""
        mine = self._said.pop(threading.current_thread(), {})
        return {site: {name: _joined(parts) for name, parts in names.items()} for site, names in mine.items()}

    def report_of(self, request: Request) -> Report:
        """What a prefill did whose books are ``request``."""
        return self._accounts.of_request(request)

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Within it, in the calling thread, the model reads whole prompts as though nothing were attached, without a
        report: what a trained part learns from. Raises :class:`UnsupportedError` for stages in the vision tower."""
        if self.geometry.llm_layers == 0 or any(c.kind in ("pixels", "vision") for c in self._cuts):
            raise UnsupportedError(
                "what stages in the vision tower have dropped cannot be had back: attach without them"
            )
        with self.adapter.decoder.entrance.aside():
            yield

    @contextmanager
    def unreported(self) -> Iterator[None]:
        """Within it, in the calling thread, prefills leave no report: :meth:`report` goes on telling of the one
        before."""
        mine = threading.current_thread()
        last = self._threads.get(mine)
        try:
            yield
        finally:
            self._threads.pop(mine, None)
            if last is not None:
                self._threads[mine] = last

    @property
    def images(self) -> list[int]:
        """How many passes of the vision tower each sample of the most recent prefill had (:attr:`passes`)."""
        last = self._last
        if last is None:
            return []
        run, request = last
        if request is None:
            return [1] * run.images
        return [len(rows) for rows in request.vision or [[]] * len(request.parts)]

    @property
    def passes(self) -> list[tuple[Run, int]]:
        """The vision tower's own books of the most recent prefill: ``(run, row)`` of every pass, in the prompt's order;
        empty without stages there."""
        last = self._last
        if last is None:
            return []
        run, request = last
        return [(run, g) for g in range(run.images)] if request is None else passes_of(request)

    _vision = passes  # its name in the first layout
