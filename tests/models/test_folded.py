"""Stages in towers behind which squares of patches become one token (2 x 2 mergers, pixel shuffle, pooling), also in
those that see images of several sizes one behind the other."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from test_overhead import Operators
from torch.utils.flop_counter import FlopCounterMode
from vtprune.models.base import ADAPTERS
from vtprune.models.engine.host import checkpointed
from vtprune.models.parts.tiny import tiny_prompts

import moulds
import oracles
import vtprune
from vtprune.check.verify import check
from vtprune.core.planning import bind
from vtprune.core.types import UnsupportedError

PACKED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "glm4v", "mistral3")
FAMILIES = ("internvl", "gemma3", "smolvlm", *PACKED)
PAIRS = [(f, v) for f in FAMILIES for v in ADAPTERS.get(f).tiny]
CUTS: dict[str, dict[str, Any]] = {
    "random": {"keep": 0.4, "site": "vision.0"},  # blocks run on what is left
    "flowcut": {"keep": 0.5},
    "hiprune": {"keep": 0.5, "site": "tower"},  # notes of one block, decided behind another
}
MERGES: dict[str, dict[str, Any]] = {
    **{name: {"keep": 0.6} for name in ("tome", "pitome", "turbo", "vomix")},
    "visionzip": {"keep": 0.6, "site": "tower"},
}


def by_turns(choices: Any, pairs: list[tuple[str, str]]) -> list[Any]:
    """(family, variant, choice): each variant meets one of the choices in every run, all of them in the slow one."""
    names = list(choices)
    return [
        pytest.param(
            *pair, name, marks=() if (i + j) % len(names) == 0 else pytest.mark.slow, id=f"{'-'.join(pair)}-{name}"
        )
        for i, pair in enumerate(pairs)
        for j, name in enumerate(names)
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "variant", "method"), by_turns(CUTS, PAIRS))
def test_pruned_is_masked_dense(family, variant, method, tiny):
    """Batches of several sizes, single samples, videos: prefill and cached decoding equal the dense model with the
    dropped squares hidden; a full budget equals the dense model."""
    model, inputs = tiny(family, variant)
    names = ("prefill_is_masked_dense", "decode_is_masked_dense", "batch_is_singles", "full_budget", "counts_are_true")
    for name in names:
        result = check(name, model, method, inputs, **CUTS[method])
        assert result.passed, f"{name}: {result.detail}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "variant", "method"), by_turns(MERGES, PAIRS))
def test_merges_do_not_depend_on_the_batch(family, variant, method, tiny):
    model, inputs = tiny(family, variant)
    options = MERGES[method]
    try:
        with vtprune.attach(model, method, **options), torch.no_grad():
            model(**inputs)
    except UnsupportedError as e:
        assert "pixel_attention_mask" in str(e) and family == "smolvlm" and variant != "whole"
        return
    for name in ("batch_is_singles", "full_budget", "counts_are_true", "cached_is_uncached", "restored"):
        result = check(name, model, method, inputs, **options)
        assert result.passed, f"{name}: {result.detail}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "variant", "site"), by_turns(("vision.0", "vision.1"), [p for p in PAIRS if p[0] != "mistral3"])
)
def test_flops_of_the_tower_equal_the_counter(family, variant, site, tiny):
    """Tower and projector; windows that lost tokens too. (Pixtral's masks in each image what all of them cost.)"""
    model, inputs = tiny(family, variant)
    model.set_attn_implementation("eager")
    adapter = bind(model)
    with vtprune.attach(model, "random", keep=0.3, site=site) as handle, torch.no_grad():
        with FlopCounterMode(display=False, depth=99) as counter:
            model(**inputs)
        _, spent = handle._accounts._vision(handle._last[1])
    counts, root = counter.get_flop_counts(), type(model).__name__
    name = next(n for n, m in model.named_modules() if m is adapter.lm)
    behind = sum(sum(counts.get(f"{root}.{n}", {}).values()) for n in (name, "lm_head"))
    assert spent == pytest.approx(sum(counts["Global"].values()) - behind, rel=1e-3)


# ------------------------------------------------------------------------------------------------- by hand


def squares(h: int, w: int, fold: int = 2) -> list[list[tuple[int, int]]]:
    """The patches (row, column) of every visual token, in raster order."""
    return [
        [(r * fold + i, c * fold + j) for i in range(fold) for j in range(fold)]
        for r in range(h // fold)
        for c in range(w // fold)
    ]


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: list[float]) -> torch.Tensor:
    """Attention of patches ``[n, H, d]`` one by one, each key counted as often as its token has ``size`` (four patches
    a token): ``[n, H d]``."""
    out, weight = torch.empty_like(q), torch.tensor(size, dtype=q.dtype).repeat_interleave(4).log()
    for h in range(q.shape[1]):
        for i in range(len(q)):
            logits = (k[:, h] @ q[i, h]) * q.shape[-1] ** -0.5 + weight
            out[i, h] = logits.softmax(0) @ v[:, h]
    return out.flatten(1)


def qwen(block: Any, x: torch.Tensor, angle: torch.Tensor, size: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of a block of Qwen2-VL on patches ``x`` ``[n, C]``, and their keys."""
    q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.num_heads, -1).unbind(1)

    def turned(t: torch.Tensor) -> torch.Tensor:
        first, second = t.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    q, k = turned(q), turned(k)
    return x + block.attn.proj(attended(q, k, v, size)), k


def siglip(block: Any, x: torch.Tensor, angle: torch.Tensor, size: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of a block of Gemma 3's tower, likewise."""
    a, z = block.self_attn, block.layer_norm1(x)
    q, k, v = (m(z).view(len(x), -1, a.head_dim) for m in (a.q_proj, a.k_proj, a.v_proj))
    return x + a.out_proj(attended(q, k, v, size)), k


@torch.no_grad()
def tome_by_hand(x: torch.Tensor, angle: torch.Tensor, halves: list[tuple[Any, Any]], r: int) -> tuple[Any, list]:
    """ToMe (arXiv 2210.09461) on squares ``x`` ``[n, 4, C]`` of patches: the keys of a square are the mean of its
    patches', squares merge patch by patch with their sizes as weights, attention is proportional. What is left ``[n',
    4, C]``, and the squares that each holds."""
    size, slots, order = [1.0] * len(x), [[i] for i in range(len(x))], list(range(len(x)))
    for first, second in halves:
        rows, keys = first(x.flatten(0, 1), angle.flatten(0, 1), size)
        metric = keys.view(len(x), 4, *keys.shape[1:]).mean((1, 2))
        found = oracles.tome_match_oracle(metric[order][None], r, class_token=False, distill_token=False)
        x = rows.view(len(x), 4, -1)
        total = [s * x[i] for i, s in enumerate(size)]
        for a, b in found["merges"][0]:
            a, b = order[a], order[b]
            total[b], size[b], slots[b] = total[b] + size[a] * x[a], size[b] + size[a], slots[b] + slots[a]
        left = [order[i] for i in found["kept_official"][0]]
        stay = sorted(left)
        x = torch.stack([total[i] / size[i] for i in stay])
        angle, size, slots = angle[stay], [size[i] for i in stay], [slots[i] for i in stay]
        order = [stay.index(i) for i in left]
        x = second(x)
    return x, [sorted(slot) for slot in slots]


def seen_by(module: torch.nn.Module, model: Any, inputs: dict[str, Any], r: int) -> tuple[list, torch.Tensor]:
    """The tower's passes under ToMe, and what ``module`` behind it is given."""
    given: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    with vtprune.attach(model, "tome", keep=None, r=r) as handle, torch.no_grad():
        model(**inputs)
        passes = handle.passes
    hook.remove()
    return passes, given[0]


def doubled(family: str, variant: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = moulds.tiny(family, variant)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def compared(run: Any, g: int, got: torch.Tensor, want: torch.Tensor, slots: list) -> None:
    """``got`` ``[N, 4, C]``: the whole raster, zeros for what is gone."""
    record = run.records[-1]
    assigned, kept = record.assignment[g].tolist()[: len(got)], record.kept[g].tolist()
    assert [[i for i, s in enumerate(assigned) if s == slot] for slot in range(len(kept))] == slots
    assert torch.allclose(got[kept], want, atol=1e-9)
    assert bool((got[[i for i in range(len(got)) if i not in kept]] == 0).all())


def test_tome_over_squares_in_a_packed_tower_equals_a_slow_transcription():
    """Qwen2-VL, image by image, with rotary positions of those that absorb others."""
    model, inputs = doubled("qwen2-vl", "images")
    tower, r = model.model.visual, 2
    passes, behind = seen_by(tower.merger, model, inputs, r)
    with torch.no_grad():
        patches = tower.patch_embed(inputs["pixel_values"])
    halves = [(partial(qwen, b), lambda x, b=b: x + b.mlp(b.norm2(x))) for b in tower.blocks]
    start, inverse = 0, tower.rotary_pos_emb.inv_freq.double()
    for (run, g), (_, h, w) in zip(passes, inputs["image_grid_thw"].tolist(), strict=True):
        where = torch.tensor(squares(h, w), dtype=torch.float64)
        angle = (where[..., None] * inverse).flatten(2)  # rows, then columns
        here = slice(start, start := start + h * w)  # rows of a square stand together
        left, slots = tome_by_hand(patches[here].view(-1, 4, patches.shape[1]), angle, halves, r)
        assert len(left) == h * w // 4 - 3 * r
        compared(run, g, behind[here].view(-1, 4, patches.shape[1]), left, slots)


def test_tome_over_squares_in_a_fixed_tower_equals_a_slow_transcription():
    """Gemma 3, whose patches stand in the order of the raster."""
    model, inputs = doubled("gemma3", "sliding")
    tower, r = model.model.vision_tower, 3
    tower = getattr(tower, "vision_model", tower)
    passes, behind = seen_by(tower.post_layernorm, model, inputs, r)
    with torch.no_grad():
        patches = tower.embeddings(inputs["pixel_values"])
    halves = [(partial(siglip, b), lambda x, b=b: x + b.mlp(b.layer_norm2(x))) for b in tower.encoder.layers]
    place = torch.tensor([[r * 8 + c for r, c in square] for square in squares(8, 8)])
    for run, g in passes:
        left, slots = tome_by_hand(patches[g][place], torch.zeros(16, 4, 1), halves, r)
        compared(run, g, behind[g][place], left, slots)


@pytest.mark.parametrize("family", ["qwen2-vl", "gemma3"])
def test_sizes_count_in_the_attention_wherever_the_merge_falls(family):
    """PiToMe's form for CLIP towers merges behind a block, not inside it."""
    model, inputs = moulds.tiny(family, next(iter(ADAPTERS.get(family).tiny)))
    logits = []
    for proportional in (False, True):
        with (
            vtprune.attach(model, "pitome", keep=0.5, variant="hf-clip", proportional=proportional),
            torch.no_grad(),
        ):
            logits.append(model(**inputs).logits)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-4


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "variant"), PAIRS)
def test_scores_of_squares_are_those_that_notes_have(family, variant, tiny):
    """Attention received within windows and rasters, of padded batches too: what HiPrune keeps behind the last block is
    what it keeps behind the projector by the notes of single patches."""
    model, inputs = tiny(family, variant)
    kept = []
    for site in ("tower", "projector"):
        with vtprune.attach(model, "hiprune", keep=0.5, site=site) as handle, torch.no_grad():
            model(**inputs)
            kept.append(handle.report().stages[-1].kept)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_notes_of_images_of_several_sizes_are_their_own(tiny):
    """EvoCut follows each image through the blocks: what it noted in one is found again in the next."""
    model, inputs = tiny("mistral3", "pixtral")
    result = check("batch_is_singles", model, "evocut", inputs, keep=0.5)
    assert result.passed, result.detail


# ------------------------------------------------------------------------------------------------- what it costs


def film(family: str, frames: int) -> tuple[Any, dict[str, Any]]:
    """A video of ``frames`` steps in time of 2 x 2 tokens."""
    model, _ = moulds.tiny(family, "video")
    spans = [(4, 4)] * frames if family.startswith("qwen3") else [(4, 4 * frames)]
    inputs: dict[str, Any] = dict(tiny_prompts([spans], opening=5))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 3).int() + 2 * (inputs["input_ids"] == 4).int()
    inputs["video_grid_thw"] = torch.tensor([[frames, 4, 4]])
    inputs["pixel_values_videos"] = torch.randn(frames * 16, 96, generator=torch.Generator().manual_seed(1))
    return model, inputs


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize(("method", "options"), [("random", {"site": "vision.0"}), ("flowcut", {})])
def test_operators_and_host_reads_do_not_grow_with_the_frames(family, method, options):
    added = []
    for frames in (8, 256):
        model, inputs = film(family, frames)
        with torch.no_grad(), Operators() as dense:
            model(**inputs)
        with vtprune.attach(model, method, keep=2, **options), torch.no_grad():
            model(**inputs)  # tables of this shape
            with Operators() as pruned:
                model(**inputs)
        added.append((sum(pruned.seen.values()) - sum(dense.seen.values()), pruned.reads - dense.reads))
    assert added[0] == added[1] and added[0][1] <= 10


# ------------------------------------------------------------------------------------------------- what is refused


def test_patches_that_become_no_token_are_refused():
    """Five rows of patches: the fifth is seen in the tower and becomes nothing behind it."""
    model, inputs = moulds.tiny("mistral3", "sliding")
    inputs["image_sizes"] = inputs["image_sizes"].clone()
    inputs["image_sizes"][0, 0] += 4
    with (
        vtprune.attach(model, "random", keep=0.5, site="vision.0"),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="leaves some that become no visual token"),
    ):
        model(**inputs)


