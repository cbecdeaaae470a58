"""Sanity tests of the oracles themselves: published token counts, agreement with the unmodified models, and properties
the equations imply."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
)

import oracles as O

# --------------------------------------------------------------------------------------------------------------------
# models


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.3) -> torch.nn.Module:
    """Double precision, eval, every parameter random (norm weights around 1) so that no two scores are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            is_norm_weight = parameter.dim() == 1 and bool((parameter == 1).all())
            parameter.copy_(noise + 1 if is_norm_weight else noise)
    return model


def random_images(batch: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_clip(layers: int = 6, implementation: str = "sdpa") -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config._attn_implementation = implementation
    return randomise(CLIPVisionModel(config), 1)


def make_dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=32, mlp_ratio=2, num_hidden_layers=5, num_attention_heads=4, image_size=32, patch_size=8
    )
    return randomise(Dinov2Model(config), 2)


def make_vit(cls: type = VisionTransformer, seed: int = 3, **kwargs) -> VisionTransformer:
    return randomise(cls(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, **kwargs), seed)


LM_COMMON = dict(vocab_size=11, hidden_size=32, intermediate_size=48, num_hidden_layers=5, max_position_embeddings=64)


def make_lm(kind: str, implementation: str = "sdpa") -> torch.nn.Module:
    if kind == "llama":
        config, cls = LlamaConfig(**LM_COMMON, num_attention_heads=4, num_key_value_heads=4), LlamaModel
    elif kind == "mistral":
        config, cls = MistralConfig(**LM_COMMON, num_attention_heads=4, num_key_value_heads=2), MistralModel
    else:
        config, cls = Qwen2Config(**LM_COMMON, num_attention_heads=4, num_key_value_heads=2), Qwen2Model
    config._attn_implementation = implementation
    return randomise(cls(config), 4)


def lm_inputs(n: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, n, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGE = torch.arange(3, 16)  # 13 image tokens
TEXT = [p for p in range(24) if p not in range(3, 16)]


def run_slice(
    lm: torch.nn.Module, start: int, stop: int, x: torch.Tensor, position_ids: torch.Tensor, final_norm: bool = False
) -> torch.Tensor:
    """The unmodified model restricted to layers start..stop-1 on x [1, n, D].

    The all-ones mask matters: without a mask the model takes gaps in position_ids for packed sequences and masks across
    them.
    """
    part = copy.deepcopy(lm)
    part.layers = part.layers[start:stop]
    part.config.num_hidden_layers = stop - start
    if not final_norm:
        part.norm = torch.nn.Identity()
    with torch.no_grad():
        return part(
            inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), position_ids=position_ids, use_cache=False
        ).last_hidden_state


# --------------------------------------------------------------------------------------------------------------------
# FlowCut


@pytest.mark.parametrize(
    "ratio, target, expected",
    [
        (0.95, 64, [565, 553, 541, 529, 516, 502, 487, 470, 450, 423, 64]),
        (0.90, 192, [560, 544, 527, 510, 493, 475, 456, 436, 413, 383, 192]),
        (0.80, 64, [535, 495, 456, 418, 381, 345, 309, 273, 235, 191, 64]),
        (1.00, 64, [576] * 10 + [64]),
    ],
)
def test_flowcut_schedule(ratio: float, target: int, expected: list[int]) -> None:
    assert O.flowcut_schedule(576, 24, target, ratio) == expected


def test_flowcut_entropy() -> None:
    assert O.flowcut_entropy_ratio([0.2] * 7) == pytest.approx(1.0)
    assert O.flowcut_entropy_ratio([0.0, 0.0, 3.0]) == 0.0  # 0 ln 0 := 0


