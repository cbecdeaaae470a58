"""What single model families add to the contract: sliding windows, image boundaries, image sizes, tiles."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from vtprune.models.base import ADAPTERS
from vtprune.models.engine import serving
from vtprune.models.engine.host import cache_of, cached
from vtprune.models.engine.level import shaped
from vtprune.models.engine.probe import probe_queries

import vtprune
from vtprune.check.verify import check
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError, VtpruneError

WINDOW = 12  # of every tiny model with sliding layers
SLIDING = [("gemma3", "sliding"), ("paligemma", "gemma2"), ("mistral3", "sliding")]
EVERY = [*SLIDING, ("paligemma", "gemma"), ("mistral3", "pixtral"), ("smolvlm", "smolvlm")]


def _results(model, inputs, names, method="random", **options):
    return {name: check(name, model, method, inputs, **options).passed for name in names}


@pytest.mark.parametrize(("family", "variant"), SLIDING)
def test_sliding_windows_span_the_prompts_positions(tiny, family, variant, monkeypatch):
    """A window that counted the rows left by pruning, at prefill or at decoding, would not pass."""
    model, inputs = tiny(family, variant)
    names = ("prefill_is_masked_dense", "decode_is_masked_dense")
    assert model.config.text_config.sliding_window == WINDOW < int(inputs["attention_mask"].sum(1).min())
    assert _results(model, inputs, names, keep=2) == dict.fromkeys(names, True)
    right_prefill, right_decode = serving.prefill_mask, serving.decode_mask

    def prefill(own, level, keys, x, cached, how, sliding, retained):
        mask = right_prefill(own, level, keys, x, cached, how, sliding, retained)
        if not sliding:
            return mask
        column = torch.arange(level.width)
        near = (column <= column[:, None]) & (column > column[:, None] - WINDOW)
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        return shaped(seen | near & level.valid[:, None] & level.valid[..., None], how, x.dtype)

    def decode(level, tail, length, q, columns, window, x, how):
        if window is not None:
            window += length - level.width  # as far as the tokens dropped reach
        return right_decode(level, tail, length, q, columns, window, x, how)

    monkeypatch.setattr(serving, "prefill_mask", prefill)
    assert not any(_results(model, inputs, names, keep=2).values())
    monkeypatch.setattr(serving, "prefill_mask", right_prefill)
    monkeypatch.setattr(serving, "decode_mask", decode)
    assert _results(model, inputs, names, keep=2) == {names[0]: True, names[1]: False}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_both_attentions_and_every_budget_unit(tiny, family, variant):
    """Eager attention and sdpa; a budget per sample; compact positions."""
    model, inputs = tiny(family, variant)
    masked, same = ("prefill_is_masked_dense", "decode_is_masked_dense"), ("cached_is_uncached", "batch_is_singles")
    assert all(_results(model, inputs, (*masked, *same), per="sample", keep=5).values())
    assert all(_results(model, inputs, same, "fastv", positions="compact", keep=3, layer=2).values())
    model.set_attn_implementation("eager")
    assert all(_results(model, inputs, (*masked, *same), "fastv", keep=3, layer=2).values())
    assert all(_results(model, inputs, masked, keep=3).values())


def test_paligemma_needs_token_type_ids(tiny):
    model, inputs = tiny("paligemma", "gemma")
    del inputs["token_type_ids"]
    with vtprune.attach(model, "random", keep=4), pytest.raises(UnsupportedError, match="token_type_ids"):
        model(**inputs)


def test_tiles_of_unknown_images_have_no_budget_per_image(tiny):
    model, inputs = tiny("smolvlm", "smolvlm")
    with pytest.raises(VtpruneError, match="'tile', 'sample'"):
        vtprune.attach(model, "random", keep=4, per="image")
    with vtprune.attach(model, "random", keep=4) as handle, torch.no_grad():
        model(**inputs)
        assert handle.report().stages[-1].tokens_out == [12, 4]


@pytest.mark.parametrize(
    ("family", "variant", "grids"),
    [
        ("mistral3", "sliding", [[(4, 3), (2, 4)], [(3, 3)]]),
        ("mistral3", "pixtral", [[(4, 3), (2, 4)], [(3, 3)]]),
        ("qwen2.5-vl", "images", [[(4, 4), (2, 4)], [(2, 6)]]),
        ("qwen3-vl", "video", [[(2, 2), (2, 2), (2, 2), (2, 2), (4, 4)], [(2, 4)]]),
        ("llava-next", "clip-llama", [[(4, 4), (6, 9), (4, 4), (8, 3)], [(4, 4), (8, 9)]]),
    ],
)
def test_sizes_are_known_while_generating(tiny, family, variant, grids):
    """generate() keeps the images' sizes to itself in newer releases; methods of the image plane see the same rows and
    columns as in a plain forward."""
    model, inputs = tiny(family, variant)
    with vtprune.attach(model, "uniform", keep=3) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
        assert report.grids == grids
        model.generate(**inputs, max_new_tokens=2, num_beams=1, suppress_tokens=[3])
        assert handle.report().grids == grids
        assert all(
            torch.equal(a, b) for a, b in zip(handle.report().stages[-1].kept, report.stages[-1].kept, strict=True)
        )
        # before, beams could not have prompts of several images
        if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
            model.generate(**inputs, max_new_tokens=2, num_beams=2, suppress_tokens=[3])
            assert handle.report().grids == [sample for sample in grids for _ in range(2)]


def test_images_without_sizes_and_prompts_that_do_not_fit_are_refused(tiny):
    model, inputs = tiny("mistral3", "pixtral")
    with vtprune.attach(model, "uniform", keep=3), torch.no_grad(), pytest.raises(VtpruneError, match="image_sizes"):
        model(**{k: v for k, v in inputs.items() if k != "image_sizes"})
    model, inputs = tiny("qwen2-vl", "images")
    with vtprune.attach(model, "random", keep=3), torch.no_grad():
        with pytest.raises(VtpruneError, match="more image placeholders"):
            model(**{**inputs, "image_grid_thw": inputs["image_grid_thw"][:1]})
        grid = inputs["image_grid_thw"].clone()
        grid[1] = torch.tensor([1, 8, 8])
        with pytest.raises(VtpruneError, match="not whole images"):
            model(**{**inputs, "image_grid_thw": grid})


@pytest.mark.parametrize("method", ["random", "fastv", "pool"])
def test_one_budget_per_tile_image_video_or_sample(tiny, method):
    """Counts, and fractions of what each budget is for; indices stay those of the whole sample."""
    counts = {"tile": [4 * 3 + 3, 3], "image": [4 * 3 + 3, 3], "video": [2 * 3, 3], "sample": [3, 3]}
    for family, variant, want in (
        ("qwen3-vl", "video", {k: counts[k] for k in ("image", "video", "sample")}),
        ("llava-next", "clip-llama", {"tile": [12, 6], "image": [6, 3], "sample": [3, 3]}),
        ("llava-onevision", "video", {"tile": [3 * 3 + 1, 6], "image": [9, 3], "video": [3, 3], "sample": [3, 3]}),
        ("internvl", "qwen2", {"tile": [9, 3], "image": [6, 3], "sample": [3, 3]}),
    ):
        model, inputs = tiny(family, variant)
        for per, out in want.items():
            with vtprune.attach(model, method, keep=3, per=per) as handle, torch.no_grad():
                model(**inputs)
                stage = handle.report().stages[-1]
            assert stage.tokens_out == out, (family, per)
            assert all(len(k) == n and bool((k[1:] > k[:-1]).all()) for k, n in zip(stage.kept, out, strict=True))
        with pytest.raises(VtpruneError, match="per='frame'"):
            vtprune.attach(model, method, keep=3, per="frame")


def test_a_fraction_is_of_each_image(tiny):
    model, inputs = tiny("qwen2-vl", "images")
    with vtprune.attach(model, "uniform", keep=0.25) as handle, torch.no_grad():
        model(**inputs)
    assert handle.report().stages[-1].tokens_out == [4 + 2, 3]


def test_counts_in_the_tower_are_per_tile(tiny):
    model, inputs = tiny("llava-next", "clip-llama")
    with pytest.raises(VtpruneError, match="one tile at a time"):
        vtprune.attach(model, "flowcut", keep=4)
    with vtprune.attach(model, "flowcut", keep=4, per="tile") as handle, torch.no_grad():
        model(**inputs)
    assert all(run.records[-1].tokens_out[g] == 4 for run, g in handle.passes) and len(handle.passes) == 5 + 3 + 5


def test_the_solver_serves_images_of_any_size(tiny):
    model, inputs = tiny("qwen2-vl", "images")
    with pytest.raises(VtpruneError, match="vary in size"):
        vtprune.attach(model, "fastv", effective_tokens=8)
    with vtprune.attach(model, "pyramiddrop", effective_tokens=0.5) as handle, torch.no_grad():
        model(**inputs)
    report = handle.report()
    assert 0.4 * sum(report.visual_tokens) / 2 <= report.effective_tokens <= 0.5 * sum(report.visual_tokens) / 2
    one = {k: inputs[k][1:] for k in ("input_ids", "attention_mask", "mm_token_type_ids")} | {
        "image_grid_thw": inputs["image_grid_thw"][2:]
    }
    recipe = vtprune.solve(model, "random", effective_tokens=5, inputs=one)
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        model(**one, pixel_values=inputs["pixel_values"][-48:])
    assert handle.report().effective_tokens == 5


def test_glm_takes_images_or_videos(tiny):
    """Both stand at the image token: a batch with both cannot be told apart, by the model neither."""
    model, inputs = tiny("glm4v", "video")
    with vtprune.attach(model, "random", keep=2, per="video") as handle, torch.no_grad():
        model(**inputs)
        assert handle.report().grids == [[(2, 2)] * 4, [(2, 3)] * 2] and handle.report().stages[-1].tokens_out == [2, 2]
        with pytest.raises(UnsupportedError, match="images or videos"):
            model(**inputs, image_grid_thw=torch.tensor([[1, 4, 4]]), pixel_values=torch.zeros(16, 96))


def test_deepstack_planes_follow_their_rows(tiny, monkeypatch):
    """The planes that Qwen3-VL adds behind its first layers are cut like the rows: shifted by one row the contract
    fails."""
    from vtprune.models import qwen_vl

    model, inputs = tiny("qwen3-vl", "images")
    assert check("prefill_is_masked_dense", model, "random", inputs, keep=4).passed
    right = qwen_vl.take
    monkeypatch.setattr(qwen_vl, "take", lambda table, rows: right(table, (rows - 1).clamp_min(0)))
    assert check("prefill_is_masked_dense", model, "random", inputs, keep=4).passed is False


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe"])
def test_merging_equals_the_language_model_on_the_short_sequence(tiny, family):
    """Independent of the engine: merged features, M-RoPE positions and DeepStack planes of the kept tokens, given to
    the language model alone."""
    model, inputs = tiny(family, "images")
    one = {k: inputs[k][1:] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    real = one["attention_mask"][0].bool()
    one = {k: v[:, real] for k, v in one.items()} | {
        "image_grid_thw": inputs["image_grid_thw"][2:],
        "pixel_values": inputs["pixel_values"][-48:],
    }
    with torch.no_grad():
        with vtprune.attach(model, "pool", keep=4) as handle:
            got = model(**one).logits[0]
            stage = handle.report().stages[0]
        kept, slot = stage.kept[0], stage.assignment[0]
        encoded = model.model.get_image_features(one["pixel_values"], one["image_grid_thw"], return_dict=True)
        visual = (one["input_ids"][0] == 3).nonzero()[:, 0]

        def mean(rows):
            return torch.stack([rows[slot == k].mean(0) for k in range(len(kept))])

        stay = torch.ones_like(real[real])
        stay[visual] = False
        stay[visual[kept]] = True
        embeds = model.get_input_embeddings()(one["input_ids"])[0]
        embeds[visual[kept]] = mean(encoded.pooler_output[0])
        places, _ = model.model.get_rope_index(
            one["input_ids"], mm_token_type_ids=one["mm_token_type_ids"], image_grid_thw=one["image_grid_thw"]
        )
        planes = {}
        if family.startswith("qwen3-vl"):
            marks = torch.zeros_like(stay)
            marks[visual[kept]] = True
            planes = {
                "visual_pos_masks": marks[stay][None],
                "deepstack_visual_embeds": [
                    mean(p if isinstance(p, torch.Tensor) else p[0]) for p in encoded.deepstack_features
                ],
            }
        out = model.model.language_model(
            inputs_embeds=embeds[stay][None], position_ids=places[:, :, stay], **planes
        ).last_hidden_state
        want = model.lm_head(out)[0]
    assert torch.allclose(got[stay], want, atol=1e-5 * float(want.abs().max()))
    assert len(kept) == 4 and slot.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("variant", ["dense", "experts"])
def test_rotations_of_a_part_of_each_head_are_recomputed(tiny, variant):
    """GLM-4.1V turns neighbouring channels, GLM-4.5V halves, both in the first part of each head only; the wrong one of
    the two is noticed."""
    model, _ = tiny("glm4v", variant)
    adapter = bind(model)
    described = adapter.describe()
    assert adapter.pairs == (variant == "dense")
    with pytest.raises(UnsupportedError, match="attention is not what"):
        probe_queries(replace(described, pairs=not adapter.pairs))
    probe_queries(described)


@pytest.mark.parametrize("method", ["fastv", "random", "drop-all"])
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl", "glm4v", "paligemma", "llava"])
def test_decoding_by_hand_without_positions_is_what_generate_does(tiny, family, method):
    """A caller who passes only the new token and the cache gets the positions behind the whole prompt, however little
    of it the cache holds."""
    variant = next(iter(ADAPTERS.get(family).tiny))
    model, inputs = tiny(family, variant)
    adapter = bind(model)
    found = adapter.parts(inputs["input_ids"], inputs)
    real = inputs["attention_mask"][0].bool()
    one = {k: inputs[k][:1, real] for k in ("input_ids", *adapter.follows) if k in inputs} | adapter.slice_(
        inputs, found, 0
    )
    rules = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [3, 4],
    }
    options = {"layer": 0} if method == "drop-all" else {"keep": 2}
    with torch.no_grad(), vtprune.attach(model, method, **options):
        answer = model.generate(**one, attention_mask=torch.ones_like(one["input_ids"]), **rules)
        cache = cache_of(model(**one, use_cache=True))
        for i, token in enumerate(answer.sequences[0, -4:-1]):
            step = model(input_ids=token[None, None], **cached(model, cache), use_cache=True)
            assert torch.allclose(step.logits[0, -1], answer.logits[i + 1][0], atol=1e-4), i


@pytest.mark.parametrize(("family", "variant"), SLIDING)
def test_sliding_caches_are_counted_as_they_are(tiny, family, variant):
    """A layer with a window keeps the last tokens of it, whatever was pruned."""
    model, inputs = tiny(family, variant)
    one = bind(model).slice_(inputs, bind(model).parts(inputs["input_ids"], inputs), 0)
    real = inputs["attention_mask"][0].bool()
    one |= {k: inputs[k][:1, real] for k in ("input_ids", *bind(model).follows) if k in inputs}
    with torch.no_grad(), vtprune.attach(model, "random", keep=2) as handle:
        cache = cache_of(model(**one, use_cache=True))
        report = handle.report()
    assert report.kv_bytes == sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
    assert report.kv_bytes <= report.dense_kv_bytes
