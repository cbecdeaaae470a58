"""The figures of two sides beside each other, and what their difference means."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import styles
from .results import Result, Rounds, ratios, typical

ENOUGH = 3  # rounds from which on their spread says something
SURE = 6  # rounds from which on a headline may tell who was sooner: all on one side by chance is rarer than 5 %
EFFECTIVE = (
    "Effective visual tokens are the visual tokens that a layer of the language model reads, averaged over its layers: "
    "a token that goes after half of the layers counts half."
)


def figures_of(result: Result) -> dict[str, Any]:
    """The numbers of one side: ``ttft_ms``, ``prefill_ms``, ``token_ms``, ``total_ms``, ``new_tokens``,
    ``visual_tokens``, ``layer_tokens`` per language-model layer, ``effective_tokens`` their mean, ``flops`` and
    ``dense_flops``, ``kv_bytes`` and ``dense_kv_bytes``."""
    report = result.report
    out: dict[str, Any] = {
        name: getattr(result, name) for name in ("ttft_ms", "prefill_ms", "token_ms", "total_ms", "new_tokens")
    }
    out |= {"visual_tokens": report.visual_tokens[0], "layer_tokens": list(report.layer_tokens[0])}
    return out | {
        name: getattr(report, name)
        for name in ("effective_tokens", "flops", "dense_flops", "kv_bytes", "dense_kv_bytes")
    }


def headline(a: Result, b: Result, rounds: Rounds) -> str:
    """What B gains over A, or loses, in one sentence: visual tokens, answer, time to the first token."""
    same = "same answer" if a.answer == b.answer else "another answer"
    said = ", ".join(part for part in (_gone(a, b), same, _sooner(rounds)) if part)
    grey = f" Patches are drawn on grey: {a.note}." if a.note else ""
    return f"{said}.{grey}"


def _gone(a: Result, b: Result) -> str:
    """How many effective tokens B has less."""
    if not a.report.effective_tokens:
        return ""
    gone = 1 - b.report.effective_tokens / a.report.effective_tokens
    if gone < 0:
        return f"{1 - gone:.1f}× the visual tokens"
    if gone == 0:
        return "as many visual tokens"
    tenths = round(10 * gone)
    return f"{tenths} of 10 visual tokens gone" if 0 < tenths < 10 else f"{100 * gone:.3g} % of the visual tokens gone"


def _sooner(rounds: Rounds) -> str:
    """How much sooner, or later, B's first token comes, where the rounds tell."""
    if rounds.rounds < SURE:
        return f"too few rounds ({rounds.rounds}) to compare times"
    middle, low, high = ratios(rounds.ttft_ms)
    if low <= 1 <= high:
        return "first token as soon, within noise"
    return f"first token {1 / middle:.2g}× sooner" if middle < 1 else f"first token {middle:.2g}× later"


def layers_text(layer_tokens: Sequence[int]) -> str:
    """``144 x 3, 72 x 9``: runs of layers with the same number of tokens."""
    runs = [(tokens, len(list(group))) for tokens, group in itertools.groupby(layer_tokens)]
    return ", ".join(f"{tokens} x {layers}" for tokens, layers in runs)


@dataclass(frozen=True)
class Row:
    """One line of the comparison, all text.

    Attributes:
        name: of the figure, with its unit.
        first: one side.
        second: the other side.
        difference: ``second`` minus ``first``; empty: no such.
        ratio: ``second`` over ``first``, with a remark; empty: no such.
    """

    name: str
    first: str
    second: str
    difference: str
    ratio: str


def metrics(a: Result, b: Result, rounds: Rounds | None = None) -> list[Row]:
    """The comparison of two sides. The first two times are those of ``rounds``; single measurements (without
    ``rounds``) stand side by side without a difference, because nobody knows how far they can be trusted. Later tokens
    are told where both answers have enough of them."""
    x, y = figures_of(a), figures_of(b)
    names = {"ttft_ms": "time to first token, ms", "prefill_ms": "prefill, ms"}
    if rounds is None:
        times = [_single(name, x[key], y[key]) for key, name in names.items()]
    else:
        times = [_paired(name, getattr(rounds, key), y["flops"] - x["flops"]) for key, name in names.items()]
    later = (x["token_ms"], y["token_ms"])
    return [
        *times,
        *([] if None in later else [_single("later tokens, median ms", *later)]),
        Row("visual tokens per layer", layers_text(x["layer_tokens"]), layers_text(y["layer_tokens"]), "", ""),
        _row("effective visual tokens", x["effective_tokens"], y["effective_tokens"]),
        _row("prefill FLOPs, G", x["flops"] / 1e9, y["flops"] / 1e9, 3),
        _row("KV cache, KiB", x["kv_bytes"] / 1024, y["kv_bytes"] / 1024),
    ]


def _row(name: str, first: float, second: float, digits: int = 1) -> Row:
    ratio = f"x {second / first:.2f}" if first else ""
    return Row(name, f"{first:.{digits}f}", f"{second:.{digits}f}", f"{second - first:+.{digits}f}", ratio)


def _single(name: str, first: float | None, second: float | None) -> Row:
    """One measurement each."""
    values = ["-" if v is None else f"{v:.1f}" for v in (first, second)]
    return Row(f"{name}, one run each", values[0], values[1], "", "")


def _paired(name: str, pairs: Sequence[tuple[float, float]], more_work: float) -> Row:
    """Times in turns: the middle round, and the median of the rounds' ratios with its 95 % interval. What noise
    explains is said to be noise, and a difference against the FLOPs (``more_work``: second minus first) is said to be
    one."""
    first, second = typical(pairs)
    if len(pairs) < ENOUGH:
        return Row(
            f"{name}, in turns", f"{first:.1f}", f"{second:.1f}", "", f"too few rounds ({len(pairs)}) to compare"
        )
    middle, low, high = ratios(pairs)
    noise = low <= 1 <= high
    against = not noise and (more_work < 0 < middle - 1 or more_work > 0 > middle - 1)
    remark = ": within noise" if noise else ": against the FLOPs, so overhead decides here" if against else ""
    ratio = f"x {middle:.2f} ({low:.2f} to {high:.2f}){remark}"
    return Row(
        f"{name}, median of {len(pairs)} in turns",
        f"{first:.1f}",
        f"{second:.1f}",
        "" if noise else f"{second - first:+.1f}",
        ratio,
    )


def metrics_html(rows: Sequence[Row], first: str = "first", second: str = "second") -> str:
    """``rows`` as a table with heads for its columns (``first``, ``second``: the sides' names) and lines, in the
    colours of Gradio's theme."""
    esc = html.escape
    head = "".join(f'<th scope="col">{esc(c)}</th>' for c in ("figure", first, second, "difference", "ratio"))
    body = "\n".join(
        f'<tr><th scope="row">{esc(r.name)}</th>'
        + "".join(f"<td>{esc(c)}</td>" for c in (r.first, r.second, r.difference, r.ratio))
        + "</tr>"
        for r in rows
    )
    return f"""<style>{styles.TABLE}</style>
<div class="vtp-scroll" role="region" tabindex="0" aria-label="figures of both sides"><table class="vtp-metrics">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<p class="vtp-word">{EFFECTIVE}</p>"""
