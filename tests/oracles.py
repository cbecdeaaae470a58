"""Slow, literal transcriptions of the published equations of five methods, used as test oracles.

Nothing here shares code with the package. Everything is written from the formulas with plain loops in float64, one
image / head / query at a time, so that a function can be compared with the paper line by line. Orders are stable (ties
go to the lower index); compare on inputs without ties.

* FlowCut      arXiv 2505.19536   ``flowcut_oracle``, ``flowcut_schedule``
* PyramidDrop  arXiv 2410.17247   ``pyramiddrop_oracle``
* FastV        arXiv 2403.06764   ``fastv_oracle``
* ToMe         arXiv 2210.09461   ``tome_match_oracle``, ``tome_vit_oracle``, ``tome_r_schedule``, ``tome_counts``
* PiToMe       arXiv 2405.16148   ``pitome_match_oracle``, ``pitome_vit_oracle``, ``pitome_counts``

Models must be in double precision and eval mode. Hugging Face modules are called as they are, which means that their
internal float32 steps (RMSNorm, rotary angles, the softmax of the eager attention) stay in float32; the scores
themselves are computed in float64 with an exact softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Merge = tuple[int, int]  # (source, destination)


# --------------------------------------------------------------------------------------------------------------------
# shared helpers


def _require_double(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype != torch.float64:
            raise ValueError("the oracles need the model in double precision")
    if module.training:
        raise ValueError("the oracles need the model in eval mode")


def _softmax(logits: Sequence[float]) -> list[float]:
    """exp(z_j) / sum_i exp(z_i), shifted by the maximum."""
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    total = sum(powers)
    return [p / total for p in powers]


def _dot(u: Tensor, v: Tensor) -> float:
    return float(torch.dot(u, v))


def _head(x: Tensor, h: int, d: int) -> Tensor:
    """Columns of head h in [n, H*d]."""
    return x[:, h * d : (h + 1) * d]


def _mean_over_heads(rows: Sequence[Sequence[float]]) -> list[float]:
    """mean_h of one row per head."""
    return [sum(row[j] for row in rows) / len(rows) for j in range(len(rows[0]))]


def _descending(values: Sequence[float]) -> list[int]:
    """Indices by falling value; equal values keep their index order."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def _top(values: Sequence[float], count: int) -> list[int]:
    """Indices of the ``count`` largest values, ascending."""
    return sorted(_descending(values)[:count])


def _unit(x: Tensor) -> list[Tensor]:
    """Rows divided by their L2 norm."""
    return [row / torch.sqrt(torch.dot(row, row)) for row in x]


# --------------------------------------------------------------------------------------------------------------------
# FlowCut


def _vision_parts(
    tower: nn.Module, pixel_values: Tensor
) -> tuple[Tensor, list[tuple[nn.Module, nn.Module, nn.Module]]]:
    """Embedded tokens and, per block, (block, first LayerNorm, attention with q_proj / k_proj / v_proj) of a
    CLIPVisionModel or Dinov2Model."""
    tower = getattr(tower, "vision_model", tower)
    if hasattr(tower, "pre_layrnorm"):  # CLIP
        x = tower.pre_layrnorm(tower.embeddings(pixel_values))
        return x, [(block, block.layer_norm1, block.self_attn) for block in tower.encoder.layers]
    x = tower.embeddings(pixel_values)  # DINOv2
    return x, [(block, block.norm1, block.attention) for block in tower.encoder.layer]


def projections(attention: nn.Module) -> list[nn.Module]:
    """Query, key and value projections; DINOv2 of transformers 5.17 has them one module deeper."""
    inner = getattr(attention, "attention", None)
    return (
        [attention.q_proj, attention.k_proj, attention.v_proj]
        if inner is None
        else [inner.query, inner.key, inner.value]
    )


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """One vision block, unmasked; DINOv2's of transformers 5.17 takes no mask at all."""
    return block(x) if hasattr(getattr(block, "attention", None), "attention") else block(x, None)


