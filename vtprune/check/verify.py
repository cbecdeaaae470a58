"""The correctness contract as plain functions: used by the generated tests and by ``vtprune verify`` on a user's own
model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.models.engine.host import cache_of, cached, held
from vtprune.models.engine.layout import units
from vtprune.models.engine.masked import hide_in_decoder, hide_in_tower

from ..core.handle import put
from ..core.ledger import UndoLedger, snapshot
from ..core.planning import ATTACH_OPTIONS, TARGETS, bind, load_recipe
from ..core.recipe import Recipe
from ..core.report import Report
from ..core.solve import solve
from ..core.types import VtpruneError
from ..core.wrappers import unwrap
from ..methods.base import METHODS, OWN_BUDGETS

TOLERANCE = 1e-5  # float32, relative to the largest reference value (at least 1)
STEPS = 8  # cached decoding steps


@dataclass(frozen=True)
class Check:
    """``passed`` None: not applicable, ``detail`` says why."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one (model, recipe) pair. ``passed``: at least one ran and none failed."""

    recipe: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        ran = [c.passed for c in self.checks if c.passed is not None]
        return bool(ran) and all(ran)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "passed": self.passed,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
        }


class _Skip(Exception):
    pass


class _Fail(Exception):
    pass


@dataclass
class _Case:
    """What the checks share."""

    model: nn.Module
    recipe: Recipe
    inputs: dict[str, Any]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.adapter = bind(self.model)
        self.geometry = self.adapter.geometry
        self.infos = [METHODS.get(s.method) for s in self.recipe.stages]
        self.mllm = self.geometry.llm_layers > 0

    def attach(self, model: nn.Module | None = None, recipe: Recipe | None = None) -> Any:
        return put(self.model if model is None else model, recipe or self.recipe, self.options)

    def run(self, model: nn.Module | None = None, inputs: dict[str, Any] | None = None) -> Tensor:
        """Logits, or a tower's last hidden states."""
        with torch.no_grad():
            out = (self.model if model is None else model)(**(self.inputs if inputs is None else inputs))
        return output(out)

    def samples(self) -> list[dict[str, Any]]:
        """The batch as single samples without padding."""
        if not self.mllm:  # images are the inputs of four dimensions; texts to compare them with stay
            images = {name: x for name, x in self.inputs.items() if isinstance(x, Tensor) and x.ndim == 4}
            count = len(next(iter(images.values())))
            return [{**self.inputs, **{name: x[i : i + 1] for name, x in images.items()}} for i in range(count)]
        ids = self.inputs["input_ids"]
        found = self.adapter.parts(ids, self.inputs)
        out = []
        for b in range(len(ids)):
            real = _mask(self.inputs)[b].bool()
            along = {
                k: self.inputs[k][b : b + 1, real] for k in ("input_ids", *self.adapter.follows) if k in self.inputs
            }
            out.append(
                {
                    **along,
                    "attention_mask": torch.ones_like(along["input_ids"]),
                    **self.adapter.slice_(self.inputs, found, b),
                }
            )
        return out

    def positions(self, mask: Tensor) -> Tensor:
        return (mask.long().cumsum(1) - 1).clamp_min(0) + self.adapter.first_position


