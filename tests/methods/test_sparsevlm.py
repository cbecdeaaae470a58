"""SparseVLM (arXiv 2410.04417) against a slow transcription: raters, cuts, clusters, hidden states."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn
from vtprune.kernels.base import squares

import oracles as O
import vtprune
from vtprune.core.types import Geometry, Text, TokenView
from vtprune.methods.base import Cut, make
from vtprune.methods.sparsevlm import density_peaks, schedule, split

PROMPTS = [[4, 9], [7, 12], [3, 5]]


def raters(visual: list[Tensor], text: list[Tensor], least: bool = False) -> list[int]:
    """Numbers of the words that rate."""
    share = [0.0] * len(text)
    for v in visual:
        for t, p in enumerate(O._softmax([O._dot(v, word) for word in text])):
            share[t] += p / len(visual)
    mean = sum(share) / len(share)
    return [t for t, p in enumerate(share) if (p >= mean if least else p > mean)] or list(range(len(text)))


@torch.no_grad()
def heads_of(lm: nn.Module, index: int, x: Tensor, ids: list[int], t: int, plus: bool) -> list[list[float]]:
    """Of each head of layer ``index`` what row t attends to the rows in front of it; ``plus``: over the product of
    all-ones vectors, rotated."""
    block = lm.layers[index]
    z = block.input_layernorm(x)
    q, k = block.self_attn.q_proj(z), block.self_attn.k_proj(z)
    cos, sin = (table[0] for table in lm.rotary_emb(x[None], torch.tensor([ids])))
    count, d = lm.config.num_attention_heads, block.self_attn.head_dim
    group = count // lm.config.num_key_value_heads
    one = torch.ones(d, dtype=torch.float64)
    bias = [
        O._dot(O._rope(one, cos[t], sin[t]), O._rope(one, cos[j], sin[j])) / math.sqrt(d) if plus else 1.0
        for j in range(t + 1)
    ]
    out = []
    for h in range(count):
        query = O._rope(O._head(q, h, d)[t], cos[t], sin[t])
        logits = [O._dot(query, O._rope(O._head(k, h // group, d)[j], cos[j], sin[j])) for j in range(t + 1)]
        out.append([p / b for p, b in zip(O._softmax([z / math.sqrt(d) for z in logits]), bias, strict=True)])
    return out


def peaks(x: list[Tensor], count: int, cosine: bool = False) -> tuple[list[int], list[list[int]]]:
    """Centres, and the members of each, with lists."""
    if not count:
        return [], []
    m, c = len(x), len(x[0])
    d = [[math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(p, q, strict=True)) / c) for q in x] for p in x]
    density = [math.exp(-sum(v * v for v in sorted(row)[:count]) / count) for row in d]
    order = sorted(range(m), key=lambda i: -density[i])
    far = [max(d[i]) if n == 0 else min(d[i][j] for j in order[:n]) for n, i in enumerate(order)]
    score = {i: density[i] * f for i, f in zip(order, far, strict=True)}
    centres = sorted(range(m), key=lambda i: -score[i])[:count]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(m):
        near = [float(torch.cosine_similarity(x[i], x[j], dim=0)) if cosine else -d[i][j] for j in centres]
        members[centres.index(i) if i in centres else near.index(max(near))].append(i)
    return centres, members


def split_by_hand(there: int, left: int, share: float = 0.3, size: int = 10) -> tuple[int, int, int]:
    """The official numbers of recycled tokens and clusters for the largest k with k + clusters = left."""
    for k in range(left, -1, -1):
        pool = int(share * (there - k)) + 1
        clusters = min(int(pool / size) + 1, left // 2)
        if k + clusters == left:
            return k, pool, clusters
    raise AssertionError


@torch.no_grad()
def slow(lm: nn.Module, x: Tensor, at: list[int], words: list[int], cuts: dict[int, int], **options: Any) -> Any:
    """Kept positions behind each cut, and what the last layer gives, of one sample ``[n, D]`` with one image ``at``."""
    plus = options.get("version") == "2.0"
    compact, total = options.get("positions") == "compact", options.get("reconstruct") == "sum"
    chosen = raters(list(x[at]), list(x[words]), options.get("raters") == "least")
    rows = [words[t] for t in chosen]
    original, kept = list(range(len(x))), []
    before, ids = x, list(original)
    for index in range(len(lm.layers)):
        if index in cuts:
            image = [i for i, p in enumerate(original) if p in at]
            each = [heads_of(lm, index - 1, before, ids, original.index(p), plus) for p in rows]
            heads = len(each[0])
            rate = [[sum(e[h][i] for e in each) / len(each) for i in image] for h in range(heads)]
            if plus:
                rate = sorted(rate, key=sum, reverse=True)[: heads // 2]
            order = O._descending([sum(h[n] for h in rate) / len(rate) for n in range(len(image))])
            left = cuts[index]
            gone, new = list(image), x.clone()
            if left >= len(image):
                gone = []
            elif plus:
                gone = [image[n] for n in order[left:]]
            else:
                k, pool, clusters = split_by_hand(len(image), left)
                some = [image[n] for n in order[k : k + pool]]
                centres, members = peaks([x[i] for i in some], clusters, total)
                for centre, mine in zip(centres, members, strict=True):
                    new[some[centre]] = sum(x[some[i]] for i in mine) / (1 if total else len(mine))
                stay = [image[n] for n in order[:k]] + [some[i] for i in centres]
                gone = [i for i in image if i not in stay]
            here = [i for i in range(len(x)) if i not in gone]
            x, original = new[here], [original[i] for i in here]
            ids = list(range(len(here))) if compact else original
            kept.append([at.index(p) for p in original if p in at])
        before = x
        x = O._run_lm_layer(lm, index, x, ids)
    return kept, lm.norm(x), original


def attached(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[list[Tensor], Any]:
    with vtprune.attach(model, "sparsevlm", **options) as handle, torch.no_grad():
        return B.final(model, inputs), handle.report()


def check(model: nn.Module, inputs: dict[str, Tensor], cuts: dict[int, int], **options: Any) -> None:
    x = B.embeddings(model, inputs)
    hidden, report = attached(model, inputs, **options)
    assert [s.site for s in report.stages] == [f"llm.{i}" for i in cuts]
    for b in range(len(x)):
        at = B.visual_positions(inputs, b).tolist()
        words = list(range(at[-1] + 1, len(x[b])))
        kept, want, original = slow(model.model.language_model, x[b], at, words, cuts, **options)
        assert [s.kept[b].tolist() for s in report.stages] == kept
        assert [s.tokens_out[b] for s in report.stages] == list(cuts.values())
        B.close(hidden[b][original], want)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_equals_the_transcription(text: str, version: str) -> None:
    cuts, ratios = {1: 25, 3: 14, 4: 7}, (0.7, 0.4, 0.2)
    check(B.llava(text=text), B.prompts(PROMPTS), cuts, layers=(1, 3, 4), ratios=ratios, version=version)


OTHERS = ({"positions": "compact"}, {"reconstruct": "sum"}, {"raters": "least"})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [*OTHERS, {"version": "2.0", "positions": "compact"}])
def test_options_equal_the_transcription(options: dict[str, Any]) -> None:
    check(
        B.llava(), B.prompts(PROMPTS[:2], left=False), {2: 20, 3: 9}, layers=(2, 3), ratios=(20 / 36, 0.25), **options
    )


@pytest.mark.parametrize("keep", [1, 2, 3, 11, 35, 36])
def test_budgets_are_met(keep: int) -> None:
    """The cuts' default places and budgets in six layers of 36 tokens; two fall together."""
    cuts = dict(zip((1, 1, 3), schedule(keep, B.N, "1.5"), strict=True))
    check(B.llava(), B.prompts(PROMPTS[:1]), cuts, keep=keep)


