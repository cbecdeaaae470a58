"""One line each for people: what ``repr`` shows of a handle, a report and a method's facts, and what the log says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MANY = 4  # samples whose numbers are told one by one, and stages
LONG = 60  # characters of an option's value


def tokens(before: Sequence[int], behind: Sequence[int], what: str = "") -> str:
    """``576 -> 64``; of several samples each, of many the sums."""
    if len(before) == 1:
        return f"{before[0]} -> {behind[0]}{what}"
    if len(before) <= MANY:
        return f"[{', '.join(map(str, before))}] -> [{', '.join(map(str, behind))}]{what}"
    return f"{sum(before)} -> {sum(behind)}{what} in {len(before)} samples"


def stage(one: Any) -> str:
    """A stage of a report: ``llm.8 fastv 576 -> 144``."""
    return f"{one.site} {one.method} {tokens(one.tokens_in, one.tokens_out)}"


def stages(report: Any) -> str:
    """All stages of a report, in the middle of many only how many there are."""
    shown = [stage(s) for s in report.stages]
    if len(shown) > MANY:
        shown = [*shown[: MANY - 1], f"{len(shown) - MANY} more", shown[-1]]
    return ", ".join(shown) or "no tokens dropped"


def report(one: Any) -> str:
    """What a prefill came to."""
    behind = one.stages[-1].tokens_out if one.stages else one.visual_tokens
    parts = [tokens(one.visual_tokens, behind, " visual tokens"), f"{one.effective_tokens:.1f} effective"]
    if one.dense_flops:
        parts.append(f"FLOPs {one.flops / one.dense_flops:.2f} of dense")
    if one.dense_kv_bytes:
        parts.append(f"KV cache {one.kv_bytes / one.dense_kv_bytes:.2f} of dense")
    return ", ".join(parts)


def value(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= LONG else text[: LONG - 3] + "..."


def recipe(one: Any) -> str:
    """Stages with their budgets and options: ``flowcut(keep=0.5) + fastv(keep=0.25, layer=2)``."""
    told = []
    for s in one.stages:
        options = {**({} if s.keep is None else {"keep": s.keep}), **s.options}
        told.append(s.method + (f"({', '.join(f'{k}={value(v)}' for k, v in options.items())})" if options else ""))
    return " + ".join(told)


def method(info: Any) -> str:
    """Facts of a method, in three lines."""
    needs = f"by default keep={info.keep!r}" if info.keep is not None else "takes no keep= by default"
    marks = {
        "looks at the question": info.question_aware,
        "merges": info.merges,
        "has a trained part": info.trained,
        "is fitted to a model": info.fitted,
    }
    also = "".join(f", {word}" for word, holds in marks.items() if holds)
    options = ", ".join(f"{name}={value(default)}" for name, default in info.options.items()) or "none"
    return (
        f"<MethodInfo {info.name} ({info.paper}): {info.idea}\n"
        f"  cuts at {', '.join(info.kinds)}; {needs}{also}\n"
        f"  options: {options}>"
    )
