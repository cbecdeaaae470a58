"""SwiftKV (arXiv 2410.03960) against a slow transcription: one prompt, one layer, one head at a time."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from slow_layers import attended, behind, double, entered, limit
from torch import Tensor
from vtprune.models.engine.host import cache_of, cached, held

import vtprune
from prompts import llama
from vtprune.check.case import Case
from vtprune.core.types import Geometry, UnsupportedError, VtpruneError
from watch import spent

FAMILIES = [("causal-lm", v) for v in ("llama", "qwen3", "gemma3")] + [
    ("llava", "clip-llama"),
    ("qwen2-vl", "images"),
    ("llava-next", "clip-llama"),
]


@torch.no_grad()
def slow(model: Any, lm: Any, x: Tensor, tables: list[Any], first: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits ``[n, V]`` of one prompt whose rows ``x`` ``[n, C]`` enter layer 0, and what every layer caches; layers
    from ``first`` on make keys and values of what entered that one."""
    caches, lends = [], None
    for j, layer in enumerate(lm.layers):
        lends = x if j == first else lends
        own, caches = layer.input_layernorm(x), [*caches, {}]
        lent = own if lends is None else layer.input_layernorm(lends)
        x = behind(layer, x, attended(layer, own, lent, tables[j], caches[-1]))
    return model.lm_head(lm.norm(x)), caches


def taken(case: Case, one: dict[str, Tensor]) -> Tensor:
    """``[T]`` which rows of a prompt leave."""
    return case.adapter.prunable(one)[0]


def longer(one: dict[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """The prompt with the tokens ``more`` ``[1, m]`` behind it."""
    out = {**one, "input_ids": torch.cat([one["input_ids"], more], 1)}
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    if "mm_token_type_ids" in one:
        out["mm_token_type_ids"] = torch.cat([one["mm_token_type_ids"], torch.zeros_like(more)], 1)
    return out


CASES = [
    pytest.param(f, v, rows, first, id=f"{v}-{rows}-{first}")
    for f, v in FAMILIES
    for rows in ("needed", "all")
    for first in (0, 2, 5)
    if v != "gemma3" or rows == "all" or first == 5  # windows
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "variant", "rows", "first"), CASES)
def test_equals_the_transcription(tiny, family, variant, rows, first):
    """Logits of every row that runs, and what every layer caches of every token: keys, values and how many."""
    model, lm, case = double(tiny, "swiftkv", family, variant)
    for one in case.samples():
        want, caches = slow(model, lm, *entered(model, lm, one), first)
        gone = taken(case, one) if rows == "needed" else torch.zeros(len(want), dtype=torch.bool)
        with vtprune.attach(model, "swiftkv", layer=first, rows=rows) as handle, torch.no_grad():
            out = model(**one, use_cache=True)
            report = handle.report()
        B.close(out.logits[0, ~gone], want[~gone], limit(variant))
        total = int(taken(case, one).sum())
        assert report.layer_tokens == [[total] * len(caches)] and report.kv_bytes == report.dense_kv_bytes
        assert (report.flops < report.dense_flops) is (rows == "needed")
        order = torch.cat([gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]])  # what left stands in front
        for j, (layer, told) in enumerate(zip(cache_of(out).layers, caches, strict=True)):
            for name in ("keys", "values"):
                wanted = told[name][:, order if j >= first else torch.arange(len(order))]
                got = getattr(layer, name)[0]  # of a window its end
                B.close(got, wanted[:, wanted.shape[1] - got.shape[1] :], limit(variant))