def flowcut_layer_scores(
    x: Tensor, norm: nn.Module, attention: nn.Module, heads: int
) -> tuple[list[float], list[float]]:
    """FlowCut (arXiv 2505.19536, eq. for S = (norm(I^a) + norm(I^s)) * I^d) on one image: x [1+n, D], CLS first.
    Returns (a, S) over the n patches."""
    z = norm(x)
    q, k, v = (m(z) for m in projections(attention))
    tokens, d = x.shape[0], q.shape[1] // heads
    # a_j = mean_h softmax_j(q_CLS . k_j / sqrt(d)) over all n+1 keys
    a = _mean_over_heads(
        [
            _softmax([_dot(_head(q, h, d)[0], _head(k, h, d)[j]) / math.sqrt(d) for j in range(tokens)])
            for h in range(heads)
        ]
    )[1:]
    # s_j = mean_h softmax_j(v_CLS . v_j) over all n+1 tokens including CLS, without 1/sqrt(d)
    s = _mean_over_heads(
        [_softmax([_dot(_head(v, h, d)[0], _head(v, h, d)[j]) for j in range(tokens)]) for h in range(heads)]
    )[1:]
    # u_j = || mean_h v_j ||_1
    u = []
    for j in range(1, tokens):
        mean_value = sum(_head(v, h, d)[j] for h in range(heads)) / heads
        u.append(sum(abs(float(component)) for component in mean_value))
    sum_a, sum_s = sum(a), sum(s)
    return a, [(a[j] / sum_a + s[j] / sum_s) * u[j] for j in range(tokens - 1)]


def flowcut_entropy_ratio(a: Sequence[float]) -> float:
    """r_H = H(p) / ln n with p = a / sum(a) and p ln p := 0 at p = 0 (arXiv 2505.19536)."""
    total = sum(a)
    entropy = 0.0
    for value in a:
        p = value / total
        if p > 0.0:
            entropy -= p * math.log(p)
    return entropy / math.log(len(a))


def flowcut_prune_amount(n: int, target: int, rho: int, entropy_ratio: float) -> float:
    """P before rounding: (n - T) / sqrt(rho) * (1 - r_H^2), rho > 0 layers remaining (arXiv 2505.19536)."""
    return (n - target) / math.sqrt(rho) * (1.0 - entropy_ratio**2)


def flowcut_schedule(n: int, layers: int, target: int, ratio: float) -> list[int]:
    """Patch counts after every pruning layer of an encoder of ``layers`` blocks (select_layer = layers - 2) when H / ln
    n is the constant ``ratio``."""
    select = layers - 2
    counts = []
    for layer in range(select + 1):
        rho = select - 1 - layer
        if rho < 0 or rho % 2 != 0:
            continue
        if n > target:
            n = target if rho == 0 else max(n - round(flowcut_prune_amount(n, target, rho, ratio)), target)
        counts.append(n)
    return counts


