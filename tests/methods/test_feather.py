"""FEATHER (arXiv 2412.13180) against loops over the decoder's own projections."""

from __future__ import annotations

import builders as B
import pytest
import torch
from vtprune.models.base import ADAPTERS

import oracles as O
import vtprune
from vtprune.core.types import Cut, Geometry, TokenView
from vtprune.methods.base import make
from vtprune.methods.feather import on_grid

SIDE = B.SIDE


def geometry(tokens: int, depth: int = 32, **more) -> Geometry:
    side = round(tokens**0.5)
    return Geometry(
        family="x",
        arch="x",
        tokens=tokens,
        grid=(side, tokens // side),
        prefix=0,
        vision_layers=0,
        vision_depth=0,
        llm_layers=depth,
        provides={"llm": frozenset({"query_attention"})},
        **more,
    )


def phi(lm, index: int, x, at: list[int]) -> list[float]:
    """Attention of the last of the rows ``x`` to the rows ``at`` in layer ``index``: no positions, softmax over
    ``at``, mean over heads."""
    attention, z = lm.layers[index].self_attn, lm.layers[index].input_layernorm(x)
    q, k = attention.q_proj(z[-1]).tolist(), attention.k_proj(z).tolist()
    heads, groups = lm.config.num_attention_heads, lm.config.num_attention_heads // lm.config.num_key_value_heads
    d = len(q) // heads
    total = [0.0] * len(at)
    for h in range(heads):
        g = h // groups
        logits = [
            sum(a * b for a, b in zip(q[h * d : (h + 1) * d], k[j][g * d : (g + 1) * d], strict=True)) / d**0.5
            for j in at
        ]
        for c, share in enumerate(O._softmax(logits)):
            total[c] += share / heads
    return total


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(score, key=lambda r: (-score[r], r))[:count])


def transcription(lm, x, images: list[list[int]], cuts: tuple[int, int], counts, stride: int) -> list[list[int]]:
    """Rows of ``x`` that are left behind the two cuts; ``images`` the rows of each image's tokens, ``counts(n)`` how
    many of n tokens are the best: of the first cut, and of the second."""
    rows, state, last, kept = list(range(len(x))), x, x, []
    for layer in range(len(lm.layers)):
        if layer in cuts:
            there = [[r for r in image if r in rows] for image in images]
            at = sum(there, [])
            scores = dict(zip(at, phi(lm, layer - 1, last, [rows.index(r) for r in at]), strict=True))
            stays: list[int] = []
            for image, mine in zip(images, there, strict=True):
                own = {r: scores[r] for r in mine}
                if layer == cuts[0]:
                    grid = [
                        image[i] for i in range(len(image)) if stride and not (i // SIDE % stride or i % SIDE % stride)
                    ]
                    chosen = {*best(own, counts[0](len(image))), *grid}
                else:
                    chosen = {*best(own, counts[1](len(mine)))}
                stays += sorted(chosen)
            kept.append(stays)
            gone = set(at) - set(stays)
            state = torch.stack([s for r, s in zip(rows, state, strict=True) if r not in gone])
            rows = [r for r in rows if r not in gone]
        last, state = state, B.layer(lm, layer, state, rows)
    return kept


def compared(text: str, counts, stride: int, **options) -> list[list[int]]:
    """Two samples, one of two images; answers with the counts of each cut and sample."""
    model, inputs = B.llava("clip", text, blocks=3, layers=6), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "feather", layers=(2, 4), stride=stride, **options) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    lm = model.model.language_model
    for b, x in enumerate(B.embeddings(model, inputs)):
        visual = B.visual_positions(inputs, b).tolist()
        images = [visual[i : i + B.N] for i in range(0, len(visual), B.N)]
        want = transcription(lm, x, images, (2, 4), counts, stride)
        assert [[visual[i] for i in s.kept[b].tolist()] for s in report.stages] == want
    return [s.tokens_out for s in report.stages]


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_llava_equals_the_transcription(text):
    """The official form, R = 0.7: 10 of 36 and a grid of 4, then 9 % of those."""
    counts = (lambda n: int(n * 0.3), lambda n: max(1, int(n * 0.3**2)))
    out = compared(text, counts, 3, r=0.7)
    assert 10 <= out[0][0] <= 14 and out[1] == [1, 2]


@pytest.mark.parametrize("stride, r", [(2, 0.5), (0, 0.5), (1, 0.5), (7, 0.25)])
def test_other_strides_and_shares(stride, r):
    counts = (lambda n: int(n * (1 - r)), lambda n: int(n * (1 - r) ** 2))
    out = compared("llama", counts, stride, r=r)
    if stride in (0, 1):
        assert out[0][0] == (18 if stride == 0 else 36)