def output(out: Any) -> Tensor:
    """The tensor a caller looks at: logits, last hidden state, open_clip's image features (in a dict, or first of a
    tuple), or the model's plain output."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(out, name):
            return getattr(out, name)
    if isinstance(out, dict):
        return out["image_features"]
    return out[0] if isinstance(out, tuple) else out


def close(got: Tensor, want: Tensor, what: str) -> str:
    """Raises unless equal to the tolerance of the dtype; returns the error as text."""
    if got.shape != want.shape:
        raise _Fail(f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)}")
    limit = TOLERANCE if got.dtype in (torch.float32, torch.float64) else 3e-2
    error = (
        float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1))
        if got.numel()
        else 0.0
    )
    if not error <= limit:
        raise _Fail(f"{what}: relative error {error:.1e} is above {limit:.0e}")
    return f"{error:.1e}"


# -------------------------------------------------------------------------------------------------------------------
# checks


def full_budget(c: _Case) -> str:
    """Full budget equals the unpatched model, and at least one site fired."""
    if not all(i.budgeted for i in c.infos):
        raise _Skip("no budget to fill: the method drops or routes whatever the budget")
    stages = tuple(
        replace(s, keep=1.0, options={k: v for k, v in s.options.items() if k not in OWN_BUDGETS})
        for s in c.recipe.stages
    )
    want = c.run()
    with c.attach(recipe=replace(c.recipe, stages=stages)) as handle:
        got = c.run()
        report = handle.report()
    if not report.stages:
        raise _Fail("no site fired")
    return close(got, want, "full budget") + f", {len(report.stages)} decisions"


def prefill_is_masked_dense(c: _Case) -> str:
    """A pruned prefill equals the dense model with the dropped columns hidden, on every row that is left."""
    _only_pruning(c)
    with c.attach() as handle:
        got, tokens = _behind_tower(c)
        report = handle.report()
    hidden, present, ledger = _masks(c, report, handle.passes)
    try:
        want, dense = _behind_tower(c)
    finally:
        ledger.undo()
    if c.mllm:
        return close(got[present], want[present], "prefill")
    p = c.geometry.prefix
    worst = "0"
    for row, whole, kept in zip(tokens, dense, report.stages[-1].kept, strict=True):
        left = torch.cat([whole[:p], whole[p:][kept.to(whole.device)]])
        worst = max(worst, close(row[: len(left)], left, "last block"), key=float)
    if got.ndim == 2 and c.adapter.class_readout:  # any other head reads the tokens that are left
        worst = max(worst, close(got, want, "prefill"), key=float)
    return worst


def decode_is_masked_dense(c: _Case) -> str:
    """Cached greedy generation gives the logits of the dense model under the same masks."""
    _only_pruning(c)
    _needs_lm(c)
    with c.attach() as handle:
        got, tokens = _generate(c)
        report = handle.report()
    _, _, ledger = _masks(c, report, handle.passes)
    try:
        want, other = _generate(c)
    finally:
        ledger.undo()
    if not torch.equal(tokens, other):
        raise _Fail("different tokens")
    return close(got, want, "generation")


def cached_is_uncached(c: _Case) -> str:
    """Prefill and cached decoding equal one forward over prompt and answer."""
    _needs_lm(c)
    with c.attach():
        want, tokens = _generate(c)
        ids = torch.cat([c.inputs["input_ids"], tokens], dim=1)
        mask = torch.cat([_mask(c.inputs), torch.ones_like(tokens)], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -tokens.shape[1] :] = tokens
        follows = {
            k: torch.cat([c.inputs[k], torch.full_like(tokens, v)], dim=1)
            for k, v in c.adapter.follows.items()
            if k in c.inputs
        }
        whole = {**c.inputs, **follows, "input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        got = c.run(inputs=_positioned(c, whole))[:, -tokens.shape[1] - 1 : -1]
    return close(got, want, "uncached")


def batch_is_singles(c: _Case) -> str:
    """Every sample of a padded batch gets what it gets alone: the same tokens kept, the same output."""
    with c.attach() as handle:
        both = c.run(inputs=_positioned(c, c.inputs))
        report = handle.report()
        worst = "0"
        for b, one in enumerate(c.samples()):
            got = c.run(inputs=_positioned(c, one))
            single = handle.report()
            for s, t in zip(report.stages, single.stages, strict=bool(single.visual_tokens[0])):
                if not torch.equal(s.kept[b], t.kept[0]):
                    raise _Fail(f"sample {b} keeps other tokens at {s.site} than alone")
            n = got.shape[1] if got.ndim == 3 else None
            row = both[b : b + 1] if n is None else both[b : b + 1, -n:] if c.mllm else both[b : b + 1, :n]
            if c.mllm:
                real = _mask(c.inputs)[b].bool()
                row = both[b : b + 1, real]
            worst = max(worst, close(got, row, f"sample {b}"), key=float)
    return worst


def interleaved_is_solo(c: _Case) -> str:
    """Two generations whose steps alternate give what each gives alone."""
    _needs_lm(c)
    singles = c.samples()
    a, b = singles[0], singles[-1]
    with c.attach():
        alone = [_steps(c, one) for one in (a, b)]
        first, second = [], []
        ga, gb = _stepper(c, a), _stepper(c, b)
        for _ in range(STEPS):
            first.append(next(ga))
            second.append(next(gb))
        worst = max(
            close(torch.stack(x), torch.stack(y), "interleaved") for x, y in zip((first, second), alone, strict=True)
        )
    return worst


def other_instance_untouched(c: _Case) -> str:
    """A second model of the same class, built from a copy, computes as before while this one is attached."""
    other = copy.deepcopy(c.model)
    want, before = c.run(other), snapshot(other)
    with c.attach():
        c.run()
        if not torch.equal(c.run(other), want):
            raise _Fail("the other instance computes something else")
        if snapshot(other) != before:
            raise _Fail("the other instance was changed")
    return "bitwise"


def clean_after_exception(c: _Case) -> str:
    """An exception in the middle of a forward leaves a handle that works and a model that can be restored."""
    want = c.run()
    before = snapshot(c.model)
    layers = c.adapter.all_layers()
    trap = UndoLedger()
    with c.attach():
        good = c.run()

        def raise_(*_: Any) -> None:
            raise _Planted

        trap.before(layers[len(layers) // 2], raise_)
        try:
            c.run()
        except _Planted:
            pass
        else:
            raise _Fail("the planted exception did not come through")
        finally:
            trap.undo()
        if not torch.equal(c.run(), good):
            raise _Fail("the next forward under the handle differs")
    if snapshot(c.model) != before or not torch.equal(c.run(), want):
        raise _Fail("the model is not as it was")
    return "bitwise"


class _Planted(Exception):
    pass


def restored(c: _Case) -> str:
    """After ``remove()`` a full snapshot is equal and outputs are bitwise the same."""
    want = c.run()
    before = snapshot(c.model)
    handle = c.attach()
    c.run()
    handle.remove()
    handle.remove()
    after = snapshot(c.model)
    if after != before:
        changed = [k for k in before if before[k] != after.get(k)]
        raise _Fail(f"left behind in: {', '.join(changed[:3])}")
    if not torch.equal(c.run(), want):
        raise _Fail("outputs differ after remove()")
    return "bitwise"


def attach_twice_raises(c: _Case) -> str:
    with c.attach():
        try:
            c.attach()
        except VtpruneError:
            return "raises"
    raise _Fail("attaching twice was accepted")


def counts_are_true(c: _Case) -> str:
    """Exact counts where promised; indices ascending, unique and in range; the cache holds what the report says."""
    with c.attach() as handle, torch.no_grad():
        out = c.model(**({**c.inputs, "use_cache": True} if c.mllm else c.inputs))
        report = handle.report()
    total = report.visual_tokens
    for stage in report.stages:
        for b, k in enumerate(stage.kept):
            if len(k) and (bool((k[1:] <= k[:-1]).any()) or int(k[0]) < 0 or int(k[-1]) >= total[b]):
                raise _Fail(f"{stage.site}: indices are not ascending, unique and in range")
            if len(k) != stage.tokens_out[b]:
                raise _Fail(f"{stage.site}: {stage.tokens_out[b]} reported, {len(k)} indices")
            if stage.assignment is not None and set(stage.assignment[b][k].tolist()) != set(range(len(k))):
                raise _Fail(f"{stage.site}: a kept token is not in its own slot")
    last, info = c.recipe.stages[-1], c.infos[-1]
    if info.budgeted and info.exact and isinstance(last.keep, int) and report.stages:
        inside = report.stages[-1].site.startswith(("vision", "pixels"))  # budgets there are per pass of the tower
        got = [run.records[-1].tokens_out[g] for run, g in handle.passes] if inside else report.stages[-1].tokens_out
        want = [last.keep] * len(got) if inside else _wanted(c, last.keep, total)
        if got != want:
            raise _Fail(f"keep={last.keep} gave {got}, not {want}")
    if c.mllm:
        text = _mask(c.inputs).sum(1).tolist()
        cache = cache_of(out)
        for i in range(c.geometry.llm_layers):
            real = max(t - n + row[i] for t, n, row in zip(text, total, report.layer_tokens, strict=True))
            if report.layer_tokens[0][i] != total[0] and held(cache, i) != real:
                raise _Fail(f"layer {i} caches {held(cache, i)} tokens, the report says {real}")
    return f"{[s.tokens_out[0] for s in report.stages]}"


def deterministic(c: _Case) -> str:
    with c.attach():
        if not torch.equal(c.run(), c.run()):
            raise _Fail("two runs differ")
    return "bitwise"


def finite_in_half(c: _Case) -> str:
    """Finite outputs in bfloat16 and float16."""
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(c.model).to(dtype)
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in c.inputs.items()}
        with c.attach(half):
            if not bool(torch.isfinite(c.run(half, inputs)).all()):
                raise _Fail(f"not finite in {dtype}")
    return "bf16, fp16"


CHECKS: dict[str, Callable[[_Case], str]] = {
    f.__name__: f
    for f in (
        full_budget,
        prefill_is_masked_dense,
        decode_is_masked_dense,
        cached_is_uncached,
        batch_is_singles,
        interleaved_is_solo,
        other_instance_untouched,
        clean_after_exception,
        restored,
        attach_twice_raises,
        counts_are_true,
        deterministic,
        finite_in_half,
    )
}


def check(name: str, model: nn.Module, recipe: Any, inputs: dict[str, Any], **options: Any) -> Check:
    """One check by name. ``options`` are attach-time ones (``positions``, ``seed``); errors of the library (impossible
    pair, bad budget) are raised, not reported."""
    chosen = load_recipe(recipe)
    attached: dict[str, Any] = {k: options.pop(k) for k in ATTACH_OPTIONS if k in options}
    if options:
        chosen = chosen.override(**options)
    case = _Case(unwrap(model), chosen, dict(inputs), attached)
    try:
        return Check(name, True, CHECKS[name](case))
    except _Skip as e:
        return Check(name, None, str(e))
    except _Fail as e:
        return Check(name, False, str(e))


def verify(model: nn.Module, recipe: Any, inputs: dict[str, Any], **options: Any) -> VerifyReport:
    """Runs the correctness contract on a model of the user's.

    Args:
        model: as for :func:`attach`, in evaluation mode.
        recipe: name, path or :class:`Recipe`.
        inputs: what the model is called with; a batch with unequal prompts shows most.
        **options: overrides as for :func:`attach` (``keep=``, ``positions=``, …).

    Raises:
        VtpruneError: the recipe does not fit the model at all, or the model is in training mode.
    """
    model = unwrap(model)
    if model.training:
        raise VtpruneError("verify needs the model in evaluation mode: model.eval()")
    chosen = load_recipe(recipe)
    target = {name: options.pop(name) for name in TARGETS if name in options}
    if target:
        attached = {name: options.pop(name) for name in ATTACH_OPTIONS if name in options}
        chosen, options = solve(model, chosen, **target, **attached, **options), attached
    checks = tuple(check(name, model, chosen, inputs, **options) for name in CHECKS)
    return VerifyReport(chosen.name, checks)


# ------------------------------------------------------------------------------------------------------------------
# helpers


def _behind_tower(c: _Case) -> tuple[Tensor, Tensor]:
    """The model's output and, without a language model, what leaves the last block ``[G, P + n, C]``."""
    if c.mllm:
        return c.run(), torch.empty(0)
    last: list[Tensor] = []
    ledger = UndoLedger()
    ledger.after(
        c.adapter.tower_blocks()[-1],
        lambda module, args, kwargs, x: last.append(x[0] if isinstance(x, tuple) else x),
        first=False,
    )
    try:
        return c.run(), last[0]
    finally:
        ledger.undo()