@torch.no_grad()
def flowcut_oracle(
    tower: nn.Module, pixel_values: Tensor, target: int, select_layer: int, batch_max: bool = True
) -> dict:
    """FlowCut in a CLIPVisionModel / Dinov2Model (arXiv 2505.19536, prune amount P and cumulative score S_cum, in the
    form the released code evaluates).

    ``target`` counts patches (CLS extra). Returns ``kept[layer][image]`` = ascending original patch indices after block
    ``layer`` for the layers 0..select_layer, and ``hidden`` [B, 1 + n, D] = output of block ``select_layer`` with CLS
    first. ``batch_max=False`` runs every image alone.
    """
    if target < 1:
        raise ValueError("target must be at least 1")
    _require_double(tower)
    images = pixel_values.shape[0]
    if not batch_max and images > 1:
        single = [flowcut_oracle(tower, pixel_values[b : b + 1], target, select_layer) for b in range(images)]
        kept = [[result["kept"][layer][0] for result in single] for layer in range(select_layer + 1)]
        return {"kept": kept, "hidden": torch.cat([result["hidden"] for result in single])}

    embedded, blocks = _vision_parts(tower, pixel_values)
    heads = tower.config.num_attention_heads
    hidden = [embedded[b] for b in range(images)]
    alive = [list(range(embedded.shape[1] - 1)) for _ in range(images)]
    cumulative: list[list[float] | None] = [None] * images
    kept = []
    for layer in range(select_layer + 1):
        block, norm, attention = blocks[layer]
        n = len(alive[0])
        rho = select_layer - 1 - layer
        entropy_ratios = []
        if n > target:  # score of this layer, from the input of the block; C <- S, then C <- C/2 + S/2
            for b in range(images):
                a, score = flowcut_layer_scores(hidden[b], norm, attention, heads)
                entropy_ratios.append(flowcut_entropy_ratio(a))
                previous = cumulative[b]
                cumulative[b] = score if previous is None else [0.5 * previous[j] + 0.5 * score[j] for j in range(n)]
        hidden = [run_block(block, hidden[b][None])[0] for b in range(images)]
        if n > target and rho >= 0 and rho % 2 == 0:
            if rho == 0:
                count = target
            else:
                amount = max(flowcut_prune_amount(n, target, rho, ratio) for ratio in entropy_ratios)
                count = max(n - round(amount), target)  # round() is half to even
            for b in range(images):
                top = _top(cumulative[b], count)
                hidden[b] = torch.stack([hidden[b][0]] + [hidden[b][1 + j] for j in top])
                alive[b] = [alive[b][j] for j in top]
                cumulative[b] = [cumulative[b][j] for j in top]
        kept.append([torch.tensor(alive[b], dtype=torch.long) for b in range(images)])
    return {"kept": kept, "hidden": torch.stack(hidden)}


# -------------------------------------------------------------------------------------------------------------------
# PyramidDrop and FastV


def _causal_mask(n: int) -> Tensor:
    """0 where key <= query, -inf elsewhere, [1, 1, n, n]."""
    mask = torch.zeros(1, 1, n, n, dtype=torch.float64)
    for query in range(n):
        for key in range(query + 1, n):
            mask[0, 0, query, key] = -math.inf
    return mask


def _run_lm_layer(lm: nn.Module, index: int, x: Tensor, position_ids: Sequence[int]) -> Tensor:
    """x^{index+1} = layer_index(x^{index}) for x [n, D] at the given positions."""
    ids = torch.tensor([list(position_ids)], dtype=torch.long)
    return lm.layers[index](
        x[None], attention_mask=_causal_mask(len(x)), position_ids=ids, position_embeddings=lm.rotary_emb(x[None], ids)
    )[0]