def test_another_layer_is_another_model(tiny):
    """What the transcription is equal to depends on n; the last layer's own input is the dense model's, bit by bit."""
    model, lm, case = double(tiny, "swiftkv", "causal-lm", "llama")
    one = case.samples()[0]
    told = [slow(model, lm, *entered(model, lm, one), first)[0] for first in (1, 2, 5)]
    assert all(float((a - b)[-1].abs().max()) > 1e-3 for a, b in zip(told, told[1:], strict=False))
    with torch.no_grad():
        want = model(**one).logits
        with vtprune.attach(model, "swiftkv", layer=5, rows="all"):
            assert torch.equal(model(**one).logits, want)
    B.close(want[0], told[-1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rows", ["needed", "all"])
@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_every_new_token_lends_what_it_brought_to_layer_n(tiny, family, variant, rows):
    """Decoding token by token, and several tokens at once, are the transcription run on the whole sequence."""
    model, lm, case = double(tiny, "swiftkv", family, variant)
    one, first = case.samples()[-1], 5 if (variant, rows) == ("gemma3", "needed") else 2
    more = torch.randint(8, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    want, _ = slow(model, lm, *entered(model, lm, longer(one, more)), first)
    with vtprune.attach(model, "swiftkv", layer=first, rows=rows), torch.no_grad():
        cache = cache_of(model(**one, use_cache=True))
        n, steps = held(cache, 0), []
        for i, m in ((0, 1), (1, 1), (2, 3), (5, 1)):
            told = {"attention_mask": torch.ones(1, n + i + m, dtype=torch.long)}
            steps.append(model(input_ids=more[:, i : i + m], **told, **cached(model, cache)).logits)
        assert {held(cache, j) for j in range(first, len(lm.layers))} == {n + 6}
    B.close(torch.cat(steps, 1)[0], want[-6:], limit(variant))


@pytest.mark.parametrize("rows", ["needed", "all"])
def test_generate_is_the_transcription_step_by_step(tiny, rows):
    """Greedy answers of two prompts, each its own and by turns."""
    model, lm, case = double(tiny, "swiftkv", "causal-lm", "llama")
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with vtprune.attach(model, "swiftkv", layer=2, rows=rows):
        alone = [model.generate(**one, **how) for one in case.samples()]
        batch = model.generate(**case.inputs, **how)
    for one, got in zip(case.samples(), alone, strict=True):
        ids = one["input_ids"]
        for _ in range(5):
            logits, _ = slow(model, lm, *entered(model, lm, {"input_ids": ids}), 2)
            ids = torch.cat([ids, logits[-1].argmax()[None, None]], 1)
        assert torch.equal(got, ids)
    for row, got in zip(batch, alone, strict=True):
        assert torch.equal(row[-5:], got[0, -5:])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("attention", "left"), [("sdpa", True), ("sdpa", False), ("eager", False)])
def test_rows_that_leave_change_nothing_that_is_read(left, attention):
    """In a padded batch of unequal prompts, one of them text alone: logits and gradients of what stays are those with
    all rows running, and those of single prompts."""
    shapes = [[4, 9], [7, 2, 5], [3, 12], [11]]
    model, inputs = B.llava(text="mistral"), B.prompts(shapes, left=left)
    model.set_attn_implementation(attention)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == B.IMAGE, -100)
    for row, mask in zip(labels, inputs["attention_mask"], strict=True):
        row[mask.nonzero()[:-3, 0]] = -100
        row[mask == 0] = -100
    with torch.no_grad():
        text = model(input_ids=inputs["input_ids"][3:][inputs["attention_mask"][3:].bool()][None]).logits[0]
    hidden, grads = {}, {}
    for rows in ("needed", "all"):
        with vtprune.attach(model, "swiftkv", layer=2, rows=rows):
            hidden[rows] = B.final(model, inputs)
            loss = model(**inputs, labels=labels.clone()).loss
            weights = [model.model.language_model.layers[j].self_attn.k_proj.weight for j in (1, 2, 5)]
            grads[rows] = torch.autograd.grad(loss, weights)
    limit = 3e-6 if attention == "eager" else 1e-9  # transformers' eager softmax works in float32
    for b in range(len(shapes)):
        stays = inputs["input_ids"][b][inputs["attention_mask"][b].bool()] != B.IMAGE
        B.close(hidden["needed"][b][stays], hidden["all"][b][stays], limit)
        assert not hidden["needed"][b][~stays].any()
    B.close(model.lm_head(hidden["all"][3]), text, limit)  # nothing to prune: the unchanged model
    for a, b in zip(grads["needed"], grads["all"], strict=True):
        assert bool(a.any())
        B.close(a, b, limit)


def test_survivors_of_the_tower_lend(tiny):
    """Behind a stage in the tower only what is left of the image is there to lend."""
    stages = (vtprune.Stage(method="flowcut", keep=7), vtprune.Stage(method="swiftkv", options={"layer": 2}))
    model, inputs = B.llava(), B.prompts([[4, 9]])
    with vtprune.attach(model, vtprune.Recipe(name="both", stages=stages)) as handle:
        (hidden,), report = B.final(model, inputs), handle.report()
        seen = []
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append((a[0], k["position_embeddings"])), with_kwargs=True
        )
        B.final(model, inputs)
        hook.remove()
    assert report.layer_tokens == [[7] * 6]
    (x, tables), at = seen[0], B.visual_positions(inputs, 0)
    want, _ = slow(model, model.model.language_model, x[0], [tables] * 6, 2)
    rows = sorted({*range(49)} - {*at.tolist()} | {*at[report.stages[-1].kept[0]].tolist()})
    text = torch.tensor([r not in at.tolist() for r in rows])
    with torch.no_grad():
        B.close(model.lm_head(hidden[torch.tensor(rows)[text]]), want[text])