@pytest.mark.parametrize("keep", [1, 3, 17, 35, 36])
def test_a_number_of_tokens_is_met(keep):
    """1 - R is where the expected number behind both cuts passes K + 1/2, found here in steps of 1e-5."""
    q = 0.0
    while q < 1 and (36 * q + 4 * (1 - q)) * q**2 < keep + 0.5:
        q += 1e-5
    out = compared("llama", (lambda n: int(n * min(q, 1)), lambda n: keep), 3, keep=keep)
    assert out[1] == [keep, 2 * keep] and out[0][0] >= keep


def test_the_official_numbers():
    """729 tokens: 218 united with 81, then a ninth of a third: about 24; 576 tokens by default."""
    first, second = make("feather", {"r": 0.7}).plan(geometry(729), None)
    assert (first.site, first.keep, first.most, first.adaptive) == ("llm.8", 218, 299, True)
    assert (second.site, second.keep, second.most) == ("llm.16", 19, 26)
    assert int(on_grid(((27, 27),), 3).sum()) == 81
    default = vtprune.describe("feather").keep
    first, second = make("feather", {}).plan(geometry(576), int(576 * default))
    assert (first.keep, first.most, second.keep, second.adaptive) == (172, 172 + 64, 19, False)
    whole = make("feather", {}).plan(geometry(576), 576)
    assert [(c.keep, c.adaptive) for c in whole] == [(576, False)] * 2


def test_the_grid_of_rasters():
    """Rows and columns are those of each raster, whatever its shape."""
    marks = on_grid(((2, 5), (4, 3)), 3).nonzero()[:, 0].tolist()
    assert marks == [0, 3, 10 + 0, 10 + 9]


def view(score, grid=(3, 3), rasters=(), valid=None) -> TokenView:
    n = score.shape[1]
    return TokenView(
        features=torch.zeros(*score.shape, 4),
        valid=torch.ones_like(score, dtype=torch.bool) if valid is None else valid,
        index=torch.arange(n).expand(score.shape) if valid is None else torch.arange(n).expand(score.shape) * valid,
        size=torch.ones_like(score),
        protected=torch.zeros_like(score, dtype=torch.bool),
        grid=grid,
        rasters=rasters,
        sources={"query_attention": lambda **how: score},
    )


def test_ties_tiles_and_padding():
    method, cut = make("feather", {}), Cut(site="llm.2", keep=2, data={"stride": 2})
    same = torch.full((1, 9), 0.1)
    assert method.select(view(same), cut).kept.tolist() == [[0, 1, 2, 6, 8]]
    tiles = torch.tensor([[0.0, 0, 0, 0, 0, 0.5, 0, 0.4]])
    kept = method.select(view(tiles, (8, 1), (((2, 2), (2, 2)),)), cut).kept
    assert kept.tolist() == [[0, 4, 5, 7]]
    valid = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    kept = method.select(view(torch.full((2, 9), torch.nan), valid=valid), cut).kept
    assert kept.tolist() == [[0, 1, 2, 6, 8], [0, 1, 2, -1, -1]]


def test_tiles_have_their_grids(tiny):
    """LLaVA-NeXT: every raster of an image has its grid, ranked together with the others."""
    model, inputs = tiny("llava-next", next(iter(ADAPTERS.get("llava-next").tiny)))
    with vtprune.attach(model, "feather", keep=2, layers=(1, 3)) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    for b, rasters in enumerate(report.grids):
        assert {*on_grid(tuple(map(tuple, rasters)), 3).nonzero()[:, 0].tolist()} <= {
            *report.stages[0].kept[b].tolist()
        }


@pytest.mark.parametrize(
    "options, says",
    [
        ({"layers": (0, 2)}, "two layers of at least 1"),
        ({"layers": (2,)}, "two layers"),
        ({"layers": (1, 2, 3)}, "two layers"),
        ({"layers": (4, 9)}, "must ascend"),
    ],
)
def test_impossible_schedules_are_refused(options, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        make("feather", options).plan(geometry(16, 8), 1)


def test_where_the_image_plane_is_not_known():
    with pytest.raises(vtprune.UnsupportedError, match="stride=0"):
        make("feather", {}).plan(geometry(16, 8, raster=False), 4)
    assert len(make("feather", {"stride": 0}).plan(geometry(16, 8, raster=False), 4)) == 2


def test_the_solver_stays_below_its_target(tiny):
    model, inputs = tiny("llava", "clip-llama")
    with vtprune.attach(model, "feather", effective_tokens=0.7) as handle, torch.no_grad():
        model(**inputs)
        effective = handle.report().effective_tokens
    assert 0.7 * 16 - 2 < effective <= 0.7 * 16