def _rope(row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R_p x in the half-split layout: y_i = x_i cos_i - x_{i+d/2} sin_i, y_{i+d/2} = x_{i+d/2} cos_{i+d/2} + x_i
    sin_{i+d/2}."""
    half = len(row) // 2
    out = torch.empty_like(row)
    for i in range(half):
        out[i] = row[i] * cos[i] - row[i + half] * sin[i]
        out[i + half] = row[i + half] * cos[i + half] + row[i] * sin[i + half]
    return out


def lm_attention_row(lm: nn.Module, index: int, x: Tensor, position_ids: Sequence[int], query: int) -> list[float]:
    """(1/H) sum_h softmax_j(R(q_t).R(k_j) / sqrt(d_h)) of layer ``index`` on x [n, D] for the row t = ``query``; j over
    all causal keys 0..t."""
    layer = lm.layers[index]
    attention = layer.self_attn
    z = layer.input_layernorm(x[None])[0]
    q, k = attention.q_proj(z), attention.k_proj(z)
    ids = torch.tensor([list(position_ids)], dtype=torch.long)
    cos, sin = lm.rotary_emb(x[None], ids)
    heads, kv_heads = lm.config.num_attention_heads, lm.config.num_key_value_heads
    d = q.shape[1] // heads
    rows = []
    for h in range(heads):
        shared = h // (heads // kv_heads)  # grouped queries: consecutive query heads share one key head
        rotated_query = _rope(_head(q, h, d)[query], cos[0, query], sin[0, query])
        logits = [
            _dot(rotated_query, _rope(_head(k, shared, d)[j], cos[0, j], sin[0, j])) / math.sqrt(d)
            for j in range(query + 1)
        ]
        rows.append(_softmax(logits))
    return _mean_over_heads(rows)


def _check_lm(lm: nn.Module, inputs_embeds: Tensor) -> None:
    _require_double(lm)
    if inputs_embeds.shape[0] != 1:
        raise ValueError("batch 1 only")
    window = getattr(lm.config, "sliding_window", None)
    if window is not None and inputs_embeds.shape[1] > window:
        raise ValueError("sequences longer than the sliding window are not covered")


@torch.no_grad()
def pyramiddrop_oracle(
    lm: nn.Module,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    image_positions: Tensor,
    layers: Sequence[int],
    ratios: Sequence[float],
    query_positions: Sequence[int],
    renumber: bool = False,
    stays: Sequence[int] = (),
) -> dict:
    """PyramidDrop (arXiv 2410.17247) in a Llama / Mistral / Qwen2 decoder, batch 1 without padding.

    Before layer L = layers[s]: s_j = mean over query rows and heads of the softmax over all causal keys, with layer L's
    own input norm, q and k on x^L; the int(N0 * ratios[s]) best image tokens stay. Positions stay original unless
    ``renumber`` (0..len-1 after each cut, as released). Returns ``kept`` (per cut, ascending original sequence
    positions of the image tokens) and ``hidden`` [1, n', D] after the final norm. Without query rows nothing is pruned.
    Image tokens at the positions ``stays`` come before all others (a row that ranks is not dropped).
    """
    _check_lm(lm, inputs_embeds)
    if attention_mask is not None and not bool((attention_mask != 0).all()):
        raise ValueError("padding is not covered")
    x = inputs_embeds[0]
    original = list(range(x.shape[0]))  # original sequence position of every current token
    position_ids = list(original)
    image = sorted(int(p) for p in image_positions)
    n0 = len(image)
    kept = []
    for index in range(len(lm.layers)):
        for stage in range(len(layers)):
            if layers[stage] != index:
                continue
            candidates = [i for i in range(len(original)) if original[i] in image]  # current rows of the image tokens
            count = int(n0 * ratios[stage])
            if query_positions and count < len(candidates):
                score = [0.0] * len(candidates)
                for position in query_positions:
                    t = original.index(position)
                    row = lm_attention_row(lm, index, x, position_ids, t)
                    for c in range(len(candidates)):
                        if candidates[c] <= t:  # later keys have probability 0
                            score[c] += row[candidates[c]] / len(query_positions)
                score = [float("inf") if original[c] in stays else s for s, c in zip(score, candidates, strict=True)]
                chosen = [candidates[c] for c in _top(score, count)]
                rows = [i for i in range(len(original)) if i not in candidates or i in chosen]
                x = torch.stack([x[i] for i in rows])
                original = [original[i] for i in rows]
                position_ids = list(range(len(rows))) if renumber else [position_ids[i] for i in rows]
            kept.append(torch.tensor([p for p in original if p in image], dtype=torch.long))
        x = _run_lm_layer(lm, index, x, position_ids)
    return {"kept": kept, "hidden": lm.norm(x[None])}


@torch.no_grad()
def fastv_oracle(lm: nn.Module, inputs_embeds: Tensor, image_positions: Tensor, k: int, keep: int) -> dict:
    """FastV (arXiv 2403.06764): s_j = (1/H) sum_h A_h^{k-1}[last, j] ranks the image tokens, the ``keep`` best stay
    from layer k on.

    Original positions; batch 1 without padding; k >= 1. Same return form as ``pyramiddrop_oracle`` (one cut).
    """
    _check_lm(lm, inputs_embeds)
    if not 1 <= k <= len(lm.layers):
        raise ValueError("k must be at least 1 and at most the number of layers")
    x = inputs_embeds[0]
    position_ids = list(range(x.shape[0]))
    image = sorted(int(p) for p in image_positions)
    kept = []
    for index in range(len(lm.layers)):
        if index == k - 1:
            row = lm_attention_row(lm, index, x, position_ids, len(x) - 1)
        x = _run_lm_layer(lm, index, x, position_ids)
        if index == k - 1:
            chosen = [image[c] for c in _top([row[p] for p in image], keep)]
            rows = [i for i in range(len(position_ids)) if i not in image or i in chosen]
            x = torch.stack([x[i] for i in rows])
            position_ids = rows
            kept.append(torch.tensor(chosen, dtype=torch.long))
    return {"kept": kept, "hidden": lm.norm(x[None])}


# ---------------------------------------------------------------------------------------------------------------
# merging in a timm ViT (shared)


def _weighted_merge(
    x: Tensor, size: Sequence[float], merges: Sequence[Merge], kept: Sequence[int]
) -> tuple[Tensor, list[float]]:
    """x_d <- sum_i s_i x_i / sum_i s_i and s_d <- sum_i s_i over the destination d and its sources; output in the order
    of ``kept``."""
    rows, sizes = [], []
    for destination in kept:
        total, weight = size[destination] * x[destination], size[destination]
        for source, target in merges:
            if target == destination:
                total = total + size[source] * x[source]
                weight = weight + size[source]
        rows.append(total / weight)
        sizes.append(weight)
    return torch.stack(rows), sizes


def timm_attention(attention: nn.Module, z: Tensor, size: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + log s) v for z [n, D] with a timm ``Attention``; also returns the mean-head keys [n,
    d]. ``size=None``: no log s."""
    if getattr(attention, "gate", None) is not None:
        raise ValueError("gated attention is not covered")
    heads, d = attention.num_heads, attention.head_dim
    qkv = attention.qkv(z)
    q, k, v = qkv[:, : heads * d], qkv[:, heads * d : 2 * heads * d], qkv[:, 2 * heads * d :]
    tokens = z.shape[0]
    out = torch.zeros(tokens, heads * d, dtype=torch.float64)
    mean_key = torch.zeros(tokens, d, dtype=torch.float64)
    for h in range(heads):
        query, key, value = attention.q_norm(_head(q, h, d)), attention.k_norm(_head(k, h, d)), _head(v, h, d)
        mean_key += key / heads
        for i in range(tokens):
            dots = key @ query[i]  # q_i . k_j for all j
            bias = [0.0 if size is None else math.log(size[j]) for j in range(tokens)]
            weights = _softmax([float(dots[j]) / math.sqrt(d) + bias[j] for j in range(tokens)])
            out[i, h * d : (h + 1) * d] = torch.tensor(weights, dtype=torch.float64) @ value  # sum_j w_j v_j
    return attention.proj(attention.norm(out)), mean_key


# a matcher receives (layer, metric [n, d], number of prefix tokens) and returns (merges, surviving tokens in the
# released order), indices into the sequence
Matcher = Callable[[int, Tensor, int], tuple[list[Merge], list[int]]]


def _merging_vit(model: nn.Module, pixel_values: Tensor, matcher: Matcher, proportional: bool, order: str) -> dict:
    """timm VisionTransformer with a merge between attention and MLP of every block; see ``tome_vit_oracle`` for the
    returned dict."""
    _require_double(model)
    if order not in ("position", "official"):
        raise ValueError(f"unknown order {order!r}")
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(pixel_values)))
    prefix = model.num_prefix_tokens
    patches = embedded.shape[1] - prefix
    final, slots, assignments = [], [], []
    for b in range(embedded.shape[0]):
        x = embedded[b]
        size = [1.0] * (prefix + patches)
        slot = list(range(-prefix, patches))  # original patch index of every token; prefix tokens are -prefix..-1
        assignment = list(range(patches))
        for layer in range(len(model.blocks)):
            block = model.blocks[layer]
            attended, metric = timm_attention(block.attn, block.norm1(x), size if proportional else None)
            x = x + block.ls1(attended)
            merges, kept = matcher(layer, metric, prefix)
            for source, destination in merges:
                assignment = [slot[destination] if owner == slot[source] else owner for owner in assignment]
            if order == "position":
                kept = sorted(kept, key=lambda i: slot[i])
            x, size = _weighted_merge(x, size, merges, kept)
            slot = [slot[i] for i in kept]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        final.append(torch.stack([x[i] for i in sorted(range(len(slot)), key=lambda i: slot[i])]))
        slots.append(torch.tensor(sorted(s for s in slot if s >= 0), dtype=torch.long))
        assignments.append(torch.tensor(assignment, dtype=torch.long))
    return {"hidden": torch.stack(final), "slots": slots, "assignment": assignments}