SETTINGS = {
    "1.5": {113: (300, 200, 110), 39: (303, 110, 36), 27: (238, 48, 26), 18: (66, 30, 17)},
    "2.0": {118: (300, 200, 118), 60: (238, 108, 60), 28: (246, 54, 28), 20: (66, 34, 20)},
}


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_official_settings(version: str) -> None:
    """The official tables; recycled tokens beside them as the official numbers say; the means over layers."""
    geometry = Geometry("llava", "clip", 576, (24, 24), 1, 23, 24, 32, {"llm": frozenset({"query_attention", "text"})})
    means = []
    for keep, table in SETTINGS[version].items():
        first, *cuts = make("sparsevlm", {"version": version}).plan(geometry, keep)
        assert (first.site, first.keep) == ("llm.0", 576)
        assert [(c.layer, c.observe) for c in cuts] == [(3, (2,)), (7, (6,)), (16, (15,))]
        counts, there = [c.keep for c in cuts], 576
        assert counts[-1] == keep
        for want, count in zip(table, counts, strict=True):
            if version == "2.0":
                assert count == want
                continue
            pool = int(0.3 * (there - want)) + 1
            assert split(there, count, 0, 0.3, 10) == (want, pool, int(pool / 10) + 1)
            assert want + int(pool / 10) + 1 == count
            there = count
        means.append(round((2 * 576 + 4 * counts[0] + 9 * counts[1] + 17 * counts[2]) / 32, 2))
    if version == "1.5":
        assert means == [192.03, 128.62, 96.94, 64.81]


