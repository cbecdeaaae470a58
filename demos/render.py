"""What the demo shows of results: figures and their differences, cards, pictures to keep, and a recipe file and a
program that repeat it. Knows no Gradio."""

from __future__ import annotations

import html
import itertools
import json
import pprint
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vtprune.core.recipe import Recipe
from vtprune.core.types import VtpruneError
from vtprune.inputs import demo_model
from vtprune.methods.base import METHODS
from vtprune.show import pictures as render
from vtprune.show.web import data_url

from . import TRAINED
from .checks import LARGEST_SIDE
from .results import Entry, Result, Rounds, medians, ratios
from .sides import Side

THUMB = 160  # longer side of a card's picture, pixels
COLUMNS = 4  # cards beside each other in the PNG
LINE = 20  # pixels
ENOUGH = 3  # rounds from which on their spread says something
MARKS = {True: "✓ right", False: "✗ wrong"}  # a sign and a word, so that no colour is needed

_INK, _LINE = "var(--body-text-color, inherit)", "var(--border-color-primary, #8886)"
_TABLE_CSS = f"""
.vtp-scroll {{ overflow-x: auto; color: {_INK}; }}
.vtp-metrics {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
.vtp-metrics th, .vtp-metrics td {{ padding: .3rem .5rem; border-bottom: 1px solid {_LINE}; text-align: right; font-weight: normal; color: {_INK}; }}
.vtp-metrics thead th {{ opacity: .75; }}
.vtp-metrics tr > :first-child {{ text-align: left; }}
.vtp-metrics td:last-child {{ min-width: 6rem; overflow-wrap: break-word; }}
@media (max-width: 34rem) {{ .vtp-metrics {{ font-size: .8rem; }} .vtp-metrics th, .vtp-metrics td {{ padding: .25rem .2rem; }}
  .vtp-metrics [scope=row] {{ min-width: 5.5rem; }} .vtp-metrics td:last-child {{ min-width: 4.5rem; }}
  .vtp-metrics thead :nth-child(4), .vtp-metrics td:nth-child(4) {{ display: none; }} }}
""".strip()  # noqa: E501
_CARDS_CSS = f"""
.vtp-cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 44%), 1fr)); gap: .75rem; list-style: none; margin: 0; padding: 0; }}
.vtp-cards li {{ border: 1px solid {_LINE}; border-radius: .4rem; padding: .6rem; margin: 0; color: {_INK}; overflow-wrap: anywhere; }}
.vtp-cards img {{ width: 100%; height: auto; border-radius: .2rem; display: block; }}
.vtp-cards li > h3 {{ font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; color: {_INK}; }}
.vtp-cards p {{ margin: .3rem 0 0; color: {_INK}; }}
.vtp-cards .vtp-small {{ font-size: .85rem; opacity: .75; }}
""".strip()  # noqa: E501


# ---------------------------------------------------------------------------------------------------------------
# figures


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


def layers_text(layer_tokens: Sequence[int]) -> str:
    """``144 x 3, 72 x 9``: runs of layers with the same number of tokens."""
    runs = [(tokens, len(list(group))) for tokens, group in itertools.groupby(layer_tokens)]
    return ", ".join(f"{tokens} x {layers}" for tokens, layers in runs)


@dataclass(frozen=True)
class Row:
    """One line of the comparison, all text: the figure's ``name`` with its unit, both sides, and ``second`` minus and
    over ``first`` (empty: no such)."""

    name: str
    first: str
    second: str
    difference: str
    ratio: str