@pytest.mark.parametrize("rows", ["needed", "all"])
def test_what_is_read_ahead_borrows_nothing(rows):
    """GemFilter's filter layer, behind n, chooses as it does alone; the model that starts anew borrows."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    gem = vtprune.Stage(method="gemfilter", keep=9, options={"layer": 4})
    mine = vtprune.Stage(method="swiftkv", options={"layer": 1, "rows": rows})
    kept = []
    for stages in ((gem,), (gem, mine)):
        recipe = vtprune.Recipe(name="ahead", stages=stages)
        with vtprune.attach(model, recipe, positions="original") as handle:
            hidden = B.final(model, inputs)[0]
            kept.append(handle.report().stages[0].kept[0])
    assert torch.equal(*kept)
    at = B.visual_positions(inputs, 0)
    rows_left = torch.tensor(sorted({*range(49)} - {*at.tolist()} | {*at[kept[0]].tolist()}))
    lm = model.model.language_model
    every = B.embeddings(model, inputs)[0][rows_left]
    tables = [tuple(t[:, rows_left] for t in lm.rotary_emb(every[None], torch.arange(49)[None]))] * 6
    want, _ = slow(model, lm, every, tables, 1)
    text = ~torch.isin(rows_left, at)
    with torch.no_grad():
        B.close(model.lm_head(hidden[rows_left[text]]), want[text])


@pytest.mark.parametrize("rows", ["needed", "all"])
def test_a_visual_token_that_is_asked_goes_on(rows):
    """A prompt that ends with its image: the answer follows from the last visual token."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    inputs = {k: v[:, :40] if v.ndim == 2 else v for k, v in inputs.items()}
    lm = model.model.language_model
    want, _ = slow(model, lm, *entered(model, lm, inputs), 2)
    token = torch.tensor([[20]])
    grown = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token], 1)}
    grown = {k: v for k, v in grown.items() if k not in ("attention_mask", "position_ids")}
    behind, _ = slow(model, lm, *entered(model, lm, grown), 2)
    with vtprune.attach(model, "swiftkv", layer=2, rows=rows) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        B.close(out.logits[0, [0, 3, 39]], want[[0, 3, 39]])
        assert handle.report().layer_tokens == [[36] * 6]
        if rows == "needed":
            assert handle.report().stages[0].kept[0].tolist() == [35]
        step = model(input_ids=token, attention_mask=torch.ones(1, 41), **cached(model, cache_of(out)))
    B.close(step.logits[0, 0], behind[-1])


def test_flops_are_those_that_torch_counts():
    """Of what ran, and what it saves; queries, outputs and MLPs of the rows that left are not run."""
    model, ids = llama(length=30)
    model = model.float()
    model.set_attn_implementation("eager")  # whose products the counter sees

    prompt = {"input_ids": ids}
    dense, config = spent(model, prompt), model.config
    for rows, first in (("needed", 2), ("needed", 0), ("all", 2)):
        with vtprune.attach(model, "swiftkv", layer=first, rows=rows) as handle:
            saved, report = dense - spent(model, prompt), handle.report()
        assert report.dense_flops - report.flops == saved
        gone = 30 - 5 if rows == "needed" else 0
        d, f = config.hidden_size, config.intermediate_size
        each = 2 * (2 * d * d + 3 * d * f) + 4 * 30 * d  # q and o, the MLP, the products with 30 keys and values
        assert saved == (6 - first) * gone * each