@pytest.mark.parametrize("tokens", [1, 36, 576, 2880])
@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_every_budget_falls_and_ends_exactly(version: str, tokens: int) -> None:
    for keep in (1, 2, tokens // 7, tokens // 3, tokens - 1, tokens):
        if 1 <= keep <= tokens:
            counts = schedule(keep, tokens, version)
            assert tokens >= counts[0] >= counts[1] >= counts[2] == keep


def test_every_split_is_exact() -> None:
    for there in (1, 2, 7, 40, 113):
        for left in range(1, there + 1):
            for forced in (0, 1, left, there):
                for share, size in ((0.3, 10), (0.0, 10), (1.0, 1), (0.5, 3)):
                    first, pool, clusters = split(there, left, forced, share, size)
                    assert first + clusters == left and first >= min(forced, left) and clusters <= pool
                    assert first + pool <= there and first >= 1
                    assert not (share == 0 and clusters)


def test_layers_and_ratios_are_checked() -> None:
    model = B.llava()
    for options, says in (
        ({"layers": (0, 2)}, "at least 1"),
        ({"layers": (1, 2), "ratios": (0.5,)}, "one per layer"),
        ({"layers": (1, 2), "ratios": (0.5, 0.6)}, "falling"),
        ({"layers": (1, 2, 3, 4)}, "ratios="),
    ):
        with pytest.raises(vtprune.VtpruneError, match=says):
            vtprune.attach(model, "sparsevlm", **options)
    _, report = attached(model, B.prompts([[3, 5]]), layers=(5,), keep=4)
    assert [(s.site, s.tokens_out) for s in report.stages] == [("llm.5", [4])]


def test_a_small_budget_moves_the_cuts() -> None:
    """solve() halves the depth of the three cuts; the look at the words in front of layer 0 is none of them."""
    model = B.llava(layers=16)
    recipe = vtprune.solve(model, "sparsevlm", effective_tokens=5)
    assert recipe.stages[-1].options["layers"] == (1, 2, 4)
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        B.final(model, B.prompts([[3, 5]]))
        assert 3 < handle.report().effective_tokens <= 5


def view(score: Tensor, features: Tensor, valid: Tensor | None = None, protected: Tensor | None = None) -> TokenView:
    """A view whose raters rate as ``score`` ``[B, N]`` says, by one word."""
    b, n = score.shape
    valid = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    one = torch.ones(b, 1, dtype=torch.bool)
    return TokenView(
        features=features,
        valid=valid,
        index=torch.where(valid, torch.arange(n), -1),
        size=valid.double(),
        protected=torch.zeros_like(valid) if protected is None else protected,
        grid=(n, 1),
        sources={
            "query_attention": lambda **how: score,
            "queried": lambda: torch.ones(b, dtype=torch.bool),
            "text": lambda: Text(features[:, :1], one, one, one.long()),
        },
    )


def chosen(made: TokenView, keep: int, **options: Any):
    method = make("sparsevlm", options)
    assert method.select(made, Cut(site="llm.0")) is None
    return method.select(made, Cut(site="llm.3", keep=keep))


@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("keep", [1, 2, 5, 12, 20])
def test_hostile_views_leave_exact_counts(keep: int, version: str) -> None:
    """Equal tokens, equal scores, NaN, protected tokens, ragged rows."""
    generator = torch.Generator().manual_seed(1)
    n = 20
    valid = torch.arange(n) < torch.tensor([[n], [7], [1]])
    protected = (torch.rand(3, n, generator=generator) < 0.2) & valid
    each = torch.rand(3, n, generator=generator, dtype=torch.float64)
    for features in (torch.ones(3, n, 4).double(), torch.randn(3, n, 4, generator=generator).double()):
        for score in (each, torch.ones_like(each), torch.full_like(each, torch.nan)):
            rated = score.masked_fill(~valid, -torch.inf)
            rated = rated[..., None].expand(-1, -1, 2) if version == "2.0" else rated
            made = view(score, features, valid, protected)
            made = replace(made, sources={**made.sources, "query_attention": lambda r=rated, **how: r})
            selection = chosen(made, keep, version=version)
            for b, row in enumerate(selection.kept):
                row = row[row >= 0].tolist()
                there = int(valid[b].sum())
                assert len(row) == len(set(row)) == min(keep, there) and max(row) < there and row == sorted(row)
                if keep >= int(protected[b].sum()):
                    assert set(protected[b].nonzero()[:, 0].tolist()) <= set(row)
            if selection.target is not None:
                own = selection.target.gather(1, selection.kept.clamp_min(0))
                there = selection.kept >= 0
                assert torch.equal(own[there], torch.arange(own.shape[1]).expand_as(own)[there])


def test_clusters_become_the_means_of_their_members() -> None:
    """Two heaps among what is dropped, of equal densities: one cluster each at the best rated of it; the worst token is
    not recycled."""
    heaps = [[side, y] for side in (0.0, 5.0) for y in (0.0, 0.25, 0.125)]
    x = torch.tensor([[9.0, 9.0], [9.0, 8.0], *heaps, [-9.0, -9.0]]).double()
    score = torch.arange(9, 0, -1).double()
    selection = chosen(view(score[None], x[None]), 4, recycle=0.8, cluster=5)  # int(.8 * 7) + 1 of seven, 6 // 5 + 1
    assert selection.kept.tolist() == [[0, 1, 2, 5]]
    assert selection.target.tolist() == [[0, 1, 2, 2, 2, 3, 3, 3, -1]]
    assert selection.weight.tolist() == [[1.0] * 9]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_density_peaks(count: int, cosine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(5)).double()
    want = [peaks(list(row), count, cosine) for row in x]
    for chunk in (1 << 20, 7 * 60 // 16):  # all rows at once, seven at a time
        monkeypatch.setattr(sys.modules["vtprune.methods.sparsevlm"], "CHUNK", chunk)
        centre, member = density_peaks(x, count, cosine=cosine)
        for b, (centres, members) in enumerate(want):
            assert centre[b].tolist() == centres
            assert [(member[b] == i).nonzero()[:, 0].tolist() for i in range(count)] == members


def test_squares_are_distances_the_same_from_either_side() -> None:
    x = torch.randn(2, 90, 33, generator=torch.Generator().manual_seed(5)) + 50
    y, (a, b) = x[:, :7].clone(), (x.double(), x[:, :7].double())
    torch.testing.assert_close(squares(x, y).double(), torch.cdist(a, b).square(), rtol=1e-4, atol=1e-3)
    own = squares(x, x)
    torch.testing.assert_close(own.double(), torch.cdist(a, a).square(), rtol=1e-4, atol=1e-3)
    assert torch.equal(own, own.transpose(1, 2)) and not own.diagonal(dim1=1, dim2=2).any()
    assert squares(x.half(), x.half()).dtype == torch.float32


def test_equal_tokens_are_one_cluster() -> None:
    """Without random noise a copy is no centre of its own while others are left."""
    x = torch.tensor([[0.0, 0], [0, 0], [0, 0], [4, 4], [4, 5], [9, 0]]).double()[None]
    centre, member = density_peaks(x, 3)
    assert centre[0, 0] == 0 and sorted(centre[0].tolist())[1] >= 3
    assert member[0, :3].tolist() == [0, 0, 0]


def test_distances_far_beyond_the_exponential() -> None:
    """Densities are compared where exp(-d^2) is nothing."""
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(2)) * 100
    far, near = density_peaks(x, 3), density_peaks(x.double(), 3)
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


def test_two_images_have_raters_of_their_own() -> None:
    """The text behind each image: between the two it rates for the first alone."""
    model, inputs = B.llava(), B.prompts([[3, 4, 6], [4, 6]])
    x = B.embeddings(model, inputs)[0]
    _, report = attached(model, inputs, layers=(2,), ratios=(0.25,), version="2.0")
    at = B.visual_positions(inputs, 0).tolist()
    for i in range(2):
        mine = at[i * B.N : (i + 1) * B.N]
        words = [p for p in range(mine[-1] + 1, len(x)) if p not in at]
        kept, *_ = slow(model.model.language_model, x, mine, words, {2: 9}, version="2.0")
        got = report.stages[0].kept[0]
        assert got[(got >= i * B.N) & (got < (i + 1) * B.N)].sub(i * B.N).tolist() == kept[0]


def test_without_text_behind_the_image_the_last_row_rates() -> None:
    model, inputs = B.llava(), B.prompts([[5, 0], [4, 6]])
    x, lm = B.embeddings(model, inputs), model.model.language_model
    options = {"layers": (2,), "ratios": (0.25,), "recycle": 0.0}
    _, report = attached(model, inputs, **options)
    at = B.visual_positions(inputs, 0).tolist()
    scores = B.scores(lm, x[0], 2, at, "previous", [len(x[0]) - 1], "all", True)
    scores[-1] = math.inf  # the row that rates stays
    assert report.stages[0].kept[0].tolist() == O._top(scores, 9)
    alone = {
        k: v[1:, -int(inputs["attention_mask"][1].sum()) :] if k != "pixel_values" else v[1:] for k, v in inputs.items()
    }
    _, single = attached(model, alone, **options)
    assert report.stages[0].kept[1].tolist() == single.stages[0].kept[0].tolist()


def test_training_samples_without_an_answer_stay_whole() -> None:
    model, inputs = B.llava(), B.prompts([[3, 8], [3, 8]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    with vtprune.attach(model, "sparsevlm", keep=5) as handle:
        model(**inputs, labels=labels).loss.backward()
        assert handle.report().stages[-1].tokens_out == [5, B.N]


def test_memory_is_found_again_among_images_of_several_kinds() -> None:
    """Prompts whose images have other sizes are cut kind by kind, with raters of their own each."""
    from vtprune.models.base import ADAPTERS

    info = ADAPTERS.get("llava-next")
    model, inputs = info.tiny[next(iter(info.tiny))]()
    for version in ("1.5", "2.0"):
        with vtprune.attach(model, "sparsevlm", keep=0.3, version=version) as handle, torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()
            assert all(
                a > b for a, b in zip(handle.report().visual_tokens, handle.report().stages[-1].tokens_out, strict=True)
            )
