"""LLaVA-Mini (arXiv 2501.03895) against a slow transcription: the compression, the pre-fusion, and what the language
model is given."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from safetensors.torch import save_file
from slow_layers import turned
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import cache_of, cached

import vtprune
from vtprune import Recipe, Stage, testing
from vtprune.check.case import Case
from vtprune.core.planning import load_recipe
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.methods.llava_mini import LlavaMini, Mini
from watch import spent

NAME = "llava-mini"
SHAPES = [[4, 9], [7, 2, 5], [11], [3, 12]]


def shaken(handle: Any, seed: int = 9) -> Mini:
    """Queries and layers, moved away from what they begin as."""
    module = handle.modules[NAME]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_((torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1).to(p.dtype))
    return module


# ------------------------------------------------------------------------------------------------------- written out


def place(row: float, column: float, d: int) -> list[float]:
    """Sines and cosines of a place: half of the channels of its row, half of its column."""
    out = []
    for at in (row, column):
        angles = [at / 10000 ** (k / (d // 4)) for k in range(d // 4)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return out


def compressed(x: Tensor, rows: int, columns: int, q: Tensor, c: int, pe: str, scaled: bool) -> Tensor:
    """C x C tokens of an image's ``x`` ``[n, d]``, token by token."""
    n, d = x.shape
    if pe == "grid":
        its = [place(i // columns, i % columns, d) for i in range(n)]
        middle = [(i + 0.5) * rows / c - 0.5 for i in range(c)], [(i + 0.5) * columns / c - 0.5 for i in range(c)]
        own = [place(middle[0][i // c], middle[1][i % c], d) for i in range(c * c)]
    else:
        own = [place(i // c, i % c, d) for i in range(c * c)]
        small = torch.tensor(own, dtype=torch.float64).view(c, c, d).permute(2, 0, 1)[None]
        large = nn.functional.interpolate(small, (rows, columns), mode="bicubic", align_corners=False)[0]
        its = [large[:, i // columns, i % columns].tolist() for i in range(n)]
    out = []
    for i in range(c * c):
        query = q[i].double() + torch.tensor(own[i], dtype=torch.float64)
        scores = [float(query @ (x[j].double() + torch.tensor(its[j], dtype=torch.float64))) for j in range(n)]
        scores = [s / d**0.5 for s in scores] if scaled else scores
        top = max(scores)
        power = [math.exp(s - top) for s in scores]
        out.append(sum(p / sum(power) * x[j].double() for j, p in enumerate(power)))
    return torch.stack(out)


def ran(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A decoder layer over ``x`` ``[n, D]``, head by head and row by row, causal."""
    a, h = layer.self_attn, layer.input_layernorm(x)
    q, k, v, d = a.q_proj(h), a.k_proj(h), a.v_proj(h), a.head_dim
    group, heads = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1] // d):
        other = slice(head // group * d, (head // group + 1) * d)
        mine, key = turned(q[:, head * d : (head + 1) * d], cos, sin), turned(k[:, other], cos, sin)
        rows = [(mine[i] @ key[: i + 1].T * d**-0.5).softmax(-1) @ v[: i + 1, other] for i in range(len(x))]
        heads.append(torch.stack(rows))
    x = x + a.o_proj(torch.cat(heads, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def centres(rows: int, columns: int, c: int) -> list[int]:
    """The tokens nearest to the middles of C x C equal cells, the first of equally near ones."""
    out = []
    for i in range(c * c):
        r = range(-(-(i // c) * rows // c), -(-(i // c + 1) * rows // c))
        k = range(-(-(i % c) * columns // c), -(-(i % c + 1) * columns // c))
        y, z = sum(r) / len(r), sum(k) / len(k)
        cell = [(a, b) for a in r for b in k]
        out.append(min(cell, key=lambda at: ((at[0] - y) ** 2 + (at[1] - z) ** 2, at)))
    return [a * columns + b for a, b in out]


@torch.no_grad()
def given(
    lm: Any, x: Tensor, images: list[list[int]], module: Mini, how: dict[str, Any], last: int | None = None
) -> dict:
    """What the language model is given, by the tokens' places in the prompt; text up to ``last`` is fused."""
    c = how["grid"]
    text = [i for i in range(len(x)) if all(i not in image for image in images)]
    rows = {i: x[i] for i in text}
    if not images:
        return rows
    said = [i for i in text if last is None or i <= last]
    order = [i for image in images for i in image] + said
    h = x[order]
    ids = torch.tensor([list(range(len(order))) if how.get("numbering") == "running" else order])
    cos, sin = (t[0] for t in lm.rotary_emb(h[None], ids))
    for layer in module.fusion:
        h = ran(layer, h, cos, sin)
    rows.update(zip(said, h[-len(said) :], strict=True))
    for image in images:
        made = compressed(x[image], 6, 6, module.queries, c, how.get("pe", "grid"), how.get("scaled", False))
        rows.update(zip((image[i] for i in centres(6, 6, c)), made, strict=True))
    return dict(sorted(rows.items()))


def pictures(inputs: dict[str, Tensor], b: int) -> list[list[int]]:
    at = B.visual_positions(inputs, b).tolist()
    return [at[i : i + B.N] for i in range(0, len(at), B.N)]


HOW = [
    ({"grid": 2, "fusion": 2}, "llama"),
    ({"grid": 1, "fusion": 1, "pe": "upsampled"}, "mistral"),
    ({"grid": 3, "fusion": 3, "numbering": "running", "scaled": True}, "qwen2"),
    ({"grid": 2, "fusion": 1, "pe": "upsampled", "init": "random", "positions": "compact"}, "llama"),
    ({"grid": 2, "fusion": 0}, "qwen2"),
    ({"grid": 6, "fusion": 1}, "llama"),
]


@pytest.mark.parametrize("how, text", HOW)
@pytest.mark.parametrize("left", [True, False])
def test_equals_the_transcription(how: dict[str, Any], text: str, left: bool) -> None:
    """In a padded batch with no, one and two images: hidden states in front of the head, and what is reported."""
    model, inputs = B.llava(text=text), B.prompts(SHAPES, left=left)
    x, lm = B.embeddings(model, inputs), model.model.language_model
    with vtprune.attach(model, NAME, **how) as handle:
        module = shaken(handle)
        hidden, report = B.final(model, inputs), handle.report()
    n = how["grid"] ** 2
    for b, _ in enumerate(SHAPES):
        images = pictures(inputs, b)
        rows = given(lm, x[b], images, module, how)
        ids = list(range(len(rows))) if how.get("positions") == "compact" else list(rows)
        want = torch.zeros_like(x[b])
        with torch.no_grad():
            want[list(rows)] = B.stack(lm, torch.stack(list(rows.values())), ids)
        B.close(hidden[b], want, 1e-7)  # transformers' rotary angles are float32
        assert report.layer_tokens[b] == [n * len(images)] * 6
    assert [(s.site, s.tokens_out) for s in report.stages] == [("llm.0", [n, 2 * n, 0, n])]


# ---------------------------------------------------------------------------------------------- every family's prompts


def layer_zero(model: nn.Module, lm: Any, inputs: dict[str, Any]) -> list[tuple[Tensor, dict]]:
    seen: list[tuple[Tensor, dict]] = []
    hook = lm.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.append((a[0] if a else k["hidden_states"], k)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen


FAMILIES = [
    (f, v)
    for f in ("gemma3", "glm4v", "internvl", "llava-next", "llava-onevision", "mistral3", "paligemma", "qwen2-vl")
    for v in ADAPTERS.get(f).tiny
] + [("smolvlm", "smolvlm"), ("qwen2.5-vl", "video")]


@pytest.mark.parametrize(("family", "variant"), FAMILIES, ids=lambda x: x)
def test_what_the_first_layer_is_given_in_every_family(tiny, family: str, variant: str) -> None:
    """Rows, one after another, of each sample alone: rasters one by one, video frames averaged, positions of three
    axes, scaled embeddings, sliding windows (of which the pre-fusion has none)."""
    model, inputs = tiny(family, variant)
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    if "experts" in variant:
        model.set_experts_implementation("eager")
    case = Case(model, load_recipe(NAME), inputs, {})
    lm, met = case.adapter.lm, 0
    for one in case.samples():
        (x,), kwargs = layer_zero(model, lm, one)[0]
        tables = kwargs["position_embeddings"]
        (parts,) = case.adapter.parts(one["input_ids"], one)
        with vtprune.attach(model, NAME, grid=2, fusion=1) as handle:
            module = shaken(handle)
            (got,), _ = layer_zero(model, lm, one)[0]
            report = handle.report()
        text = (~case.adapter.visual(one["input_ids"])[0]).nonzero()[:, 0].tolist()
        still = [i for p in parts if p.video < 0 for i in p.columns.tolist()]
        frames: dict[int, list[int]] = {}
        for p in parts:
            if p.video >= 0:
                frames.setdefault(p.image, []).extend(p.columns.tolist())
        looks = [sorted(still + f) for f in frames.values()] or [still]
        met += len(looks) > 1
        total = torch.zeros(len(text), x.shape[1], dtype=torch.float64)
        for look in looks:
            order = look + text
            mask = torch.ones(len(order), len(order), dtype=torch.bool).tril()
            additive = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
            with torch.no_grad():
                out = module.fusion[0](
                    x[order][None],
                    attention_mask=additive[None, None],
                    position_embeddings=tuple(t[:, order] for t in tables),
                )
            total += (out[0] if isinstance(out, tuple) else out)[0][-len(text) :]
        rows = dict(zip(text, total / len(looks), strict=True))
        for p in parts:
            mine, (h, w) = x[p.columns], p.grid
            if len(mine) < 4:
                rows.update(zip(p.columns.tolist(), mine, strict=True))
                continue
            made = compressed(mine, h, w, module.queries, 2, "grid", False)
            kept = [i for i in p.columns.tolist() if i in _kept(report, case, one)]
            assert len(kept) == 4
            if h % 2 == w % 2 == 0 and h == w:
                assert kept == [int(p.columns[i]) for i in centres(h, w, 2)]
            rows.update(zip(kept, made, strict=True))
        B.close(got, torch.stack([rows[i] for i in sorted(rows)]), 1e-5)
    assert met or "video" not in variant


def _kept(report: Any, case: Case, one: dict[str, Any]) -> set[int]:
    columns = case.adapter.visual(one["input_ids"])[0].nonzero()[:, 0]
    return set(columns[report.stages[0].kept[0]].tolist())


def test_identical_frames_are_one(tiny) -> None:
    """Invariant 8: each frame makes its tokens, and the text beside each is the same, at positions counted anew."""
    model, inputs = tiny("llava-onevision", "video")
    one = Case(model, load_recipe(NAME), inputs, {}).samples()[0]
    video = one["pixel_values_videos"]
    one["pixel_values_videos"] = video[:, :1].expand_as(video).contiguous()
    looked = []

    def note(self, hidden, run, module):
        looked.append(hidden)
        looked.append(run(module.fusion[0], hidden))
        return looked[-1]

    stock, LlavaMini.fuse = LlavaMini.fuse, note
    try:
        with vtprune.attach(model, NAME, grid=2, fusion=1, numbering="running") as handle, torch.no_grad():
            model(**one)
            report = handle.report()
    finally:
        LlavaMini.fuse = stock
    frames = video.shape[1]
    before, after = looked
    assert frames > 1 and len(before) == frames and report.layer_tokens[0][0] == 4 * frames + 1  # a new line
    for i in range(1, frames - 1):  # the new line follows the last
        torch.testing.assert_close(after[i], after[0])
    assert float((before - after).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------------- invariants


def test_without_layers_or_with_those_that_do_nothing_the_text_stays() -> None:
    """Invariants 1, 2 and 5: bitwise without layers; identity layers give every row back; prompts without images are
    never touched."""
    model, inputs = B.llava(), B.prompts(SHAPES)
    lm = model.model.language_model
    (dense, _), *_ = layer_zero(model, lm, inputs)
    words = {"input_ids": torch.tensor([[5, 9, 33, 12]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        alone = model(**words).logits
    rows = {}
    for name, how in (
        ("none", {"fusion": 0}),
        ("identity", {"fusion": 3, "init": "identity"}),
        ("copy", {"fusion": 1}),
    ):
        with vtprune.attach(model, NAME, grid=2, **how) as handle, torch.no_grad():
            (rows[name], _), *_ = layer_zero(model, lm, inputs)
            final = B.final(model, inputs)
            assert torch.equal(model(**words).logits, alone)
            handle.report()
        if name == "none":
            want = final
        elif name == "identity":
            for a, b in zip(final, want, strict=True):
                B.close(a, b, 1e-12)
    text = dense[1][(inputs["input_ids"][1] != B.IMAGE) & inputs["attention_mask"][1].bool()]
    packed = rows["none"][1]
    places = torch.tensor([i for i in range(len(packed))])
    assert torch.equal(packed[-5:], text[-5:]) and torch.equal(packed[places[:7]], text[:7])
    assert torch.equal(rows["identity"], rows["none"])
    assert not torch.equal(rows["copy"][1], packed)
    assert torch.equal(rows["copy"][2], rows["none"][2]), "a prompt without an image was fused"


def test_answers_keep_plain_embeddings_and_the_loss_is_the_models() -> None:
    """Invariant 4: with labels the rows in front of the first answer, and those between answers, are fused; a row of an
    answer never, nor what follows the last one."""
    model, inputs = B.llava(text="qwen2"), B.prompts([[4, 12]])
    lm, ids = model.model.language_model, inputs["input_ids"]
    (dense, _), *_ = layer_zero(model, lm, inputs)
    labels = torch.full_like(ids, -100)
    labels[0, -9:-7] = ids[0, -9:-7]
    labels[0, -4:-2] = ids[0, -4:-2]
    with vtprune.attach(model, NAME, grid=1, fusion=1) as handle:
        module = shaken(handle)
        ((got,), _), *_ = layer_zero(model, lm, {**inputs, "labels": labels})
        out = model(**inputs, labels=labels)
    changed = (got[[*range(4), *range(5, 17)]] != dense[0][[*range(4), *range(40, 52)]]).any(1).tolist()
    assert changed == [True] * 7 + [False] * 2 + [True] * 3 + [False] * 4
    images = pictures(inputs, 0)
    x = B.embeddings(model, inputs)[0]
    kept = [i for i in range(52) if i not in (43, 44) and i < 48]
    with torch.no_grad():
        order = images[0] + [i for i in kept if i not in images[0]]
        h, table = x[order], lm.rotary_emb(x[None], torch.tensor([order]))
        h = ran(module.fusion[0], h, table[0][0], table[1][0])
        rows = {i: x[i] for i in range(52) if i not in images[0]}
        rows.update(zip(order[36:], h[36:], strict=True))
        rows[images[0][centres(6, 6, 1)[0]]] = compressed(x[images[0]], 6, 6, module.queries, 1, "grid", False)[0]
        rows = dict(sorted(rows.items()))
        logits = model.lm_head(B.stack(lm, torch.stack(list(rows.values())), list(rows)))
    where = list(rows)
    answers = [i for i in range(52) if labels[0, i] != -100]
    want = torch.stack([-logits[where.index(i - 1)].log_softmax(-1)[ids[0, i]] for i in answers]).mean()
    assert float((out.loss - want).detach().abs()) < 1e-6
    for i in answers:
        B.close(out.logits[0, i - 1].detach(), logits[where.index(i - 1)], 1e-7)


def test_generated_tokens_never_come_back() -> None:
    """Invariant 7: cached steps are the model's own over the shorter prompt, and each equals reading the whole anew
    with the answer labelled; without a cache the prompt stays what it was."""
    model, inputs = B.llava(text="mistral"), B.prompts([[4, 9], [2, 5]])
    calls = []
    with vtprune.attach(model, NAME, grid=2, fusion=2) as handle, torch.no_grad():
        module = shaken(handle)
        module.fusion[0].register_forward_hook(lambda m, a, y: calls.append(1))
        how = {"max_new_tokens": 4, "do_sample": False}
        want = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        assert len(calls) == 1
        again = model.generate(**inputs, **how, use_cache=False)
        assert torch.equal(again, want.sequences) and len(calls) == 5
        more = want.sequences[:, inputs["input_ids"].shape[1] :]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), more], 1)
        whole = model(
            input_ids=want.sequences,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            pixel_values=inputs["pixel_values"],
            labels=labels,
        ).logits
        B.close(torch.stack(want.logits, 1), whole[:, -5:-1], 1e-7)
        # a later turn goes on behind the prompt, its text as it is
        out = model(**inputs, use_cache=True)
        assert cache_of(out).get_seq_length() == 4 + 13
        before = len(calls)
        later = torch.tensor([[9, 8, 7], [6, 5, 9]])
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
        model(input_ids=later, attention_mask=mask, **cached(model, cache_of(out)))
        assert len(calls) == before


def test_a_cache_of_fused_text_is_closed_with_the_attachment() -> None:
    """Also where as many visual tokens are left as there were."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    with vtprune.attach(model, NAME, grid=6, fusion=1), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    token = torch.tensor([[9]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    with pytest.raises(UnsupportedError, match="has been removed"):
        model(input_ids=token, attention_mask=mask, **cached(model, cache))


def test_the_weights_of_the_compression() -> None:
    """Invariants 3 and 6: they sum to one; queries that cancel their places look at everything alike; patches moved
    with their places change nothing, and with one up-sampled place even patches alone."""
    x = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    module = Mini(2, 48, []).double().requires_grad_(False)
    for pe in ("grid", "upsampled"):
        for scaled in (True, False):
            weight = module(x, 3, 4, pe, scaled)
            assert weight.shape == (2, 12, 4) and torch.allclose(weight.sum(1), torch.ones(2, 4, dtype=torch.float64))
    with torch.no_grad():
        own = [place((i // 2 + 0.5) * 1.5 - 0.5, (i % 2 + 0.5) * 2 - 0.5, 48) for i in range(4)]
        module.queries.copy_(-torch.tensor(own, dtype=torch.float64))
    uniform = module(x, 3, 4, "grid", False)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 12))
    one, order = (
        Mini(1, 48, []).double().requires_grad_(False),
        torch.randperm(12, generator=torch.Generator().manual_seed(2)),
    )
    a, b = one(x, 3, 4, "upsampled", False), one(x[:, order], 3, 4, "upsampled", False)
    torch.testing.assert_close(a[:, order], b)
    a, b = one(x, 3, 4, "grid", False), one(x[:, order], 3, 4, "grid", False)
    assert float((a[:, order] - b).abs().max()) > 1e-3
    torch.testing.assert_close(one(x, 3, 4, "grid", False), one(x.flip(0), 3, 4, "grid", False).flip(0))
    flat = Mini(1, 48, [])
    assert float(flat.queries.detach().std()) == pytest.approx(0.02, rel=0.4)


def test_flops_are_what_ran() -> None:
    """The products of the compression itself among it, 4 C^2 n d of each image."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    model = model.float()
    model.set_attn_implementation("eager")  # whose products the counter sees
    inputs["pixel_values"] = inputs["pixel_values"].float()
    dense = spent(model, inputs)
    for fusion in (0, 1, 3):
        with vtprune.attach(model, NAME, grid=2, fusion=fusion) as handle, torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                model(**inputs, logits_to_keep=1)
            report = handle.report()
        assert dense - counter.get_total_flops() == report.dense_flops - report.flops
    d, f = 48, 80

    def c(n: int) -> int:
        return 8 * n * d * d + 4 * n * n * d + 6 * n * d * f

    assert report.flops - report.dense_flops == 6 * c(17) - 6 * c(49) + 3 * c(49) + 4 * 4 * 36 * 48


def test_the_published_size() -> None:
    """Four layers of Vicuna-7B are 0.81 B parameters; one query is as wide as the model."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from vtprune.models.llava import Llava

    with torch.device("meta"):
        adapter = Llava(LlavaForConditionalGeneration(LlavaConfig()))
        module = LlavaMini().build(adapter.branch, adapter.geometry)
    assert sum(p.numel() for p in module.parameters()) == 4 * 202_383_360 + 4096
    assert [layer.self_attn.layer_idx for layer in module.fusion] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("how", [{"grid": 2, "fusion": 2, "scaled": True}, {"grid": 1, "fusion": 1, "pe": "upsampled"}])
def test_gradients_are_those_of_the_loss(how: dict[str, Any]) -> None:
    """By finite differences, of queries and layers, at once and of every parameter some; of nothing else."""
    model, inputs = B.llava(text="qwen2"), B.prompts([[4, 9], [7, 2, 6]])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    for p in model.parameters():
        p.requires_grad_(False)
    target = labels[:, -4:]

    def loss() -> Tensor:
        """In float64; the model's own is float32."""
        logits = model(**inputs, labels=labels, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, -5:-1].flatten(0, 1), target.flatten())

    with vtprune.attach(model, NAME, **how) as handle:
        module = shaken(handle).double()
        with torch.no_grad():
            plain = loss()
        assert not loss().requires_grad
        module.requires_grad_(True)
        value = loss()
        torch.testing.assert_close(value.detach(), plain)
        value.backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and bool((p.grad != 0).any()), name
            at = int(p.grad.abs().argmax())
            found = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[at] += step
                    found.append(float(loss()))
                    p.view(-1)[at] -= step
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(p.grad.view(-1)[at]), rel=1e-3, abs=1e-8), name
    assert all(p.grad is None for p in model.parameters())


def test_text_embeddings_get_no_gradient_by_way_of_the_layers() -> None:
    """Those of answers do, by the model's own; those that were fused, and pixels' by both ways, as the code has it."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    for p in model.parameters():
        p.requires_grad_(False)
    table = model.get_input_embeddings().weight.requires_grad_(True)
    with vtprune.attach(model, NAME, grid=1, fusion=1):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    ids = inputs["input_ids"][0]
    spoken = set(ids[-4:-1].tolist())
    assert {int(i) for i in ids if i != B.IMAGE and bool(table.grad[i].any())} == spoken


def test_gradient_checkpointing_is_refused_where_it_is_trained() -> None:
    model, inputs = B.llava(), B.prompts([[4, 9]])
    model.train()
    model.gradient_checkpointing_enable()
    with vtprune.attach(model, NAME, grid=2, fusion=1) as handle:
        handle.modules[NAME].requires_grad_(True)
        with pytest.raises(UnsupportedError, match="being trained"):
            model(**inputs, use_cache=False).logits.sum().backward()


# ------------------------------------------------------------------------------------------------------- refusals


def test_trained_parts_are_read_and_others_refused(tmp_path) -> None:
    model, inputs = B.llava(), B.prompts([[4, 9]])
    path, how = str(tmp_path / "mini.safetensors"), {"grid": 2, "fusion": 1}
    with vtprune.attach(model, NAME, **how) as handle:
        state = {k: v.clone() for k, v in shaken(handle).state_dict().items()}
        want = B.final(model, inputs)[0]
    told = {"grid": "2", "fusion": "1", "pe": "grid", "scaled": "False", "numbering": "original"}
    save_file(state, path, told)
    with vtprune.attach(model, NAME, **how, weights=path, init="random"):
        assert torch.equal(B.final(model, inputs)[0], want)
    for other, says in (
        ({"grid": 1}, "grid=2, this is grid=1"),
        ({"fusion": 2}, "fusion=1, this is fusion=2"),
        ({"pe": "upsampled"}, "pe=grid, this is pe=upsampled"),
        ({"scaled": True}, "scaled=False, this is scaled=True"),
        ({"numbering": "running"}, "numbering=original, this is numbering=running"),
    ):
        with pytest.raises(VtpruneError, match=says):
            vtprune.attach(model, NAME, **{**how, **other}, weights=path)
    save_file(state, path)
    with pytest.raises(VtpruneError, match="does not tell for which grid"):
        vtprune.attach(model, NAME, **how, weights=path)
    save_file(state, path, {**told, "grid": "1"})
    with pytest.raises(VtpruneError, match="does not fit 1 x 1 queries and 1 layers of this model"):
        vtprune.attach(model, NAME, grid=1, fusion=1, weights=path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grid": 7}, "grid=7 makes 49 tokens of images that have 36"),
        ({"grid": 0}, "grid=0 must be at least 1"),
        ({"fusion": 7}, "fusion=7 is more than the 6 layers"),
        ({"fusion": -1}, "must be at least 0"),
        ({"pe": "none"}, "pe='none' is not one of"),
        ({"numbering": "compact"}, "numbering='compact' is not one of"),
        ({"init": "zeros"}, "init='zeros' is not one of"),
        ({"keep": 4}, "takes no keep="),
        ({"flops": 0.2}, "it meets no budget"),
        ({"effective_tokens": 0.5}, "it meets no budget"),
        ({"per": "prompt"}, "image plane"),
        ({"shelve": True, "fusion": 1}, "shelve=True"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(VtpruneError, match=says) as error:
        vtprune.attach(B.llava(), NAME, **options)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_refused(tiny) -> None:
    model, _ = tiny("qwen2-vl", "images")
    with pytest.raises(UnsupportedError, match="counting them anew does not define"):
        vtprune.attach(model, NAME, fusion=1, numbering="running")
    model, _ = tiny("qwen3-vl", "images")
    with pytest.raises(UnsupportedError, match="DeepStack"):
        vtprune.attach(model, NAME, fusion=1)
    model = B.llava()
    stages = (Stage(method="divprune", keep=9), Stage(method=NAME, options={"fusion": 1}))
    with pytest.raises(VtpruneError, match="needs the whole raster"):
        vtprune.attach(model, Recipe(name="two", stages=stages))
    ids = torch.tensor([[4, *[B.IMAGE] * 36, 5, 6, 7, *[B.IMAGE] * 36, 8, 9]])
    where = torch.tensor([[*range(39), *range(39)]])
    with vtprune.attach(model, NAME, fusion=1), pytest.raises(UnsupportedError, match="packed into one row"):
        model(input_ids=ids, position_ids=where, pixel_values=B.images(2), use_cache=False)
    ends = {"input_ids": torch.tensor([[4, 5, *[B.IMAGE] * 36]]), "pixel_values": B.images(1)}
    with vtprune.attach(model, NAME, fusion=1), pytest.raises(UnsupportedError, match="ends with an image token"):
        model(**ends)


def test_it_may_be_followed() -> None:
    """By a stage that drops some of its tokens."""
    model, inputs = B.llava(), B.prompts(SHAPES)
    stages = (Stage(method=NAME, options={"grid": 3, "fusion": 1}), Stage(method="fastv", keep=4, options={"layer": 2}))
    with vtprune.attach(model, Recipe(name="two", stages=stages)) as handle:
        B.final(model, inputs)
        report = handle.report()
    assert report.layer_tokens[0] == [9, 9, 4, 4, 4, 4] and report.layer_tokens[1] == [18, 18, 8, 8, 8, 8]


def test_copies_are_in_the_models_mode():
    """A model that was put into evaluation mode since answers without dropout."""
    model, inputs = testing.tiny("llava")
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with vtprune.attach(model, "llava-mini", grid=2, fusion=2), torch.no_grad():
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_part_in_training_is_not_cast():
    model, inputs = testing.tiny("llava")
    model = model.to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with vtprune.attach(model, "llava-mini", grid=2, fusion=1) as handle:
        handle.modules["llava-mini"].float().requires_grad_(True)
        with pytest.raises(UnsupportedError, match="train it under autocast"):
            model(**inputs, use_cache=False)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs, use_cache=False)
        assert all(p.dtype == torch.float32 for p in handle.modules["llava-mini"].parameters())
