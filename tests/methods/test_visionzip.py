"""VisionZip (arXiv 2412.04467) against a slow transcription: kept sets, who absorbs whom, and what the language
model gets."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn

import oracles as O
import vtprune
from vtprune.core.select import combine
from vtprune.core.types import TokenView
from vtprune.methods.base import Cut, make

USED = 3  # of four blocks; the features are the output of the third
NAMES = ("q_proj", "k_proj", "query", "key")  # transformers' names over the years


def seen(tower: nn.Module, pixels: Tensor) -> list[dict[str, Any]]:
    """Of each image the features, keys and queries (by head) and class attention of the last block that is used, prefix
    taken off. transformers' eager attention rounds to 32 bits: only attention is taken from there."""
    found: dict[str, Tensor] = {}
    projections = [(n[0], m) for p, m in tower.named_modules() if (n := p.rpartition(".")[2]) in NAMES]
    hooks = [
        module.register_forward_hook(lambda m, a, y, name=name: found.update({name: y}))
        for name, module in projections[2 * (USED - 1) : 2 * USED]
    ]
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[USED]
    for hook in hooks:
        hook.remove()
    out = []
    for image, weights in enumerate(B.watched(tower, pixels)[1][USED - 1]):  # [H, n, n]
        prefix = weights.shape[-1] - B.N
        rows = [[float(w) for w in row] for row in weights.mean(0)]
        queries = rows[:1] if prefix else rows
        attention = [sum(row[j] for row in queries) / len(queries) for j in range(prefix, len(rows))]
        q, k = (found[name][image].unflatten(-1, (4, -1)) for name in "qk")
        out.append({"x": hidden[image, prefix:], "q": q, "k": k, "keys": k[prefix:], "a": attention})
    return out