def _only_pruning(c: _Case) -> None:
    if any(i.merges or i.routes for i in c.infos):
        raise _Skip("merging and routing change values, no mask gives the same")


def _wanted(c: _Case, keep: int, total: list[int]) -> list[int]:
    """What an integer budget leaves in each sample: so much of every unit, or all of a smaller one."""
    if not c.mllm:
        return [min(keep, n) for n in total]
    out = [0] * len(total)
    for unit in units(c.adapter.parts(c.inputs["input_ids"], c.inputs), c.options.get("per") or c.geometry.per[0]):
        out[unit.sample] += min(keep, len(unit.columns))
    return out


def _needs_lm(c: _Case) -> None:
    if not c.mllm:
        raise _Skip("no language model")


def _mask(inputs: dict[str, Any]) -> Tensor:
    return (
        inputs["attention_mask"] if inputs.get("attention_mask") is not None else torch.ones_like(inputs["input_ids"])
    )


def _positioned(c: _Case, inputs: dict[str, Any]) -> dict[str, Any]:
    """With the positions that ``generate`` gives; families with three axes derive theirs from the mask."""
    return {**inputs, "position_ids": c.positions(_mask(inputs))} if c.mllm and not c.geometry.mrope else inputs


def _masks(c: _Case, report: Report, passes: list[tuple[Any, int]]) -> tuple[list[Tensor], Tensor, UndoLedger]:
    """Hooks that hide from the dense model what was dropped. Also ``present`` ``[B, T]``: rows left at the end."""
    ledger = UndoLedger()
    if passes:
        blocks = c.adapter.tower_blocks()
        if c.adapter.tower_mask is None:
            raise _Skip("this tower's blocks take no mask, so nothing can be hidden from the dense model")
        gone = torch.zeros(len(passes), passes[0][0].tokens, dtype=torch.bool)
        per_block = []
        for i in range(len(blocks)):
            for j, (run, g) in enumerate(passes):
                for record in run.records:
                    if record.site == f"vision.{i - 1}":
                        gone = gone.clone()
                        gone[j] = True
                        gone[j, record.kept[g]] = False
            per_block.append(gone)
        hide_in_tower(
            ledger, blocks, c.adapter.tower_mask, c.geometry.prefix, per_block, getattr(c.adapter, "mask_form", None)
        )
    if not c.mllm:
        return [], torch.empty(0), ledger
    ids, padding = c.inputs["input_ids"], _mask(c.inputs)
    visual = c.adapter.visual(ids)

    def columns(kept: list[Tensor]) -> Tensor:
        out = visual.clone()
        for b, k in enumerate(kept):
            out[b, visual[b].nonzero()[:, 0][k.to(ids.device)]] = False
        return out

    lost = torch.zeros_like(visual)
    hidden = []
    for i in range(c.geometry.llm_layers):
        for stage in report.stages:
            if stage.site == f"llm.{i}" or (i == 0 and not stage.site.startswith("llm.")):
                lost = columns(stage.kept)
        hidden.append(lost)
    hide_in_decoder(ledger, c.adapter.decoder_layers(), hidden)
    if c.options.get("positions") == "compact":
        _renumber(ledger, c, [padding.bool() & ~h if bool(h.any()) else None for h in hidden])
    return hidden, padding.bool() & ~hidden[-1], ledger


