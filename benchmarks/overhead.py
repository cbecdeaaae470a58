"""Selection overhead: the time of a pruned prefill over *the limit*, the same work without selection, and what the
hooks cost per decoded token.

``python benchmarks/overhead.py [--size small|bench|bench-next|llava-7b|llava-next] [--methods a,b] [--repeats N]
[--device cpu] [--dtype float32] [--json F] [--table F]``

The limit is the unpatched model doing exactly what is left. A pruned run is recorded: how many tokens every tower
block, its MLP and every decoder layer saw. Plain hooks then cut the sequence to these numbers by ``x[:, :n]``, with
rotary tables made beforehand and a prompt that has as many placeholders as features arrive: no scores, no indices, no
gathering, no books. It runs no attention bias either, so ToMe's proportional attention counts as overhead. DPVR-LF's
limit has its side branch, and one concatenation where the rows come back.

Limit and pruned are module trees over the same weights and take turns: limit, pruned, limit. An overhead is the median
over rounds of the pruned run's time over the mean of the two limits'; the second limit over the first tells the noise.
On a busy machine that noise is larger than what is measured, so the time spent inside the library's own hooks and
decisions is given as well. Decoding compares the pruned cache with the unpatched model over a cache of the same
lengths, in turns of a few steps. The model is random: times do not depend on what it says, except that FlowCut chooses
its own numbers on the way to ``keep``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vtprune.models.engine.host import cache_of, cached

import vtprune
from vtprune.core.stopwatch import stopwatch
from vtprune.measure.environment import environment
from vtprune.measure.timing import WARMUP, Moments, clock, rounds, spread, use_cpu_time
from vtprune.methods.base import METHODS

BLOCK = 4  # decoding steps in one turn
IMAGE, TEXT, VOCABULARY = 3, 40, 1000  # the placeholder's id; words around it
DECODED = ("fastv", "pyramiddrop", "drop-all", "dpvr-lf", "uniform")  # the in-LLM methods and one behind the projector


@dataclass(frozen=True)
class Size:
    """``tower`` and ``text``: width, layers, heads, MLP width. ``side`` pixels per tile, ``tiles`` per image, ``keep``
    for every method that takes it."""

    tower: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    keep: int | float
    side: int = 336
    tiles: int = 1


SIZES = {
    "small": Size((64, 5, 4, 128), (64, 6, 4, 128), keep=4, side=84),
    "bench": Size((1024, 12, 16, 4096), (1024, 16, 16, 2816), keep=64),
    "bench-next": Size((1024, 12, 16, 4096), (1024, 16, 16, 2816), keep=1 / 9, tiles=5),  # 2880 tokens
    "thin": Size((64, 12, 4, 64), (64, 16, 4, 64), keep=64),  # computes next to nothing: what is left is Python
    "llava-7b": Size((1024, 24, 16, 4096), (4096, 32, 32, 11008), keep=64),
    "llava-next": Size((1024, 24, 16, 4096), (4096, 32, 32, 11008), keep=1 / 9, tiles=5),
}


def build(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    """A random stock LLaVA-1.5 (one tile) or LLaVA-NeXT (five), made on ``device``, and one prompt with one image."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = CLIPVisionConfig(**dict(zip(names, size.tower, strict=True)), image_size=size.side, patch_size=14)
    text = LlamaConfig(**dict(zip(names, size.text, strict=True)), vocab_size=VOCABULARY, max_position_embeddings=4096)
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
    }
    grid = size.side // 14
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pixels = torch.randn(size.tiles, 3, size.side, size.side)
            inputs = {"pixel_values": pixels}
            if size.tiles == 1:
                model: Any = LlavaForConditionalGeneration(
                    LlavaConfig(**common, vision_feature_select_strategy="default")
                )
                tokens = grid * grid
            else:
                whole = [2 * size.side, 2 * size.side]
                model = LlavaNextForConditionalGeneration(
                    LlavaNextConfig(**common, image_grid_pinpoints=[whole], vision_feature_select_strategy="default")
                )
                inputs = {
                    "pixel_values": pixels[None],
                    "image_sizes": torch.tensor([whole], device=None if device == "meta" else "cpu"),
                }
                tokens = size.tiles * grid * grid + 2 * grid  # a new-line token behind each of the large raster's rows
            words = torch.randint(8, VOCABULARY, (1, TEXT))
            ids = torch.cat([words[:, :5], torch.full((1, tokens), IMAGE), words[:, 5:]], 1)
    finally:
        torch.set_default_dtype(before)
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def twin(model: Any) -> Any:
    """The same model as a module tree of its own over the same weights."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def blocks(model: Any) -> list[nn.Module]:
    tower = model.model.vision_tower
    return list(getattr(tower, "vision_model", tower).encoder.layers)


def prefill(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs, logits_to_keep=1, use_cache=True)


# --------------------------------------------------------------------------------------------------------------- the
# limit


@dataclass
class Work:
    """What a run did, in rows (class token and text included): into each tower block and its MLP, into each decoder
    layer and each layer of a side branch; ``vision`` keywords that the tower got."""

    blocks: list[int] = field(default_factory=list)
    mlps: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    vision: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[list[int], ...]:
        return self.blocks, self.mlps, self.layers


@contextmanager
def recorded(model: Any, branch: list[nn.Module]) -> Iterator[Work]:
    """Notes the lengths of every block's and layer's input; entered after ``attach``, so that the hooks run behind the
    library's own."""
    work = Work()

    def into(found: list[int]) -> Callable:
        return lambda module, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    targets = [(b, work.blocks) for b in blocks(model)] + [(b.mlp, work.mlps) for b in blocks(model)]
    targets += [(layer, work.layers) for layer in model.model.language_model.layers] + [
        (layer, work.branch) for layer in branch
    ]
    hooks = [module.register_forward_pre_hook(into(found), with_kwargs=True) for module, found in targets]
    tower = model.model.vision_tower
    note = lambda module, args, kwargs: work.vision.update(kwargs, **({"pixel_values": args[0]} if args else {}))  # noqa: E731
    hooks.append(tower.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def limit(model: Any, inputs: dict[str, Any], work: Work) -> dict[str, Any]:
    """Makes ``model`` do exactly ``work`` and answers with the inputs for it: a prompt with as many placeholders as
    features arrive."""
    core, first = model.model, work.layers[0]
    visual = first - TEXT
    ids = inputs["input_ids"]
    short = {**inputs, "input_ids": torch.cat([ids[:, :5], ids[:, 5 : 5 + visual], ids[:, 5 - TEXT :]], 1)}
    short["attention_mask"] = torch.ones_like(short["input_ids"])

    plain = {k: v for k, v in work.vision.items() if k in ("pixel_values", "interpolate_pos_encoding")}
    core.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: ((), {**kwargs, **plain}), with_kwargs=True
    )
    behind = [*work.blocks[1:], work.mlps[-1]]
    for block, into, mlp, out in zip(blocks(model), work.blocks, work.mlps, behind, strict=True):
        if into != mlp or mlp != out:
            block.forward = _composed(block, mlp, out)

    if visual < ids.shape[1] - TEXT and not hasattr(core, "pack_image_features"):
        core.multi_modal_projector.register_forward_hook(lambda module, args, output: output[:, :visual])
    elif visual < ids.shape[1] - TEXT:
        lengths = torch.tensor([visual], device=ids.device)

        def pack(
            features: list[Tensor], *args: Any, image_newline: Tensor, **kwargs: Any
        ) -> tuple[list[Tensor], Tensor]:
            rows = features[0].flatten(0, 1)[:visual]
            return [
                torch.cat([rows, image_newline.expand(visual - len(rows), -1)])
            ], lengths  # new-line tokens that are left

        core.pack_image_features = pack

    lm = core.language_model
    like = next(lm.parameters())[:1]
    tables = {n: _table(lm, like, torch.arange(n, device=ids.device)[None]) for n in {*work.layers, *work.branch}}
    aside: list[Tensor] = []
    for i, n in enumerate(work.layers):
        if n != first:
            lm.layers[i].register_forward_pre_hook(_shortens(n, tables[n], aside), with_kwargs=True)
        elif n > work.layers[i - 1] and i:
            lm.layers[i].register_forward_pre_hook(
                _returns(lm.layers[work.layers.index(min(work.layers))], work.branch, tables, n, aside),
                with_kwargs=True,
            )
    return short


