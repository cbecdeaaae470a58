"""The correctness contract: each of its checks as a plain function that returns what it saw, or raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine.host import cache_of, held
from vtprune.models.engine.layout import units

from ..core.ledger import UndoLedger, snapshot
from ..core.planning import applies_to
from ..core.types import Action, VtpruneError
from ..methods.base import OWN_BUDGETS, make
from .case import Case, attention_mask, behind_tower, positioned
from .decoding import STEPS, generate, stepper, steps
from .dense import masks
from .outcome import Fail, Skip, close


def full_budget(c: Case) -> str:
    """Full budget equals the unpatched model, and at least one site fired."""
    if not all(i.budgeted for i in c.infos):
        raise Skip("no budget to fill: the method drops, routes or leaves out whatever the budget")
    stages = tuple(
        replace(s, keep=1.0, options={k: v for k, v in s.options.items() if k not in OWN_BUDGETS})
        for s in c.recipe.stages
    )
    if not all(make(s.method, s.options).faithful() for s in stages):
        raise Skip("what is kept is weighed, whatever the budget")
    want = c.run()
    with c.attach(recipe=replace(c.recipe, stages=stages)) as handle:
        got = c.run()
        report = handle.report()
    if not report.stages:
        raise Fail("no site fired")
    return close(got, want, "full budget") + f", {len(report.stages)} decisions"


def prefill_is_masked_dense(c: Case) -> str:
    """A pruned prefill equals the dense model with the dropped columns hidden, on every row that is left."""
    _only_pruning(c)
    with c.attach() as handle:
        got, tokens = behind_tower(c)
        report = handle.report()
    hidden, present, ledger = masks(c, report, handle.passes)
    try:
        want, dense = behind_tower(c)
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


def decode_is_masked_dense(c: Case) -> str:
    """Cached greedy generation gives the logits of the dense model under the same masks."""
    _only_pruning(c)
    _needs_lm(c)
    _nothing_evicted(c)
    with c.attach() as handle:
        got, tokens = generate(c)
        report = handle.report()
    _, _, ledger = masks(c, report, handle.passes)
    try:
        want, other = generate(c)
    finally:
        ledger.undo()
    if not torch.equal(tokens, other):
        raise Fail("different tokens")
    return close(got, want, "generation")


def cached_is_uncached(c: Case) -> str:
    """Prefill and cached decoding equal one forward over prompt and answer."""
    _needs_lm(c)
    _nothing_evicted(c)
    with c.attach():
        want, tokens = generate(c)
        ids = torch.cat([c.inputs["input_ids"], tokens], dim=1)
        mask = torch.cat([attention_mask(c.inputs), torch.ones_like(tokens)], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -tokens.shape[1] :] = tokens
        follows = {
            k: torch.cat([c.inputs[k], torch.full_like(tokens, v)], dim=1)
            for k, v in c.adapter.follows.items()
            if k in c.inputs
        }
        whole = {**c.inputs, **follows, "input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        got = c.run(inputs=positioned(c, whole))[:, -tokens.shape[1] - 1 : -1]
    return close(got, want, "uncached")


def batch_is_singles(c: Case) -> str:
    """Every sample of a padded batch gets what it gets alone: the same tokens kept, the same output."""
    with c.attach() as handle:
        both = c.run(inputs=positioned(c, c.inputs))
        report = handle.report()
        worst = "0"
        for b, one in enumerate(c.samples()):
            got = c.run(inputs=positioned(c, one))
            single = handle.report()
            for s, t in zip(report.stages, single.stages, strict=bool(single.visual_tokens[0])):
                if not torch.equal(s.kept[b], t.kept[0]):
                    raise Fail(f"sample {b} keeps other tokens at {s.site} than alone")
            n = got.shape[1] if got.ndim == 3 else None
            row = both[b : b + 1] if n is None else both[b : b + 1, -n:] if c.mllm else both[b : b + 1, :n]
            if c.mllm:
                real = attention_mask(c.inputs)[b].bool()
                row = both[b : b + 1, real]
            worst = max(worst, close(got, row, f"sample {b}"), key=float)
    return worst


def interleaved_is_solo(c: Case) -> str:
    """Two generations whose steps alternate give what each gives alone."""
    _needs_lm(c)
    singles = c.samples()
    a, b = singles[0], singles[-1]
    with c.attach():
        alone = [steps(c, one) for one in (a, b)]
        first, second = [], []
        ga, gb = stepper(c, a), stepper(c, b)
        for _ in range(STEPS):
            first.append(next(ga))
            second.append(next(gb))
        worst = max(
            close(torch.stack(x), torch.stack(y), "interleaved") for x, y in zip((first, second), alone, strict=True)
        )
    return worst


def other_instance_untouched(c: Case) -> str:
    """A second model of the same class, built from a copy, computes as before while this one is attached."""
    other = copy.deepcopy(c.model)
    want, before = c.run(other), snapshot(other)
    with c.attach():
        c.run()
        if not torch.equal(c.run(other), want):
            raise Fail("the other instance computes something else")
        if snapshot(other) != before:
            raise Fail("the other instance was changed")
    return "bitwise"


def clean_after_exception(c: Case) -> str:
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
            raise Fail("the planted exception did not come through")
        finally:
            trap.undo()
        if not torch.equal(c.run(), good):
            raise Fail("the next forward under the handle differs")
    if snapshot(c.model) != before or not torch.equal(c.run(), want):
        raise Fail("the model is not as it was")
    return "bitwise"


class _Planted(Exception):
    pass


def restored(c: Case) -> str:
    """After ``remove()`` a full snapshot is equal and outputs are bitwise the same."""
    want = c.run()
    before = snapshot(c.model)
    with c.attach() as handle:
        c.run()
    handle.remove()  # once more
    after = snapshot(c.model)
    if after != before:
        changed = [k for k in before if before[k] != after.get(k)]
        raise Fail(f"left behind in: {', '.join(changed[:3])}")
    if not torch.equal(c.run(), want):
        raise Fail("outputs differ after remove()")
    return "bitwise"


def attach_twice_raises(c: Case) -> str:
    with c.attach():
        try:
            c.attach()
        except VtpruneError:
            return "raises"
    raise Fail("attaching twice was accepted")


def counts_are_true(c: Case) -> str:
    """Exact counts where promised; indices ascending, unique and in range; the cache holds what the report says."""
    with c.attach() as handle, torch.no_grad():
        out = c.model(**({**c.inputs, "use_cache": True} if c.mllm else c.inputs))
        report = handle.report()
    total = report.visual_tokens
    for stage in report.stages:
        for b, k in enumerate(stage.kept):
            if len(k) and (bool((k[1:] <= k[:-1]).any()) or int(k[0]) < 0 or int(k[-1]) >= total[b]):
                raise Fail(f"{stage.site}: indices are not ascending, unique and in range")
            if len(k) != stage.tokens_out[b]:
                raise Fail(f"{stage.site}: {stage.tokens_out[b]} reported, {len(k)} indices")
            if stage.assignment is not None and set(stage.assignment[b][k].tolist()) != set(range(len(k))):
                raise Fail(f"{stage.site}: a kept token is not in its own slot")
    last, info = c.recipe.stages[-1], c.infos[-1]
    if info.budgeted and info.exact and isinstance(last.keep, int) and report.stages:
        inside = report.stages[-1].site.startswith(("vision", "pixels"))  # budgets there are per pass of the tower
        got = [run.records[-1].tokens_out[g] for run, g in handle.passes] if inside else report.stages[-1].tokens_out
        want = [last.keep] * len(got) if inside else _wanted(c, last.keep, total)
        if got != want:
            raise Fail(f"keep={last.keep} gave {got}, not {want}")
    if c.mllm:
        text = attention_mask(c.inputs).sum(1).tolist()
        cache = cache_of(out)
        for i in range(c.geometry.llm_layers):
            real = max(t - n + row[i] for t, n, row in zip(text, total, report.layer_tokens, strict=True))
            idle = all(f"llm.{i}.attention" in halves for halves in report.skipped)
            if idle and held(cache, i):
                raise Fail(f"layer {i} caches {held(cache, i)} tokens, the report says that its attention did not run")
            if report.layer_tokens[0][i] != total[0] and held(cache, i) != real:
                raise Fail(f"layer {i} caches {held(cache, i)} tokens, the report says {real}")
    return f"{[s.tokens_out[0] for s in report.stages]}"


def deterministic(c: Case) -> str:
    with c.attach():
        if not torch.equal(c.run(), c.run()):
            raise Fail("two runs differ")
    return "bitwise"


def finite_in_half(c: Case) -> str:
    """Finite outputs in bfloat16 and float16."""
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(c.model).to(dtype)
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in c.inputs.items()}
        with c.attach(half):
            if not bool(torch.isfinite(c.run(half, inputs)).all()):
                raise Fail(f"not finite in {dtype}")
    return "bf16, fp16"


def _only_pruning(c: Case) -> None:
    if any(i.merges or i.routes for i in c.infos):
        raise Skip("merging and routing change values, no mask gives the same")
    if any(cut.action is Action.INSERT for *_, cuts in c.plan() for cut in cuts):
        raise Skip("tokens of the method's own join the others, which no mask gives")


def _nothing_evicted(c: Case) -> None:
    if any(cut.evict for *_, cuts in c.plan() for cut in cuts):
        raise Skip("caches give tokens up behind the prefill, which no one forward does")


def _needs_lm(c: Case) -> None:
    if not c.mllm:
        raise Skip("no language model")


def _wanted(c: Case, keep: int, total: list[int]) -> list[int]:
    """What an integer budget leaves in each sample: so much of every unit, or all of a smaller one."""
    if not c.mllm:
        return [min(keep, n) for n in total]
    out = [0] * len(total)
    per = applies_to(c.geometry, c.recipe, c.options.get("per"))
    for unit in units(c.adapter.parts(c.inputs["input_ids"], c.inputs), per):
        whole = c.infos[-1].video and not unit.frames  # images
        out[unit.sample] += len(unit.columns) if whole else min(keep, len(unit.columns))
    return out


CHECKS: dict[str, Callable[[Case], str]] = {
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
