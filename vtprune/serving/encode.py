"""``vtprune.encode``: the rows of the prompt that a recipe leaves, without the language model that reads them."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine import host
from vtprune.models.engine.request import Call

from ..check.attach import attach
from ..core.composition import Planned
from ..core.handle import Handle
from ..core.ledger import UndoLedger
from ..core.planning import plan_for
from ..core.recipe import Recipe
from ..core.types import Geometry, UnsupportedError, VtpruneError
from .encoded import Encoded, Item, signature
from .placed import AXES

PER_TOKEN = ("input_ids", "attention_mask", "position_ids")


def encode(model: Any, recipe: str | os.PathLike | Recipe, inputs: dict[str, Any], **overrides: Any) -> Encoded:
    """Runs tower, projector and a recipe that ends before the language model, and hands over what is left: prompts
    that the unpatched model, in this process or another, answers as the attached one does.

    Args:
        model: as for :func:`attach`, not attached.
        recipe: name, path or :class:`Recipe`; all its stages in the tower or behind the projector.
        inputs: what the model is called with: a batch of prompts, ``input_ids`` and ``attention_mask`` ``[B, T]``,
            pixels, and what the family's processor returns besides.
        **overrides: as for :func:`attach`.

    Raises:
        VtpruneError: as :func:`attach`; prompts without an image.
        UnsupportedError: a stage inside the language model; a model whose forward takes no encoded images; layers with
            sliding windows that the prompt is longer than.
    """
    with Encoder(model, recipe, **overrides) as encoder:
        return encoder(inputs)


class Encoder:
    """A model with a recipe attached that ends before the language model: called with inputs as :func:`encode` is, any
    number of times. Arguments and errors are those of :func:`encode`; leaving its context restores the model."""

    def __init__(self, model: Any, recipe: str | os.PathLike | Recipe, **overrides: Any):
        self.compact = overrides.get("positions") == "compact"
        self.handle = attach(model, recipe, **overrides)
        try:
            check_stages(self.handle.geometry, self.handle.recipe, overrides.get("per"))
            _check(self.handle)
        except VtpruneError:
            self.handle.remove()
            raise

    def __call__(self, inputs: dict[str, Any]) -> Encoded:
        """The prompts ``inputs``, encoded."""
        with torch.no_grad():
            return _Reading(self.handle, inputs, compact=self.compact).encoded()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


def check_stages(geometry: Geometry, recipe: Recipe, per: str | None) -> None:
    """Raises :class:`UnsupportedError` for a recipe that does not end before the language model."""
    if not geometry.llm_layers:
        raise UnsupportedError(f"{geometry.family} has no language model to encode for; attach the recipe")
    stages = plan_for(geometry, recipe, per)
    first = next((n for n, (*_, cuts) in enumerate(stages) if any(c.kind == "llm" for c in cuts)), None)
    if first is not None:
        raise UnsupportedError(_inside(stages, first))


def _check(handle: Handle) -> None:
    """Raises :class:`UnsupportedError` for a model whose forward takes no encoded images."""
    root = handle.adapter.decoder.decoder.root
    if not host.takes_encoded(root):
        raise UnsupportedError(
            f"{type(root).__name__} of transformers {host.release()} takes no encoded images ({host.ENCODED}); attach "
            "the recipe"
        )


def _inside(stages: list[Planned], first: int) -> str:
    """Why a recipe whose stage ``first`` cuts in the language model is not encoded, and what of it can be."""
    stage, _, cuts = stages[first]
    site = next(c.site for c in cuts if c.kind == "llm")
    ahead = [s.method for s, *_ in stages[:first]]
    rest = f"encode what stands in front of it ({', '.join(ahead)})" if ahead else "attach the recipe"
    return f"{stage.method} cuts inside the language model ({site}), which an encoder does not run: {rest}"


class _Arrived(Exception):
    """The prompt has come to the language model's first layer, and goes no further."""