def metrics(a: Result, b: Result, rounds: Rounds | None = None) -> list[Row]:
    """The comparison of two sides. The first two times are those of ``rounds``; single measurements (the later tokens;
    all without ``rounds``) stand side by side without a difference, because nobody knows how far they can be
    trusted."""
    x, y = figures_of(a), figures_of(b)
    names = {"ttft_ms": "time to first token, ms", "prefill_ms": "prefill, ms"}
    if rounds is None:
        times = [_single(name, x[key], y[key]) for key, name in names.items()]
    else:
        times = [_paired(name, getattr(rounds, key), y["flops"] - x["flops"]) for key, name in names.items()]
    return [
        *times,
        _single("later tokens, ms each", x["token_ms"], y["token_ms"]),
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
    said = ["-" if v is None else f"{v:.1f}" for v in (first, second)]
    return Row(f"{name}, one run each", said[0], said[1], "", "")


def _paired(name: str, pairs: Sequence[tuple[float, float]], more_work: float) -> Row:
    """Times in turns: medians, and the median of the rounds' ratios with the lowest and highest. What noise explains is
    said to be noise, and a difference against the FLOPs (``more_work``: second minus first) is said to be one."""
    first, second = medians(pairs)
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
    return f"""<style>{_TABLE_CSS}</style>
<div class="vtp-scroll" role="region" tabindex="0" aria-label="figures of both sides"><table class="vtp-metrics">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>"""


# -----------------------------------------------------------------------------------------------------------------
# cards


def thumb(result: Result, panel: int = THUMB) -> Image.Image:
    """The tokens that were left, on the picture that shows all of the image."""
    return render.kept_picture(result.views[result.overview], result.report, number=result.overview, panel=panel)


def _told(entry: Entry) -> list[str]:
    """Effective tokens, tokens per layer where they differ, and FLOPs of a card, in words."""
    assert entry.report is not None and entry.flops_share is not None
    layers = entry.report.layer_tokens[0]
    differ = [f"layers: {layers_text(layers)}"] if len(set(layers)) > 1 else []
    return [
        f"{entry.effective_tokens:.1f} of {entry.report.visual_tokens[0]} tokens",
        *differ,
        f"{100 * entry.flops_share:.0f} % of dense FLOPs",
    ]


def cards_html(cards: Sequence[str]) -> str:
    """The :func:`card`s, as many beside each other as fit."""
    return f'<style>{_CARDS_CSS}</style>\n<ul class="vtp-cards">\n' + "\n".join(cards) + "\n</ul>"


def card(entry: Entry) -> str:
    """An entry as HTML: the tokens that were left, the answer, right or wrong, tokens and FLOPs; or why it cannot
    run."""
    esc = html.escape
    note = f'<p class="vtp-small">{esc(entry.note)}</p>' if entry.note else ""
    if entry.result is None:
        return f"<li><h3>{esc(entry.name)}</h3><p>not run</p>{note}</li>"
    told = _told(entry)
    alt = esc(f"visual tokens that {entry.name} kept: {told[0]}", quote=True)
    small = "<br>".join(map(esc, told))
    mark = "" if entry.right is None else f" <strong>{MARKS[entry.right]}</strong>"
    picture = f'<img alt="{alt}" src="{data_url(thumb(entry.result))}">'
    return f'<li><h3>{esc(entry.name)}</h3>{picture}<p>{esc(entry.result.answer)}{mark}</p><p class="vtp-small">{small}</p>{note}</li>'  # noqa: E501


# --------------------------------------------------------------------------------------------------------------
# pictures


def _lines(text: str, width: int, size: int, most: int) -> list[str]:
    """``text`` broken into at most ``most`` lines of ``width`` pixels; what is left over becomes dots."""
    draw, out, words = ImageDraw.Draw(Image.new("RGB", (1, 1))), [""], text.split()
    for number, word in enumerate(words):
        longer = f"{out[-1]} {word}".strip()
        if out[-1] and draw.textlength(longer, font=render.font(size)) > width:
            if len(out) == most:
                return [*out[:-1], render.fit(draw, " ".join([out[-1], *words[number:]]), width, size)]
            out.append(word)
        else:
            out[-1] = longer
    return [render.fit(draw, line, width, size) for line in out]


def sheet(entries: Sequence[Entry], question: str, *, truth: str | None = None) -> Image.Image:
    """The cards as one picture. Raises :class:`VtpruneError` if there are none."""
    if not entries:
        raise VtpruneError("a contact sheet needs at least one entry")
    pictures = [None if e.result is None else thumb(e.result) for e in entries]
    width = max(THUMB, *(p.width for p in pictures if p is not None), 0)
    high = max([p.height for p in pictures if p is not None], default=0)
    texts = [_card_lines(e, width) for e in entries]
    tall = high + LINE * (1 + max(map(len, texts))) + 2 * render.GAP
    columns = min(COLUMNS, len(entries))
    whole = columns * (width + render.GAP) + render.GAP
    head = _lines(f"{question}{'' if truth is None else f'  (right: {truth})'}", whole - 2 * render.GAP, 17, 4)
    top = render.GAP + len(head) * 24
    out = Image.new("RGB", (whole, top + -(-len(entries) // columns) * tall), render.PAPER)
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(head):
        draw.text((render.GAP, render.GAP + 24 * i), line, fill=render.INK, font=render.font(17))
    for i, (entry, picture_, lines) in enumerate(zip(entries, pictures, texts, strict=True)):
        x, y = render.GAP + i % columns * (width + render.GAP), top + i // columns * tall
        draw.text((x, y), render.fit(draw, entry.name, width, 15), fill=render.INK, font=render.font(15))
        if picture_ is not None:
            out.paste(picture_, (x, y + LINE))
        for k, line in enumerate(lines):
            draw.text(
                (x, y + LINE + (0 if picture_ is None else high + 4) + k * LINE),
                line,
                fill=render.MUTED if k else render.INK,
                font=render.font(13),
            )
    return out


def _card_lines(entry: Entry, width: int) -> list[str]:
    """What stands below a card's picture; marks are words, since Pillow's typeface has no signs for them."""
    if entry.result is None:
        return ["not run", *_lines(entry.note, width, 13, 8)]
    mark = "" if entry.right is None else "  (right)" if entry.right else "  (wrong)"
    told = [*_told(entry), *([entry.note] if entry.note else [])]
    return [
        *_lines(entry.result.answer + mark, width, 13, 2),
        *itertools.chain.from_iterable(_lines(t, width, 13, 4) for t in told),
    ]


def picture(question: str, *results: Result) -> Image.Image:
    """The sides below each other: name, answer, key figures and the tokens of every stage. Raises :class:`VtpruneError`
    without sides."""
    if not results:
        raise VtpruneError("a picture needs at least one side")
    strips = [render.token_picture(r.views[r.overview], r.report, 0, number=r.overview) for r in results]
    width = max(640, *(s.width for s in strips))
    text: list[tuple[str, int, Any]] = [
        (line, 17, render.INK) for line in _lines(question, width - 2 * render.GAP, 17, 6)
    ]
    blocks: list[tuple[list[tuple[str, int, Any]], Image.Image | None]] = [(text, None)]
    for result, strip in zip(results, strips, strict=True):
        n = figures_of(result)
        facts = (
            f"{n['effective_tokens']:.1f} of {n['visual_tokens']} effective tokens, {n['flops'] / 1e9:.3f} of "
            f"{n['dense_flops'] / 1e9:.3f} GFLOPs, "
        )
        facts += (
            f"{n['kv_bytes'] / 1024:.1f} of {n['dense_kv_bytes'] / 1024:.1f} KiB cache, first token after "
            f"{n['ttft_ms']:.0f} ms"
        )
        answer = _lines(
            f"{result.name}: {result.answer}{' (stopped)' if result.stopped else ''}", width - 2 * render.GAP, 16, 8
        )
        blocks.append(
            (
                [
                    *((a, 16, render.INK) for a in answer),
                    *((f, 13, render.MUTED) for f in _lines(facts, width - 2 * render.GAP, 13, 3)),
                ],
                strip,
            )
        )
    out = Image.new(
        "RGB",
        (width, sum(24 * len(lines) + (s.height if s else 0) + render.GAP for lines, s in blocks) + render.GAP),
        render.PAPER,
    )
    draw, y = ImageDraw.Draw(out), render.GAP
    for lines, strip_ in blocks:
        for line, size, color in lines:
            draw.text((render.GAP, y), line, fill=color, font=render.font(size))
            y += 24
        if strip_ is not None:
            out.paste(strip_, (0, y))
            y += strip_.height
        y += render.GAP
    return out


# -------------------------------------------------------------------------------------------------------------
# repeating


def recipe_json(result: Result) -> str:
    """A recipe file of exactly what ran, the solver's schedule in it, for :meth:`vtprune.Recipe.load` and ``vtprune run
    --recipe FILE``. A seed that matters is named in ``source``, for ``--seed``; a trained branch is named by its path
    on this machine. Raises :class:`VtpruneError` for the dense model."""
    if result.recipe is None:
        raise VtpruneError("the dense model has no recipe to save")
    recipe = result.recipe
    seed = f"--seed {result.side.seed}" if any(METHODS.get(stage.method).draws for stage in recipe.stages) else ""
    source = "; ".join(part for part in (recipe.source, seed) if part)
    return Recipe(name=recipe.name, stages=recipe.stages, source=source).to_json() + "\n"


def snippet(
    sides: Sequence[Side],
    question: str,
    model_path: str | None,
    image_name: str,
    *,
    trained: Recipe | None = None,
    max_new_tokens: int = 32,
    device: str = "cpu",
    dtype: str = "float32",
) -> str:
    """A program that repeats ``sides`` with the public interface; run, it leaves ``results``, a list of ``(answer,
    report)``.

    Args:
        model_path: folder or hub id, ``None`` for the bundled model. image_name: of a picture file.
        trained: what ``"dpvr-lf (trained)"`` stands for (:attr:`vtprune.demos.engine.Engine.trained`).

    Raises :class:`VtpruneError` for the trained branch without ``trained`` and for a recipe file that cannot be read.
    """
    if model_path is None:
        load = [
            f"model, processor = vtprune.load_demo_model({_quoted(device)}{'' if dtype == 'float32' else f', torch.{dtype}'})"  # noqa: E501
        ]
    else:
        load = [
            f"model = AutoModelForImageTextToText.from_pretrained({_quoted(model_path)}, "
            f"dtype=torch.{dtype}).to({_quoted(device)}).eval()",
            f"processor = AutoProcessor.from_pretrained({_quoted(model_path)})",
        ]
    runs = "\n".join(_run(side, trained) for side in sides)
    used = [
        *(["from pathlib import Path", ""] if "str(Path(" in runs else []),
        *(["import torch"] if "torch." in load[0] else []),
        "import vtprune",
        *(["from transformers import AutoModelForImageTextToText, AutoProcessor"] if model_path is not None else []),
        "from vtprune.inputs.images import open_image",
        *(["from vtprune.measure.run import dense_report"] if any(side.recipe is None for side in sides) else []),
    ]
    before, loaded = "\n".join(used), "\n".join(load)
    return f"""{before}

{loaded}

image = open_image({_quoted(image_name)})
image.thumbnail(({LARGEST_SIDE}, {LARGEST_SIDE}))  # leaves smaller ones as they are
question = {_quoted(question)}
message = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]}}]
inputs = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)


def ask():
    output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False, num_beams=1)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


results = []
{runs}

for answer, report in results:
    print(answer, f"({{report.effective_tokens:.1f}} effective tokens, {{report.flops / 1e9:.3f}} GFLOPs)")
"""  # noqa: E501


def _quoted(text: str) -> str:
    """A Python literal: JSON's strings are, too, and have the usual quotes."""
    return json.dumps(text, ensure_ascii=False)


def _run(side: Side, trained: Recipe | None) -> str:
    """The lines that run ``side``: by name where the recipe is registered, else with the recipe written out."""
    recipe = side.recipe
    if recipe is None:
        return "results.append((ask(), dense_report(model, inputs)))"
    if recipe == TRAINED:
        if trained is None:
            raise VtpruneError("the trained branch belongs to the bundled model")
        recipe = trained
    if not isinstance(recipe, Recipe) and Path(recipe).suffix in (".json", ".yaml", ".yml"):
        recipe = Recipe.load(Path(recipe))
    before = f"recipe = {_written(recipe)}\n" if isinstance(recipe, Recipe) else ""
    options = "".join(f", {name}={value!r}" for name, value in side.attach_options().items())
    return f"""{before}with vtprune.attach(model, {"recipe" if before else _quoted(str(recipe))}{options}) as handle:
    results.append((ask(), handle.report()))"""


def _written(recipe: Recipe) -> str:
    """``recipe`` as an expression; a bundled branch is found beside the model, wherever that lies."""
    data = recipe.to_dict()
    marks = {}
    for i, stage in enumerate(data["stages"]):
        weights = stage["options"].get("weights")
        if weights and Path(weights).parent == demo_model.FOLDER:
            stage["options"]["weights"] = f"<weights-{i}>"
            marks[repr(f"<weights-{i}>")] = f"str(Path(model.name_or_path) / {Path(weights).name!r})"
    text = pprint.pformat(data, width=120, sort_dicts=False)
    for mark, code in marks.items():
        text = text.replace(mark, code)
    return f"vtprune.Recipe.from_dict(\n{textwrap.indent(text, '    ')}\n)"
