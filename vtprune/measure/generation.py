"""Where the time of a dense and a pruned generation goes. What is compared is measured in turns in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..check.attach import attach
from ..core.ledger import UndoLedger
from ..core.planning import ATTACH_OPTIONS, bind
from ..core.recipe import Recipe
from ..core.report import Report
from ..core.stopwatch import Watch, stopwatch
from ..core.types import UnsupportedError, VtpruneError
from ..models.engine.host import backend
from .timing import WARMUP, Moments, clock, spread

PARTS = ("e2e_ms", "ttft_ms", "vision_ms", "prefill_ms", "decode_ms", "scorer_ms")
COMPARED = ("e2e", "ttft", "prefill", "decode")  # pruned over dense


@dataclass
class _Parts:
    """Laps of a model's parts."""

    vision: Watch  # one lap for every call of the encoders
    passes: list[tuple[int, Any, Any]] = field(default_factory=list)  # one for every call of the language model


@contextmanager
def _parted(model: Any, adapter: Any, moments: Moments) -> Iterator[_Parts]:
    """Watches the parts of ``model``, with what an attachment does in them; it has to be made before this and removed
    after."""
    parts, ledger = _Parts(Watch(moments.now)), UndoLedger()
    begun: list[Any] = []

    def enter(module: Any, args: tuple, kwargs: dict) -> None:
        begun[:] = [moments.now()]

    def leave(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        parts.passes.append((1, begun[0], moments.now()))

    try:
        for name in adapter.encoders():
            ledger.replace(model.base_model, name, parts.vision.timed(getattr(model.base_model, name)))
        ledger.before(adapter.lm, enter, first=True)
        ledger.after(adapter.lm, leave, first=False)
        yield parts
    finally:
        ledger.undo()


def generate(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> None:
    """Exactly ``new_tokens`` greedy tokens. Raises :class:`VtpruneError` where the model stops earlier."""
    out = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1)
    made = out.shape[1] - inputs["input_ids"].shape[1]
    if made != new_tokens:
        raise VtpruneError(
            f"the model generated {made} tokens instead of {new_tokens}, so its times cannot be compared"
        )


Turn = dict[str, Any]  # the times of one turn by name


def _turn(model: Any, adapter: Any, inputs: Mapping[str, Any], new_tokens: int, moments: Moments) -> Turn:
    """One turn: a generation of one token and one of ``new_tokens``, with their parts; the names of :data:`PARTS` but
    the scorer, and ``peak_bytes``."""
    device = model.device
    with _parted(model, adapter, moments) as parts:
        out: dict[str, Any] = {"ttft_ms": clock(lambda: generate(model, inputs, 1), device)}
        out["vision_ms"] = moments.ms(parts.vision.laps) if adapter.encoders() else None
        out["prefill_ms"] = moments.ms(parts.passes[:1])
        parts.passes.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        out["e2e_ms"] = clock(lambda: generate(model, inputs, new_tokens), device)
        out["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        later = parts.passes[1:]
        out["decode_ms"] = moments.ms(later) / len(later) if later else None
    return out


@torch.no_grad()
def measure(
    model: Any,
    inputs: Mapping[str, Any],
    recipe: str | Recipe,
    *,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
    **attach_options: Any,
) -> dict[str, Any]:
    """Where the time of a generation goes, without and with ``recipe``, for one batch of prompts.

    A round is dense, pruned, dense; there are ``repeats`` after one that is thrown away. Attaching, and the first
    prefill of an attachment, which plans for the images' sizes, are not part of any time.

    Args:
        inputs: what the processor returns, on the model's device.
        new_tokens: of the long generation (at least 1).
        **attach_options: as for :func:`vtprune.attach`; a budget is solved once.

    Returns:
        A JSON-safe dict. ``dense`` and ``pruned`` hold, each as ``{"median", "p20", "p80"}`` in milliseconds (``None``
        where there is no such part):

        * ``e2e_ms``, ``ttft_ms``: ``generate`` of exactly ``new_tokens`` tokens, and of one;
        * ``vision_ms``: tower and projector, ``prefill_ms``: the language model's first pass (without the head), both
            within the ``ttft_ms``;
        * ``decode_ms``: a later pass of it;
        * ``scorer_ms``: time in the library's own hooks and decisions during one prefill, in prefills of their own. It
            is part of the others, not in addition;

        ``peak_bytes``: allocated at most during the long generation beyond what was there before, on CUDA (the model's
        first device); ``None`` on a CPU, whose allocator keeps no books. ``kv_bytes``: keys and values of the real
        tokens after the prefill.

        ``ratio``: for ``e2e``, ``ttft``, ``prefill`` and ``decode`` the spread over rounds of pruned over the mean of
            the two dense ones around it.
        ``dense_over_dense``: per round the ``ttft_ms`` of the second dense turn over the first's: the noise. ``tokens``
        and ``effective_tokens``: visual tokens per prompt; ``attention``: the language model's attention
        implementation; ``recipe``: the key of what was attached.

    Raises:
        VtpruneError: a model without language model, or whatever :func:`vtprune.attach` refuses. The model is left as
            it was.
    """
    adapter = bind(model)
    if adapter.geometry.llm_layers == 0:
        raise UnsupportedError(f"{type(model).__name__} has no language model; times are those of generate()")
    if new_tokens < 1 or repeats < 1:
        raise VtpruneError(f"new_tokens={new_tokens} and repeats={repeats} must be at least 1")
    options = {"seed": seed, **{k: v for k, v in attach_options.items() if k in ATTACH_OPTIONS}}
    with attach(model, recipe, seed=seed, **attach_options) as handle:
        solved = handle.recipe
        generate(model, inputs, 1)
        report = handle.report()
    triples = _triples(model, adapter, inputs, solved, options, new_tokens, repeats)
    scorer = _scorer(model, inputs, solved, options, repeats)
    facts = {"attention": backend(adapter.lm.config), "recipe": solved.key()}
    return _result(report, facts, triples, scorer)


def _triples(
    model: Any,
    adapter: Any,
    inputs: Mapping[str, Any],
    recipe: Recipe,
    options: Mapping[str, Any],
    new_tokens: int,
    repeats: int,
) -> list[tuple[Turn, Turn, Turn]]:
    """The rounds: a dense turn, a pruned one, a dense one."""
    moments = Moments(model)
    triples = []
    for _ in range(WARMUP + repeats):
        before = _turn(model, adapter, inputs, new_tokens, moments)
        with attach(model, recipe, **options):
            generate(model, inputs, 1)
            pruned = _turn(model, adapter, inputs, new_tokens, moments)
        triples.append((before, pruned, _turn(model, adapter, inputs, new_tokens, moments)))
    return triples[WARMUP:]


def _scorer(
    model: Any, inputs: Mapping[str, Any], recipe: Recipe, options: Mapping[str, Any], repeats: int
) -> list[float]:
    """Milliseconds in the library's own code, per prefill."""
    moments, scorer = Moments(model), []
    with stopwatch(moments.now) as watch, attach(model, recipe, **options):
        for _ in range(WARMUP + repeats):
            watch.laps.clear()
            clock(lambda: generate(model, inputs, 1), model.device)
            scorer.append(moments.ms(watch.laps))
    return scorer[WARMUP:]


def _result(
    report: Report, facts: Mapping[str, Any], triples: Sequence[tuple[Turn, Turn, Turn]], scorer: Sequence[float]
) -> dict[str, Any]:
    """What :func:`measure` gives."""
    dense = _summary([turn for a, _, c in triples for turn in (a, c)], [0.0])
    pruned = _summary([b for _, b, _ in triples], scorer)
    return {
        "tokens": sum(report.visual_tokens) / len(report.visual_tokens),
        "effective_tokens": report.effective_tokens,
        **facts,
        "dense": {**dense, "kv_bytes": report.dense_kv_bytes},
        "pruned": {**pruned, "kv_bytes": report.kv_bytes},
        "ratio": {name: _ratio(triples, f"{name}_ms") for name in COMPARED},
        "dense_over_dense": [c["ttft_ms"] / a["ttft_ms"] for a, _, c in triples],
    }


def _summary(turns: Sequence[Turn], scorer: Sequence[float]) -> dict[str, Any]:
    """Each part over the turns; the most bytes of any."""
    values = {name: [t[name] for t in turns] for name in PARTS if name != "scorer_ms"} | {"scorer_ms": scorer}
    peaks = [t["peak_bytes"] for t in turns]
    return {
        **{name: None if None in v else spread(v) for name, v in values.items()},
        "peak_bytes": None if None in peaks else max(peaks),
    }


def _ratio(triples: Sequence[Sequence[Turn]], name: str) -> dict[str, float] | None:
    """Pruned over the mean of the two dense turns around it; ``None`` for a part that is not there."""
    if triples[0][0][name] is None:
        return None
    return spread([2 * b[name] / (a[name] + c[name]) for a, b, c in triples])