@pytest.mark.parametrize(("method", "options"), [("random", {"site": "vision.0"}), ("tome", {})])
def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused(method, options):
    """Releases whose checkpoints run a block's hooks again in the backward pass cannot drop there again."""
    grads = []
    for checkpoints in (False, True):
        model, inputs = moulds.tiny("qwen2-vl", "images")
        model = copy.deepcopy(model).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        again = checkpoints and checkpointed(model.model.visual.blocks[0])
        with vtprune.attach(model, method, keep=0.5, **options):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            if again:
                with pytest.raises(UnsupportedError, match="gradient checkpointing runs blocks of this tower again"):
                    loss.backward()
                return
            loss.backward()
        grads.append([p.grad for p in model.model.visual.parameters() if p.grad is not None])
    assert len(grads[0]) > 10 and all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*grads, strict=True))


def test_gradients_flow_through_what_is_left():
    model, inputs = moulds.tiny("qwen2.5-vl", "images")
    inputs["pixel_values"].requires_grad_()
    with vtprune.attach(model, "random", keep=0.5, site="vision.0") as handle:
        model(**inputs).logits.square().mean().backward()
        kept = handle.report().stages[-1].kept
    grads = inputs["pixel_values"].grad.abs().sum(1)
    assert bool((grads > 0).all())  # a dropped square is seen by block 0
    assert sum(map(len, kept)) < len(grads) // 4


