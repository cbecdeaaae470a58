"""``vtprune analyze flow``: where in a language model information flows from the image to the answer.

Attention knock-out after "Cross-modal Information Flow in Multimodal Large Language Models" (arXiv 2411.18620): rows
of one part of the prompt may not read another part within a window of layers, and what the answer loses is measured.
Beside it, layer by layer, the logit lens, how much text attends to the image, how far below the picture's middle
(arXiv 2412.13180 saw that FastV's criterion keeps the bottom), how much visual rows still change, and what withdrawing
the image from that layer on costs (the saturation of arXiv 2606.09131).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine.host import backend
from vtprune.models.engine.masked import block_in_decoder

from ..core.ledger import UndoLedger
from ..core.planning import bind
from ..core.recipe import Recipe, Stage
from ..core.types import UnsupportedError, VtpruneError
from ..inputs.chats import generate, prepare
from .environment import environment
from .fit import divergence
from .samples import Sample, matches

FLOWS = ("image->question", "image->last", "question->last", "last->last")
WINDOW = 9  # layers of 32, the paper's
NUMBERS = ("lens", "visual_lens", "to_image", "row_bias", "cosine", "withdrawn")  # layer by layer


def window_of(layers: int) -> int:
    """The paper's window in proportion, odd."""
    return max(round(WINDOW * layers / 32), 1) | 1


