"""``attach``: binds a recipe to one model instance, owns every change to it, and reports what the last prefill did. The only place that sees methods and
models."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

from . import cost
from .ledger import UndoLedger
from .methods.base import OWN_BUDGETS, Cut, Method, make
from .recipe import Recipe, Stage, resolve
from .recipes import RECIPES
from .types import Geometry, Report, Selection, StageReport, TokenView, UnsupportedError, VtpruneError

if TYPE_CHECKING:
    from torch import nn

    from vtprune.models._decoder import Request
    from vtprune.models._tower import Record, Run

# The handle is kept alive by its hooks in the model: a strong value here would keep the model alive for good.
_live: WeakKeyDictionary[Any, ReferenceType[Handle]] = WeakKeyDictionary()
_ORDER = {"pixels": 0, "vision": 1, "projector": 2, "llm": 3}
ATTACH_OPTIONS = ("positions", "seed")
TARGETS = ("effective_tokens", "flops")  # budgets that the solver turns into a schedule


def bind(model: nn.Module) -> Any:
    """The adapter for ``model``, or :class:`UnsupportedError` naming the families there are."""
    from vtprune.models.base import ADAPTERS

    for name in ADAPTERS:
        info = ADAPTERS.get(name)
        if info.matches(model):
            return info.bind(model)
    raise UnsupportedError(f"no adapter takes a {type(model).__name__}; there are: " + "; ".join(f"{n} ({ADAPTERS.get(n).idea})" for n in ADAPTERS))


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
            raise UnsupportedError(
                f"{info.name} works at {' / '.join(info.kinds)}; this model ({geometry.family}, {geometry.arch}) offers {' / '.join(geometry.provides)}"
            )
        wanted = info.keep if stage.keep is None else stage.keep
        if not info.budgeted and stage.keep is not None:
            raise VtpruneError(f"{info.name} takes no keep= (its options: {', '.join(info.options) or 'none'})")
        keep = resolve(wanted, geometry.tokens) if wanted is not None and info.budgeted else None
        cuts = method.plan(geometry, keep)
        for cut in cuts:
            missing = info.needs.get(cut.kind, frozenset()) - geometry.provides.get(cut.kind, frozenset())
            if cut.kind not in geometry.provides or missing:
                lacks = ", ".join(sorted(missing)) or f"{cut.kind} sites"
                raise UnsupportedError(f"{info.name} needs {lacks} and {geometry.family} with a {geometry.arch} tower does not provide that")
        out.append((stage, method, cuts))
    flat = [(_ORDER[c.kind], c.layer) for *_, cuts in out for c in cuts]
    starts = [(_ORDER[cuts[0].kind], cuts[0].layer) for *_, cuts in out if cuts]
    if starts != sorted(starts):
        raise VtpruneError(f"recipe {recipe.name!r}: stages must be listed in execution order (pixels, vision, projector, llm; then by layer)")
    if any(a[0] == b[0] == 0 for a, b in zip(flat, flat[1:], strict=False)):
        raise VtpruneError(f"recipe {recipe.name!r} resizes the pixels twice")
    return out


def attach(model: nn.Module, recipe: str | os.PathLike | Recipe, **overrides: Any) -> Handle:
    """Puts ``recipe`` into ``model`` and returns the :class:`Handle` that takes it out again (also a context manager).

    Args:
        model: an unmodified Hugging Face MLLM or vision tower, or a timm ``VisionTransformer``.
        recipe: a registered name, a :class:`Recipe`, or a path to its JSON / YAML form.
        **overrides: ``keep=`` tokens per image after the last cut (int) or their fraction (float in (0, 1]); ``effective_tokens=`` / ``flops=`` let the
        budget solver
            derive the schedule; ``positions="original" | "compact"`` (in-LLM and projector cuts); ``seed=`` for random methods; all else are the last
            stage's options.

    Raises:
        VtpruneError: unknown recipe or option, impossible budget, a model that is attached already; :class:`UnsupportedError` if the model lacks what a
        method needs.
    """
    if model in _live:
        raise VtpruneError("this model is attached already; call remove() on its handle first, or put all stages into one recipe")
    chosen = load_recipe(recipe)
    extra = {name: overrides.pop(name) for name in ATTACH_OPTIONS if name in overrides}
    target = {name: overrides.pop(name) for name in TARGETS if overrides.get(name) is not None}
    budgets = [*target, *(n for n in ("keep", *OWN_BUDGETS) if overrides.get(n) is not None)]
    if len(budgets) > 1:
        raise VtpruneError(f"give one budget, not {' and '.join(f'{n}=' for n in budgets)}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in target.values()):
        raise VtpruneError(f"{next(iter(target))}={next(iter(target.values()))!r} is not a number")
    seed = extra.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise VtpruneError(f"seed={seed!r} is not a whole number from 0 to 2**63 - 1")
    if overrides:
        chosen = chosen.override(**overrides)
    adapter = bind(model)
    if target:
        from .solve import solve

        chosen = solve(model, chosen, **target)
    return Handle(model, chosen, adapter, **extra)


def _decider(method: Method, cut: Cut) -> Any:
    """Decisions carry no gradient: it flows through what is kept (PyramidDrop, arXiv 2410.17247, trains this way)."""
    import torch

    def decide(view: TokenView) -> Selection | None:
        with torch.no_grad():
            return method.select(view, cut)

    return decide


class Handle:
    """Owns one attachment. Leaving its context, or :meth:`remove`, restores the model exactly, also after an exception."""

    def __init__(self, model: nn.Module, recipe: Recipe, adapter: Any, *, positions: str = "original", seed: int = 0):
        from vtprune.models.base import PlannedCut

        self.recipe, self.geometry, self._cost, self.adapter = recipe, adapter.geometry, adapter.cost, adapter
        stages = plan(adapter.geometry, recipe)
        if positions not in ("original", "compact"):
            raise VtpruneError(f"positions={positions!r} is not one of 'original', 'compact'")
        if positions != "original" and adapter.geometry.llm_layers == 0:
            raise VtpruneError("positions= is for models with a language model")
        self._ledger = UndoLedger()
        self._methods: list[Method] = []
        self.modules: dict[str, Any] = {}
        planned: list[PlannedCut] = []
        self._inside = False
        for number, (stage, method, cuts) in enumerate(stages):
            module = method.build(adapter.branch, adapter.geometry) if method.info.routes else None
            if module is not None:
                self.modules[stage.method] = module
            for cut in cuts:
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
                        select=_decider(method, cut),
                        bring_back=lambda hidden, run, method=method, module=module: method.restore(hidden, run, module),
                    )
                )
        self._names = [stage.method for stage, *_ in stages]
        self._vision: deque[Run] = deque(maxlen=32)
        self._local = threading.local()
        self._last: Any = None
        try:
            adapter.install(planned, self._ledger, self, positions=positions, seed=seed)
        except BaseException:
            self._ledger.undo()
            raise
        self._model: Any = model
        _live[model] = ref(self)

    # recorder -------------------------------------------------------------------------------------------------------

    def vision(self, run: Run) -> None:
        """Called by the adapter after each pass of the vision side."""
        self._vision.append(run)
        if self.geometry.llm_layers == 0:
            self._last = (run, None)

    def finished(self, request: Request) -> None:
        """Called by the adapter after each prefill of the language model."""
        request.vision = self._match(request)
        self._last = (request.vision, request)

    def _match(self, request: Request) -> list[tuple[Run, int]] | None:
        """The vision passes that made the images of ``request``, told by which of their tokens arrived: ``[(run, image)]`` per image, or ``None`` without
        vision stages."""
        if not self._vision:
            return None
        level = request.levels[0]
        out: list[tuple[Run, int]] = []
        used: set[tuple[int, int]] = set()
        for b, images in enumerate(request.groups):
            here = set(level.rows[b][level.valid[b]].tolist())
            for group in images:
                mask = [int(p) in here for p in group.tolist()]
                found = None
                for run in reversed(self._vision):
                    for g in range(run.images):
                        arrived = set(run.index[g][run.index[g] >= 0].tolist())
                        if mask == [j in arrived for j in range(run.tokens)]:
                            found = (run, g) if found is None or ((id(found[0]), found[1]) in used and (id(run), g) not in used) else found
                    if found is not None and (id(found[0]), found[1]) not in used:
                        break
                if found is None:
                    return None
                used.add((id(found[0]), found[1]))
                out.append(found)
        return out

    # the user's side --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model; may be called more than once."""
        if self._model is None:
            return
        self._ledger.undo()
        _live.pop(self._model, None)
        self._model = None

    def reseed(self, seed: int) -> None:
        """The seed of the next forward (methods that draw at random)."""
        self.adapter.reseed(seed)

    def report(self) -> Report:
        """What the most recent prefill did. Raises :class:`VtpruneError` before the first one."""
        if self._last is None:
            raise VtpruneError("no prefill with visual tokens has run yet")
        vision, request = self._last
        return self._report_vit(vision) if request is None else self._report_mllm(vision, request)

    def _report_vit(self, run: Run) -> Report:
        s, n = self._cost, self.geometry.tokens
        per = list(zip(*run.layer_tokens, strict=True))  # per image, per block
        flops = sum(cost.vision(s, 1, self._patches(run), row, self._inside, float(run.valid[g].sum())) for g, row in enumerate(per))
        stages = tuple(self._stage(r, r.tokens_in, r.tokens_out, r.kept, r.assignment) for r in run.records)
        return Report(
            visual_tokens=[n] * run.images,
            stages=stages,
            layer_tokens=[list(row) for row in per],
            flops=flops,
            dense_flops=run.images * cost.vision(s, 1, n, [n] * s.vdepth),
            kv_bytes=0,
            dense_kv_bytes=0,
            recipe=self.recipe.key(),
        )

    def _patches(self, run: Run) -> int:
        """Patches embedded: fewer if the pixels were reduced."""
        return run.records[0].tokens_out[0] if run.records and run.records[0].site == "pixels" else run.tokens

    def _stage(self, record: Record, tokens_in: list[int], tokens_out: list[int], kept: list, assignment: list | None) -> StageReport:
        return StageReport(record.site, self._names[record.stage], list(tokens_in), list(tokens_out), list(kept), assignment)

    def _report_mllm(self, images: list[tuple[Run, int]] | None, request: Request) -> Report:
        import torch

        s, n = self._cost, self.geometry.tokens
        owner = [b for b, groups in enumerate(request.groups) for _ in groups]
        samples = len(request.groups)

        def join(kept: Sequence, sizes: Sequence[int] | None = None) -> list:
            """Per image to per sample; the second image of a sample counts from n on."""
            rows: list[list] = [[] for _ in range(samples)]
            for b, k in zip(owner, kept, strict=True):
                rows[b].append(k + n * len(rows[b]))
            return [torch.cat(r) if r else torch.empty(0, dtype=torch.long) for r in rows]

        def add(counts: Sequence[int]) -> list[int]:
            rows = [0] * samples
            for b, c in zip(owner, counts, strict=True):
                rows[b] += c
            return rows

        stages: list[StageReport] = []
        flops = 0
        if images is not None:
            first = images[0][0]
            for i, record in enumerate(first.records):
                per = [(run.records[i], g) for run, g in images]
                kept = [r.kept[g] for r, g in per]
                assignment = None
                if record.assignment is not None:
                    rows: list[list] = [[] for _ in range(samples)]
                    base = [0] * samples
                    for b, (r, g) in zip(owner, per, strict=True):
                        a = cast(list, r.assignment)[g]
                        rows[b].append(torch.where(a >= 0, a + base[b], -1))
                        base[b] += len(r.kept[g])
                    assignment = [torch.cat(r) if r else torch.empty(0, dtype=torch.long) for r in rows]
                stages.append(self._stage(record, add([r.tokens_in[g] for r, g in per]), add([r.tokens_out[g] for r, g in per]), join(kept), assignment))
            for run, g in images:
                towers = [row[g] for row in run.layer_tokens]
                tower_out = [r for r in run.records if r.site.startswith(("vision", "pixels"))]
                projected = float(tower_out[-1].tokens_out[g] if tower_out else n)
                flops += cost.vision(s, 1, self._patches(run), towers, self._inside, projected)
        else:
            flops += cost.vision(s, len(owner), n, [n] * s.vdepth)
        dense_vision = cost.vision(s, len(owner), n, [n] * s.vdepth)
        for record in request.records:
            stages.append(self._stage(record, add(record.tokens_in), add(record.tokens_out), join(record.kept), None))
        layers = [list(row) for row in zip(*request.layer_tokens, strict=True)]  # per sample, per layer
        total = [n * len(g) for g in request.groups]
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
        )