def _table(lm: Any, like: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"position_embeddings": lm.rotary_emb(like, position_ids=ids), "position_ids": ids, "attention_mask": None}


def _composed(block: Any, mlp: int, out: int) -> Callable:
    """A CLIP block whose second half sees ``mlp`` rows and that hands on ``out``."""

    def forward(x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = (x + block.self_attn(hidden_states=block.layer_norm1(x), attention_mask=mask, **kwargs)[0])[:, :mlp]
        return (x + block.mlp(block.layer_norm2(x)))[:, :out]

    return forward


def _shortens(n: int, table: dict[str, Any], aside: list[Tensor]) -> Callable:
    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0]
        if x.shape[1] > n:
            aside[:] = [x[:, n:]]
            x = x[:, :n]
        return (x, *args[1:]), {**kwargs, **table}

    return enter


def _returns(source: Any, branch: list[int], tables: dict[int, Any], n: int, aside: list[Tensor]) -> Callable:
    """The rows put aside come back through a side branch (layers as large as ``source``)."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        (rows,) = aside
        for size in branch:
            rows = source.forward(rows, **tables[size])
        return (torch.cat([rows, args[0]], 1), *args[1:]), kwargs

    return enter


# ---------------------------------------------------------------------------------------------------------------
# measuring


def prefills(
    model: Any, inputs: dict[str, Any], method: str, keep: int | float, repeats: int, dense: float
) -> dict[str, Any]:
    """One method's row, ``dense`` being the whole prefill's time. Times in milliseconds; raises AssertionError if the
    limit or the report does not do what the pruned run did."""
    pruned, bare = twin(model), twin(model)
    budget = {"keep": keep} if METHODS.get(method).budgeted else {}
    with vtprune.attach(pruned, method, **budget) as handle:
        branch = list(handle.modules[method]) if method in handle.modules else []
        with recorded(pruned, branch) as work:
            prefill(pruned, inputs)
        report = handle.report()
        short = limit(bare, inputs, work)
        with recorded(bare, []) as done:
            prefill(bare, short)
        assert done.counts == work.counts, f"{method}: the limit did {done.counts}, the pruned run {work.counts}"
        assert [n + TEXT for n in report.layer_tokens[0]] == work.layers, (
            f"{method}: the report says {report.layer_tokens}, the layers saw {work.layers}"
        )
        device, least = inputs["input_ids"].device, lambda: prefill(bare, short)
        # The limit before and behind the pruned run: their mean is what it is compared with, their ratio the noise.
        # The recorded runs were the warm-up.
        sides = {"limit": least, "pruned": lambda: prefill(pruned, inputs), "again": least}
        times = rounds(sides, repeats, device, warmup=0)
    own, watched, moments = [], twin(model), Moments(model)
    with stopwatch(moments.now) as watch, vtprune.attach(watched, method, **budget):
        for _ in range(min(repeats, 3)):
            watch.laps.clear()
            clock(lambda: prefill(watched, inputs), device)
            own.append(moments.ms(watch.laps))
    return {
        "method": method,
        "site": report.stages[0].site.partition(".")[0],
        "keep": keep if budget else None,
        "tower_tokens": sum(work.blocks) / len(work.blocks) - 1,
        "effective_tokens": report.effective_tokens,
        "dense_ms": dense,
        **{f"{name}_ms": statistics.median(times[name]) for name in ("limit", "pruned")},
        "overhead": spread(
            [2 * p / (n + a) for p, n, a in zip(times["pruned"], times["limit"], times["again"], strict=True)]
        ),
        "noise": spread([a / n for a, n in zip(times["again"], times["limit"], strict=True)]),
        "of_dense": statistics.median(times["pruned"]) / dense,
        "own_ms": statistics.median(own),
        "times_ms": times,
    }


class Decoding:
    """A cache that grows by greedy steps. ``held`` columns of the attention mask."""

    def __init__(self, model: Any, cache: Any, held: int, token: Tensor):
        self.model, self.cache, self.held, self.token = model, cache, held, token

    def step(self) -> None:
        self.held += 1
        mask = torch.ones(1, self.held, dtype=torch.long, device=self.token.device)
        out = self.model(input_ids=self.token, **cached(self.model, self.cache), attention_mask=mask, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)

    def steps(self) -> None:
        for _ in range(BLOCK):
            self.step()


def decoding(model: Any, inputs: dict[str, Any], method: str, keep: int | float, repeats: int) -> dict[str, Any]:
    """Milliseconds per token of the attached model and of the unpatched one over a cache whose layers have the same
    lengths, in turns of :data:`BLOCK` steps; ``added_us``: their difference, microseconds per token."""
    from transformers import DynamicCache

    pruned = twin(model)
    with vtprune.attach(pruned, method, **({"keep": keep} if METHODS.get(method).budgeted else {})):
        out = prefill(pruned, inputs)
        lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
        dense, same = cache_of(prefill(model, inputs)), DynamicCache(config=model.config.get_text_config())
        for i, (layer, n) in enumerate(zip(dense.layers, lengths, strict=True)):
            same.update(layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone(), i)
        token = out.logits[:, -1:].argmax(-1)
        # Layer 0 tells the stock model how long its mask is; without padding it makes none for a single query.
        calls = {
            "limit": Decoding(model, same, lengths[0], token),
            "pruned": Decoding(pruned, cache_of(out), inputs["input_ids"].shape[1], token),
        }
        times = rounds({name: d.steps for name, d in calls.items()}, repeats, token.device)
        new = (WARMUP + repeats) * BLOCK
        for name, d in calls.items():
            assert [layer.keys.shape[2] - new for layer in d.cache.layers] == lengths, (
                f"{method}: the {name} cache has other lengths"
            )
    per_token = {name: [t / BLOCK for t in found] for name, found in times.items()}
    pairs = list(zip(per_token["pruned"], per_token["limit"], strict=True))
    return {
        "method": method,
        "limit_ms": statistics.median(per_token["limit"]),
        "pruned_ms": statistics.median(per_token["pruned"]),
        "overhead": spread([p / n for p, n in pairs]),
        "added_us": spread([1000 * (p - n) for p, n in pairs]),
        "tokens": repeats * BLOCK,
    }


def hooks(thin: Any, inputs: dict[str, Any], method: str, repeats: int) -> dict[str, Any]:
    """:func:`decoding` on one thread, where the two sides differ by Python and small operations alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return decoding(thin, inputs, method, SIZES["thin"].keep, repeats)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def measure(
    size: str, methods: list[str], repeats: int, device: str, dtype: torch.dtype, log: Callable[[str], object]
) -> dict[str, Any]:
    """All tables, JSON-safe. A method that the model refuses gives a row with ``error``."""
    model, inputs = build(SIZES[size], device, dtype)
    thin, thin_inputs = build(SIZES["thin"], device, dtype)
    found: dict[str, Any] = {
        **environment(model),
        "size": size,
        "repeats": repeats,
        "prefill": [],
        "decode": [],
        "hooks": [],
    }
    # once for all methods, and apart from their limits: it disturbs
    whole = rounds({"dense": lambda: prefill(model, inputs)}, min(repeats, 3), inputs["input_ids"].device)["dense"]
    dense, keep = statistics.median(whole), SIZES[size].keep
    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for m in methods:
        jobs.append(("prefill", m, lambda m=m: prefills(model, inputs, m, keep, repeats, dense)))
        if m in DECODED:
            turns = max(repeats, 8)
            jobs.append(("decode", m, lambda m=m, n=turns: decoding(model, inputs, m, keep, n)))
            jobs.append(("hooks", m, lambda m=m: hooks(thin, thin_inputs, m, 5 * repeats)))
    for kind, m, job in jobs:
        try:
            row = job()
            log(
                f"{kind:8}{m:12} {row['overhead']['median']:.3f} [{row['overhead']['p20']:.3f}, "
                f"{row['overhead']['p80']:.3f}]"
            )
        except vtprune.VtpruneError as e:
            row = {"method": m, "error": str(e)}
            log(f"{kind:8}{m:12} {e}")
        found[kind].append(row)
    return found


