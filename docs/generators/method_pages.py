"""One page per method, from its :class:`MethodInfo`, its docstrings, what was measured, and what the bundled model
keeps under it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, get_type_hints

import facts
from facts import ROOT, cell, plain
from kept import BUDGET, Kept

from vtprune.core.info import GROUPS, group, grouped
from vtprune.methods.base import MethodInfo

PLACES = {
    "pixels": "in front of the vision tower, on pixels",
    "vision": "inside the vision tower",
    "projector": "behind the projector, in front of the language model",
    "llm": "inside the language model",
}
# What a method asks of a site, in words.
NEEDS = {
    "class_token": "a class token in the tower",
    "classifier": "a bare classifier: it has no place in a multimodal model",
    "insert": "a tower whose blocks can take tokens that are no patches (no rotary positions, no folded patches)",
    "keys": "the keys of a decoder layer",
    "layers": "decoder layers that can be copied",
    "matrices": "tower blocks whose matrices can be cut to a part of their width",
    "origin": "which image and which tile a token belongs to",
    "pixel_blocks": "a processor that hands the tower blocks of pixels (Qwen-VL, GLM-4V)",
    "products": "unnormalised query-key products of a decoder layer",
    "projections": "queries, keys and values of tower blocks",
    "prompt": "a prompt of text whose tokens may be dropped",
    "query_attention": "the attention of some rows of a decoder layer, recomputed from its projections (any attention "
    "backend will do)",
    "resize": "a tower that takes images of another size",
    "states": "hidden states of decoder layers",
    "text": "the words of the question",
}


def uri(name: str) -> str:
    return f"methods/{name}.md"


def page(info: MethodInfo, kept: Kept | None) -> str:
    """The Markdown of a method's page; ``kept``: what is drawn."""
    source = facts.paper(info)
    title = [f"# {info.name}", "", f"**{info.idea[0].upper()}{info.idea[1:]}.**", ""]
    if source is not None:
        link = f"[arXiv {source.arxiv}](https://arxiv.org/abs/{source.arxiv})"
        title += [f"*{source.title}*, {link}" if source.title else link]
        title[-1] += f", {source.venue}." if source.venue else "."
    else:
        title += ["A baseline: no paper, and the least that a method has to beat."]
    parts = [
        *title,
        *_try(info),
        *_drawn(info, kept),
        *_where(info, kept),
        *_decides(info),
        *_options(info),
        *_hand_written(info),
        *_needs(info),
        *_families(info),
        *_measured(info),
        *_citation(info),
    ]
    return "\n".join(parts) + "\n"


def _try(info: MethodInfo) -> Iterator[str]:
    if info.classifies or info.fitted or info.of_text:
        return
    keep = ", keep=0.25" if info.keep is not None else ""
    yield from ["", "```python", "import vtprune", ""]
    yield f"# model, inputs: {_model(info)}"
    yield f'with vtprune.attach(model, "{info.name}"{keep}) as handle:'
    yield from ["    model.generate(**inputs, max_new_tokens=8)", "print(handle.report().effective_tokens)", "```"]


def _model(info: MethodInfo) -> str:
    return "of one of the families below, with a video" if info.video else "of one of the families below"


def _drawn(info: MethodInfo, kept: Kept | None) -> Iterator[str]:
    yield ""
    if kept is None:
        return
    said = "four frames of a generated video" if info.video else "a generated picture"
    if info.video:
        yield f"![{kept.words}](img/{info.name}.webp){{ .kept }}"
    else:
        yield '<div class="pair" markdown>'
        yield "![the picture without pruning](img/original.webp) "
        yield f"![{kept.words}](img/{info.name}.webp)"
        yield "</div>"
    what = "merged groups are outlined, dropped patches dimmed" if info.merges else "dropped patches are dimmed"
    first, last = kept.stages[0], kept.stages[-1]
    yield ""
    yield f"What is left of {said} in the bundled model: {last[2]} of {first[1]} visual tokens; {what}."
    yield "The picture is made while this site is built" + (
        f", with the schedule that was measured at {100 * BUDGET:g} % of the effective tokens."
        if facts.bench_rows("bench.json", info.name) or facts.bench_rows("clips.json", info.name)
        else ", with the method's own defaults."
        if info.keep is None
        else f", with `keep={BUDGET:g}`."
    )


def _where(info: MethodInfo, kept: Kept | None) -> Iterator[str]:
    yield from ["", "## Where it cuts", ""]
    usual, *others = info.kinds
    yield f"It works {PLACES[usual]}" + (
        f"; with options or in other families also {', '.join(PLACES[k] for k in others)}." if others else "."
    )
    if info.score:
        yield f"Tokens are ranked by: {info.score}."
    facts_ = [text for holds, text in _traits(info) if holds]
    yield from ["", *(f"- {text}" for text in facts_)] if facts_ else []
    changed = [s for s in kept.stages if s[1] != s[2]] if kept else []
    if changed:
        steps = ", ".join(f"`{site}` {before} → {after}" for site, before, after in changed)
        yield from ["", f"In the picture above (bundled model, 8 tower blocks and 12 decoder layers): {steps}."]