def _renumber(ledger: UndoLedger, c: _Case, present: list[Tensor | None]) -> None:
    """Hooks that give the columns ``present[i]`` ``[B, T]`` of layer i the positions 0, 1, 2 ..., and what is decoded
    the ones behind; ``None``: its own."""
    kinds = c.adapter.kinds()
    fallen: dict[int, Tensor] = {}  # per layer [B, 1], by how much the prompt's last position fell

    def make(number: int, there: Tensor) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["hidden_states"]
            mine = there.to(x.device)
            own = kwargs["position_ids"].to(x.device).expand(len(mine), -1)
            if x.shape[1] == mine.shape[1]:  # the prompt
                ids = (mine.long().cumsum(1) - 1).clamp_min(0)
                last = torch.where(mine, torch.arange(mine.shape[1], device=x.device), -1).argmax(1, keepdim=True)
                fallen[number] = own.gather(1, last) - ids.gather(1, last)
            else:
                ids = own - fallen[number]
            return args, {**kwargs, "position_ids": ids, "position_embeddings": c.adapter.rotary(x, ids, kinds[number])}

        return enter

    for i, (layer, there) in enumerate(zip(c.adapter.decoder_layers(), present, strict=True)):
        if there is not None:
            ledger.before(layer, make(i, there))


