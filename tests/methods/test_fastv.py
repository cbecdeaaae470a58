"""FastV (arXiv 2403.06764) against the slow transcription."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from vtprune.models.engine.host import cache_of, cached

import oracles as O
import vtprune

PROMPTS = [[4, 9], [7, 12], [3, 5]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("k, keep, left", [(1, 18, True), (2, 9, True), (2, 9, False), (5, 1, True), (3, 35, True)])
def test_equals_the_transcription(text: str, k: int, keep: int, left: bool) -> None:
    """Kept sets and hidden states of a padded batch equal the transcription's, sample by sample."""
    model, inputs = B.llava(text=text), B.prompts(PROMPTS, left=left)
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "fastv", layer=k, keep=keep) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    (stage,) = report.stages
    assert stage.site == f"llm.{k}" and report.layer_tokens == [[36] * k + [keep] * (6 - k)] * 3
    for b in range(3):
        at = B.visual_positions(inputs, b)
        want = O.fastv_oracle(model.model.language_model, x[b][None], at, k, keep)
        assert at[stage.kept[b]].tolist() == want["kept"][0].tolist()
        present = torch.ones(len(x[b]), dtype=torch.bool)
        present[at] = False
        present[want["kept"][0]] = True
        B.close(hidden[b][present], want["hidden"][0])
        assert not hidden[b][~present].any()


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_compact_positions_renumber_the_rest_of_the_stack(text: str) -> None:
    model, inputs = B.llava(text=text), B.prompts([[4, 9]])
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0)
    with vtprune.attach(model, "fastv", layer=2, keep=7, positions="compact") as handle:
        hidden, kept = B.final(model, inputs)[0], handle.report().stages[0].kept[0]
    lm = model.model.language_model
    assert at[kept].tolist() == O.fastv_oracle(lm, x[None], at, 2, 7)["kept"][0].tolist()
    rows = sorted({*range(len(x))} - {*at.tolist()} | {*at[kept].tolist()})
    with torch.no_grad():
        for i in range(6):
            if i == 2:
                x = x[rows]
            x = O._run_lm_layer(lm, i, x, list(range(len(x))))
        B.close(hidden[rows], lm.norm(x))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [{"query": "all"}, {"keys": "visual"}, {"rope": False}, {"query": "all", "keys": "visual", "rope": False}],
)
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_score_options(text: str, options: dict[str, Any]) -> None:
    """The paper's wording (all rows), FEATHER's corrections (no rotary positions, visual keys), each written out."""
    model, inputs = B.llava(text=text), B.prompts([[3, 4]])
    with vtprune.attach(model, "fastv", layer=2, keep=10, **options) as handle:
        B.final(model, inputs)
        kept = handle.report().stages[0].kept[0].tolist()
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0).tolist()
    queries = list(range(len(x))) if options.get("query") == "all" else [len(x) - 1]
    assert kept == O._top(
        B.scores(
            model.model.language_model,
            x,
            2,
            at,
            "previous",
            queries,
            options.get("keys", "all"),
            options.get("rope", True),
        ),
        10,
    )


def test_options_change_the_choice() -> None:
    model, inputs = B.llava(text="qwen2"), B.prompts([[3, 4]])
    found = []
    for options in ({}, {"query": "all"}, {"rope": False}, {"keys": "visual", "rope": False}):
        with vtprune.attach(model, "fastv", layer=2, keep=10, **options) as handle:
            B.final(model, inputs)
            found.append(tuple(handle.report().stages[0].kept[0].tolist()))
    assert len(set(found)) >= 3 and len(set(found[:3])) == 3


def test_the_first_choice_stays_while_decoding() -> None:
    """Cached decoding keeps the prefill's subset: every new token's logits equal the transcription's on the grown
    prompt with that subset."""
    model, inputs = B.llava(text="mistral"), B.prompts([[4, 6]])
    lm, (x,), at = model.model.language_model, B.embeddings(model, inputs), B.visual_positions(inputs, 0)
    with vtprune.attach(model, "fastv", layer=2, keep=5) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        kept = at[handle.report().stages[0].kept[0]].tolist()
        mask, cache = inputs["attention_mask"], cache_of(out)
        for token in (17, 40, 5):
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            out = model(
                input_ids=torch.tensor([[token]]),
                attention_mask=mask,
                **cached(model, cache),
                position_ids=torch.tensor([[len(mask[0]) - 1]]),
            )
            x = torch.cat([x, lm.embed_tokens(torch.tensor([token]))])
            rows = [i for i in range(len(x)) if i not in at.tolist() or i in kept]
            h = x
            for i in range(6):
                if i == 2:
                    h = h[rows]
                h = O._run_lm_layer(lm, i, h, rows if i >= 2 else list(range(len(x))))
            B.close(out.logits[0, -1], model.lm_head(lm.norm(h))[-1])
        assert [cache.get_seq_length(i) for i in range(6)] == [49] * 2 + [18] * 4


def test_layer_zero_is_refused() -> None:
    with pytest.raises(vtprune.VtpruneError, match="layer >= 1"):
        vtprune.attach(B.llava(), "fastv", layer=0)