def _traits(info: MethodInfo) -> list[tuple[bool, str]]:
    """Facts that a user wants to know before the first try."""
    keep = f"{info.keep:g}" if isinstance(info.keep, float) else str(info.keep)
    fewer = f"`keep={keep}` by default" + (" (a share of the tokens)" if isinstance(info.keep, float) else "")
    return [
        (info.keep is not None, f"Budget: {fewer}."),
        (info.keep is None and info.budgeted, "Budget: its options say how much stays; `keep=` is not needed."),
        (not info.budgeted, "Budget: none; what it saves follows from its options or from the input."),
        (not info.exact, "The number of tokens follows from the picture: a budget is met on average or from below."),
        (info.merges, "It merges tokens: what leaves is averaged into what stays."),
        (info.question_aware, "It reads the question: another question keeps other tokens."),
        (info.draws, "It draws at random: `seed=` repeats a draw."),
        (info.video, "It compares the frames of a video: one budget for all of them; single images stay whole."),
        (info.fitted, f"It has no defaults: `vtprune fit {info.name}` finds them for your model."),
        (info.trained, f"It has a part that is trained first: `vtprune train {info.name}`, then `weights=FILE`."),
        (info.whole, "It needs the whole raster: no other stage may drop tokens in front of it."),
        (info.positions != "original", f"Positions: `positions={info.positions!r}` by default."),
    ]


def _decides(info: MethodInfo) -> Iterator[str]:
    """The docstrings of module and class: the equations, and where paper and official code differ."""
    assert info.cls is not None
    yield from ["", "## How it decides", ""]
    own = inspect.getdoc(info.cls)
    yield plain(own) if own else "See the options."
    _, _, more = facts.module_doc(info).partition("\n\n")
    if more:
        yield from ["", plain(more)]


def _options(info: MethodInfo) -> Iterator[str]:
    yield from ["", "## Options", ""]
    assert info.cls is not None
    if not info.options:
        yield "None besides those of `vtprune.attach` (`keep=`, `effective_tokens=`, `flops=`, `positions=`, `per=`)."
        return
    import dataclasses

    hints = get_type_hints(info.cls)
    yield "Keywords of `vtprune.attach`, `--option NAME=VALUE` on the command line, `options:` in a recipe file. Where "
    yield "paper and official code differ, both are options, and the help says which is which."
    yield from ["", "| option | default | values | what it does |", "|---|---|---|---|"]
    for f in dataclasses.fields(info.cls):
        values = _values(f.metadata, hints[f.name])
        default = "none" if f.default is None else f"`{f.default!r}`"
        yield f"| `{f.name}` | {cell(default)} | {cell(values)} | {cell(plain(f.metadata.get('help', '')))} |"


def _values(declared: Any, hint: Any) -> str:
    """What an option may be, as :func:`vtprune.methods.base.option` declares it."""
    if declared.get("choices"):
        return ", ".join(f"`{c!r}`" for c in declared["choices"])
    words = (("least", "from"), ("above", "above"), ("most", "to"), ("below", "below"))
    limits = " ".join(f"{w} {declared[k]:g}" for k, w in words if declared.get(k) is not None)
    text = str(hint)
    kind = "list of numbers" if "tuple" in text else hint.__name__ if isinstance(hint, type) else ""
    spoken = {"int": "whole number", "float": "number", "bool": "`True`, `False`", "str": "text"}
    kind = spoken.get(kind, kind) or next((v for k, v in spoken.items() if k in text), "")
    return f"{kind} {limits}".strip()


def _hand_written(info: MethodInfo) -> Iterator[str]:
    """The text of docs/methods/NAME.md, one level deeper, without its title."""
    path = ROOT / "docs" / "methods" / f"{info.name}.md"
    if not path.is_file():
        return
    _, _, text = path.read_text(encoding="utf-8").partition("\n")
    yield from ["", "## In detail", "", text.strip()]


def _needs(info: MethodInfo) -> Iterator[str]:
    yield from ["", "## What it needs", ""]
    lines = [f"{PLACES[kind]}: {NEEDS[what]}" for kind, names in info.needs.items() for what in sorted(names)]
    if info.trained:
        lines.append(
            f"weights that were trained for your model ([training](../training.md), `vtprune train {info.name}`)"
        )
    if info.fitted:
        lines.append(f"a recipe that was fitted to your model (`vtprune fit {info.name} --recipe-out FILE`)")
    yield from [f"- {line}" for line in lines] or ["Nothing beyond a supported model."]


def _families(info: MethodInfo) -> Iterator[str]:
    yield from ["", "## Families", ""]
    signs = {family: row[info.name] for family, row in facts.support().items()}
    whole = [f"[{f}](../families/{f}.md)" for f, sign in signs.items() if sign == "●"]
    yield f"Works with its defaults in {', '.join(whole)}." if whole else "No family takes it with its defaults."
    rest = [(f, sign) for f, sign in signs.items() if sign != "●"]
    if rest:
        yield from ["", "| family | | why |", "|---|---|---|"]
        for family, sign in rest:
            yield f"| [{family}](../families/{family}.md) | {facts.STATUS[sign]} | {_why(family, info.name)} |"