def check_language_model(
    model: nn.Module,
    inputs: dict[str, Tensor],
    hidden: list[Tensor],
    x: list[Tensor],
    made: list[dict[int, Tensor]],
    limit: float = 1e-9,
) -> None:
    """``hidden`` is what a dense decoder makes of the embeddings ``x`` when image i hands over ``made[i]``, tower
    features by place."""
    images = iter(made)
    for b in range(len(x)):
        at = B.visual_positions(inputs, b)
        rows, sequence = {*range(len(x[b]))} - {*at.tolist()}, x[b].clone()
        for place in range(len(at) // B.N):
            for index, feature in next(images).items():
                row = int(at[place * B.N + index])
                with torch.no_grad():
                    sequence[row] = model.model.multi_modal_projector(feature[None])[0]
                rows.add(row)
        order = sorted(rows)
        B.close(hidden[b][order], B.stack(model.model.language_model, sequence[order], order), limit)


def zipped(
    x: Tensor, metric: list[list[float]], a: list[float], dominant: int, contextual: int, merge: str = "sum"
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """What is handed over, by place, and who absorbs whom, with lists."""
    falling = sorted(range(len(a)), key=lambda j: -a[j])
    first, rest = sorted(falling[:dominant]), sorted(falling[dominant:])
    out, into = {j: x[j] for j in first}, {j: j for j in first}
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[i * step] for i in range(contextual)]
    groups: dict[int, list[int]] = {t: [] for t in targets}

    def cosine(i: int, j: int) -> float:
        dot = lambda p, q: sum(u * v for u, v in zip(metric[p], metric[q], strict=True))  # noqa: E731
        return dot(i, j) / math.sqrt(dot(i, i) * dot(j, j))

    for j in rest:
        if targets and j not in targets:
            groups[max(targets, key=lambda t: cosine(j, t))].append(j)
    for t, members in groups.items():
        into |= {j: t for j in [t, *members]}
        total = sum((x[j] for j in members), torch.zeros_like(x[t]))
        if merge == "sum":
            out[t] = x[t] + total / max(1, len(members))
        else:
            out[t] = (x[t] + total) / (1 + len(members))
    return out, into


def split(keep: int, share: float = 10 / 64) -> tuple[int, int]:
    contextual = math.floor(keep * share + 0.5)
    return (keep, 0) if keep >= B.N else (keep - contextual, contextual)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize(
    "keep, options",
    [
        (8, {}),
        (3, {}),
        (35, {}),
        (36, {}),
        (17, {"merge": "mean"}),
        (9, {"contextual": 0.5}),
        (10, {"contextual": 0.0}),
        (4, {"contextual": 1.0}),
    ],
)
def test_llava_equals_the_transcription(vision: str, keep: int, options: dict[str, Any]) -> None:
    model, inputs = B.llava(vision, "llama", layers=2), B.prompts([[4, 9], [7, 2, 5]])
    x = B.embeddings(model, inputs)
    with vtprune.attach(model, "visionzip", keep=keep, **options) as handle:
        hidden, report = B.final(model, inputs), handle.report()
        records = [(run.records[-1], g) for run, g in handle.passes]
    dominant, contextual = split(keep, options.get("contextual", 10 / 64))
    made = []
    for (record, g), image in zip(records, seen(model.model.vision_tower, inputs["pixel_values"]), strict=True):
        metric = [[sum(float(v) for v in key[:, c]) / 4 for c in range(key.shape[1])] for key in image["keys"]]
        out, into = zipped(image["x"], metric, image["a"], dominant, contextual, options.get("merge", "sum"))
        assert record.kept[g].tolist() == sorted(out)
        if keep < B.N:
            slots = record.assignment[g].tolist()
            assert {j: sorted(out)[s] for j, s in enumerate(slots) if s >= 0} == into
        made.append(out)
    assert report.stages[-1].tokens_out == [keep, 2 * keep]
    check_language_model(model, inputs, hidden, x, made)


def test_behind_the_projector_keys_and_attention_are_noted() -> None:
    """The same tokens stay, projected features are merged."""
    model, inputs = B.llava("clip", "llama", layers=2), B.prompts([[4, 9]])
    x, at = B.embeddings(model, inputs)[0], B.visual_positions(inputs, 0)
    with vtprune.attach(model, "visionzip", keep=12, site="projector") as handle:
        hidden, report = B.final(model, inputs), handle.report()
    (image,) = seen(model.model.vision_tower, inputs["pixel_values"])
    metric = image["keys"].mean(1).tolist()
    out, into = zipped(x[at], metric, image["a"], *split(12))
    kept = sorted(out)
    assert report.stages[-1].kept[0].tolist() == kept
    assert [kept[s] for s in report.stages[-1].assignment[0]] == [into[j] for j in range(B.N)]
    x[at[kept]] = torch.stack([out[j] for j in kept])
    rows = sorted({*range(len(x))} - {*at.tolist()} | {*at[kept].tolist()})
    B.close(hidden[0][rows], B.stack(model.model.language_model, x[rows], rows))


@pytest.mark.parametrize("keep, dominant, contextual", [(64, 54, 10), (128, 108, 20), (192, 162, 30), (32, 27, 5)])
def test_the_paper_s_budgets(keep: int, dominant: int, contextual: int) -> None:
    """Of 576 equal tokens the first are dominant, and every ``R // M``-th of the others is a target."""
    rest = 576 - dominant
    want = [*range(dominant), *(dominant + i * (rest // contextual) for i in range(contextual))]
    assert chosen(torch.ones(1, 576, 4), torch.full((1, 576), 1 / 576), keep).kept[0].tolist() == want


def view(keys: Tensor, attention: Tensor, valid: Tensor | None = None, protected: Tensor | None = None) -> TokenView:
    """A view behind the projector with these notes."""
    b, n = attention.shape
    valid = torch.ones(b, n).bool() if valid is None else valid
    notes = torch.cat([attention[..., None], keys], -1)
    return TokenView(
        features=keys,
        valid=valid,
        index=torch.where(valid, torch.arange(n), -1),
        size=valid.to(torch.float32),
        protected=torch.zeros_like(valid) if protected is None else protected,
        grid=(1, n),
        sources={"note vision.2": lambda: notes},
    )


def chosen(keys: Tensor, attention: Tensor, keep: int, method: str = "visionzip", **options: Any) -> Any:
    masks = {k: options.pop(k) for k in ("valid", "protected") if k in options}
    cut = Cut(site="projector", keep=keep, data={"blocks": (2,)})
    return make(method, options).select(view(keys, attention, **masks), cut)


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("share", [0.0, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 3, 8, 12])
def test_ties_and_ragged_batches_leave_exact_counts(keep: int, share: float, merge: str) -> None:
    """Equal tokens, zeros, tokens without notes, one token."""
    counts = [12, 12, 7, 1, 12]
    valid = torch.arange(12)[None] < torch.tensor(counts)[:, None]
    keys = torch.ones(5, 12, 4)
    keys[1] = 0
    attention = torch.full((5, 12), 1 / 12)
    attention[4, 5:] = torch.nan
    keys[4, 5:] = torch.nan
    got = chosen(keys, attention, keep, valid=valid, contextual=share, merge=merge)
    rows = [row[row >= 0].tolist() for row in got.kept]
    assert [len(set(row)) for row in rows] == [len(row) for row in rows] == [min(keep, c) for c in counts]
    assert rows == [sorted(row) for row in rows] and got.span == (1, min(keep, 12))
    assert {0, 1, 2, 3, 4} >= {*rows[4][:5]}
    out, size = combine(keys.nan_to_num(7.0), got, valid.float())
    assert torch.isfinite(out).all()
    for row, target, n, total in zip(rows, got.target, counts, size, strict=True):
        assert target[n:].eq(-1).all() and [target[j] for j in row] == list(range(len(row)))
        assert total.sum() == (target >= 0).sum()


def test_a_batch_decides_as_its_images_do() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, attention = torch.randn(3, 20, 6, generator=generator), torch.rand(3, 20, generator=generator)
    valid = torch.arange(20)[None] < torch.tensor([20, 13, 6])[:, None]
    both = chosen(keys, attention, 7, valid=valid, contextual=0.4)
    for b, n in enumerate((20, 13, 6)):
        alone = chosen(keys[b : b + 1, :n], attention[b : b + 1, :n], 7, contextual=0.4)
        assert both.kept[b, : alone.kept.shape[1]].tolist() == alone.kept[0].tolist()
        assert both.target[b, :n].tolist() == alone.target[0].tolist()
        out = combine(keys, both, valid.float())[0][b, : alone.kept.shape[1]]
        B.close(out, combine(keys[b : b + 1, :n], alone, torch.ones(1, n))[0][0], 1e-6)


def test_protected_tokens_are_dominant_and_unknown_ones_never_merge() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, attention = torch.randn(1, 10, 4, generator=generator), torch.arange(10.0)[None]
    protected = torch.zeros(1, 10).bool()
    protected[0, :3] = True
    got = chosen(keys, attention, 4, protected=protected, contextual=0.5)
    assert got.kept[0].tolist() == [0, 1, 2, 3]  # the budget's rest is one target, the first of the others
    assert got.target[0].tolist() == [0, 1, 2, *[3] * 7]
    attention[0, 4] = torch.nan
    got = chosen(keys, attention, 4, contextual=0.5)
    assert got.kept[0].tolist() == [0, 3, 8, 9] and got.target[0, 4] == -1  # of 0 1 2 3 5 6 7 every third


def test_sizes_weigh_the_mean() -> None:
    """Behind a stage that merged, each token counts as many times as it stands for."""
    keys, attention = torch.ones(1, 4, 1), torch.tensor([[9.0, 3.0, 2.0, 1.0]])
    size = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    x = torch.tensor([[[1.0], [10.0], [20.0], [40.0]]])
    for merge, want in (("sum", 10 + (3 * 20 + 40) / 4), ("mean", (2 * 10 + 3 * 20 + 40) / 6)):
        method = make("visionzip", {"merge": merge, "contextual": 0.5})
        look = view(keys, attention)
        cut = Cut(site="projector", keep=2, data={"blocks": (2,)})
        got = method.select(TokenView(**{**vars(look), "size": size}), cut)
        out, sizes = combine(x, got, size)
        assert out.flatten().tolist() == pytest.approx([1.0, want]) and sizes.tolist() == [[1.0, 6.0]]


def test_softmax_is_over_all_tokens() -> None:
    """The transcription's attention is the softmax of scaled products, once by hand."""
    model, pixels = B.tower("clip", 3), B.images(1)
    hidden, attentions = B.watched(model, pixels)
    layer = model.encoder.layers[2]
    with torch.no_grad():
        z = layer.layer_norm1(hidden[2][0])
        q, k = (m(z).view(-1, 4, 8) for m in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    want = O._softmax([float(q[0, 1] @ k[j, 1]) / math.sqrt(8) for j in range(len(z))])
    assert attentions[2][0, 1, 0].tolist() == pytest.approx(want)
