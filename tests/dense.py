"""The dense model made to compute what a pruned one must: dropped columns hidden, merged rows averaged, routed rows
replaced. Written apart from the package's own reference (``models/engine/masked.py``): no cache, so prompt and answer
are one forward, and merges are followed as well.

A merged token equals a cluster whose members all hold the mean: with proportional attention every member stays visible,
else one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vtprune.models.engine.packed import PackedRun

from vtprune.core.types import Action
from vtprune.methods.base import METHODS
from vtprune.methods.mone import capacities

FREE = (
    "vomix",
    "visionzip",
    "prumerge",
    "prumerge+",
    "fastvid",
    "holitom",
)  # their slots are no means of the tokens that the report puts into them
SECOND_NORM = ("layer_norm2", "norm2", "layernorm_after", "ln_2")  # in front of a tower block's MLP


class NoReference(Exception):
    """What was done cannot be repeated densely."""


@dataclass
class Done:
    """What an attached model said it did with one prompt of ``ids`` ``[B, T]``. ``stages``: those of the report;
    ``passes``: ``(run, row)`` per pass of the tower; ``cuts``: ``(stage, Cut)``; ``rows``: which of the report's
    samples each row of the batch is; ``given``: rows that entered the language model, for towers that cannot be
    repeated, and behind them those of each plane (DeepStack)."""

    ids: Tensor | None = None
    stages: tuple[Any, ...] = ()
    passes: list[tuple[Any, int]] = field(default_factory=list)
    cuts: list[tuple[int, Any]] = field(default_factory=list)
    methods: list[Any] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    modules: dict[str, Any] = field(default_factory=dict)
    positions: str = "original"
    given: Sequence[Tensor] | None = None
    mask: Tensor | None = None  # [B, T]
    labels: Tensor | None = None
    skipped: list[list[str]] = field(default_factory=list)  # halves of layers left out, per sample of the report
    grids: list[list[tuple[int, int]]] = field(default_factory=list)  # rasters of each sample of the report
    moving: bool = False  # some are frames of videos


class Dense:
    """``with Dense(model, adapter, done) as d: model(...)``; ``d.present`` ``[B, T]`` are the rows of the prompt that
    are left at the end, ``d.scores`` what the ranking methods in the language model should have ranked by: ``(number of
    the stage in the report, scores [B, T])``."""

    def __init__(self, model: Any, adapter: Any, done: Done):
        self.model, self.adapter, self.done = model, adapter, done
        self.hooks: list[Any] = []
        self.kept_inputs: dict[int, tuple[Tensor, dict[str, Any], Tensor]] = {}
        self.scores: list[tuple[int, Tensor]] = []
        self.factors: dict[
            int, list[float]
        ] = {}  # by layer, per row: what its input is scaled by, its attention left out
        self.made: dict[int, Tensor] = {}  # routing stage -> what its side branch made
        depth = adapter.geometry.llm_layers
        self.routed = next((m for m in done.methods if m.info.routes), None)
        if all(cut.action is Action.LEND for stage, cut in done.cuts if done.methods[stage] is self.routed):
            self.routed = None  # every row runs
        self.lending: dict[int, Tensor] = {}  # stage -> what entered the first layer that borrows
        if depth and done.ids is not None:
            told = {"attention_mask": done.mask, "labels": done.labels}  # of the prompt, or of what follows as well
            told = {k: None if v is None else v[:, : done.ids.shape[1]] for k, v in told.items()}
            self.visual = adapter.prunable({"input_ids": done.ids, **told})
            self._follow()
            self.present = ~self.lost[-1]
        found = self._tower()
        for block, hook, kind in [f for f in found if f[2] == "before"] + [
            f for f in reversed(found) if f[2] == "after"
        ]:
            if kind == "before":
                self.hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            else:  # ahead of transformers' own, which capture hidden states
                self.hooks.append(block.register_forward_hook(hook, with_kwargs=True, prepend=True))
        self.planes: list[Tensor] = []  # of the image, which DeepStack adds behind early layers, [B, T, C]
        self.weights: dict[int, Tensor] = {}  # by layer, by what a router multiplies each token's MLP, [B, T]
        if depth and done.ids is not None:
            self.hooks.append(adapter.lm.register_forward_pre_hook(self._entry, with_kwargs=True))
            for i, layer in enumerate(adapter.decoder_layers()):
                self.hooks.append(layer.register_forward_pre_hook(self._layer(i), with_kwargs=True))
                for stage, cut in done.cuts:
                    if cut.action is Action.LEND and cut.layer == i:
                        norm, parts = self._distilled(stage, i, layer)
                        for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                            self.hooks.append(part.register_forward_pre_hook(self._lent(stage, norm)))
                        for name, part in parts.items():
                            own = getattr(layer.self_attn, f"{name}_proj")
                            self.hooks.append(own.register_forward_hook(self._made_by(part)))
                for half, name in (("attention", "self_attn"), ("mlp", "mlp")):
                    left = [f"llm.{i}.{half}" in done.skipped[row] for row in done.rows if done.skipped]
                    if any(left):
                        self.hooks.append(getattr(layer, name).register_forward_hook(self._silent(left)))
                        factor = [self._scale(i, half) if gone else 1.0 for gone in left]
                        if half == "attention":
                            self.factors[i] = factor
                        else:  # ahead of transformers' own, as above
                            self.hooks.append(layer.register_forward_hook(self._times(factor), prepend=True))

                if any(cut.passing and cut.layer == i for _, cut in done.cuts):
                    self.hooks.append(_added(layer).register_forward_hook(self._weighed(i), prepend=True))
                for stage, cut in done.cuts:
                    if cut.watch and cut.layer == i:
                        self._learn(layer, done.methods[stage], cut)

    def _learn(self, layer: Any, method: Any, cut: Any) -> None:
        """An MLP that stands for nothing behind the first tokens of an answer, as these say, row by row."""
        norm = next(
            getattr(layer, n) for n in ("pre_feedforward_layernorm", "post_attention_layernorm") if hasattr(layer, n)
        )
        between: list[Tensor] = []
        self.hooks.append(norm.register_forward_pre_hook(lambda module, args: between.append(args[0])))

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            y, z = between.pop(), _first(output).clone()
            for b, places in enumerate(self._behind(z.shape[1])):
                first, rest = places[: cut.watch], places[cut.watch :]
                if not rest:
                    continue
                before, after = y[b, first].detach().double(), z[b, first].detach().double()
                similar = torch.stack([p @ q / p.norm() / q.norm() for p, q in zip(before, after, strict=True)])
                longer = torch.stack([q.norm() / p.norm() for p, q in zip(before, after, strict=True)])
                left, factor = method.learn(similar[None], longer[None], cut)
                if bool(left[0]):
                    z[b, rest] = (y[b, rest].double() * factor[0]).to(z.dtype)
            return (z, *output[1:]) if isinstance(output, tuple) else z

        self.hooks.append(layer.register_forward_hook(leave, prepend=True))

    def _behind(self, width: int) -> list[list[int]]:
        """Per sample the columns of what follows its prompt; none where nothing could be pruned."""
        out, labels, mask = [], self.done.labels, self.done.mask
        for b in range(len(self.visual)):
            start = self.visual.shape[1]
            if labels is not None:
                start = next((t for t in range(1, labels.shape[1]) if labels[b, t] != -100), start)
            real = range(start, width) if bool(self.visual[b].any()) else range(0)
            out.append([t for t in real if mask is None or t >= mask.shape[1] or bool(mask[b, t])])
        return out

    def __enter__(self) -> Dense:
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self.hooks:
            hook.remove()

    # ------------------------------------------------------------------------------------------------------------
    # language model

    def _follow(self) -> None:
        """Layer by layer, cut by cut: ``lost[i]`` columns gone in layer i, ``steps[i]`` what its cuts do, in their
        order; ``gone`` columns gone in front of a reported stage."""
        self.lost: list[Tensor] = []
        self.steps: list[list[tuple[str, int, Tensor]]] = []
        self.gone: dict[int, Tensor] = {}
        self.owner: dict[int, Any] = {}
        told, used = list(enumerate(self.done.stages)), set()
        entry = [s for s in self.done.stages if not s.site.startswith("llm.")]
        now = self._columns(entry[-1].kept) if entry else torch.zeros_like(self.visual)
        held: dict[int, Tensor] = {}
        for i in range(self.adapter.geometry.llm_layers):
            steps, aside = [], None
            for stage, cut in self.done.cuts:
                if cut.site != f"llm.{i}":
                    continue
                name = self.done.methods[stage].info.name
                place = next((n for n, s in told if s.site == cut.site and s.method == name and n not in used), None)
                used.add(place)
                if cut.action is Action.LEND:
                    if i == min(c.layer for s, c in self.done.cuts if s == stage and c.action is Action.LEND):
                        steps.append(("lend", stage, now))
                    continue
                if cut.returns:
                    # where only some left, the others are the sequence's own
                    some = all(c.keep is not None for s, c in self.done.cuts if s == stage and not c.returns)
                    own = cut.action is Action.CONTEXT or some
                    steps.append(("back", stage, held[stage] | (self.visual & ~now if own else torch.zeros_like(now))))
                    now, aside = (held[stage], aside) if cut.action is Action.RESTORE else (now, held[stage])
                    if cut.action is Action.RESTORE and some:
                        del held[stage]
                    continue
                if cut.action is Action.STASH:
                    steps.append(("stash", stage, now))
                    held.setdefault(stage, now)
                elif held and any(bool((h != now).any()) for h in held.values()):
                    raise NoReference("cuts among the routed layers")
                if place is not None:
                    steps.append(("rank", place, now))
                    self.gone[place], self.owner[place] = now, self.done.methods[stage]
                    now = self._columns(self.done.stages[place].kept)
                    if cut.passing and self.done.methods[stage].weigh == "p":
                        steps.append(("weigh", stage, now))
            self.steps.append(steps)
            self.lost.append(now if aside is None else aside)
        self.later, begin = list(self.lost), 0  # columns gone for what follows the prompt: caches give them up
        for at in sorted(cut.layer for _, cut in self.done.cuts if cut.evict):
            self.later[begin:at] = [self.lost[at]] * (at - begin)
            begin = at

    def _columns(self, kept: Sequence[Tensor]) -> Tensor:
        out = self.visual.clone()
        for b, row in enumerate(self.done.rows):
            out[b, self.visual[b].nonzero()[:, 0][kept[row]]] = False
        return out

    def _entry(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # a model without images makes them itself
            embeds = module.embed_tokens(kwargs["input_ids"])
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": embeds}
        planes = kwargs.get("deepstack_visual_embeds")
        whole = [p.new_zeros(*embeds.shape[:2], p.shape[-1]) for p in planes or ()]
        marks = self.adapter.visual(self.done.ids)  # where they are of images, and text is pruned as well
        for s, p in zip(whole, planes or (), strict=True):
            s[:, : self.visual.shape[1]][marks] = p
        if self.done.given is not None:
            embeds = embeds.clone()
            for now, given in zip((embeds, *whole), self.done.given, strict=True):
                rows = given[self.done.rows].to(now.dtype)
                take = self.visual & rows.isfinite().all(-1)
                now[:, : rows.shape[1]][take] = rows[take]
        single, spread = embeds, whole
        for stage in self.done.stages:
            if stage.assignment is None or stage.site.startswith(("vision", "pixels")):
                continue
            if not METHODS.get(stage.method).merges:  # it only carries on who stands for whom
                continue
            if stage.site.startswith("llm.") and _carried(stage, self.done.stages):
                continue
            if METHODS.get(stage.method).fuses:
                continue
            if stage.method in FREE or stage.site != "projector":
                raise NoReference("free mixes, or merges in the language model")  # tests/models/test_views.py
            behind = any(r.assignment is not None for run, _ in self.done.passes for r in run.records)
            if stage.method != "pool" and behind:
                raise NoReference("merges by size behind merges")
            # every slot is the plain mean of all it stands for
            embeds, spread = embeds.clone(), [s.clone() for s in whole]
            for b, row in enumerate(self.done.rows):
                columns, into = self.visual[b].nonzero()[:, 0], stage.assignment[row]
                for slot, k in enumerate(stage.kept[row].tolist()):
                    members = columns[into == slot]
                    embeds[b, columns[k]] = single[b, members].mean(0)
                    for s, w in zip(spread, whole, strict=True):
                        s[b, columns[k]] = w[b, members].mean(0)
        self.planes = spread
        if planes is not None:
            planes = [s[:, : self.visual.shape[1]][marks] for s in spread]
        more = {"deepstack_visual_embeds": planes} if planes is not None else {}
        return args, {**kwargs, **more, "inputs_embeds": embeds}

    def _layer(self, number: int) -> Callable:
        kind = self.adapter.kinds()[number]

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["hidden_states"]
            x = _scaled(x, self.factors[number]) if number in self.factors else x
            if number == 0:
                x = self._fused(x, kwargs)
            t = x.shape[1]
            eye = torch.eye(t, dtype=torch.bool)
            own = kwargs.get("attention_mask")
            seen = (
                torch.ones(t, t, dtype=torch.bool).tril()[None, None]
                if own is None
                else own
                if own.dtype == torch.bool
                else own == 0
            )
            seen = seen.expand(len(x), -1, -1, -1)[:, :1]
            kwargs = dict(kwargs)
            for what, which, gone in self.steps[number]:
                here = {**kwargs, "position_embeddings": self._tables(kwargs, gone, kind, x)}
                if what == "lend":
                    self.lending[which] = x
                elif what == "stash":
                    new = self._branched(which, x, here, seen, gone)
                    still = self._wide(~gone, t)[..., None]
                    self.made[which] = torch.where(still, new, self.made.get(which, new))
                elif what == "weigh":
                    p = self._module(which)(module.input_layernorm(x)).softmax(-1)[..., 1]
                    self.weights[number] = torch.where(self._wide(self.visual & ~gone, t), p, 1)
                elif what == "back":
                    if any(c.passing for s, c in self.done.cuts if s == which) and number <= len(self.planes):
                        self.made[which] = self.made[which] + self.planes[number - 1]
                    x = torch.where(self._wide(self.visual & ~gone, t)[..., None], self.made[which], x)
                elif self.done.stages[which].scores is not None and self.done.stages[which].method in (
                    "fastv",
                    "pyramiddrop",
                ):
                    self._rank(which, number, module, x, here, seen)
            lost, later = (self._wide(gone[number], t)[:, None, None] for gone in (self.lost, self.later))
            answer = torch.arange(t)[:, None] >= self.visual.shape[1]
            seen = seen & ~torch.where(answer, later, lost)
            kwargs["position_embeddings"] = self._tables(kwargs, self.lost[number], kind, x)
            kwargs["attention_mask"] = self._additive(seen, eye, x)
            self.kept_inputs[number] = (x, kwargs, seen)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return enter

    def _fused(self, x: Tensor, kwargs: dict) -> Tensor:
        """Text changed by layers that read it behind all visual tokens of its sample, and compressed tokens."""
        fusing = next(((s, c) for s, c in self.done.cuts if c.action is Action.FUSE), None)
        if fusing is None:
            return x
        if self.done.moving:
            raise NoReference("text fused frame by frame")  # tests/methods/test_llava_mini.py
        method = self.done.methods[fusing[0]]
        kept = next((s.kept for s in self.done.stages if s.method == method.info.name and s.site == "llm.0"), None)
        module, out = self.done.modules[method.info.name], x.clone()
        for b, row in enumerate(self.done.rows):
            visual = self.visual[b].nonzero()[:, 0]
            if not len(visual):
                continue
            order = torch.cat([visual, self._said(b)])
            n = len(order)
            mask = torch.zeros(n, n, dtype=x.dtype).masked_fill(
                ~torch.ones(n, n, dtype=torch.bool).tril(), torch.finfo(x.dtype).min
            )
            h = torch.cat([x[b, visual], x[b, order[len(visual) :]].detach()])[None]  # text has no gradient this way
            for layer in module.fusion:
                kind = self.adapter.kinds()[layer.self_attn.layer_idx]
                if method.numbering == "running":
                    tables = self.adapter.rotary(h, torch.arange(n)[None] + self.adapter.first_position, kind)
                elif kind == self.adapter.kinds()[0]:
                    tables = tuple(
                        (t if len(t) == 1 else t[b : b + 1])[:, order] for t in kwargs["position_embeddings"]
                    )
                else:
                    ids = kwargs["position_ids"]
                    tables = self.adapter.rotary(h, (ids if len(ids) == 1 else ids[b : b + 1])[:, order], kind)
                h = _first(layer(h, attention_mask=mask[None, None], position_embeddings=tables))
            if len(module.fusion):
                out[b, order[len(visual) :]] = h[0, len(visual) :]
            start, left = 0, set(kept[row].tolist())
            for rows, columns in self.done.grids[row]:
                places = range(start, start + rows * columns)
                start += rows * columns
                slots = [i for i in places if i in left]
                if len(places) < method.grid**2:
                    assert slots == list(places)
                    continue
                mine = x[b, visual[places.start : places.stop]]
                mine = mine.float() if mine.dtype == torch.bfloat16 else mine
                weight = module(mine[None].detach(), rows, columns, method.pe, method.scaled)[0]
                out[b, visual[slots]] = (weight.T @ mine).to(x.dtype)
        return out

    def _said(self, b: int) -> Tensor:
        """The columns of a sample's text that a prompt is made of: no padding, and with labels no answer, nothing
        behind the last one; what stands in front of the first is all of it."""
        real = self._real(self.visual.shape[1])[b] & ~self.visual[b]
        columns = real.nonzero()[:, 0].tolist()
        if self.done.labels is None:
            return torch.tensor(columns, dtype=torch.long)
        told = self.done.labels[b].tolist()
        answer = [t != -100 and (i >= len(real) or not bool(self.visual[b, i])) for i, t in enumerate(told)]
        there = self._real(len(told))[b].tolist()
        asks = [i for i in range(len(told) - 1) if answer[i + 1] and not answer[i] and there[i]]
        if not asks:
            return torch.tensor(columns, dtype=torch.long)
        said = [i for i in columns if i <= asks[0] or (i <= asks[-1] and not answer[i])]
        return torch.tensor(said, dtype=torch.long)

    def _distilled(self, stage: int, number: int, layer: Any) -> tuple[Any, dict[str, Any]]:
        """The norm in front of what is lent to ``layer``, and by q, k and v the projections that took the places of its
        own."""
        name = self.done.methods[stage].info.name
        part = self.done.modules.get(f"{name}.{stage}", self.done.modules.get(name))
        if part is None:
            return layer.input_layernorm, {}
        i = number - part.first
        return part.norm[i if len(part.norm) > 1 else 0], {"q": part.q[i], "k": part.k[i], "v": part.v[i]}

    def _lent(self, stage: int, norm: Any) -> Callable:
        """What a projection of a layer is given: what entered the first of them, behind ``norm``; of samples without
        visual tokens the layer's own."""

        def enter(module: nn.Module, args: tuple) -> tuple:
            some = self.visual.any(1)[:, None, None]
            return (torch.where(some, norm(self.lending[stage]), args[0]),)

        return enter

    def _made_by(self, part: Any) -> Callable:
        """What a projection gives where ``part`` stands for it: for samples with visual tokens."""

        def leave(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            weight, bias = part.weight.to(output.dtype), part.bias
            made = nn.functional.linear(args[0], weight, None if bias is None else bias.to(output.dtype))
            return torch.where(self.visual.any(1)[:, None, None], made, output)

        return leave

    @staticmethod
    def _silent(left: list[bool]) -> Callable:
        """What a half of a layer gives, without that of the samples that are ``left`` out."""

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            kept = torch.stack(
                [torch.zeros_like(row) if gone else row for row, gone in zip(_first(output), left, strict=True)]
            )
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        return leave

    def _scale(self, number: int, half: str) -> float:
        """By what the residual stream is multiplied where this half is left out."""
        return next(c.scale for _, c in self.done.cuts if c.site == f"llm.{number}" and c.half == half)

    @staticmethod
    def _times(factor: list[float]) -> Callable:
        """What leaves a layer, each sample times its ``factor``."""

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            rows = _scaled(_first(output), factor)
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        return leave

    def _tables(self, kwargs: dict, lost: Tensor, kind: str, x: Tensor) -> Any:
        """Rotary tables with ``lost`` columns gone: the model's own, or of positions without gaps."""
        if self.done.positions != "compact" or not bool(lost.any()):
            return kwargs["position_embeddings"]
        there = self._real(x.shape[1]) & ~self._wide(lost, x.shape[1])
        return self.adapter.rotary(x, (there.long().cumsum(1) - 1).clamp_min(0), kind)

    @staticmethod
    def _wide(mask: Tensor, t: int) -> Tensor:
        return nn.functional.pad(mask, (0, t - mask.shape[1]))

    @staticmethod
    def _additive(seen: Tensor, eye: Tensor, x: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~(seen | eye), torch.finfo(x.dtype).min)

    def _real(self, t: int) -> Tensor:
        """``[B, t]``: no padding."""
        mask = torch.ones_like(self.visual) if self.done.mask is None else self.done.mask.bool()
        return nn.functional.pad(mask[:, :t], (0, max(t - mask.shape[1], 0)), value=True)

    def _branched(self, stage: int, x: Tensor, kwargs: dict, seen: Tensor, gone: Tensor) -> Tensor:
        """The side branch: its layers over the visual rows, which see each other alone."""
        t = x.shape[1]
        visual = self._wide(self.visual & ~gone, t)
        mask = self._additive(seen & visual[:, None, None], torch.eye(t, dtype=torch.bool), x)
        out = x
        part = self._module(stage)
        for layer in part if isinstance(part, nn.ModuleList) else ():  # else there is none
            made = layer(out, attention_mask=mask, position_embeddings=kwargs["position_embeddings"])
            out = made[0] if isinstance(made, tuple) else made
        return out

    def _module(self, stage: int) -> Any:
        """What the method of a stage has of its own."""
        name = self.done.methods[stage].info.name
        return self.done.modules.get(f"{name}.{stage}", self.done.modules.get(name, ()))

    def _weighed(self, number: int) -> Callable:
        """What a layer's MLP adds, token by token times a router's probability."""

        def leave(module: nn.Module, args: tuple, output: Any) -> Any:
            rows = _first(output)
            if number not in self.weights:
                return None
            rows = rows * self.weights[number][..., None].to(rows.dtype)
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        return leave

    def _rank(self, place: int, number: int, module: Any, x: Tensor, kwargs: dict, seen: Tensor) -> None:
        """Attention of the query rows, mean over heads and rows, from the definitions."""
        stage, method, gone = self.done.stages[place], self.owner[place], self._wide(self.gone[place], x.shape[1])
        layer, seen_by = module, seen & ~gone[:, None, None]
        if stage.method == "fastv" or method.score_layer == "previous":
            if number - 1 not in self.kept_inputs:
                return
            layer = self.adapter.decoder_layers()[number - 1]
            x, kwargs, seen_by = self.kept_inputs[number - 1]
        attention = layer.self_attn
        if getattr(attention, "attn_logit_softcapping", None):
            return
        h = layer.input_layernorm(x)

        def heads(name: str) -> Tensor:
            if hasattr(attention, "qkv_proj"):  # Phi-3: all in one, queries first
                groups = attention.config.num_key_value_heads * attention.head_dim
                y = attention.qkv_proj(h)
                y = y[..., : -2 * groups] if name == "q" else y[..., -2 * groups : -groups]
            else:
                y = getattr(attention, f"{name}_proj")(h)
            y = y.unflatten(-1, (-1, attention.head_dim))
            norm = getattr(attention, f"{name}_norm", None)
            return (y if norm is None else norm(y)).transpose(1, 2)

        q, k = heads("q"), heads("k")
        if method.rope:
            cos, sin = (a[:, None] for a in kwargs["position_embeddings"])

            def turn(y: Tensor) -> Tensor:
                first, rest = y[..., : cos.shape[-1]], y[..., cos.shape[-1] :]
                if self.adapter.pairs:  # neighbouring channels are a complex number
                    by = torch.complex(cos[..., ::2].double(), sin[..., ::2].double())
                    first = (
                        torch.view_as_real(
                            torch.view_as_complex(first.double().unflatten(-1, (-1, 2)).contiguous()) * by
                        )
                        .flatten(-2)
                        .to(y.dtype)
                    )
                else:
                    a, b = first.chunk(2, -1)
                    first = first * cos + torch.cat([-b, a], -1) * sin
                return torch.cat([first, rest], -1)

            q, k = turn(q), turn(k)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        t, prompt = x.shape[1], self.visual.shape[1]
        if method.keys == "visual":
            seen_by = seen_by & self._wide(self.visual, t)[:, None, None]
        logits = (q @ k.transpose(-1, -2)).double() * attention.scaling
        probs = logits.masked_fill(~seen_by, -torch.inf).softmax(-1).nan_to_num().mean(1)
        real = self._real(t)
        out = torch.full(x.shape[:2], torch.nan, dtype=torch.float64)
        for b in range(len(x)):
            there = real[b] & ~gone[b]
            rows = there[:prompt].nonzero()[-1:, 0]
            if getattr(method, "query", "last") == "all":
                if self.done.labels is not None:
                    continue
                rows = there[:prompt].nonzero()[:, 0]
            elif self.done.labels is not None:
                labels = self.done.labels[b]
                starts = ((labels[1:] != -100) & (labels[:-1] == -100)).nonzero()[:, 0]
                if not len(starts) or not bool(there[starts].all()):
                    continue
                rows = starts
            out[b] = probs[b, rows].mean(0)
        self.scores.append((place, out[:, :prompt]))

    # ----------------------------------------------------------------------------------------------------------------
    # tower

    def _tower(self) -> list[tuple[nn.Module, Callable, str]]:
        done, adapter = self.done, self.adapter
        if not done.passes or done.given is not None:
            return []
        if isinstance(done.passes[0][0], PackedRun):
            raise NoReference("images of several sizes in one sequence")
        if any(c.action is Action.INSERT for _, c in done.cuts):
            raise NoReference("tokens of a method's own among the patches")
        blocks, prefix, out = adapter.tower_blocks(), adapter.geometry.prefix, []
        masked, squares = adapter.masked_modules(), done.passes[0][0].squares
        proportional = any(c.proportional for _, c in done.cuts)
        count, n = len(done.passes), done.passes[0][0].tokens
        merges = any(r.assignment is not None for run, _ in done.passes for r in run.records)
        if any(r.site == "pixels" for run, _ in done.passes for r in run.records):
            raise NoReference("reduced pixels")
        if merges and getattr(getattr(adapter, "tower", None), "rope", None) is not None:
            raise NoReference("merges among rotary positions")
        if any(done.methods[r.stage].info.name in FREE for run, _ in done.passes for r in run.records):
            raise NoReference("free mixes")
        nests = next((s for s, cut in done.cuts if cut.action is Action.NEST), None)
        if nests is not None:
            return self._nested(blocks, prefix, squares, nests)
        identity = torch.arange(n)
        state = [
            (identity.clone(), identity.clone()) for _ in range(count)
        ]  # per pass: kept tokens, and each token's place among them (-1: dropped)
        for i, block in enumerate(blocks):
            hidden = torch.ones(count, n, dtype=torch.bool)
            for j, (kept, into) in enumerate(state):
                hidden[j, into >= 0 if proportional else kept] = False
            if bool(hidden.any()):
                if adapter.tower_mask is None:
                    raise NoReference("blocks that take no mask")
                out.append((masked[i], self._hide(_of_patches(hidden, squares), prefix), "before"))
            mixes: list[tuple[bool, Tensor]] = []
            numbers = {k for run, _ in done.passes for k, r in enumerate(run.records) if r.site == f"vision.{i}"}
            for k in sorted(numbers):
                mix, any_merge, inside = torch.eye(n, dtype=torch.float64).repeat(count, 1, 1), False, False
                for j, (run, g) in enumerate(done.passes):
                    record = run.records[k]
                    cut = next(c for stage, c in done.cuts if stage == record.stage and c.site == record.site)
                    kept = record.kept[g]
                    old_kept, old_into = state[j]
                    if record.assignment is None:
                        into = torch.full((n,), -1)
                        into[kept] = torch.arange(len(kept))
                    else:
                        into = record.assignment[g]
                        weighted = cut.data.get("weighted", done.methods[record.stage].info.name != "pool")
                        inside = cut.inside
                        for slot in range(len(kept)):
                            members = (into == slot).nonzero()[:, 0]
                            parts = old_into[members].unique()
                            if len(parts) > 1:
                                any_merge = True
                                weight = torch.tensor(
                                    [float((old_into == p).sum()) if weighted else 1.0 for p in parts.tolist()],
                                    dtype=torch.float64,
                                )
                                mix[j, members] = 0
                                for p, w in zip(parts.tolist(), (weight / weight.sum()).tolist(), strict=True):
                                    mix[j, members, old_kept[p]] = w
                    state[j] = kept, into
                if any_merge:
                    mixes.append((inside, mix if squares is None else _square_by_square(mix, squares)))
            for inside, mix in mixes:
                if inside:
                    norm = next(getattr(block, name) for name in SECOND_NORM if hasattr(block, name))
                    out.append((norm, self._mix_in(mix, prefix), "before"))
                out.append((block, self._mix_out(mix, prefix), "after"))
        return out

    def _nested(self, blocks: list[Any], prefix: int, squares: Tensor | None, stage: int) -> list[Any]:
        """Every token on the expert that the router of the first block's input gives it, by zeros."""
        method = self.done.methods[stage]
        router = self.done.modules[method.info.name]
        chosen: list[list[int]] = []  # of each image and row, how many features it has
        gains: list[list[float]] = []  # and r of its own expert

        def route(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).double()
            w, b, d = router.w.detach().double(), router.b.detach().double(), x.shape[-1]
            chosen.clear()
            gains.clear()
            for image in x:
                patches = image[prefix:]
                tokens = [[i] for i in range(len(patches))] if squares is None else squares.tolist()
                r = [(w @ patches[own].mean(0) + b).softmax(0).tolist() for own in tokens]
                expert = [0] * len(tokens)
                left = set(range(len(tokens)))
                shares = [math.floor(c * len(tokens) + 1e-9) for c in capacities(method.capacity)]
                for j in (3, 2, 1):
                    best = sorted(left, key=lambda t, j=j: (-r[t][j], t))[: shares[j]]
                    left -= set(best)
                    for t in best:
                        expert[t] = j
                features, gain = [d] * len(image), [1.0] * len(image)
                for t, own in enumerate(tokens):
                    for i in own:
                        features[prefix + i] = d >> (3 - expert[t])
                        gain[prefix + i] = r[t][expert[t]]
                chosen.append(features)
                gains.append(gain)

        def cut(x: Tensor) -> Tensor:
            if len(x) != len(chosen):
                raise NoReference("the tower runs more than once")
            out = x.clone()
            for image, features in zip(out, chosen, strict=True):
                for row, d in zip(image, features, strict=True):
                    row[d:] = 0
            return out

        def read(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return (cut(args[0]), *args[1:]), kwargs

        def last(layer: int) -> Callable:
            def leave(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
                alpha = min(max(float(router.alpha[layer]), 0.0), 1 - 2**-10)
                factor = torch.tensor([[1 + alpha * (r if r < 1 else 0) for r in row] for row in gains])
                return cut(output) * factor.to(output)[..., None]

            return leave

        out: list[tuple[nn.Module, Callable, str]] = [(blocks[0], route, "before")]
        for i, block in enumerate(blocks):
            for name, module in block.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                attention, own = name.startswith("att") or name.startswith("self_attn"), name.rpartition(".")[2]
                if own in ("proj", "o_proj", "out_proj", "projection_layer", "dense"):
                    out.append((module, lambda m, a, k, output: cut(output), "after"))
                elif own in ("fc2", "down_proj", "weights_out"):
                    out.append((module, last(i), "after"))
                else:
                    assert attention or own in ("fc1", "fc1_g", "fc1_x", "gate_proj", "up_proj", "weights_in"), name
                    out.append((module, read, "before"))
        return out

    def _hide(self, hidden: Tensor, prefix: int) -> Callable:
        name, form = self.adapter.tower_mask, getattr(self.adapter, "mask_form", None)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["hidden_states"]
            if len(x) != len(hidden):
                raise NoReference("the tower runs more than once")
            mask = nn.functional.pad(
                torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -torch.inf), (prefix, 0)
            )[:, None, None]
            own = args[1] if len(args) > 1 else kwargs.get(name)
            if own is not None:  # what the model hides itself
                mask = mask.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else mask + own
            mask = mask if form is None else form(mask)
            return ((args[0], mask, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, name: mask})

        return enter

    @staticmethod
    def _mixed(mix: Tensor, prefix: int, x: Tensor) -> Tensor:
        if len(x) != len(mix):
            raise NoReference("the tower runs more than once")
        return torch.cat([x[:, :prefix], (mix @ x[:, prefix:].double()).to(x.dtype)], 1)

    def _mix_in(self, mix: Tensor, prefix: int) -> Callable:
        return lambda module, args, kwargs: ((self._mixed(mix, prefix, args[0]), *args[1:]), kwargs)

    def _mix_out(self, mix: Tensor, prefix: int) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._mixed(mix, prefix, output[0]), *output[1:])
            return self._mixed(mix, prefix, output)

        return leave


def _added(layer: Any) -> Any:
    """The part of a layer whose output its MLP's half adds."""
    names = ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _carried(stage: Any, before: Sequence[Any]) -> bool:
    """Whether a stage in the language model merged nothing: each token that it kept stands for what it stood for behind
    the projector."""
    entry = next((s for s in before if s.site == "projector" and s.assignment is not None), None)
    if entry is None:
        return False

    def stood(told: Any, b: int) -> dict[int, list[int]]:
        return {k: (told.assignment[b] == i).nonzero()[:, 0].tolist() for i, k in enumerate(told.kept[b].tolist())}

    rows = range(len(stage.kept))
    return all(stood(entry, b)[k] == members for b in rows for k, members in stood(stage, b).items())


def _scaled(x: Tensor, factor: list[float]) -> Tensor:
    return torch.stack([(row.double() * f).to(x.dtype) for row, f in zip(x, factor, strict=True)])


def _of_patches(hidden: Tensor, squares: Tensor | None) -> Tensor:
    """``hidden`` ``[G, N]`` of tokens as that of their patches, in the order of the raster; ``squares`` ``[N, m]``."""
    if squares is None:
        return hidden
    out = hidden.new_zeros(len(hidden), squares.numel())
    for token, patches in enumerate(squares.tolist()):
        out[:, patches] = hidden[:, token : token + 1]
    return out


def _square_by_square(mix: Tensor, squares: Tensor) -> Tensor:
    """``mix`` ``[G, N, N]`` of tokens as that of their patches: those in the same places of their squares are mixed."""
    out = mix.new_zeros(len(mix), squares.numel(), squares.numel())
    for place in squares.T:
        out[:, place[:, None], place] = mix
    return out