def test_flowcut_scores_against_the_attention_maps_of_the_model() -> None:
    tower = make_clip(implementation="eager")
    images = random_images(2)
    with torch.no_grad():
        output = tower(images, output_attentions=True, output_hidden_states=True)
        for layer in range(3):
            block = tower.encoder.layers[layer]
            x = output.hidden_states[layer]
            v = block.self_attn.v_proj(block.layer_norm1(x)).view(2, 17, 4, 8).transpose(1, 2)
            a = output.attentions[layer][:, :, 0].mean(1)[:, 1:]
            s = torch.einsum("bhd,bhnd->bhn", v[:, :, 0], v).softmax(-1).mean(1)[:, 1:]
            expected = (a / a.sum(1, keepdim=True) + s / s.sum(1, keepdim=True)) * v.mean(1).abs().sum(-1)[:, 1:]
            for b in range(2):
                a_row, score = O.flowcut_layer_scores(x[b], block.layer_norm1, block.self_attn, 4)
                torch.testing.assert_close(torch.tensor(a_row, dtype=torch.float64), a[b], rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(torch.tensor(score, dtype=torch.float64), expected[b], rtol=1e-5, atol=1e-7)


def batched_flowcut(
    tower: CLIPVisionModel, images: torch.Tensor, target: int, select: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The whole method with batched tensors (CLIP, coupled batch): kept indices per layer [B, n] and the output of
    block ``select``."""
    x = tower.pre_layrnorm(tower.embeddings(images))
    index = torch.arange(x.shape[1] - 1).expand(len(images), -1)
    cumulative, kept = None, []
    for layer, block in enumerate(tower.encoder.layers[: select + 1]):
        z, n, rho = block.layer_norm1(x), index.shape[1], select - 1 - layer
        q, k, v = (
            project(z).unflatten(-1, (4, -1)).transpose(1, 2)
            for project in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        a = (torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 1:]
        s = torch.einsum("bhd,bhnd->bhn", v[:, :, 0], v).softmax(-1).mean(1)[:, 1:]
        score = (F.normalize(a, p=1, dim=-1) + F.normalize(s, p=1, dim=-1)) * v.mean(1)[:, 1:].norm(p=1, dim=-1)
        x = block(x, None)
        if n > target:
            cumulative = score if cumulative is None else (cumulative + score) / 2
            if rho >= 0 and rho % 2 == 0:
                ratio = (
                    torch.distributions.Categorical(probs=a).entropy()
                    / torch.tensor(float(n), dtype=torch.float64).log()
                )
                count = (
                    target
                    if rho == 0
                    else max(target, n - int(((n - target) / rho**0.5 * (1 - ratio**2)).max().round()))
                )
                top = cumulative.topk(count).indices.sort().values
                cumulative, index = cumulative.gather(1, top), index.gather(1, top)
                x = torch.cat([x[:, :1], x[:, 1:].gather(1, top[..., None].expand(-1, -1, x.shape[-1]))], 1)
        kept.append(index)
    return kept, x


@pytest.mark.parametrize("layers", [6, 7, 8])
def test_flowcut_against_batched_tensors(layers: int) -> None:
    tower, images = make_clip(layers), random_images(3, seed=layers)
    result = O.flowcut_oracle(tower, images, 3, layers - 2)
    with torch.no_grad():
        kept, hidden = batched_flowcut(tower, images, 3, layers - 2)
    for ours, theirs in zip(result["kept"], kept, strict=True):
        assert [row.tolist() for row in ours] == theirs.tolist()
    torch.testing.assert_close(result["hidden"], hidden)
    assert len({len(rows[0]) for rows in result["kept"]}) > 2  # the adaptive cuts remove something too


@pytest.mark.parametrize("make, layers", [(make_clip, 6), (make_dinov2, 5)])
def test_flowcut_runs(make, layers: int) -> None:
    tower = make()
    images = random_images(3)
    select = layers - 2
    with torch.no_grad():
        reference = tower(images, output_hidden_states=True).hidden_states[select + 1]
    noop = O.flowcut_oracle(tower, images, 16, select)
    torch.testing.assert_close(noop["hidden"], reference)

    coupled = O.flowcut_oracle(tower, images, 5, select)
    alone = O.flowcut_oracle(tower, images, 5, select, batch_max=False)
    for result in (coupled, alone):
        assert result["hidden"].shape == (3, 6, 32)
        assert len(result["kept"]) == select + 1
        previous = [set(range(16))] * 3
        for layer, kept in enumerate(result["kept"]):
            rho = select - 1 - layer
            for b in range(3):
                assert kept[b].tolist() == sorted(set(kept[b].tolist())) and set(kept[b].tolist()) <= previous[b]
                if rho < 0 or rho % 2 == 1:
                    assert set(kept[b].tolist()) == previous[b]
            previous = [set(kept[b].tolist()) for b in range(3)]
        assert all(len(kept) == 5 for kept in result["kept"][-1])
    lengths = [[len(kept[b]) for kept in alone["kept"]] for b in range(3)]
    for b in range(3):
        single = O.flowcut_oracle(tower, images[b : b + 1], 5, select)
        assert [kept[0].tolist() for kept in single["kept"]] == [kept[b].tolist() for kept in alone["kept"]]
        torch.testing.assert_close(single["hidden"][0], alone["hidden"][b])
    first = next(layer for layer in range(select) if (select - 1 - layer) % 2 == 0)
    assert len(coupled["kept"][first][0]) == min(row[first] for row in lengths)  # the batch uses the largest P


# -------------------------------------------------------------------------------------------------------------------
# PyramidDrop and FastV


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_language_model_oracles_without_pruning_equal_the_model(kind: str) -> None:
    lm, x = make_lm(kind), lm_inputs()
    with torch.no_grad():
        reference = lm(inputs_embeds=x).last_hidden_state
    none = O.pyramiddrop_oracle(lm, x, None, IMAGE, [], [], [23])
    full = O.pyramiddrop_oracle(lm, x, torch.ones(1, 24), IMAGE, [2], [1.0], [23])
    no_query = O.pyramiddrop_oracle(lm, x, None, IMAGE, [2], [0.5], [])
    fastv = O.fastv_oracle(lm, x, IMAGE, 2, 13)
    for result in (none, full, no_query, fastv):
        torch.testing.assert_close(result["hidden"], reference)
    assert full["kept"][0].tolist() == fastv["kept"][0].tolist() == IMAGE.tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_first_cut_ranks_by_the_attention_map_of_the_model(kind: str) -> None:
    lm, x = make_lm(kind, "eager"), lm_inputs(seed=1)
    with torch.no_grad():
        attentions = lm(inputs_embeds=x, output_attentions=True).attentions
    for queries in ([23], [17, 19, 23]):
        score = attentions[3][0].mean(0)[queries].mean(0)[IMAGE]
        expected = IMAGE[score.topk(6).indices].sort().values
        assert O.pyramiddrop_oracle(lm, x, None, IMAGE, [3], [0.5], queries)["kept"][0].tolist() == expected.tolist()
    expected = IMAGE[attentions[1][0].mean(0)[-1][IMAGE].topk(4).indices].sort().values
    assert O.fastv_oracle(lm, x, IMAGE, 2, 4)["kept"][0].tolist() == expected.tolist()


@pytest.mark.parametrize("renumber", [False, True])
def test_pyramiddrop_stages(renumber: bool) -> None:
    lm, x = make_lm("qwen2"), lm_inputs(seed=2)
    result = O.pyramiddrop_oracle(lm, x, None, IMAGE, [1, 2, 4], [0.5, 0.25, 0.125], [23], renumber=renumber)
    assert [len(kept) for kept in result["kept"]] == [6, 3, 1]  # int(13 * ratio), of the original count
    assert result["hidden"].shape == (1, 12, 32)
    for before, after in zip(result["kept"][:-1], result["kept"][1:], strict=True):
        assert set(after.tolist()) <= set(before.tolist())
    # the same chain from slices of the unmodified model
    alive, position_ids, start = torch.arange(24), torch.arange(24)[None], 0
    for layer, kept in zip([1, 2, 4], result["kept"], strict=True):
        x = run_slice(lm, start, layer, x, position_ids)
        rows = torch.tensor([i for i, p in enumerate(alive.tolist()) if p in TEXT or p in kept.tolist()])
        alive, x = alive[rows], x[:, rows]
        position_ids = torch.arange(len(rows))[None] if renumber else position_ids[:, rows]
        start = layer
    torch.testing.assert_close(result["hidden"], run_slice(lm, 4, 5, x, position_ids, final_norm=True))


def test_fastv_equals_masking_the_dropped_keys() -> None:
    lm, x = make_lm("mistral"), lm_inputs(seed=3)
    result = O.fastv_oracle(lm, x, IMAGE, 2, 5)
    kept = result["kept"][0].tolist()
    rows = [p for p in range(24) if p in TEXT or p in kept]
    hidden = run_slice(lm, 0, 2, x, torch.arange(24)[None])
    mask = torch.full((24, 24), -torch.inf, dtype=torch.float64).triu(1)
    dropped = [p for p in range(24) if p not in rows]
    mask[:, dropped] = -torch.inf
    mask[dropped, dropped] = 0.0  # a dropped row attends to itself only, nobody reads it
    part = copy.deepcopy(lm)
    with torch.no_grad():
        ids = torch.arange(24)[None]
        for layer in part.layers[2:]:
            hidden = layer(
                hidden,
                attention_mask=mask[None, None],
                position_ids=ids,
                position_embeddings=part.rotary_emb(hidden, ids),
            )
        expected = part.norm(hidden)[:, rows]
    torch.testing.assert_close(result["hidden"], expected)


# --------------------------------------------------------------------------------------------------------------------
# ToMe


def test_tome_counts() -> None:
    assert O.tome_counts(197, [13] * 12) == [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]
    assert O.tome_counts(197, [16] * 12) == [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]  # capped
    assert O.tome_counts(197, [8] * 24)[-1] == 7
    assert O.tome_counts(257, [7] * 32)[-1] == 33
    assert O.tome_r_schedule(12, (13, -1)) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]


def test_tome_match_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 12.0, 50.0, 49.0, 80.0, 45.0], dtype=torch.float64).deg2rad()
    metric = (
        torch.stack([angles.cos(), angles.sin()], -1)[None]
        * torch.tensor([1.0, 2.0, 3.0, 1.0, 5.0, 1.0, 2.0], dtype=torch.float64)[None, :, None]
    )
    plain = O.tome_match_oracle(metric, 2, False, False)  # gaps: 0-1 10, 2-1 2, 4-3 1, 6-3 5 degrees
    assert (
        plain["merges"] == [[(4, 3), (2, 1)]]
        and plain["kept"] == [[0, 1, 3, 5, 6]]
        and plain["kept_official"] == [[6, 0, 1, 3, 5]]
    )
    cls = O.tome_match_oracle(metric, 5, True, False)
    assert cls["r"] == 3 and cls["merges"] == [[(4, 3), (2, 1), (6, 3)]] and cls["kept_official"] == [[0, 1, 3, 5]]
    distilled = O.tome_match_oracle(metric, 5, True, True)
    assert (
        distilled["r"] == 2
        and distilled["merges"] == [[(4, 3), (6, 3)]]
        and distilled["kept_official"] == [[0, 1, 2, 3, 5]]
    )
    assert O.tome_match_oracle(metric, 0, True, False)["kept_official"] == [list(range(7))]


def vectorised_tome(metric: torch.Tensor, r: int, prefix: int) -> list[set[tuple[int, int]]]:
    """The same matching with matrices."""
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    position = torch.arange(metric.shape[1])
    scores[:, position[::2] < prefix] = -torch.inf
    scores[:, :, position[1::2] < prefix] = -torch.inf
    value, partner = scores.max(-1)
    sources = value.topk(r, -1).indices
    return [{(2 * int(a), 2 * int(partner[b, a]) + 1) for a in sources[b]} for b in range(len(metric))]


@pytest.mark.parametrize(
    "n, flags", [(16, (False, False)), (17, (True, False)), (18, (True, True)), (19, (True, True))]
)
def test_tome_match_against_matrices(n: int, flags: tuple[bool, bool]) -> None:
    metric = torch.randn(3, n, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    result = O.tome_match_oracle(metric, 5, *flags)
    assert [set(merges) for merges in result["merges"]] == vectorised_tome(metric, 5, sum(flags))
    for merges, kept in zip(result["merges"], result["kept"], strict=True):
        sources = [a for a, _ in merges]
        assert sorted(sources + kept) == list(range(n)) and not set(sources) & {b for _, b in merges}


VITS = {
    "plain": dict(),
    "layer_scale": dict(init_values=0.5),
    "registers": dict(init_values=0.5, reg_tokens=4, qk_norm=True),
    "no_cls": dict(class_token=False, global_pool="avg", fc_norm=False),
    "distilled": dict(cls=VisionTransformerDistilled),
    "pre_norm": dict(pre_norm=True, no_embed_class=True),
}


@pytest.mark.parametrize("name", VITS)
def test_vit_oracles_without_merging_equal_the_model(name: str) -> None:
    model, images = make_vit(**VITS[name]), random_images(1)
    with torch.no_grad():
        reference = model.forward_features(images)
    for result in (O.tome_vit_oracle(model, images, 0), O.pitome_vit_oracle(model, images, 1.0)):
        torch.testing.assert_close(result["hidden"], reference)
        assert result["slots"][0].tolist() == result["assignment"][0].tolist() == list(range(16))


def check_vit_result(result: dict, prefix: int, patches: int) -> None:
    for b in range(len(result["slots"])):
        slots, assignment = result["slots"][b].tolist(), result["assignment"][b].tolist()
        assert len(slots) == patches and slots == sorted(slots) and set(assignment) == set(slots)
        assert all(assignment[slot] == slot for slot in slots)  # a destination keeps its own position
    assert result["hidden"].shape == (len(result["slots"]), prefix + patches, 32)


@pytest.mark.parametrize("order", ["position", "official"])
@pytest.mark.parametrize("name", VITS)
def test_tome_vit(name: str, order: str) -> None:
    model, images = make_vit(**VITS[name]), random_images(2, seed=5)
    prefix = model.num_prefix_tokens
    result = O.tome_vit_oracle(model, images, [3, 2, 0, 4], order=order)
    check_vit_result(result, prefix, O.tome_counts(16 + prefix, [3, 2, 0, 4], prefix)[-1] - prefix)


def test_tome_order_and_proportional_flags() -> None:
    model, images = make_vit(), random_images(1, seed=6)
    one = [O.tome_vit_oracle(model, images, [5, 0, 0, 0], order=order) for order in ("position", "official")]
    torch.testing.assert_close(one[0]["hidden"], one[1]["hidden"])  # a single merging layer does not see the order
    many = [O.tome_vit_oracle(model, images, 2, order=order) for order in ("position", "official")]
    assert not torch.allclose(many[0]["hidden"], many[1]["hidden"])
    plain = O.tome_vit_oracle(model, images, 2, proportional=False)
    assert not torch.allclose(many[0]["hidden"], plain["hidden"])
    last = [O.tome_vit_oracle(model, images, [0, 0, 0, 5], proportional=flag) for flag in (True, False)]
    torch.testing.assert_close(last[0]["hidden"], last[1]["hidden"])  # the first merging layer has no sizes yet


def test_proportional_attention_equals_copies() -> None:
    attention = make_vit(qk_norm=True).blocks[0].attn
    z = torch.randn(5, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        out, keys = O.timm_attention(attention, z, [1.0, 3.0, 1.0, 2.0, 1.0])
        copies = torch.cat([z, z[1:2], z[1:2], z[3:4]])
        expected = attention(copies[None])[0, :5]
        expected_keys = attention.k_norm(attention.qkv(z).view(5, 3, 2, 16)[:, 1]).mean(1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(keys, expected_keys)


def test_weighted_merge() -> None:
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]], dtype=torch.float64)
    merged, size = O._weighted_merge(x, [1.0, 2.0, 1.0, 3.0], [(0, 1), (3, 1)], [2, 1])
    assert size == [1.0, 6.0]
    torch.testing.assert_close(merged, torch.tensor([[4.0], [29.0 / 6.0]], dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------------
# PiToMe


@pytest.mark.parametrize(
    "ratio, expected",
    [
        (0.9, [177, 160, 144, 130, 117, 106, 96, 87, 79, 72, 65, 59]),
        (0.925, [182, 169, 157, 146, 136, 126, 117, 109, 101, 94, 87, 81]),
        (0.95, [187, 178, 170, 162, 154, 147, 140, 133, 127, 121, 115, 110]),
        (0.975, [192, 188, 184, 180, 176, 172, 168, 164, 160, 156, 153, 150]),
    ],
)
def test_pitome_counts(ratio: float, expected: list[int]) -> None:
    assert O.pitome_counts(196, 12, ratio) == expected


def test_pitome_match_by_hand() -> None:
    angles = torch.tensor([0.0, 2.0, 5.0, 90.0, 140.0, 200.0], dtype=torch.float64).deg2rad()
    metric = torch.stack([angles.cos(), angles.sin()], -1)[None]
    energy = O.pitome_energy(metric[0], 0.5)
    assert O._descending(energy)[:3] == [
        2,
        1,
        0,
    ]  # the cluster has the highest energy; 5 degrees lies closest to the token at 90
    one = O.pitome_match_oracle(metric, 1, 0.5)
    assert one["merges"] == [[(2, 1)]] and one["kept"] == [[0, 1, 3, 4, 5]] and one["kept_official"][0][-1] == 1
    assert O.pitome_match_oracle(metric, 0.8, 0.5)["merges"] == one["merges"]  # floor(6 - 4.8) = 1
    two = O.pitome_match_oracle(metric, 2, 0.5)
    ranks = O._descending(energy)
    assert {a for a, _ in two["merges"][0]} == {ranks[0], ranks[2]} and two["kept_official"] == [
        ranks[4:] + [ranks[1], ranks[3]]
    ]
    with pytest.raises(ValueError):
        O.pitome_match_oracle(metric, 4, 0.5)
    assert O.pitome_match_oracle(metric, 1.0, 0.5)["r"] == 0


@pytest.mark.parametrize("variant", ["pitome", "bsm"])
def test_pitome_match_against_matrices(variant: str) -> None:
    metric = torch.randn(3, 21, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    result = O.pitome_match_oracle(metric, 0.8, 0.4, variant=variant)
    assert result["r"] == 4
    unit = F.normalize(metric, dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    ranks = F.elu(similarity - 0.4).mean(-1).argsort(descending=True)
    for b in range(3):
        pool = ranks[b, :8] if variant == "pitome" else ranks[b]
        side_a, side_b = pool[::2], pool[1::2]
        value, partner = similarity[b][side_a][:, side_b].max(-1)
        chosen = range(4) if variant == "pitome" else value.topk(4).indices.tolist()
        assert set(result["merges"][b]) == {(int(side_a[i]), int(side_b[partner[i]])) for i in chosen}
        assert sorted([a for a, _ in result["merges"][b]] + result["kept"][b]) == list(range(21))


@pytest.mark.parametrize("name", VITS)
def test_pitome_vit(name: str) -> None:
    model, images = make_vit(**VITS[name]), random_images(2, seed=9)
    results = [
        O.pitome_vit_oracle(model, images, 0.8, bsm_layers=(0, 1), order=order) for order in ("position", "official")
    ]
    for result in results:
        check_vit_result(result, model.num_prefix_tokens, O.pitome_counts(16, 4, 0.8)[-1])
    torch.testing.assert_close(results[0]["hidden"], results[1]["hidden"])  # the split goes by energy, not by position
    assert [a.tolist() for a in results[0]["assignment"]] == [a.tolist() for a in results[1]["assignment"]]


@pytest.mark.parametrize("method", ["tome", "pitome", "bsm"])
@pytest.mark.parametrize("name", ["plain", "registers", "distilled"])
def test_one_block_by_hand(name: str, method: str) -> None:
    """Depth 1: metric, margin, prefix protection, place of the merge and the plain mean of equal sizes, from the
    modules of the block."""
    model, images = make_vit(**VITS[name]), random_images(2, seed=10)
    model.blocks = model.blocks[:1]
    block, prefix = model.blocks[0], model.num_prefix_tokens
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        z = block.norm1(x)
        metric = block.attn.k_norm(block.attn.qkv(z).unflatten(-1, (3, 2, 16))[:, :, 1]).mean(2)
        x = x + block.ls1(block.attn(z))
        if method == "tome":
            result = O.tome_vit_oracle(model, images, 4)
            merges = [[(a - prefix, b - prefix) for a, b in row] for row in vectorised_tome(metric, 4, prefix)]
        else:
            result = O.pitome_vit_oracle(
                model, images, 0.75, margin_scale=0.6, bsm_layers=(0,) if method == "bsm" else ()
            )
            merges = O.pitome_match_oracle(metric[:, prefix:], 4, 0.6, variant="bsm" if method == "bsm" else "pitome")[
                "merges"
            ]
        for b in range(2):
            owner = torch.arange(16)
            for source, destination in merges[b]:
                owner[source] = destination
            slots = owner.unique()
            means = torch.stack([x[b, prefix:][owner == slot].mean(0) for slot in slots])
            y = torch.cat([x[b, :prefix], means])
            torch.testing.assert_close(result["hidden"][b], model.norm(y + block.ls2(block.mlp(block.norm2(y)))))
            assert result["slots"][b].tolist() == slots.tolist() and result["assignment"][b].tolist() == owner.tolist()
