"""What methods may look at: notes that travel from the tower, the prompt's text, states and keys of decoder layers,
attention by chosen rows and single heads. The oracles are the model's own outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from vtprune.models.base import ADAPTERS
from vtprune.models.engine import scores
from vtprune.models.engine.host import cache_of
from vtprune.models.engine.layout import units as groups
from vtprune.models.engine.masked import hide_in_decoder

import vtprune
from vtprune.core.ledger import UndoLedger
from vtprune.core.recipe import Recipe, Stage
from vtprune.core.select import from_mask, merged, top
from vtprune.core.types import Action, Cut, Mix
from vtprune.methods.base import METHODS, Method, MethodInfo, register

SEEN: dict = {}

NOTING = ("llava", "llava-next", "llava-onevision", "paligemma", "internvl", "gemma3")
ASKED = ("llava", "qwen2.5-vl", "gemma3", "llava-next")


@pytest.fixture(autouse=True)
def spies():
    """Two methods that look and keep everything."""
    SEEN.clear()

    @register(
        MethodInfo(
            name="spy-notes",
            paper="baseline",
            idea="notes indices and first channels in the tower, and looks at them behind the projector or in a layer",
            kinds=("projector", "llm", "vision"),
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Notes(Method):
        site: str = "projector"

        def plan(self, geometry, keep):
            last = geometry.seen_layers - 1
            marks = [Cut(site=f"vision.{i}", action=Action.NOTE) for i in (0, last)]
            return (*marks, Cut(site=self.site, keep=keep, data={"sites": [c.site for c in marks]}))

        def note(self, view, cut):
            return view.index.double() if cut.site == "vision.0" else view.features[..., 0].double()

        def select(self, view, cut):
            SEEN.setdefault("views", []).append((view.index, view.valid, [view.noted(s) for s in cut.data["sites"]]))
            return from_mask(view.valid)

    @register(
        MethodInfo(
            name="spy-text",
            paper="baseline",
            idea="looks at everything a cut in the language model offers",
            kinds=("llm", "projector"),
            needs={"llm": frozenset({"text", "states", "keys", "query_attention"}), "projector": frozenset({"text"})},
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Looks(Method):
        site: str = "llm.2"

        def plan(self, geometry, keep):
            observe = (1,) if self.site == "llm.2" else ()
            return (Cut(site=self.site, keep=keep, observe=observe),)

        def select(self, view, cut):
            if self.site == "projector":
                SEEN.setdefault("projector", []).append(view.source("text"))
                return from_mask(view.valid)
            text = view.source("text", keys="previous")
            ask = lambda **how: view.source("query_attention", layer="previous", **how)  # noqa: E731
            seen = {
                "view": view,
                "text": text,
                "states": view.source("states"),
                "normed": (view.source("states", layer="next", norm=True), view.source("text", norm=True).hidden),
                "keys": view.source("keys"),
                "each": ask(query="last", heads="each"),
                "by": {h: ask(query=text.after, heads=h) for h in ("mean", "max", "most", "each")},
                "corrected": {h: ask(query=text.after, heads=h, rope="corrected") for h in ("mean", "max", "each")},
                "last": ask(query="last", rope="corrected"),
                "own": {h: ask(query="visual", heads=h) for h in ("mean", "max", "most", "each")},
            }
            SEEN.setdefault("llm", []).append(seen)
            return from_mask(view.valid)

    @register(
        MethodInfo(
            name="spy-origin",
            paper="baseline",
            idea="notes the passes of the tower, and compares them with what the view says of its tokens",
            kinds=("projector", "llm", "vision"),
            needs={"projector": frozenset({"origin"}), "llm": frozenset({"origin"})},
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Origins(Method):
        site: str = "projector"

        def plan(self, geometry, keep):
            notes = [Cut(site="vision.0", action=Action.NOTE)] if geometry.seen_layers else []
            return (*notes, Cut(site=self.site, keep=keep))

        def note(self, view, cut):
            number = torch.arange(len(view.index)).double()  # of the pass; of packed towers, within its kind
            return torch.stack([number, view.features.double().mean((1, 2))], -1)[:, None].expand(*view.index.shape, 2)

        def select(self, view, cut):
            noted = view.noted("vision.0") if "note vision.0" in view.sources else None
            SEEN.setdefault("origins", []).append((view, view.source("origin"), noted))
            return from_mask(view.valid)

    yield
    for name in ("spy-notes", "spy-text", "spy-origin"):
        METHODS._forget(name)


def first(family: str, tiny):
    return tiny(family, next(iter(ADAPTERS.get(family).tiny)))


@pytest.mark.parametrize("site", ["projector", "llm.2"])
@pytest.mark.parametrize("family", NOTING)
def test_notes_follow_their_tokens(family, site, tiny):
    """The index that the tower noted is the token's own, of folded tokens the mean; the first channel that of the
    tower's own states, image by image."""
    model, inputs = first(family, tiny)
    blocks = []
    with vtprune.attach(model, "spy-notes", keep=1.0, site=site) as handle, torch.no_grad():
        adapter = handle.adapter
        last = adapter.engines[0].tower.blocks[-1]
        hook = last.register_forward_hook(lambda m, a, o: blocks.append(o[0] if isinstance(o, tuple) else o))
        out = model(**inputs)
        hook.remove()
        parts = adapter.parts(inputs["input_ids"], inputs)
        sources = adapter.sources(inputs, parts)
        report = handle.report()
    assert torch.isfinite(out.logits).all()
    assert all(len(k) == n for k, n in zip(report.stages[-1].kept, report.visual_tokens, strict=True))
    prefix, fold = adapter.geometry.prefix, getattr(adapter, "fold", 1)
    states = torch.cat([b[:, prefix:, 0] for b in blocks]).double()  # [passes, patches]
    side = int(states.shape[1] ** 0.5)
    folded = lambda t: t.view(-1, side // fold, fold, side // fold, fold).mean((2, 4)).flatten(1)  # noqa: E731
    index, states = folded(torch.arange(side * side).double()[None])[0], folded(states)
    want = []
    at = 0
    for sample, source in zip(parts, sources, strict=True):
        passes = sum(len(p.passes) for p in sample)
        mine = states[at : at + passes].flatten()
        at += passes
        there = source >= 0
        both = [torch.where(there, values[source.clamp_min(0)], torch.nan) for values in (index.repeat(passes), mine)]
        order = torch.cat([p.columns for p in sample]).sort().values
        want += [
            torch.stack(both)[:, torch.searchsorted(order, unit.columns)]
            for unit in groups([sample], adapter.geometry.per[0])
        ]
    got = [
        torch.stack([values[g][valid[g]] for values in noted])
        for _, valid, noted in SEEN["views"]
        for g in range(len(valid))
    ]
    assert len(got) == len(want)
    for unit in want:  # units of several sizes are looked at kind by kind
        assert sum(g.shape == unit.shape and torch.allclose(g, unit, atol=1e-5, equal_nan=True) for g in got) == 1


@pytest.mark.parametrize("per", ["image", "sample"])
@pytest.mark.parametrize("site", ["projector", "llm.2"])
@pytest.mark.parametrize("family", [*NOTING, "qwen2.5-vl"])
def test_tokens_know_their_image_and_the_pass_that_made_them(family, site, per, tiny):
    """The tower noted the number of the pass, over the batch; new-line tokens have none. Rasters of a packed tower are
    passes of their own."""
    model, inputs = first(family, tiny)
    with vtprune.attach(model, "spy-origin", keep=1.0, site=site, per=per) as handle, torch.no_grad():
        model(**inputs)
        adapter = handle.adapter
        parts = adapter.parts(inputs["input_ids"], inputs)
    units = groups(parts, per)
    got = {}
    for view, origin, noted in SEEN["origins"]:
        assert bool((origin[~view.valid] == -1).all())
        for g, n in enumerate(view.valid.sum(1).tolist()):
            image, number = origin[g, :n].unbind(-1)
            if noted is not None:
                known, mean = noted[g, :n].unbind(-1)
                assert torch.equal(number < 0, known.isnan())
                made = number >= 0
                if family in NOTING:
                    assert len((number - known)[made].unique()) == 1, "the sample's first pass is number 0"
                each = torch.stack([number[made].double(), mean[made]], 1).unique(dim=0)
                assert len(each) == len(each[:, 0].unique()) == len(each[:, 1].unique())
            got.setdefault((n, len(image.unique()), len(number[number >= 0].unique())), []).append(g)
    want = [(p.image, len(p.passes)) for sample in parts for p in sample]
    assert sum(len(rows) for rows in got.values()) == len(units)
    assert sum(n * len(rows) for (n, _, _), rows in got.items()) == sum(len(u.columns) for u in units)
    assert sum(passes * len(rows) for (_, _, passes), rows in got.items()) == sum(n for _, n in want)
    images = sum(len({p.image for p in sample}) for sample in parts)
    assert sum(count * len(rows) for (_, count, _), rows in got.items()) == images


def eager(model, inputs):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
    return out


@pytest.mark.parametrize("family", ASKED)
def test_the_language_model_s_sources_are_its_own(family, tiny):
    model, inputs = first(family, tiny)
    model.set_attn_implementation("eager")
    with vtprune.attach(model, "spy-text", keep=1.0) as handle, torch.no_grad():
        model(**inputs)
        adapter = handle.adapter
    ids = inputs["input_ids"]
    out = eager(model, inputs)
    units = [(u.sample, u.columns) for u in groups(adapter.parts(ids, inputs), adapter.geometry.per[0])]
    visual, mask = adapter.visual(ids), inputs["attention_mask"].bool()
    rows = [(seen, g) for seen in SEEN["llm"] for g in range(len(seen["view"].valid))]
    assert len(units) == len(rows)
    for b, columns in units:
        state = out.hidden_states[2][b, columns]
        mine = [(s, g) for s, g in rows if torch.allclose(s["view"].features[g, 0], state[0], atol=1e-5)]
        assert len(mine) == 1
        here = (mask[b] & ~visual[b]).nonzero()[:, 0]
        check(*mine[0], columns, b, here, mask[b], out)
        text, g = mine[0][0]["text"], mine[0][1]
        assert text.ids[g].tolist() == ids[b, here].tolist() + [-1] * (text.ids.shape[1] - len(here))
        for got, at in zip(mine[0][0]["normed"], (columns, here), strict=True):  # the model's own final norm
            with torch.no_grad():
                close(got[mine[0][1], : len(at)], adapter.lm.norm(out.hidden_states[2][b, at]))


def test_rows_are_asked_a_few_at_a_time(tiny, monkeypatch):
    """However few: three rows' masks, one row's attention."""
    monkeypatch.setattr(scores, "ROWS", 3)
    monkeypatch.setattr(scores, "CHUNK", 1)
    test_the_language_model_s_sources_are_its_own("llava", tiny)


def check(seen, g, columns, b, here, mask, out):
    """What was seen of one unit, whose tokens are ``columns`` of row b, against what the model says; text ``here``."""
    text, n, cache = seen["text"], len(columns), cache_of(out)
    t = int(text.valid[g].sum())
    assert text.place[g, :t].tolist() == here.tolist()
    assert text.after[g, :t].tolist() == (here > columns[-1]).tolist()
    close(text.hidden[g, :t], out.hidden_states[2][b, here])
    close(seen["view"].features[g, :n], out.hidden_states[2][b, columns])
    close(seen["states"][g, :n], out.hidden_states[1][b, columns])
    stored = cache.layers[1].keys  # [B, G, T, d]
    if stored.shape[2] == len(mask):  # a sliding layer's cache holds the last ones only
        close(text.keys[g, :t], stored[b].transpose(0, 1)[here])
        close(seen["keys"][g, :n], stored[b].transpose(0, 1)[columns])
    weights = out.attentions[1][b]  # [H, T, T]
    close(seen["each"][g, :n], weights[:, mask.nonzero()[-1, 0]][:, columns].T)
    block = weights[:, here[here > columns[-1]]][:, :, columns]  # [H, R, n]
    assert block.shape[1]
    close(seen["by"]["mean"][g, :n], block.mean((0, 1)))
    close(seen["by"]["each"][g, :n], block.mean(1).T)
    close(seen["by"]["max"][g, :n], block.amax(0).mean(0))
    close(seen["by"]["most"][g, :n], block.amax((0, 1)))
    own = weights[:, columns][:, :, columns]  # [H, n, n]
    close(seen["own"]["mean"][g, :n], own.mean((0, 1)))
    close(seen["own"]["each"][g, :n], own.mean(1).T)
    close(seen["own"]["max"][g, :n], own.amax(0).mean(0))
    close(seen["own"]["most"][g, :n], own.amax((0, 1)))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", (*ASKED, "glm4v"))
def test_attention_is_corrected_for_rotary_positions(family, tiny):
    """Each probability of the model's own over the product of the two places' all-ones vectors, rotated by the tables
    that its layer was given."""
    model, inputs = first(family, tiny)
    model.set_attn_implementation("eager")
    with vtprune.attach(model, "spy-text", keep=1.0) as handle, torch.no_grad():
        model(**inputs)
        adapter = handle.adapter
    tables: list[tuple[Tensor, Tensor]] = []
    layer = adapter.decoder_layers()[1]
    hook = layer.register_forward_pre_hook(lambda m, a, k: tables.append(k["position_embeddings"]), with_kwargs=True)
    out = eager(model, inputs)
    hook.remove()
    (cos, sin), attention = tables[0], layer.self_attn
    ids, mask, visual = inputs["input_ids"], inputs["attention_mask"].bool(), adapter.visual(inputs["input_ids"])
    n, d = cos.shape[-1], attention.head_dim
    ahead = torch.ones(n)
    if family == "glm4v":
        ahead[::2] = -1  # each channel with its neighbour
    else:
        ahead[: n // 2] = -1  # half against half
    one = torch.nn.functional.pad(cos + ahead * sin, (0, d - n), value=1.0).expand(len(ids), -1, -1)
    bias = one @ one.transpose(1, 2) * attention.scaling  # [B, T, T]
    rows = [(seen, g) for seen in SEEN["llm"] for g in range(len(seen["view"].valid))]
    for unit in groups(adapter.parts(ids, inputs), adapter.geometry.per[0]):
        b, columns = unit.sample, unit.columns
        state = out.hidden_states[2][b, columns]
        ((seen, g),) = [(s, g) for s, g in rows if torch.allclose(s["view"].features[g, 0], state[0], atol=1e-5)]
        here = (mask[b] & ~visual[b]).nonzero()[:, 0]
        here, last = here[here > columns[-1]], mask[b].nonzero()[-1, 0]
        divided = out.attentions[1][b] / bias[b]  # [H, T, T]
        block = divided[:, here][:, :, columns]
        m = len(columns)
        close(seen["corrected"]["mean"][g, :m], block.mean((0, 1)))
        close(seen["corrected"]["each"][g, :m], block.mean(1).T)
        close(seen["corrected"]["max"][g, :m], block.amax(0).mean(0))
        close(seen["last"][g, :m], divided[:, last, columns].mean(0))


@pytest.mark.parametrize("family", ASKED)
def test_text_behind_the_projector_is_the_question_s_embeddings(family, tiny):
    model, inputs = first(family, tiny)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    with vtprune.attach(model, "spy-text", keep=1.0, site="projector") as handle, torch.no_grad():
        model(**inputs)
        adapter = handle.adapter
    words, visual = model.get_input_embeddings(), adapter.visual(ids)
    prompts = [(mask[b] & ~visual[b]).nonzero()[:, 0] for b in range(len(ids))]
    met = set()
    for text in SEEN["projector"]:
        for g in range(len(text.valid)):
            here = text.place[g][text.valid[g]]
            b = next(b for b, prompt in enumerate(prompts) if prompt.tolist() == here.tolist())
            met.add(b)
            close(text.hidden[g][text.valid[g]], words(ids[b, here]))
            assert text.ids[g][text.valid[g]].tolist() == ids[b, here].tolist()
    assert met == set(range(len(ids)))


@pytest.mark.parametrize("family", ASKED)
def test_text_is_the_same_behind_a_cut(family, tiny):
    model, inputs = first(family, tiny)
    recipe = Recipe(
        name="two",
        stages=(Stage(method="random", keep=0.5, options={"site": "llm.0"}), Stage(method="spy-text", keep=1.0)),
    )
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        model(**inputs)
        visual = handle.adapter.visual(inputs["input_ids"])
    real = inputs["attention_mask"].bool() & ~visual
    want = {tuple(ids[mine].tolist()) for ids, mine in zip(inputs["input_ids"], real, strict=True)}
    texts = [seen["text"] for seen in SEEN["llm"]]
    got = {tuple(ids[mine].tolist()) for text in texts for ids, mine in zip(text.ids, text.valid, strict=True)}
    assert got == want


def test_answers_are_no_part_of_the_text(tiny):
    model, inputs = first("llava", tiny)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with vtprune.attach(model, "spy-text", keep=1.0), torch.no_grad():
        model(**inputs, labels=labels)
    text = SEEN["llm"][0]["text"]
    length = inputs["input_ids"].shape[1]
    assert int(text.place.max()) == length - 3


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("family", ASKED)
def test_merged_rows_stand_where_their_absorber_stood(family, mixes, tiny):
    """Two cuts that merge, the second by size; the oracle is the dense model with the means put into the rows of the
    absorbers and the others hidden from then on."""
    model, inputs = first(family, tiny)
    merging(mixes)
    try:
        with vtprune.attach(model, "spy-merge", keep=0.5) as handle, torch.no_grad():
            got = model(**inputs).logits
            adapter, report = handle.adapter, handle.report()
    finally:
        METHODS._forget("spy-merge")
    ids = inputs["input_ids"]
    visual = adapter.visual(ids)
    present = inputs["attention_mask"].bool()
    lost, size = torch.zeros_like(visual), torch.ones_like(ids).double()
    hidden, rows = [], {}
    for layer in range(adapter.geometry.llm_layers):
        for stage in report.stages:
            if stage.site != f"llm.{layer}":
                continue
            lost = visual.clone()
            for b, kept in enumerate(stage.kept):
                columns = visual[b].nonzero()[:, 0]
                lost[b, columns[kept]] = False
            rows[layer] = (stage, lost)
        hidden.append(lost)
    ledger = UndoLedger()
    hide_in_decoder(ledger, adapter.decoder_layers(), hidden)

    def put_in(module, args, kwargs, layer):
        x = args[0] if args else kwargs["hidden_states"]
        stage, gone = rows[layer]
        before = hidden[layer - 1]
        x = x.clone()
        for b, kept in enumerate(stage.kept):
            columns = visual[b].nonzero()[:, 0]
            there = ~before[b, columns]
            old, sizes = x[b, columns].clone(), size[b, columns].clone()
            slot = stage.assignment[b]
            for s, k in enumerate(kept.tolist()):
                mine = ((slot == s) & there).nonzero()[:, 0]
                weight = sizes[mine] / sizes[mine].sum()
                if mixes:  # twice the absorber, and the sum of the others
                    weight = torch.where(mine == k, 2.0, 1.0).double()
                x[b, columns[k]] = (old[mine] * weight[:, None].to(old.dtype)).sum(0)
                size[b, columns[k]] = sizes[mine].sum()
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    for layer in rows:
        if rows[layer][0].assignment is not None:
            ledger.before(adapter.decoder_layers()[layer], partial(put_in, layer=layer))
    with torch.no_grad():
        want = model(**inputs).logits
    ledger.undo()
    left = present & ~hidden[-1]
    assert [s.assignment is None for s in report.stages] == [False, False]
    close(got[left], want[left])
    for stage in report.stages:
        for b, kept in enumerate(stage.kept):
            assert stage.assignment[b][kept].tolist() == list(range(len(kept)))


def test_a_tower_mixes_tokens_of_which_none_is_dropped(tiny):
    """Every patch takes half of the next one's features, and all stay."""

    @register(
        MethodInfo(
            name="spy-mix",
            paper="baseline",
            idea="every token takes half of the next one",
            kinds=("vision",),
            merges=True,
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Mixes(Method):
        def plan(self, geometry, keep):
            return (Cut(site=f"vision.{geometry.vision_layers - 1}", keep=keep),)

        def select(self, view, cut):
            at = torch.arange(view.valid.shape[1]).expand_as(view.valid)
            tokens, weights = (
                torch.cat([at, at.roll(-1, 1)], 1),
                torch.tensor([1.0, 0.5]).repeat_interleave(at.shape[1]),
            )
            return replace(from_mask(view.valid), mix=Mix(tokens, at.repeat(1, 2), weights.expand_as(tokens)))

    tower, pixels = tiny("llava", "clip-llama")[0].model.vision_tower, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = tower(pixels).last_hidden_state[:, 1:]
        try:
            with vtprune.attach(tower, "spy-mix", keep=1.0):
                got = tower(pixels).last_hidden_state[:, 1:]
        finally:
            METHODS._forget("spy-mix")
    close(got, dense + 0.5 * dense.roll(-1, 1))


def merging(mixes: bool) -> None:
    @register(
        MethodInfo(
            name="spy-merge",
            paper="baseline",
            idea="every second token takes in the one behind it, by size",
            kinds=("llm",),
            merges=True,
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Merge(Method):
        def plan(self, geometry, keep):
            return (Cut(site="llm.1", keep=keep), Cut(site="llm.3", keep=keep))

        def select(self, view, cut):
            n = view.valid.shape[1]
            at = torch.arange(n).expand_as(view.valid)
            absorber = at // 2 * 2
            chosen = merged((at % 2 == 0) & view.valid, torch.where(view.valid, absorber, -1))
            if not mixes:
                return chosen
            weight = torch.where(at == absorber, 2.0, 1.0)
            return replace(chosen, mix=Mix(at, chosen.target, weight))


def test_what_is_missing_is_said_with_its_reason_once(tiny):
    model, _ = tiny("generic", "kimi-k2.5")
    with pytest.raises(vtprune.UnsupportedError, match="needs keys, query_attention, which") as e:
        vtprune.attach(model, "spy-text", keep=1.0)
    assert str(e.value).count("under the usual names") == 1


def test_rasters_compete_where_a_cut_is_joint(tiny):
    """A method of the image plane decides raster by raster, and over the whole unit at its joint cut; the report tells
    who was ranked among whom."""
    seen: dict[str, list[int]] = {}

    @register(
        MethodInfo(
            name="spy-joint",
            paper="baseline",
            idea="keeps the first tokens, behind the projector of every raster",
            kinds=("projector", "llm"),
            raster=True,
            cases=({"keep": 1.0}, {"keep": 0.5}),
        )
    )
    @dataclass(frozen=True, kw_only=True)
    class Joint(Method):
        def plan(self, geometry, keep):
            n = geometry.tokens
            return (Cut(site="projector", keep=(n + keep) // 2), Cut(site="llm.1", keep=keep, joint=True))

        def select(self, view, cut):
            seen.setdefault(cut.site, []).extend(view.counts.tolist())
            return top(-view.index.double(), cut.keep, view.valid)

    model, inputs = first("llava-next", tiny)
    try:
        with vtprune.attach(model, "spy-joint", keep=0.5) as handle, torch.no_grad():
            model(**inputs)
            behind, inside = handle.report().stages
            units = groups(handle.adapter.parts(inputs["input_ids"], inputs), handle.adapter.geometry.per[0])
    finally:
        METHODS._forget("spy-joint")
    several = [u for u in units if len(u.rasters) > 1]
    assert several
    assert sorted(seen["projector"]) == sorted(r * c for u in units for r, c in u.rasters)
    assert len(seen["llm.1"]) == len(units)
    for b in {u.sample for u in several}:
        mine = [u for u in units if u.sample == b]
        ranked = [stage.units[b][stage.units[b] >= 0].unique() for stage in (behind, inside)]
        assert list(map(len, ranked)) == [sum(len(u.rasters) for u in mine), len(mine)]
        columns = torch.cat([u.columns for u in mine]).sort().values
        for u in mine:
            left, kept = (s.kept[b][torch.isin(columns[s.kept[b]], u.columns)] for s in (behind, inside))
            assert 0 < len(kept) < len(left) and kept.tolist() == left[: len(kept)].tolist()