# --------------------------------------------------------------------------------------------------------------------
# ToMe


def tome_r_schedule(layers: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """Merges asked for per layer (arXiv 2210.09461): int = constant; (r, inflect) = linear from int(r (1 - inflect)) to
    2r - first; list = as it is."""
    if isinstance(r, int):
        return [r] * layers
    if isinstance(r, tuple):
        mean, inflect = r
        first = int(mean * (1 - inflect))
        last = 2 * mean - first
        return [int(first + (last - first) * layer / (layers - 1)) for layer in range(layers)]
    if len(r) != layers:
        raise ValueError("one entry per layer")
    return list(r)


def tome_clip_r(n: int, r: int, protected: int) -> int:
    """r <- min(r, (n - protected) // 2), at least 0."""
    return max(0, min(r, (n - protected) // 2))


def tome_counts(n: int, r: Sequence[int], protected: int = 1) -> list[int]:
    """Tokens (prefix included) after every layer for per-layer merges ``r``."""
    counts = []
    for amount in r:
        n -= tome_clip_r(n, amount, protected)
        counts.append(n)
    return counts


def _bipartite(metric: Tensor, r: int, protected: set[int]) -> tuple[list[Merge], list[int], list[int]]:
    """ToMe bipartite soft matching (arXiv 2210.09461) on metric [n, c].

    A = even positions, B = odd positions; every a takes its most similar b; the r best edges are merged. Rows and
    columns of protected tokens are -inf. Returns (merges by falling similarity, unmerged A by falling similarity, B).
    """
    unit = _unit(metric)
    side_a, side_b = list(range(0, len(unit), 2)), list(range(1, len(unit), 2))
    edges = []
    for a in side_a:
        best, partner = -math.inf, -1
        for b in side_b:
            score = -math.inf if a in protected or b in protected else _dot(unit[a], unit[b])
            if score > best:
                best, partner = score, b
        edges.append((best, a, partner))
    ranked = sorted(edges, key=lambda edge: -edge[0])
    merges = [(a, b) for _, a, b in ranked[:r]]
    return merges, [a for _, a, _ in ranked[r:]], side_b


@torch.no_grad()
def tome_match_oracle(metric: Tensor, r: int, class_token: bool, distill_token: bool) -> dict:
    """ToMe matching (arXiv 2210.09461, bipartite soft matching) of metric [B, n, c]; CLS at position 0, distillation
    token at position 1.

    Returns ``r`` (clipped) and per image ``merges`` = (source, destination) by falling similarity, ``kept`` = surviving
    tokens ascending and ``kept_official`` = the released order: unmerged A (by position with a CLS, else by falling
    similarity), B; with distillation CLS, dist come first.
    """
    protected = ({0} if class_token else set()) | ({1} if distill_token else set())
    amount = tome_clip_r(metric.shape[1], r, len(protected))
    result: dict = {"r": amount, "merges": [], "kept": [], "kept_official": []}
    for image in metric.double():
        merges, unmerged, side_b = _bipartite(image, amount, protected) if amount > 0 else ([], [], [])
        if amount == 0:  # identity
            kept = list(range(len(image)))
        else:
            kept = (sorted(unmerged) if class_token else unmerged) + side_b
            if distill_token:
                front = [i for i in (0, 1) if i in kept]
                kept = front + [i for i in kept if i not in front]
        result["merges"].append(merges)
        result["kept"].append(sorted(kept))
        result["kept_official"].append(kept)
    return result


@torch.no_grad()
def tome_vit_oracle(
    model: nn.Module, pixel_values: Tensor, r: int | Sequence[int], proportional: bool = True, order: str = "position"
) -> dict:
    """ToMe in a timm VisionTransformer (arXiv 2210.09461, bipartite soft matching): metric = mean-head keys of the
    block, merge between attention and MLP, size-weighted mean, proportional attention softmax(q k^T / sqrt(d) + log s).
    All prefix tokens are protected.

    ``order``: token order fed to the next layer, on which the A / B split depends. "position" = prefix, then ascending
    original position (a destination keeps its own); "official" = prefix, unmerged A, B (unmerged A in sequence order
    with a CLS, else by falling similarity). Returns ``hidden`` [B, prefix + n', C] after model.norm (prefix tokens
    first, patches by ascending original index), ``slots`` per image = original index of every surviving patch,
    ascending, and ``assignment`` per image [N] = original index of the survivor that holds each original patch.
    """
    amounts = tome_r_schedule(len(model.blocks), r)

    def matcher(layer: int, metric: Tensor, prefix: int) -> tuple[list[Merge], list[int]]:
        amount = tome_clip_r(len(metric), amounts[layer], prefix)
        if amount == 0:
            return [], list(range(len(metric)))
        merges, unmerged, side_b = _bipartite(metric, amount, set(range(prefix)))
        if model.cls_token is not None:
            unmerged = sorted(unmerged)
        return merges, list(range(prefix)) + [i for i in unmerged if i >= prefix] + [i for i in side_b if i >= prefix]

    return _merging_vit(model, pixel_values, matcher, proportional, order)


# --------------------------------------------------------------------------------------------------------------------
# PiToMe


def pitome_r(tokens: int, ratio: float) -> int:
    """r = floor(T - T * ratio); 0 for ratio >= 1."""
    return 0 if ratio >= 1 else math.floor(tokens - tokens * ratio)


def pitome_counts(tokens: int, layers: int, ratio: float) -> list[int]:
    """Patches after every layer at a constant keep ratio."""
    counts = []
    for _ in range(layers):
        tokens -= pitome_r(tokens, ratio)
        counts.append(tokens)
    return counts


def _elu(x: float, alpha: float) -> float:
    return x if x > 0 else alpha * (math.exp(x) - 1.0)


def pitome_energy(metric: Tensor, margin: float, alpha: float = 1.0) -> list[float]:
    """E_i = (1/T) sum_j ELU_alpha(cos(k_i, k_j) - m), j = i included (arXiv 2405.16148, energy score, continuous
    form)."""
    unit = _unit(metric)
    tokens = len(unit)
    return [sum(_elu(_dot(unit[i], unit[j]) - margin, alpha) for j in range(tokens)) / tokens for i in range(tokens)]


def _pitome_match(metric: Tensor, r: int, margin: float, alpha: float, variant: str) -> tuple[list[Merge], list[int]]:
    """One image, patches only: (merges, survivors in the released order)."""
    tokens = len(metric)
    if r <= 0:
        return [], list(range(tokens))
    unit = _unit(metric)
    ranks = _descending(pitome_energy(metric, margin, alpha))
    if variant == "pitome":  # Algorithm 1: the 2r highest energies, alternate ranks; every a goes to its most similar b
        if 2 * r > tokens:
            raise ValueError("PiToMe needs 2r <= T")
        side_a, side_b, protected = ranks[0 : 2 * r : 2], ranks[1 : 2 * r : 2], ranks[2 * r :]
    elif variant == "bsm":  # all tokens by energy-rank parity, then ToMe's rule
        if r > (tokens + 1) // 2 or tokens < 2:
            raise ValueError("the BSM variant needs r <= ceil(T / 2)")
        side_a, side_b, protected = ranks[0::2], ranks[1::2], []
    else:
        raise ValueError(f"unknown variant {variant!r}")
    edges = []
    for a in side_a:
        best, partner = -math.inf, -1
        for b in side_b:
            similarity = _dot(unit[a], unit[b])
            if similarity > best:
                best, partner = similarity, b
        edges.append((best, a, partner))
    if variant == "pitome":
        return [(a, b) for _, a, b in edges], protected + side_b
    ranked = sorted(edges, key=lambda edge: -edge[0])
    return [(a, b) for _, a, b in ranked[:r]], [a for _, a, _ in ranked[r:]] + side_b


@torch.no_grad()
def pitome_match_oracle(
    metric: Tensor, r_or_ratio: int | float, margin: float, alpha: float = 1.0, variant: str = "pitome"
) -> dict:
    """PiToMe matching (arXiv 2405.16148, Algorithm 1) of metric [B, T, c], patches only. An int is r, a float is the
    keep ratio (r = floor(T - T ratio)).

    ``variant``: "pitome" = Algorithm 1; "bsm" = all tokens split by energy-rank parity, the r most similar edges merged
    (the early DeiT layers). Returns ``r`` and per image ``merges`` = (source, destination), ``kept`` ascending and
    ``kept_official`` = the released order (protected by falling energy, or unmerged a by falling similarity; then b by
    rank).
    """
    amount = r_or_ratio if isinstance(r_or_ratio, int) else pitome_r(metric.shape[1], r_or_ratio)
    result: dict = {"r": amount, "merges": [], "kept": [], "kept_official": []}
    for image in metric.double():
        merges, kept = _pitome_match(image, amount, margin, alpha, variant)
        result["merges"].append(merges)
        result["kept"].append(sorted(kept))
        result["kept_official"].append(kept)
    return result


@torch.no_grad()
def pitome_vit_oracle(
    model: nn.Module,
    pixel_values: Tensor,
    ratio: float,
    margin_scale: float = 0.75,
    proportional: bool = False,
    bsm_layers: Sequence[int] = (),
    order: str = "position",
) -> dict:
    """PiToMe in a timm VisionTransformer (arXiv 2405.16148, energy score and Algorithm 1; DeiT placement): metric =
    mean-head keys of the patches, margin m_l = margin_scale (1 - l/L), merge between attention and MLP, size-weighted
    mean; the layers in ``bsm_layers`` use the "bsm" variant.

    All prefix tokens are protected. Returned dict and ``order`` as in ``tome_vit_oracle`` ("official" = the order of
    ``kept_official``).
    """

    def matcher(layer: int, metric: Tensor, prefix: int) -> tuple[list[Merge], list[int]]:
        patches = metric[prefix:]
        margin = margin_scale * (1.0 - layer / len(model.blocks))
        variant = "bsm" if layer in bsm_layers else "pitome"
        merges, kept = _pitome_match(patches, pitome_r(len(patches), ratio), margin, 1.0, variant)
        return [(a + prefix, b + prefix) for a, b in merges], list(range(prefix)) + [i + prefix for i in kept]

    return _merging_vit(model, pixel_values, matcher, proportional, order)