def _why(family: str, method: str) -> str:
    return cell(plain(facts.reason(family, method)))


def _measured(info: MethodInfo) -> Iterator[str]:
    yield from ["", "## Measured", ""]
    said = False
    for file, about in (("bench.json", "scenes"), ("clips.json", "clips")):
        rows = [r for r in facts.bench_rows(file, info.name) if r.get("budget") is not None]
        if rows:
            yield from _bench(file, about, rows)
            said = True
    for run in facts.trained_runs(info.name):
        if run["seed"] == 0:
            yield from _trained(run)
            said = True
    tables = [p for p in facts.tables_with(info.name) if p.name != "bench.md"]
    links = ", ".join(f"[{p.stem}](../../benchmarks/results/{p.name})" for p in tables)
    if links:
        yield f"All tables with a row of this method: {links}."
    elif not said:
        yield "Nothing was measured with this method here. Its tests compare it with a slow transcription of the "
        yield "paper's equations, which says that it is right, not that it is good."


def _bench(file: str, about: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    result, dense = facts.results(file), facts.bench_dense(file)
    whole = dense["sets"][about]
    yield f"The bundled model on {whole['samples']} questions of `{about}`; dense: {100 * whole['accuracy']:.1f} %. "
    yield "Budgets are *effective* tokens (visual tokens averaged over the layers of the language model)."
    yield ""
    yield "| budget | right, % | minus dense, points (95 % interval) | FLOPs | KV cache | |"
    yield "|--:|--:|--:|--:|--:|---|"
    for r in rows:
        at = r["sets"][about]
        low, high = (100 * x for x in at["difference_interval"])
        yield (
            f"| {100 * r['budget']:g} % | {100 * at['accuracy']:.1f} | {100 * at['difference']:+.1f} "
            f"[{low:+.1f}, {high:+.1f}] | {100 * r['flops_share']:.0f} % | {100 * r['kv_share']:.0f} % | {r['note']} |"
        )
    device, versions = result["device"], result["versions"]
    yield ""
    yield f"`{result['command']}`  "
    yield f"{device['name']}, {device['threads']} thread, {device['dtype']}; torch {versions['torch']}, transformers "
    yield f"{versions['transformers']}. A small model and generated pictures: read "
    yield "[how to read it](../../benchmarks/results/README.md) before you compare neighbours."
    yield ""


def _trained(run: dict[str, Any]) -> Iterator[str]:
    yield "Trained beside the frozen bundled model, against controls on the same questions (first seed):"
    yield from ["", "| | right, % (95 % interval) | visual tokens | prefill FLOPs |", "|---|--:|--:|--:|"]
    for r in run["rows"]:
        low, high = (100 * x for x in r["interval"])
        yield (
            f"| {cell(r['name'])} | {100 * r['mean']:.1f} [{low:.1f}, {high:.1f}] | {100 * r['tokens']:.1f} % | "
            f"{100 * r['flops']:.1f} % |"
        )
    yield from ["", f"`{run['command']}`", ""]


def _citation(info: MethodInfo) -> Iterator[str]:
    source = facts.paper(info)
    if source is None:
        return
    yield from ["", "## Citation", "", "```bibtex", f"@misc{{{info.name},"]
    if source.title:
        yield f"  title         = {{{source.title}}},"
    yield f"  year          = {{{source.year}}},"
    yield f"  eprint        = {{{source.arxiv}}},"
    yield "  archivePrefix = {arXiv},"
    if source.venue:
        yield f"  note          = {{{source.venue}}},"
    yield from ["}", "```"]


def index() -> str:
    """The list of all methods, by where they decide."""
    lines = [
        "# Methods",
        "",
        "Every method is written from its paper's formulas and tested against a slow transcription of them. Each page "
        "says what the method does, where it cuts, which options it has, which families take it, and what it cost the "
        "bundled model. [Choose a method](../choose.md) says where to begin.",
        "",
    ]
    for title, infos in grouped(facts.every_method()).items():
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| method | idea | source |", "|---|---|---|"]
        lines += [f"| [`{i.name}`]({i.name}.md) | {cell(i.idea)} | {i.paper} |" for i in infos]
        lines.append("")
    return "\n".join(lines)


def nav() -> list[Any]:
    """The methods' part of the navigation."""
    groups = grouped(facts.every_method())
    assert set(groups) <= set(GROUPS.values()) and all(group(i) in GROUPS for i in facts.every_method())
    entries: list[Any] = ["methods/index.md"]
    entries += [{f"{t[0].upper()}{t[1:]}": [{i.name: uri(i.name)} for i in infos]} for t, infos in groups.items()]
    return entries


def is_method(page_uri: str) -> bool:
    path = PurePosixPath(page_uri)
    return path.parent.name == "methods" and path.stem != "index"
