"""FlowCut (arXiv 2505.19536) in CLIP, DINOv2 and SigLIP towers, bare and inside LLaVA, against the slow
transcription."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn

import oracles as O
import vtprune


def tokens(kind: str, model: nn.Module, pixels: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """Output of a bare tower and the report."""
    with vtprune.attach(model, "flowcut", **options) as handle, torch.no_grad():
        return model(pixels).last_hidden_state, handle.report()


def same_kept(report: Any, want: list[list[Tensor]]) -> None:
    """Every stage's kept set is the transcription's behind that block, and blocks without a stage changed nothing
    there."""
    layers = {int(s.site.partition(".")[2]): s for s in report.stages if s.method == "flowcut"}
    before = None
    for layer, kept in enumerate(want):
        if layer in layers:
            assert [k.tolist() for k in layers[layer].kept] == [k.tolist() for k in kept]
        elif before is not None:
            assert [k.tolist() for k in kept] == [k.tolist() for k in before]
        before = kept


@pytest.mark.sampled(3)
@pytest.mark.parametrize("batch", ["image", "max"])
@pytest.mark.parametrize(
    "kind, blocks, keep",
    [("clip", 8, 8), ("clip", 7, 3), ("dinov2", 8, 12), ("dinov2", 7, 5), ("clip", 6, 35), ("clip", 2, 9)],
)
def test_bare_tower_equals_the_transcription(kind: str, blocks: int, keep: int, batch: str) -> None:
    model, pixels = B.tower(kind, blocks), B.images(4)
    hidden, report = tokens(kind, model, pixels, keep=keep, batch=batch)
    want = O.flowcut_oracle(model, pixels, keep, blocks - 1, batch_max=batch == "max")
    same_kept(report, want["kept"])
    assert report.stages[-1].tokens_out == [keep] * 4
    B.close(hidden, model.layernorm(want["hidden"]).detach() if kind == "dinov2" else want["hidden"])


@pytest.mark.parametrize("batch", ["image", "max"])
@pytest.mark.parametrize("vision, text, keep", [("clip", "llama", 6), ("dinov2", "mistral", 9)])
def test_llava_equals_the_transcription(vision: str, text: str, keep: int, batch: str) -> None:
    """Through projector and language model: kept patches stand at the positions of their placeholders."""
    model, inputs = B.llava(vision, text, blocks=9, layers=3), B.prompts([[4, 9], [7, 2, 5]])
    want = O.flowcut_oracle(model.model.vision_tower, inputs["pixel_values"], keep, 7, batch_max=batch == "max")
    x = B.embeddings(model, inputs)
    with torch.no_grad():
        features = model.model.multi_modal_projector(want["hidden"][:, 1:])
    with vtprune.attach(model, "flowcut", keep=keep, batch=batch) as handle:
        hidden, report = B.final(model, inputs), handle.report()
    joined = [[k[0], torch.cat([k[1], k[2] + B.N])] for k in want["kept"]]
    same_kept(report, joined)
    assert report.layer_tokens == [[keep] * 3, [2 * keep] * 3]
    for b, owned in enumerate([[0], [1, 2]]):
        at = B.visual_positions(inputs, b)
        rows = {*range(len(x[b]))} - {*at.tolist()}
        sequence = x[b].clone()
        for place, image in enumerate(owned):
            here = at[place * B.N + want["kept"][7][image]]
            sequence[here] = features[image]
            rows |= {*here.tolist()}
        order = sorted(rows)
        B.close(hidden[b][order], B.stack(model.model.language_model, sequence[order], order))
        assert not hidden[b][[i for i in range(len(x[b])) if i not in rows]].any()


def test_counts_inside_a_batch_are_ragged_or_coupled() -> None:
    """Contrast decides how many tokens a pruning takes: 'image' lets counts differ and is the same alone and in a
    batch, 'max' makes them equal."""
    model, pixels = B.tower("clip", 8), B.images(4)
    report = {batch: tokens("clip", model, pixels, keep=4, batch=batch)[1] for batch in ("image", "max")}
    ragged = [s.tokens_out for s in report["image"].stages[:-1]]
    assert any(len(set(row)) > 1 for row in ragged)
    assert [s.tokens_out[0] for s in report["max"].stages] == [min(s.tokens_out) for s in report["max"].stages]
    assert all(len(set(s.tokens_out)) == 1 for s in report["max"].stages)
    assert report["max"].stages[0].tokens_out[0] == min(ragged[0])
    for b in range(4):
        alone = {
            s.site: s.kept[0].tolist()
            for s in tokens("clip", model, pixels[b : b + 1], keep=4, batch="image")[1].stages
        }
        last: list[int] = []
        for stage in report["image"].stages:
            last = alone.get(stage.site, last)  # alone, an image that is down to its budget skips the rest
            assert stage.kept[b].tolist() == last


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (0.95, [565, 553, 541, 529, 516, 502, 487, 470, 450, 423, 64]),
        (0.8, [535, 495, 456, 418, 381, 345, 309, 273, 235, 191, 64]),
    ],
)
def test_published_schedules(ratio: float, expected: list[int]) -> None:
    """Patch counts of a 24-block tower when the entropy is a constant share of ln n."""
    from vtprune.methods.base import make

    method = make("flowcut", {})
    n, target, got = 576, 64, []
    for layer in range(1, 23, 2):
        remaining = 21 - layer
        counts = torch.tensor([n])
        low, high = 0.0, 1.0 - 1.0 / n  # one token takes the extra mass that gives this entropy
        for _ in range(200):
            mass = (low + high) / 2
            p = torch.full((1, n), (1 - mass) / n, dtype=torch.float64)
            p[0, 0] += mass
            entropy = float(-(p * p.log()).sum()) / math.log(n)
            low, high = (mass, high) if entropy > ratio else (low, mass)
        n = int(method._counts(p, counts, target, remaining)) if remaining else target
        got.append(n)
    assert got == expected


# --------------------------------------------------------------------------------------------------------------------
# options


@torch.no_grad()
def slow(
    model: nn.Module,
    image: Tensor,
    target: int,
    *,
    query: str = "class",
    semantic: str = "code",
    every: int = 2,
    ema: float = 0.5,
    final: str = "before",
    epsilon: float = 0.0,
) -> list[list[int]]:
    """One image, every option written out, one token at a time; kept patches behind each block that decides."""
    prefix = (
        0
        if query == "none"
        else int(not hasattr(model.embeddings, "position_embedding") or hasattr(model.embeddings, "class_embedding"))
    )
    x = model.embeddings(image[None])
    x = (model.pre_layrnorm(x) if hasattr(model, "pre_layrnorm") else x)[0]
    blocks = model.encoder.layers if hasattr(model.encoder, "layers") else model.encoder.layer
    alive, running, out = list(range(x.shape[0] - prefix)), None, []
    decides = len(blocks) - (final == "before")
    for index in range(decides):
        block, n, remaining = blocks[index], len(alive), decides - 1 - index
        z = (block.layer_norm1 if hasattr(block, "layer_norm1") else block.norm1)(x)
        a = block.self_attn if hasattr(block, "self_attn") else block.attention
        q, k, v = (m(z).view(len(z), 4, 8) for m in O.projections(a))
        q0, v0 = (q[0], v[0]) if query == "class" else (q.sum(0) / len(q), v.sum(0) / len(v))
        keys = range(len(z))
        similar_keys = range(prefix, len(z)) if semantic == "paper" else keys
        scale = 1 / math.sqrt(8) if semantic == "paper" else 1.0
        attention, similar = [0.0] * len(z), [0.0] * len(z)
        for h in range(4):
            for j, w in zip(keys, O._softmax([O._dot(q0[h], k[j, h]) / math.sqrt(8) for j in keys]), strict=True):
                attention[j] += w / 4
            for j, w in zip(
                similar_keys, O._softmax([O._dot(v0[h], v[j, h]) * scale for j in similar_keys]), strict=True
            ):
                similar[j] += w / 4
        attention, similar = attention[prefix:], similar[prefix:]
        strength = [float(v[j].mean(0).abs().sum()) for j in range(prefix, len(z))]
        if semantic == "none":
            score = [attention[j] * strength[j] for j in range(n)]
        else:
            score = [(attention[j] / sum(attention) + similar[j] / sum(similar)) * strength[j] for j in range(n)]
        x = O.run_block(block, x[None])[0]
        if n > target:
            running = (
                score
                if running is None
                else [ema * old + (1 - ema) * new for old, new in zip(running, score, strict=True)]
            )
            if remaining % every == 0:
                amount = (
                    O.flowcut_prune_amount(n, target, remaining, entropy_ratio(attention, epsilon))
                    if remaining
                    else n - target
                )
                best = O._top(running, max(n - round(amount), target))
                x = x[[*range(prefix), *(prefix + j for j in best)]]
                alive, running = [alive[j] for j in best], [running[j] for j in best]
        out.append(alive)
    return out


def entropy_ratio(attention: list[float], epsilon: float) -> float:
    """- sum p ln(p + epsilon) / ln n."""
    if not epsilon:
        return O.flowcut_entropy_ratio(attention)
    shares = [a / sum(attention) for a in attention]
    return -sum(p * math.log(p + epsilon) for p in shares) / math.log(len(shares))


QWEN = {"semantic": "none", "final": "behind", "epsilon": 1e-7}  # mean query, no semantic term
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("clip", {}),
    ("clip", {"semantic": "paper"}),
    ("clip", {"query": "mean"}),
    ("dinov2", {"every": 3, "ema": 0.2}),
    ("dinov2", {"every": 1, "query": "mean", "semantic": "paper"}),
    ("siglip", {}),
    ("siglip", {"semantic": "paper"}),
    ("siglip", QWEN),
    ("siglip", {**QWEN, "epsilon": 0.05}),
    ("clip", {"semantic": "none"}),
    ("clip", {"final": "behind", "every": 3}),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind, options", OPTIONS)
def test_options_equal_the_equations(kind: str, options: dict[str, Any]) -> None:
    model, pixels = B.tower(kind, 8), B.images(3)
    _, report = tokens(kind, model, pixels, keep=7, **options)
    query = "mean" if kind == "siglip" else options.get("query", "class")
    for b in range(3):
        want = slow(model, pixels[b], 7, **{**options, "query": query})
        same = {f"vision.{i}": kept for i, kept in enumerate(want)}
        assert [s.kept[b].tolist() for s in report.stages] == [same[s.site] for s in report.stages]
    assert report.stages[-1].tokens_out == [7, 7, 7]


def test_options_change_the_choice() -> None:
    model, pixels = B.tower("clip", 8), B.images(3)
    found = []
    every: list[dict[str, Any]] = [{}, {"semantic": "paper"}, {"query": "mean"}, {"every": 1}, {"ema": 0.0}]
    for options in (*every, {"batch": "max"}, {"semantic": "none"}, {"final": "behind"}, {"epsilon": 0.1}):
        report = tokens("clip", model, pixels, keep=7, **options)[1]
        found.append(str([[k.tolist() for k in s.kept] for s in report.stages]))
    assert len(set(found)) == 9


def test_the_form_of_the_qwen_code() -> None:
    """Without a class token attention sums to one over the patches; behind the last block the cut is exact, also in
    LLaVA, where the last block counts whose output is used."""
    model, pixels = B.tower("siglip", 7), B.images(4)
    hidden, report = tokens("siglip", model, pixels, keep=5, **QWEN)
    assert [s.site for s in report.stages] == ["vision.0", "vision.2", "vision.4", "vision.6"]
    assert hidden.shape[1] == 5 and report.stages[-1].tokens_out == [5] * 4
    for b in range(4):
        same = {f"vision.{i}": kept for i, kept in enumerate(slow(model, pixels[b], 5, query="none", **QWEN))}
        assert [s.kept[b].tolist() for s in report.stages] == [same[s.site] for s in report.stages]
    llava = B.llava("siglip", "llama", blocks=5, layers=2)
    with vtprune.attach(llava, "flowcut", keep=5, **QWEN) as handle, torch.no_grad():
        llava(**B.prompts([[4, 9]]))
        assert handle.report().stages[-1].site == "vision.3" and handle.report().layer_tokens == [[5, 5]]


def test_a_tower_without_class_token_says_so() -> None:
    with pytest.raises(vtprune.UnsupportedError, match="query='mean'"):
        vtprune.attach(B.tower("siglip", 4), "flowcut", query="class")