# -------------------------------------------------------------------------------------------------------------------
# table


def markdown(result: dict[str, Any]) -> str:
    """Three tables: prefill, decoding, and the hooks' own cost per token."""
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    out = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} threads, {about['dtype']}; {versions}; size {result['size']}",
    ]

    def ranged(entry: dict[str, float], digits: int = 3) -> str:
        return f"{entry['median']:.{digits}f} [{entry['p20']:.{digits}f}, {entry['p80']:.{digits}f}]"

    def lines(kind: str, heads: list[str], row: Callable[[dict[str, Any]], list[str]]) -> list[str]:
        cells = [
            heads,
            *(
                [r["method"], *(row(r) if "error" not in r else ["–"] * (len(heads) - 2) + [r["error"]])]
                for r in result[kind]
            ),
        ]
        text = ["| " + " | ".join(c) + " |" for c in cells]
        return ["", text[0], "|---" + "|--:" * (len(heads) - 1) + "|", *text[1:]]

    out += [
        "",
        "Prefill: median milliseconds. pruned / limit: the median over rounds of a pruned run over the mean of the "
        "limit before and behind it [20th, 80th",
    ]
    out += [
        "percentile]; limit / limit, the one behind over the one before, is the noise; own / limit: the time inside "
        "the library's own hooks and decisions"
    ]
    heads = [
        "method",
        "site",
        "tower tokens",
        "LLM tokens",
        "dense ms",
        "limit ms",
        "pruned ms",
        "pruned / limit",
        "limit / limit",
        "own / limit",
        "pruned / dense",
    ]

    def first(r: dict[str, Any]) -> list[str]:
        times = [f"{r[f'{name}_ms']:.1f}" for name in ("dense", "limit", "pruned")]
        return [
            r["site"],
            f"{r['tower_tokens']:.1f}",
            f"{r['effective_tokens']:.1f}",
            *times,
            ranged(r["overhead"]),
            ranged(r["noise"]),
            f"{r['own_ms'] / r['limit_ms']:.3f}",
            f"{r['of_dense']:.2f}",
        ]

    out += lines("prefill", heads, first)
    if result["decode"]:
        heads = ["method", "limit ms", "pruned ms", "pruned / limit", "added µs per token"]
        row: Callable[[dict[str, Any]], list[str]] = lambda r: [  # noqa: E731
            f"{r['limit_ms']:.2f}",
            f"{r['pruned_ms']:.2f}",
            ranged(r["overhead"]),
            ranged(r["added_us"], 0),
        ]
        out += ["", "Decoding: milliseconds per token", *lines("decode", heads, row)]
        depth = SIZES["thin"].text[1]
        thin = f"{depth} layers of width {SIZES['thin'].text[0]}"
        out += [
            "",
            f"Hooks: decoding with {thin} on one thread, where what is added is Python",
            *lines("hooks", heads, row),
        ]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time of pruned prefills and decoding over the same work without selection."
    )
    parser.add_argument("--size", choices=[s for s in SIZES if s != "thin"], default="bench")
    parser.add_argument("--methods", help="comma-separated; default: all registered")
    parser.add_argument("--repeats", type=int, default=9, help="rounds after the warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread and its CPU time: for machines that others use as well"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu_time:
        try:
            use_cpu_time(args.device)
        except vtprune.VtpruneError as e:
            parser.error(str(e))
    methods = args.methods.split(",") if args.methods else list(vtprune.methods())
    result = measure(
        args.size,
        methods,
        args.repeats,
        args.device,
        getattr(torch, args.dtype),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    result["command"] = " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]])
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if args.table:
        args.table.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