def test_caches_of_fixed_size():
    """One is filled as one that grows; where visual tokens and text of unequal prompts do not fit, that is said."""
    model, inputs = B.llava(), B.prompts([[4, 9], [8, 5]])
    how = {"max_new_tokens": 4, "do_sample": False}
    with vtprune.attach(model, "swiftkv", layer=2):
        want = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, cache_implementation="static"), want)
        unequal = B.prompts([[30, 20], [3, 2, 8]])  # 72 visual tokens and 50 of text
        grown = model.generate(**unequal, **how)
        assert torch.equal(model.generate(**unequal, **how, **ample(model, 72 + 50 + 3)), grown)
        for size in (72 + 50 + 2, 72 + 50, 72 + 50 - 1):  # of the last token, of the first, of the prompt
            with pytest.raises(UnsupportedError, match=f"a cache of {size} columns is too small: .* padded each"):
                model.generate(**unequal, **how, **ample(model, size))
    with vtprune.attach(model, "swiftkv", layer=2, rows="all"):
        assert torch.equal(model.generate(**inputs, **how, cache_implementation="static"), want)
        assert torch.equal(model.generate(**unequal, **how, cache_implementation="static"), grown)


def ample(model: Any, size: int) -> dict[str, Any]:
    from transformers import StaticCache

    return cached(model, StaticCache(config=model.config.text_config, max_cache_len=size))


def test_samples_that_move_keep_what_they_are(tiny):
    """Rows of a cache, one of them of a prompt that borrows nothing."""
    model, _ = tiny("causal-lm", "llama")
    model = model.double()
    ids = torch.randint(8, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[1, :8] = 0  # four tokens, of which none may go
    mask, steps = (ids != 0).long(), torch.tensor([[9], [10]])
    grown = torch.nn.functional.pad(mask, (0, 1), value=1)
    with torch.no_grad():
        dense = model(input_ids=torch.cat([ids[1:, 8:], steps[1:]], 1)).logits[:, -1:]
        with vtprune.attach(model, "swiftkv", layer=2, rows="all"):

            def go_on(order: list[int]) -> Tensor:
                cache = cache_of(model(input_ids=ids, attention_mask=mask, use_cache=True))
                cache.batch_select_indices(torch.tensor(order))
                return model(input_ids=steps[order], attention_mask=grown[order], **cached(model, cache)).logits

            straight = go_on([0, 1])
            B.close(go_on([1, 0]), straight[[1, 0]])
            B.close(go_on([1]), straight[[1]])
            B.close(go_on([0]), straight[[0]])
    B.close(straight[1:], dense, 1e-6)  # rotary tables of other places, in single precision


def test_the_default_layer_is_the_papers():
    info = vtprune.describe("swiftkv")
    for depth, first in ((32, 16), (80, 40), (126, 63)):
        geometry = Geometry("causal-lm", "x", 9, (9, 1), 0, 0, 0, depth, {"llm": frozenset()})
        for rows in ("needed", "all"):
            layers = [c.layer for c in info.cls(rows=rows).plan(geometry, None)]
            assert min(layers) == first and max(layers) == depth - 1


def test_a_budget_of_flops_chooses_the_layer():
    model = B.llava()
    for share in (0.7, 0.9):
        recipe = vtprune.solve(model, "swiftkv", flops=share)
        first, inputs = recipe.stages[-1].options["layer"], B.prompts([[16, 16]])
        spent = []
        for layer in (first, first + 1):
            with vtprune.attach(model, "swiftkv", layer=layer) as handle:
                B.final(model, inputs)
                spent.append(handle.report().flops / handle.report().dense_flops)
        assert spent[0] <= share < spent[1]
    with pytest.raises(VtpruneError, match="cannot reach"):
        vtprune.solve(model, "swiftkv", effective_tokens=0.5)  # every layer caches every token


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layer": 6}, r"0\.\.5"),
        ({"layer": -1}, r"0\.\.5"),
        ({"rows": "some"}, "rows"),
        ({"keep": 0.5}, "takes no keep="),
        ({"shelve": True}, "every stage has to drop or merge"),
    ],
)
def test_values_out_of_range(options, why):
    with pytest.raises(VtpruneError, match=why):
        vtprune.attach(B.llava(), "swiftkv", **options)


@pytest.mark.parametrize("rows", ["needed", "all"])
def test_nothing_cuts_among_the_layers_that_borrow(rows):
    mine = vtprune.Stage(method="swiftkv", options={"layer": 2, "rows": rows})
    for name, options in (
        ("pyramiddrop", {"layers": (3,)}),
        ("pyramiddrop", {"layers": (5,)}),
        ("swiftkv", {"layer": 4}),
    ):
        other = vtprune.Stage(method=name, keep=0.5 if name == "pyramiddrop" else None, options=options)
        with pytest.raises(VtpruneError, match="put the visual tokens aside"):
            vtprune.attach(B.llava(), vtprune.Recipe(name="both", stages=(mine, other)))