class _Reading:
    """One forward of an attached model, up to the first layer of its language model."""

    def __init__(self, handle: Handle, inputs: dict[str, Any], *, compact: bool):
        self.handle, self.inputs, self.compact = handle, inputs, compact
        self.engine = handle.adapter.decoder
        self.decoder = self.engine.decoder
        self.core = self.decoder.core if self.decoder.core is not None else self.decoder.root.base_model
        self.thread = threading.get_ident()  # forwards of others are not ours
        self.call: Call | None = None
        self.given: dict[str, Any] = {}  # what the language model was called with
        self.forms: dict[str, tuple[str, ...]] = {}  # by modality, how its encoder returns rows
        self.beside: dict[str, dict[str, Tensor]] = {}  # and what else its output carries
        self.ledger = UndoLedger()

    def encoded(self) -> Encoded:
        self._check_inputs()
        self.ledger.before(self.decoder.lm, self._enter)
        self.ledger.before(self.decoder.layers[0], self._stop)
        for kind, name in self._encoders().items():
            self.ledger.replace(self.core, name, self._kept(kind, getattr(self.core, name)))
        try:
            self.decoder.root(**self.inputs)
        except _Arrived:
            return self._made()
        finally:
            self.ledger.undo()
        raise UnsupportedError(f"{type(self.decoder.root).__name__} did not call the first layer of its language model")

    def _encoders(self) -> dict[str, str]:
        return {kind: name for kind, name in host.ENCODERS.items() if hasattr(self.core, name)}

    def _check_inputs(self) -> None:
        ids = self.inputs.get("input_ids")
        if ids is None or not bool(self.decoder.visual(ids).any()):
            raise VtpruneError("there is no image in these inputs: input_ids hold no placeholder of one")
        if self.inputs.get("labels") is not None:
            raise VtpruneError("encoded prompts have no labels: attach the recipe to train, or leave them out")
        known = {*PER_TOKEN, *self.handle.adapter.follows, *self._sizes()}
        strange = [k for k, v in self.inputs.items() if isinstance(v, Tensor) and k not in known and v.ndim]
        if strange:
            raise UnsupportedError(f"it is not known what {strange[0]} is, or how to shorten it")

    def _sizes(self) -> set[str]:
        """Inputs that the encoders read, which nothing behind them needs."""
        return {n for name in self._encoders().values() for n in inspect.signature(getattr(self.core, name)).parameters}

    def _kept(self, kind: str, original: Callable) -> Callable:
        def encoder(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.forms[kind], self.beside[kind] = host.form(output), host.beside(output)
            return output

        encoder.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return encoder

    def _enter(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            self.call, self.given = self.engine.call, kwargs

    def _stop(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            raise _Arrived

    # ---------------------------------------------------------------------------------------------- what is left of it

    def _made(self) -> Encoded:
        call = self.call
        assert call is not None and call.request is not None and call.level is not None and call.visual is not None
        self.engine.cuts.count(call, self.engine.depth)
        report = self.handle.report_of(call.request)
        level, ids = call.level, self.inputs["input_ids"]
        rows, valid = level.rows.to(ids.device), level.valid.to(ids.device)
        self._check_windows(call)
        stays = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, rows, valid)

        def short(values: Tensor, padding: int) -> Tensor:
            return values.gather(1, rows).masked_fill(~valid, padding)

        items = tuple(self._item(b, c, kind, stays) for b, c, kind in _images(call))
        along = {k: self.inputs[k] for k in self.handle.adapter.follows if k in self.inputs}
        return Encoded(
            input_ids=short(ids, self._padding(call)),
            attention_mask=valid.long(),
            position_ids=self._positions(call, rows, valid),
            along={k: short(v, 0) for k, v in along.items()},
            items=items,
            forms={kind: self.forms[kind] for kind in dict.fromkeys(i.kind for i in items)},
            beside={f"{kind}.{n}": v.clone() for kind, more in self.beside.items() for n, v in more.items()},
            kept=list(report.stages[-1].kept) if report.stages else [torch.arange(n) for n in report.visual_tokens],
            told=report,
            model=signature(self.decoder.root),
        )

    def _check_windows(self, call: Call) -> None:
        """A layer with a sliding window counts, in the shortened prompt, the columns that are left: what lies further
        back than that in the whole one has to be out of its reach all the same."""
        assert call.level is not None and call.request is not None
        windows = [w for i in range(len(self.decoder.layers)) if (w := self.decoder.window_of(i)) is not None]
        if not windows or call.level.dense:
            return
        reach, length = min(windows), call.request.length
        if length >= reach:
            raise UnsupportedError(
                f"the language model has layers with windows of {reach} tokens and the prompt has {length}: windows "
                "over the shortened prompt would reach further; attach the recipe"
            )
        warnings.warn(
            f"the language model has layers with windows of {reach} tokens: answers of up to {reach - length} tokens "
            "are those of the attached model, in longer ones these layers see further back",
            stacklevel=6,
        )

    def _padding(self, call: Call) -> int:
        """A token for padded columns that stands for no picture."""
        config = self.decoder.lm.config
        known = getattr(config, "pad_token_id", None)
        wanted = known if isinstance(known, int) else 0
        ids = torch.arange(wanted, wanted + 16, device=self.inputs["input_ids"].device)[None]
        return int(ids[0][~self.decoder.visual(ids)[0]][0])

    def _positions(self, call: Call, rows: Tensor, valid: Tensor) -> Tensor:
        """``[B, T']``, or ``[3 or 4, B, T']`` of families with several axes: where the tokens that are left stood in
        the whole prompt, or in compact form."""
        assert call.level is not None
        if self.compact and not call.level.dense:
            return (valid.long().cumsum(1) - 1).clamp_min(0)
        full = self._whole.to(rows.device)
        index = rows.expand(*full.shape[:-2], *rows.shape)
        return full.gather(-1, index).masked_fill(~valid, 0)

    @cached_property
    def _whole(self) -> Tensor:
        """Those of the whole prompt, ``[B, T]`` or ``[3 or 4, B, T]``."""
        ids, full = self.inputs["input_ids"], self.given.get("position_ids")
        if full is None:
            mask = self.inputs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            full = (mask.long().cumsum(1) - 1).clamp_min(0) + self.decoder.first_position
        return full.expand(*full.shape[:-2], *ids.shape)

    def _place(self, sample: int, columns: Tensor, left: Tensor) -> tuple[Tensor, int]:
        """Of an image whose placeholders are the ``columns`` ``[n]``: by axis, how far behind its first position those
        ``left`` ``[K]`` of them stand, ``[3, K]``, and how many positions it takes."""
        if self.compact:
            return torch.arange(len(left)).expand(AXES, -1).contiguous(), len(left)
        full = self._whole[..., sample, :].cpu()
        full = full.expand(AXES, -1) if full.ndim == 1 else full[-AXES:]
        own = full[:, columns.cpu()]
        first = int(own.min())
        return full[:, left.cpu()] - first, int(own.max()) - first + 1

    def _item(self, sample: int, columns: Tensor, kind: str, stays: Tensor) -> Item:
        """One image or video: its placeholders are the ``columns`` ``[n]`` of the prompt."""
        assert self.call is not None and self.call.visual is not None
        embeds, planes = self.given["inputs_embeds"], self.given.get(host.PLANES) or ()
        left = columns.to(stays.device)[stays[sample, columns.to(stays.device)]].to(embeds.device)
        number = self.call.visual.flatten().cumsum(0).view_as(self.call.visual) - 1  # its row in the planes
        at = number.to(embeds.device)[sample, left]
        offsets, span = self._place(sample, columns, left)
        rows = embeds[sample, left].clone()
        return Item(sample, kind, rows, tuple(p[at.to(p.device)].clone() for p in planes), offsets, span)


def _images(call: Call) -> list[tuple[int, Tensor, str]]:
    """Of every image and video, in the prompts' order: its sample, its placeholders' columns and what it is."""
    found: dict[tuple[int, str, int], list[Tensor]] = {}
    for b, spans in enumerate(call.parts):
        for span in spans:
            key = (b, "video", span.video) if span.video >= 0 else (b, "image", span.image)
            found.setdefault(key, []).append(span.columns)
    return [(b, torch.cat(columns), kind) for (b, kind, _), columns in found.items()]
