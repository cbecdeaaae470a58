"""FitPrune (arXiv 2409.10197) against sums over the decoder's attention maps, made by hand."""

from __future__ import annotations

import builders as B
import pytest
import torch

import oracles as O
import vtprune
from vtprune.core.types import Geometry
from vtprune.methods.base import make


def geometry(tokens: int, depth: int, **more) -> Geometry:
    return Geometry(
        family="x",
        arch="x",
        tokens=tokens,
        grid=(1, tokens),
        prefix=0,
        vision_layers=0,
        vision_depth=0,
        llm_layers=depth,
        provides={"llm": frozenset({"query_attention", "text"})},
        **more,
    )


@torch.no_grad()
def attention(lm, index: int, x, rows: list[int]) -> list[list[list[float]]]:
    """``[H][n][n]``: what layer ``index`` gives every row of ``x``, which stand at the positions ``rows``, causally."""
    own, z = lm.layers[index].self_attn, lm.layers[index].input_layernorm(x)
    q, k = own.q_proj(z), own.k_proj(z)
    cos, sin = lm.rotary_emb(x[None], torch.tensor([rows]))
    heads, groups = lm.config.num_attention_heads, lm.config.num_attention_heads // lm.config.num_key_value_heads
    d, n = q.shape[1] // heads, len(rows)
    turned = lambda v, h: torch.stack([O._rope(v[j, h * d : (h + 1) * d], cos[0, j], sin[0, j]) for j in range(n)])  # noqa: E731
    maps = []
    for h in range(heads):
        logits = (turned(q, h) @ turned(k, h // groups).T / d**0.5).tolist()
        maps.append([O._softmax(row[: i + 1]) + [0.0] * (n - 1 - i) for i, row in enumerate(logits)])
    return maps


def importance(maps, rows: list[int], mine: list[int], behind: list[int], by: str) -> dict[int, float]:
    """Of each row of ``mine``; ``behind`` the text that follows."""
    at = {r: i for i, r in enumerate(rows)}
    largest = lambda i, j: max(m[at[i]][at[j]] for m in maps)  # noqa: E731
    out = {}
    for j in mine:
        visual = sum(largest(i, j) for i in mine) / len(mine)
        text = sum(largest(t, j) for t in behind) if behind else 1.0
        out[j] = {"both": visual * text, "visual": visual, "text": text}[by]
    return out


def compared(text: str, prompts: list[list[int]], wanted: dict[int, int], by: str = "both", **options) -> None:
    """``wanted``: tokens left of an image in front of each layer that cuts."""
    model, inputs = B.llava("clip", text, blocks=3, layers=6), B.prompts(prompts)
    with vtprune.attach(model, "fitprune", by=by, **options) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    assert [s.site for s in report.stages] == [f"llm.{i}" for i in wanted]
    lm = model.model.language_model
    for b, x in enumerate(B.embeddings(model, inputs)):
        visual = B.visual_positions(inputs, b).tolist()
        rows, state, last, done = list(range(len(x))), x, x, 0
        for layer in range(6):
            if layer in wanted:
                maps, stays = attention(lm, layer - 1, last, rows), []
                for i in range(0, len(visual), B.N):
                    mine = [r for r in visual[i : i + B.N] if r in rows]
                    behind = [r for r in rows if r not in visual and r > visual[i + B.N - 1]]
                    score = importance(maps, rows, mine, behind, by)
                    stays += sorted(sorted(mine, key=lambda r: -score[r])[: wanted[layer]])
                assert [visual[i] for i in report.stages[done].kept[b].tolist()] == stays
                done += 1
                left = [r for r in rows if r not in visual or r in stays]
                state, rows = torch.stack([state[rows.index(r)] for r in left]), left
            last, state = state, B.layer(lm, layer, state, rows)


TWO = [[4, 9], [7, 2, 5]]


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_llava_equals_the_transcription(text):
    compared(text, TWO, {1: 30, 2: 17, 4: 5}, layers=(1, 2, 4), counts=(30, 0.5 - 1e-3, 5))


@pytest.mark.parametrize("by", ["visual", "text"])
def test_one_of_the_two_alone(by):
    compared("mistral", TWO, {1: 24, 3: 10}, by, layers=(1, 3), counts=(24, 10))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("keep", [1, 9, 35, 36])
def test_the_schedule_without_a_fit(keep):
    """Two cuts of six layers, half of what goes at each."""
    compared("llama", TWO, {2: 36 - (36 - keep) // 2, 3: keep}, keep=keep)


def test_an_image_at_the_end_goes_by_itself():
    """The prompt's last token is visual and stays."""
    model, inputs = B.llava(layers=4), B.prompts([[6, 0]])
    with torch.no_grad(), vtprune.attach(model, "fitprune", layers=(1,), keep=5) as handle:
        model(**inputs)
        kept = handle.report().stages[0].kept[0].tolist()
    (x,) = B.embeddings(model, inputs)
    visual = B.visual_positions(inputs, 0).tolist()
    lm = model.model.language_model
    score = importance(attention(lm, 0, x, list(range(len(x)))), list(range(len(x))), visual, [], "both")
    score[visual[-1]] = 1.0
    assert [visual[i] for i in kept] == sorted(sorted(visual, key=lambda r: -score[r])[:5])


def test_schedules():
    """Equal parts from layer 2 to 16 of 32; fractions and numbers."""
    cuts = make("fitprune", {}).plan(geometry(576, 32), 144)
    assert [c.layer for c in cuts] == list(range(2, 17))
    assert [c.keep for c in cuts][:2] == [576 - 28, 576 - 57] and cuts[-1].keep == 144
    fitted = make("fitprune", {"layers": (3, 4, 9), "counts": (1.0, 300, 0.25)}).plan(geometry(576, 32), None)
    assert [(c.site, c.keep, c.observe) for c in fitted] == [
        ("llm.3", 576, (2,)),
        ("llm.4", 300, (3,)),
        ("llm.9", 144, (8,)),
    ]
    small = make("fitprune", {"layers": (3, 4), "counts": (300, 100)}).plan(geometry(200, 32, variable=True), None)
    assert [c.keep for c in small] == [200, 100]
    for depth in (2, 3, 4):
        assert [c.layer for c in make("fitprune", {}).plan(geometry(16, depth), 4)] == [max(1, depth // 2)]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"layers": (0, 2)}, "no attention in front"),
        ({"layers": (1, 2), "counts": (5,)}, "2 falling numbers"),
        ({"layers": (1, 2), "counts": (5, 6)}, "falling"),
        ({"layers": (1, 2), "counts": (17, 6)}, "16 visual tokens"),
        ({"layers": (1, 2), "counts": (1.5, 6)}, "a fraction lies in"),
        ({"layers": (1, 2), "counts": (3, 0)}, "above 0"),
        ({"layers": (2, 1)}, "must ascend"),
    ],
)
def test_impossible_schedules_are_refused(options, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        make("fitprune", options).plan(geometry(16, 8), 1)


def test_one_budget(tiny):
    model, _ = tiny("llava", "clip-llama")
    with pytest.raises(vtprune.VtpruneError, match="one budget"):
        vtprune.attach(model, "fitprune", keep=3, layers=[1], counts=[4])