def test_windows_without_tokens_are_left_out():
    """Of 4 x 4 windows most lose all that they hold."""
    model, inputs = moulds.tiny("qwen2.5-vl", "images")
    for name in ("prefill_is_masked_dense", "batch_is_singles"):
        result = check(name, model, "random", inputs, keep=1, site="vision.0")
        assert result.passed, result.detail
    for name in ("prefill_is_masked_dense", "batch_is_singles"):
        result = check(name, model, "random", inputs, keep=1, site="vision.0", seed=3)
        assert result.passed, result.detail


def test_hidden_patches_are_seen_by_none_but_themselves():
    """Of a tile whose lower half is masked, before and behind a cut: when it changes, no token of the upper half
    does."""
    model, inputs = moulds.tiny("smolvlm", "smolvlm")
    other = inputs["pixel_values"].clone()
    other[1, 0, :, 16:] += 1.0
    seen = []
    with vtprune.attach(model, "random", keep=0.5, site="vision.0") as handle, torch.no_grad():
        kept = None
        for pixels in (inputs["pixel_values"], other):
            rows: list[torch.Tensor] = []
            hook = model.model.connector.register_forward_hook(lambda m, a, out, rows=rows: rows.append(out))
            model(**{**inputs, "pixel_values": pixels})
            hook.remove()
            kept = handle.report().stages[-1].kept[1]
            seen.append(rows[0][-1])  # the last tile's, [16, C]
    upper, lower = kept[kept < 8], kept[kept >= 8]
    assert len(upper) and len(lower)
    assert torch.equal(seen[0][upper], seen[1][upper]) and not torch.equal(seen[0][lower], seen[1][lower])