def _generate(c: _Case) -> tuple[Tensor, Tensor]:
    """Greedy logits ``[B, STEPS, V]`` and tokens ``[B, STEPS]``; end-of-sequence does not stop it and no image
    placeholder is generated."""
    rules: dict[str, Any] = {
        "max_new_tokens": STEPS,
        "min_new_tokens": STEPS,
        "do_sample": False,
        "suppress_tokens": list(c.adapter.unspoken),
    }
    model: Any = c.model
    with torch.no_grad():
        out = model.generate(**c.inputs, **rules, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, dim=1), out.sequences[:, c.inputs["input_ids"].shape[1] :]


def _stepper(c: _Case, inputs: dict[str, Any]) -> Any:
    """Greedy decoding by hand: yields the last row's logits, one step at a time."""
    mask = _mask(inputs)
    with torch.no_grad():
        out = c.model(**inputs, use_cache=True)
    while True:
        logits = out.logits[0, -1]
        yield logits
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        with torch.no_grad():
            placed = {} if c.geometry.mrope else {"attention_mask": mask, "position_ids": c.positions(mask)[:, -1:]}
            out = c.model(
                input_ids=logits.argmax()[None, None], **cached(c.model, cache_of(out)), use_cache=True, **placed
            )


def _steps(c: _Case, inputs: dict[str, Any]) -> list[Tensor]:
    stepper = _stepper(c, inputs)
    return [next(stepper) for _ in range(STEPS)]