def places(adapter: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parts of each prompt as masks ``[B, T]``: ``image`` (visual tokens), ``question`` (text behind the first of them,
    but for the last token), ``last``, and ``all`` real tokens."""
    ids = inputs["input_ids"]
    real = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else torch.ones_like(ids).bool()
    image = adapter.prunable(inputs) & real
    column = torch.arange(ids.shape[1], device=ids.device)
    last = column == torch.where(real, column, -1).amax(1, keepdim=True)
    behind = real & ~image & (image.cumsum(1) > 0)
    return {"image": image, "question": behind & ~last, "last": last, "all": real}


def blocked(parts: Mapping[str, Tensor], flow: str) -> Tensor:
    """``[B, T, T]``: what row b of the second part of ``flow`` (``"a->b"``) may not read of the first. Raises
    :class:`VtpruneError` for a flow between parts that are not known."""
    source, _, target = flow.partition("->")
    if source not in parts or target not in parts:
        raise VtpruneError(f"flow {flow!r} must lead from one to another of {', '.join(parts)}, as in {FLOWS[0]!r}")
    return parts[target][:, :, None] & parts[source][:, None]


@contextmanager
def encoded_once(model: Any) -> Iterator[None]:
    """Within it, encoders answer as they did the first time when they are given the same tensors."""
    ledger, core = UndoLedger(), model.base_model

    def once(original: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[tuple[int, ...], tuple[Any, Any]] = {}

        def encode(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            key = tuple(id(g) if isinstance(g, Tensor) else hash(str(g)) for g in given)
            if key not in known:
                known[key] = (given, original(*args, **kwargs))  # what was given stays alive with its id
            return known[key][1]

        return encode

    try:
        for name in bind(model).encoders():
            ledger.replace(core, name, once(getattr(core, name)))
        yield
    finally:
        ledger.undo()


def knocked_out(model: Any, inputs: Mapping[str, Any], pairs: Tensor, layers: Sequence[int]) -> Tensor:
    """Logits ``[B, V]`` at each prompt's last token if in ``layers`` the ``pairs`` ``[B, T, T]`` are blocked."""
    adapter = bind(model)
    return _blocked_run(model, inputs, adapter.decoder_layers(), places(adapter, inputs)["last"], pairs, layers)


@torch.no_grad()
def _blocked_run(
    model: Any, inputs: Mapping[str, Any], every: Sequence[Any], last: Tensor, pairs: Tensor, layers: Sequence[int]
) -> Tensor:
    """As :func:`knocked_out`, of a model with the decoder layers ``every`` and a batch whose last tokens are known."""
    ledger = UndoLedger()
    try:
        if layers and bool(pairs.any()):
            block_in_decoder(ledger, {i: every[i] for i in layers}, pairs)
        out = model(**inputs, use_cache=False).logits
    finally:
        ledger.undo()
    return out[last.to(out.device)].float()


def windows(layers: int, window: int) -> list[range]:
    """Of each layer the ``window`` layers around it, fewer at both ends. Raises :class:`VtpruneError` unless it is an
    odd number of at least 1."""
    if window < 1 or window % 2 == 0:
        raise VtpruneError(f"window={window} must be odd and at least 1")
    return [range(max(0, i - window // 2), min(layers, i + window // 2 + 1)) for i in range(layers)]


def knockout(
    model: Any, inputs: Mapping[str, Any], flows: Sequence[str] = FLOWS, *, window: int | None = None
) -> Tensor:
    """``[flows, L, B]``: by how much the probability of each prompt's own next token changes, in percent of it, if a
    flow is blocked in the ``window`` layers around each layer.

    Raises :class:`VtpruneError` for unknown flows or windows, :class:`UnsupportedError` for flash attention, whose
    masks cannot say this, and for a bare vision tower.
    """
    adapter = bind(model)
    layers = adapter.geometry.llm_layers
    if layers == 0:
        raise UnsupportedError(f"{adapter.geometry.family} has no language model for information to flow through")
    if backend(adapter.lm.config).startswith("flash"):
        raise UnsupportedError("flash attention takes no mask for single pairs: load the model with sdpa or eager")
    parts, spans = places(adapter, inputs), windows(layers, window_of(layers) if window is None else window)
    run = partial(_blocked_run, model, inputs, adapter.decoder_layers(), parts["last"])
    base = run(blocked(parts, FLOWS[0]), ()).softmax(-1)
    token = base.argmax(-1, keepdim=True)
    p = base.gather(1, token)[:, 0]
    out = []
    for flow in flows:
        pairs = blocked(parts, flow)
        changed = {span: run(pairs, span).softmax(-1).gather(1, token)[:, 0] for span in dict.fromkeys(spans)}
        out.append(torch.stack([100 * (changed[span] - p) / p for span in spans]))
    return torch.stack(out)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Within it, attentions can be read."""
    before = [(m, backend(m.config)) for m in model.modules() if hasattr(m, "set_attn_implementation")]
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for part, how in before:
            part.set_attn_implementation({"": how})  # of this part alone: the others need not know it


def _heights(adapter: Any, inputs: Mapping[str, Any]) -> Tensor:
    """``[T]``: how far down its raster each visual token of the first prompt is, the middles of rows between 0 (top)
    and 1."""
    out = torch.zeros(inputs["input_ids"].shape[1])
    for span in adapter.parts(inputs["input_ids"], dict(inputs))[0]:
        rows, columns = span.grid
        out[span.columns.cpu()] = ((torch.arange(rows) + 0.5) / rows).repeat_interleave(columns)
    return out.to(inputs["input_ids"].device)


@torch.no_grad()
def layer_by_layer(model: Any, inputs: Mapping[str, Any]) -> dict[str, list[float]]:
    """For one prompt, layer by layer: ``lens`` the probability that the last token's state behind the layer gives to
    the model's own answer (final norm and head), ``visual_lens`` the mean of the visual rows', ``to_image`` the share
    of the question's and the last token's attention that goes to the image, ``row_bias`` how much lower that share
    lies than an even spread, in heights of the raster (-0.5: all in the first row of many, 0.5: all in the last; of a
    text its tokens are the rows), ``cosine`` of each visual row in front of and behind the layer, mean, and
    ``withdrawn`` the divergence (KL, nats) of the answer's distribution if from this layer on nobody reads the
    image."""
    adapter = bind(model)
    parts = places(adapter, inputs)
    layers = adapter.geometry.llm_layers
    raw: list[Tensor] = []  # what the last layer leaves: the last of the states has been through the final norm
    ledger = UndoLedger()
    try:
        ledger.before(adapter.lm.norm, lambda module, args, kwargs: raw.append(args[0]))
        with _eager(model):
            out = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
    finally:
        ledger.undo()
    states: list[Tensor] = list(out.hidden_states)
    states[-1] = raw[0]
    head, image, last = model.get_output_embeddings(), parts["image"], parts["last"]
    text = (parts["question"] | last)[0]
    logits = out.logits[last].float()
    token, whole = int(logits.argmax()), logits.log_softmax(-1)
    every, pairs = adapter.decoder_layers(), blocked({**parts, "rest": parts["all"] & ~image}, "image->rest")
    lower = _heights(adapter, inputs)[image[0]]
    told: dict[str, list[float]] = {name: [] for name in NUMBERS}
    for i in range(layers):
        before, behind = states[i][0].float(), states[i + 1][0]
        for name, rows in (("lens", last[0]), ("visual_lens", image[0])):
            told[name].append(float(head(adapter.lm.norm(behind[rows])).float().softmax(-1)[:, token].mean()))
        share = out.attentions[i][0].float().mean(0)[text][:, image[0]].mean(0)
        told["to_image"].append(float(share.sum()))
        told["row_bias"].append(float(share @ (lower - lower.mean()) / share.sum()))
        same = torch.nn.functional.cosine_similarity(before[image[0]], behind[image[0]].float(), dim=-1)
        told["cosine"].append(float(same.mean()))
        left = _blocked_run(model, inputs, every, last, pairs, range(i, layers)).log_softmax(-1)
        told["withdrawn"].append(max(float(divergence(whole, left)), 0.0))
    return told


def flow(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    flows: Sequence[str] = FLOWS,
    window: int | None = None,
    command: str = "",
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Knock-outs and layer-by-layer numbers over the ``samples`` that the model answers correctly, per ability.

    Returns:
        A JSON-safe dict of ``"type": "vtprune.Flow"``: ``layers``, ``window``, ``abilities``: for each, and for ``all``
        together, ``asked`` and ``correct`` questions, and by name of a flow or number ``mean`` and ``half`` (half the
        width of the 95 % interval of the mean, ``None`` for a single question), one per layer.

    Raises:
        VtpruneError: no samples, none that the model answers, or what :func:`knockout` refuses.
    """
    if not samples:
        raise VtpruneError("there are no questions to follow")
    layers = bind(model).geometry.llm_layers
    chosen = window_of(layers) if window is None else window
    windows(layers, chosen)
    asked: dict[str, int] = {}
    told: dict[str, list[dict[str, list[float]]]] = {}
    for sample in samples:
        asked[sample.ability] = asked.get(sample.ability, 0) + 1
        inputs = prepare(processor, [sample.shown()], [sample.question]).to(model.device, model.dtype)
        if matches(generate(model, processor, inputs)[0], sample.answer):
            with encoded_once(model):
                lost = knockout(model, inputs, flows, window=chosen)[..., 0]
                one = {**dict(zip(flows, lost.tolist(), strict=True)), **layer_by_layer(model, inputs)}
            told.setdefault(sample.ability, []).append(one)
        if progress is not None:
            progress(1)
    if not told:
        raise VtpruneError(f"the model answers none of {len(samples)} questions, so nothing can be followed")
    groups = {**told, "all": [one for ones in told.values() for one in ones]}
    abilities = {
        name: {"asked": asked.get(name, len(samples)), "correct": len(ones)}
        | {key: _means([one[key] for one in ones]) for key in ones[0]}
        for name, ones in groups.items()
    }
    facts = {"type": "vtprune.Flow", "version": 1, "command": command, **environment(model)}
    return {**facts, "layers": layers, "window": chosen, "flows": list(flows), "abilities": abilities}


def _means(rows: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """Per layer the mean over questions, and half the width of its interval (normal approximation)."""
    n, columns = len(rows), list(zip(*rows, strict=True))
    mean = [sum(c) / n for c in columns]
    spread = [sum((v - m) ** 2 for v in c) / max(n - 1, 1) for c, m in zip(columns, mean, strict=True)]
    half = [1.96 * math.sqrt(s / n) if n > 1 else None for s in spread]
    return {"mean": [round(m, 6) for m in mean], "half": [None if h is None else round(h, 6) for h in half]}


def suggest(told: Mapping[str, Any], *, tolerance: float = 0.05, ability: str = "all") -> dict[str, Any]:
    """Schedules for this model from what :func:`flow` has told: ``pyramiddrop`` with a cut in front of the first layer
    from which on the image is worth at most 1/2, 1/4 and 1/8 of what it is worth to the whole stack (by ``withdrawn``),
    each leaving that share of the tokens; ``vtw`` and ``dpvr-lf`` with the first layer from which on withdrawing the
    image costs at most ``tolerance`` of that.

    Returns:
        by name of the method a dict with the ``recipe``, the ``share`` of effective tokens that it leaves, and
        ``expects`` in a sentence; a method for which there is no such layer is left out.

    Raises:
        VtpruneError: a ``tolerance`` outside of (0, 1), an unknown ability, or an image that is worth nothing.
    """
    if not 0 < tolerance < 1:
        raise VtpruneError(f"tolerance={tolerance} must be above 0 and below 1")
    if ability not in told["abilities"]:
        raise VtpruneError(f"no ability {ability!r}; there are {', '.join(told['abilities'])}")
    worth = told["abilities"][ability]["withdrawn"]["mean"]
    layers = len(worth)
    if worth[0] <= 0:
        raise VtpruneError("withdrawing the image changes nothing on these questions, so nothing can be suggested")

    def first(share: float) -> int | None:
        """The first layer, above 0, from which on the image is worth at most ``share``."""
        good = (i for i in range(1, layers) if all(w <= share * worth[0] for w in worth[i:]))
        return next(good, None)

    out: dict[str, Any] = {}
    cuts: dict[int, float] = {}
    for share in (0.5, 0.25, 0.125):
        at = first(share)
        if at is not None:
            cuts[at] = share  # several in front of one layer are one, the smallest
    if cuts:
        counts = [min((s for at, s in cuts.items() if at <= i), default=1.0) for i in range(layers)]
        options = {"layers": list(cuts), "ratios": list(cuts.values())}
        out["pyramiddrop"] = _suggestion(
            "pyramiddrop",
            options,
            sum(counts) / layers,
            "each cut leaves what the image "
            f"is still worth behind it: {', '.join(f'{100 * s:g} % from layer {at} on' for at, s in cuts.items())}",
        )
    at = first(tolerance)
    if at is not None:
        left = f"withdrawing the image from layer {at} on costs {worth[at]:.3g} of {worth[0]:.3g} nats"
        out["vtw"] = _suggestion("vtw", {"layer": at}, at / layers, left)
        if at < layers - 1:
            out["dpvr-lf"] = _suggestion("dpvr-lf", {"split": at}, (at + 1) / layers, left)
    return out


def _suggestion(method: str, options: dict[str, Any], share: float, expects: str) -> dict[str, Any]:
    recipe = Recipe(name=f"{method}-suggested", stages=(Stage(method=method, options=options),))
    return {"recipe": recipe.to_dict(), "share": round(share, 4), "expects": expects}
