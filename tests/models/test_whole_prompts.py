"""``per="prompt"``: a model that reads images gives up tokens of its whole prompt, text and images alike."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import cache_of, cached
from vtprune.models.engine.whole import HEAD, TAIL

import vtprune
from vtprune.check.verify import CHECKS, check
from vtprune.cli.main import main
from vtprune.core.cost import prefill
from vtprune.core.planning import bind
from vtprune.lmms import jobs
from vtprune.measure import analyze, bench
from vtprune.measure.samples import scenes_samples

READERS = [name for name in ADAPTERS if name not in ("causal-lm", "hf-vit", "timm-vit", "open-clip")]
EQUAL = ("prefill_is_masked_dense", "decode_is_masked_dense", "batch_is_singles")
WHY = ("attend in several ways", "DeepStack")  # what gemfilter cannot read ahead


def built(family: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    return next(iter(ADAPTERS.get(family).tiny.values()))()


def test_the_list_is_whole():
    """Every family but those without a language model, and the one that has no images."""
    deaf = {name for name in ADAPTERS if bind(built(name)[0]).geometry.llm_layers == 0}
    assert deaf | {"causal-lm"} | {*READERS} == {*ADAPTERS}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", READERS)
def test_equals_the_dense_model_under_the_masks_of_what_is_left(family):
    model, inputs = built(family)
    for name in EQUAL:
        told = check(name, model, "fastv", inputs, per="prompt", keep=0.4)
        assert told.passed, told


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv", "gemfilter", "promptdistill", "pyramidinfer", "dart", "mindskip"])
@pytest.mark.parametrize("family", READERS)
def test_the_whole_contract(family, method):
    options = dict(vtprune.describe(method).cases[-1])
    for name in CHECKS:
        model, inputs = built(family)
        try:
            told = check(name, model, method, inputs, per="prompt", **options)
        except vtprune.UnsupportedError as e:
            assert method == "gemfilter" and any(why in str(e) for why in WHY), e
            return
        assert told.passed is not False, told


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_what_may_go(family):
    """Words and parts of images go, the first four tokens and the last never do, nor does an answer."""
    model, inputs = built(family)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    image = bind(model).visual(ids)
    with vtprune.attach(model, "random", keep=0.5, per="prompt", seed=3) as handle:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        report = handle.report()
    assert out.shape[1] == ids.shape[1] + 3
    for b, kept in enumerate(report.stages[0].kept):
        columns = real[b].nonzero()[:, 0][HEAD:-TAIL]
        assert report.visual_tokens[b] == len(columns) and len(kept) == len(columns) // 2
        gone = torch.ones(len(columns), dtype=torch.bool)
        gone[kept] = False
        assert bool(image[b, columns[gone]].any()) and bool((~image[b, columns[gone]]).any())


def test_a_prompt_of_text_is_what_its_language_model_makes_of_it():
    """LLaVA asked without an image, beside its Llama attached as a model of text."""
    model, inputs = built("llava")
    ids = torch.randint(8, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alone = LlamaForCausalLM(model.config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    for method in ("promptdistill", "pyramiddrop"):
        with vtprune.attach(model, method, keep=8, per="prompt") as a, torch.no_grad():
            got, kept = model(**asked).logits, a.report().stages[-1].kept
        with vtprune.attach(alone, method, keep=8) as b, torch.no_grad():
            want, same = alone(**asked).logits, b.report().stages[-1].kept
        assert all(torch.equal(x, y) for x, y in zip(kept, same, strict=True))
        torch.testing.assert_close(got, want)
    with vtprune.attach(model, "fastv", keep=8) as dense, torch.no_grad():  # by images there is nothing to prune
        model(**asked)
        assert dense.report().visual_tokens == [0, 0]


def test_budgets_are_of_the_whole_prompt():
    model, inputs = built("llava")
    with vtprune.attach(model, "fastv", effective_tokens=0.5, per="prompt") as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    tokens = inputs["attention_mask"].sum(1) - HEAD - TAIL
    assert report.visual_tokens == tokens.tolist()
    assert 0.4 < report.effective_tokens / float(tokens.float().mean()) <= 0.5
    text = vtprune.attach(built("causal-lm")[0], "fastv", keep=4, per="prompt")  # of a model of text nothing else is
    assert text.geometry.family == "causal-lm"
    text.remove()


def test_a_second_turn_goes_on_with_what_was_kept():
    model, inputs = built("llava")
    more = torch.randint(8, 64, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=0.4, per="prompt") as handle:
        out = model(**inputs, use_cache=True)
        kept = handle.report().stages[0].kept
        got = model(input_ids=more, attention_mask=mask, **cached(model, cache_of(out))).logits
        apart = [
            model(input_ids=more[:, i : i + 1], attention_mask=mask[:, : mask.shape[1] - 4 + i], **cached(model, cache))
            for cache in [cache_of(model(**inputs, use_cache=True))]
            for i in range(5)
        ]
        assert all(torch.equal(a, b) for a, b in zip(kept, handle.report().stages[0].kept, strict=True))
    torch.testing.assert_close(got, torch.cat([one.logits for one in apart], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", READERS)
def test_flops_are_those_of_the_same_model(family):
    """What the dense model costs does not depend on what a budget applies to; the tower reads images alone."""
    model, inputs = built(family)
    told = []
    for per in (None, "prompt"):
        with torch.no_grad(), vtprune.attach(model, "fastv", keep=1.0, layer=2, per=per) as handle:
            model(**inputs)
            told.append(handle.report())
    assert told[0].dense_flops == told[0].flops == told[1].dense_flops == told[1].flops
    ids = torch.randint(8, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    text = {"input_ids": ids, **{k: torch.zeros_like(ids) for k in bind(model).follows if k in inputs}}
    with torch.no_grad(), vtprune.attach(model, "fastv", keep=0.5, per="prompt") as handle:
        model(**text)
    cost = bind(model).cost
    assert handle.report().dense_flops == prefill(cost, [40] * cost.depth)  # no tower runs


def test_refusals(tmp_path, capsys):
    model, inputs = built("llava")
    for method in ("tome", "flowcut", "visionzip"):
        with pytest.raises(vtprune.UnsupportedError, match="per='prompt' chooses among all tokens of a prompt"):
            vtprune.attach(model, method, keep=8, per="prompt")
    with pytest.raises(vtprune.VtpruneError, match="compares the frames of a video"):
        vtprune.attach(model, "vidcom2", keep=8, per="prompt")
    with pytest.raises(vtprune.UnsupportedError, match="per='prompt' is for language models, and hf-vit has none"):
        vtprune.attach(built("hf-vit")[0], "tome", keep=8, per="prompt")
    with pytest.raises(vtprune.VtpruneError, match="per='words': llava takes 'image', 'sample', 'prompt'"):
        vtprune.attach(model, "fastv", keep=8, per="words")
    with pytest.raises(vtprune.UnsupportedError, match="the images of earlier turns"):
        vtprune.attach(model, "fastv", keep=8, per="prompt", shelve=True)
    with pytest.raises(vtprune.UnsupportedError, match="flops= counts what a tower does"):
        vtprune.attach(model, "fastv", flops=0.6, per="prompt")
    with pytest.raises(vtprune.VtpruneError, match="prompts of llava vary in size"):
        vtprune.attach(model, "fastv", effective_tokens=10, per="prompt")
    with pytest.raises(vtprune.UnsupportedError, match="the labels leave no prompt"):
        with vtprune.attach(model, "fastv", keep=8, per="prompt"):
            model(**inputs, labels=inputs["input_ids"])
    small, processor = vtprune.load_demo_model()
    with pytest.raises(vtprune.VtpruneError, match="counts a prompt's text among its tokens"):
        bench.table(small, processor, scenes_samples(1)[:1], ["fastv"], [0.5], options={"fastv": {"per": "prompt"}})
    with pytest.raises(vtprune.VtpruneError, match="counts a prompt's text among its tokens"):
        analyze.times(small, processor, ["fastv"], [0.5], options={"per": "prompt"})
    asked = Namespace(recipes=["fastv"], option=[("per", "prompt")], budgets=[0.25], keep=[], no_baselines=False)
    with pytest.raises(vtprune.VtpruneError, match="counts a prompt's text among its tokens"):
        jobs.plan(asked)
    assert main(["bench", "--methods", "fastv", "--samples", "1", "--option", "per=prompt"]) == 1
    assert "counts a prompt's text among its tokens" in capsys.readouterr().err
