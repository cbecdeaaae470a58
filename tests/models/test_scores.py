"""What reports say about scores, generated from the registries: every method's ranking explains what it kept."""

from __future__ import annotations

import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from cases import case_options
from choice import covering
from vtprune.core.report import Report
from vtprune.core.types import UnsupportedError
from vtprune.show import token_states

# One image per sample, several images, tiles, frames of a video, and bare towers.
FAMILIES = ["llava", "llava-next", "llava-onevision", "internvl", "qwen2-vl", "hf-vit", "timm-vit"]


def reported(tiny, family: str, variant: str, method: str, case: int) -> Report:
    model, inputs = tiny(family, variant)
    try:
        with vtprune.attach(model, method, **case_options(model, method, case)) as handle, torch.no_grad():
            model(**inputs)
            return handle.report()
    except UnsupportedError as e:
        pytest.skip(str(e))


MET = {(family, method) for family, _, method, _ in covering()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "family, case, method",
    [
        pytest.param(f, case, m, marks=() if (f, m) in MET else pytest.mark.slow)
        for f, case in [("llava", 0), *((family, 1) for family in FAMILIES)]
        for m in vtprune.methods()
    ],
)
def test_scores_explain_what_was_kept(tiny, family, method, case):
    info = vtprune.describe(method)
    for variant in list(ADAPTERS.get(family).tiny)[:2]:
        report = reported(tiny, family, variant, method, case)
        for number, stage in enumerate(report.stages):
            changed = any(o < i for i, o in zip(stage.tokens_in, stage.tokens_out, strict=True))  # not a return
            assert (stage.scores is None) == (stage.units is None)
            elsewhere = info.score.startswith("in the language model") and not stage.site.startswith("llm.")
            assert stage.scores is not None or elsewhere or not (info.score and changed), (
                f"{stage.site} changed something and shows no score"
            )
            assert info.score or stage.scores is None, (
                f"{stage.site} shows scores, and MethodInfo.score does not say what they are"
            )
            if stage.scores is None:
                continue
            for b, (score, unit) in enumerate(zip(stage.scores, stage.units, strict=True)):
                assert len(score) == len(unit) == report.visual_tokens[b] and score.dtype == torch.float64
                assert torch.equal(unit >= 0, ~score.isnan())
                before = report.stages[number - 1].kept[b] if number else torch.arange(report.visual_tokens[b])
                ranked = (~score.isnan()).nonzero()[:, 0]
                assert set(ranked.tolist()) <= set(before.tolist()), f"{stage.site} ranks tokens that were gone"
                if info.merges:
                    continue
                shares = info.raster and len(report.grids[b]) > 1  # a raster whose share is nothing goes unranked
                unranked = set(before.tolist()) - set(ranked.tolist())  # new-line tokens, which no tower sees
                partly = "not ranked" in info.score  # said in words
                assert shares or partly or not unranked or family in ("llava-next", "llava-onevision"), (
                    f"{stage.site} did not rank every token"
                )
                kept = torch.zeros(len(score), dtype=torch.bool)
                kept[stage.kept[b]] = True
                for u in unit.unique():
                    mine = unit == u
                    if u < 0 or bool(kept[mine].all()) or not bool(kept[mine].any()):
                        continue
                    if "go first" in info.score or "tile by tile" in info.score:  # others count as well
                        continue
                    assert score[mine & kept].min() >= score[mine & ~kept].max(), (
                        f"{stage.site}: unit {int(u)} kept a token below one that it dropped"
                    )
                    ranks = token_states.ranks(stage, b)[0][(mine & kept).numpy()]
                    assert sorted(ranks) == list(range(1, len(ranks) + 1)), (
                        f"{stage.site}: unit {int(u)} did not keep those that rank first"
                    )


def test_merged_tokens_are_those_with_low_scores():
    """ToMe merges the r most similar pairs; PiToMe's merged tokens are among the 2 r of highest energy."""
    model, processor = vtprune.load_demo_model()
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    size = model.config.vision_config.image_size
    pixels = torch.nn.functional.interpolate(pixels, (size, size))
    ids = torch.tensor([[model.config.image_token_id] * 144 + [5, 6, 7]] * 2)
    for method, limit in (("tome", 1), ("pitome", 2)):
        with vtprune.attach(model, method, keep=0.5) as handle, torch.no_grad():
            model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
            report = handle.report()
        checked = 0
        for number, stage in enumerate(report.stages):
            for b in range(2):
                before = report.stages[number - 1].kept[b] if number else torch.arange(144)
                gone = sorted(set(before.tolist()) - set(stage.kept[b].tolist()))
                if not gone:
                    continue
                checked += 1
                order = torch.nan_to_num(stage.scores[b], nan=torch.inf).argsort(stable=True)
                assert set(gone) <= set(order[: limit * len(gone)].tolist()), (method, stage.site)
                assert limit == 2 or set(gone) == set(order[: len(gone)].tolist())
        assert checked >= 10


def test_scores_stay_out_of_json_unless_asked(tiny):
    report = reported(tiny, "llava", "clip-llama", "fastv", 0)
    assert "scores" not in report.to_dict()["stages"][0]
    told = report.to_dict(scores=True)["stages"][0]
    assert [len(s) for s in told["scores"]] == report.visual_tokens and told["units"][0][0] == 0
    nothing = reported(tiny, "llava", "clip-llama", "drop-all", 0).to_dict(scores=True)["stages"][0]
    assert nothing["scores"] is None and nothing["units"] is None
