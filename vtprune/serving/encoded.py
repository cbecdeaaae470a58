"""Encoded prompts: what :func:`vtprune.encode` returns, in memory and in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune.models.engine import host

from ..core.report import Report, StageReport
from ..core.types import VtpruneError
from ..version import __version__
from .placed import placed

FORMAT, VERSION = "vtprune.Encoded", 2


@dataclass(frozen=True)
class Item:
    """One image or video.

    Attributes:
        sample: the prompt that it is in.
        kind: ``"image"`` or ``"video"``.
        rows: what the language model reads in its place, ``[K, C]``.
        planes: what DeepStack adds to its rows behind early layers, each ``[K, C]``.
        offsets: by axis, how far behind the image's first position each row stands, ``[3, K]``.
        span: positions that the whole image takes (with compact positions K).
    """

    sample: int
    kind: str
    rows: Tensor
    planes: tuple[Tensor, ...]
    offsets: Tensor
    span: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of prompts whose images are encoded and pruned. T' is the longest one's length behind it; padding stands
    in front.

    Attributes:
        input_ids: as many placeholders of an image as rows are left of it, ``[B, T']``.
        attention_mask: ``[B, T']``.
        position_ids: ``[B, T']``, or ``[axes, B, T']`` of families with several axes.
        along: what else the family's processor gives for every token, ``[B, T']`` each.
        items: images and videos, in the prompts' order.
        forms: by kind, how the family hands such rows and planes over (:func:`vtprune.models.engine.host.form`).
        beside: what else its encoders' outputs carry, as ``KIND.NAME``.
        kept: per sample, ascending indices into its visual tokens of the dense model.
        told: what :meth:`report` answers.
        model: what a model must have in common with the one that encoded.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    along: Mapping[str, Tensor]
    items: tuple[Item, ...]
    forms: Mapping[str, tuple[str, ...]]
    beside: Mapping[str, Tensor]
    kept: list[Tensor]
    told: Report
    model: Mapping[str, Any]

    @property
    def embeds(self) -> tuple[Tensor, ...]:
        """What stands for each image or video, ``[K, C]``, in the prompts' order: encoded images as engines take
        them."""
        return tuple(item.rows for item in self.items)

    @property
    def placed(self) -> tuple[Tensor, ...]:
        """:attr:`embeds` that say where they stand, with DeepStack's planes behind each row, ``[K, W + CHANNELS]``: for
        an engine with vtprune's plug-in (:mod:`vtprune.serving.placed`)."""
        return tuple(placed(torch.cat([i.rows, *i.planes], 1), i.offsets.to(i.rows.device), i.span) for i in self.items)

    @property
    def positions(self) -> Tensor:
        """:attr:`position_ids`: where each token stood in the whole prompt, or in compact form."""
        return self.position_ids

    @property
    def inputs(self) -> dict[str, Any]:
        """What the unpatched model's forward and ``generate`` take, fresh for every call."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            **self.along,
            host.ENCODED: {
                kind: host.encoded(
                    [i.rows for i in self.items if i.kind == kind],
                    [i.planes for i in self.items if i.kind == kind],
                    forms,
                    {n.partition(".")[2]: v for n, v in self.beside.items() if n.partition(".")[0] == kind},
                )
                for kind, forms in self.forms.items()
            },
        }

    def report(self) -> Report:
        """What tower and projector did, and what the language model will read. Of a loaded file without scores."""
        return self.told

    def to(self, *args: Any, **kwargs: Any) -> Encoded:
        """On another device; another dtype for the rows alone, as :meth:`torch.Tensor.to` takes them."""

        def moved(t: Tensor) -> Tensor:
            there = t.to(*args, **kwargs)
            return there if t.is_floating_point() else t.to(there.device)

        return dataclasses.replace(
            self,
            input_ids=moved(self.input_ids),
            attention_mask=moved(self.attention_mask),
            position_ids=moved(self.position_ids),
            along={k: moved(v) for k, v in self.along.items()},
            beside={k: moved(v) for k, v in self.beside.items()},
            items=tuple(
                dataclasses.replace(i, rows=moved(i.rows), planes=tuple(map(moved, i.planes))) for i in self.items
            ),
        )

    # ---------------------------------------------------------------------------------------------------------- a file

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file with what it belongs to in its header.

        Raises:
            VtpruneError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = self._tensors()
        head = {
            "type": FORMAT,
            "version": VERSION,
            "vtprune": __version__,
            "model": dict(self.model),
            "forms": dict(self.forms),
            "along": list(self.along),
            "beside": list(self.beside),
            "items": [
                {"sample": i.sample, "kind": i.kind, "planes": len(i.planes), "span": i.span} for i in self.items
            ],
            "report": self.told.to_dict(),
            "digest": _digest(tensors),
        }
        text = json.dumps(head, sort_keys=True)
        try:
            save_file(tensors, os.fspath(path), {"encoded": text, "digest": hashlib.sha256(text.encode()).hexdigest()})
        except (SafetensorError, OSError) as e:
            raise VtpruneError(f"cannot write {path}: {e}") from e

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any = None) -> Encoded:
        """Reads a file of :meth:`save`.

        Args:
            path: the file.
            model: that is to answer; checked against the one that encoded.

        Raises:
            VtpruneError: no such file, not one of these, changed since it was written, of a newer version, or made
                with another model.
        """
        head, tensors = _read(Path(path))
        try:
            made = cls._from(head, tensors)
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise VtpruneError(f"{path} lacks a part of encoded prompts: {e}") from e
        if model is not None:
            made.check(model)
        return made

    def check(self, model: Any) -> None:
        """Raises :class:`VtpruneError` for a model that these prompts were not encoded for."""
        mine = signature(model)
        for name, value in self.model.items():
            if mine[name] != value:
                raise VtpruneError(
                    f"these prompts were encoded for a model whose {name} is {value}, and this one's is {mine[name]}"
                )

    def _tensors(self) -> dict[str, Tensor]:
        out = {n: getattr(self, n) for n in ("input_ids", "attention_mask", "position_ids")}
        out |= {f"along.{k}": v for k, v in self.along.items()}
        out |= {f"beside.{k}": v for k, v in self.beside.items()}
        for n, item in enumerate(self.items):
            out[f"item.{n}.rows"], out[f"item.{n}.offsets"] = item.rows, item.offsets
            out |= {f"item.{n}.plane.{p}": plane for p, plane in enumerate(item.planes)}
        return {k: v.detach().cpu().contiguous() for k, v in out.items()}

    @classmethod
    def _from(cls, head: dict[str, Any], tensors: dict[str, Tensor]) -> Encoded:
        told = _report(head["report"])
        items = tuple(
            Item(
                i["sample"],
                i["kind"],
                tensors[f"item.{n}.rows"],
                tuple(tensors[f"item.{n}.plane.{p}"] for p in range(i["planes"])),
                tensors[f"item.{n}.offsets"],
                i["span"],
            )
            for n, i in enumerate(head["items"])
        )
        return cls(
            input_ids=tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            position_ids=tensors["position_ids"],
            along={k: tensors[f"along.{k}"] for k in head["along"]},
            beside={k: tensors[f"beside.{k}"] for k in head["beside"]},
            items=items,
            forms={kind: tuple(forms) for kind, forms in head["forms"].items()},
            kept=list(told.stages[-1].kept) if told.stages else [torch.arange(n) for n in told.visual_tokens],
            told=told,
            model=head["model"],
        )


def signature(model: Any) -> dict[str, Any]:
    """What a model must have in common with the one that encoded for it."""
    text = model.config.get_text_config()
    return {
        "class": type(model).__name__,
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        sha.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Head and tensors of a file. Raises :class:`VtpruneError` for one that :meth:`Encoded.save` did not write so."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise VtpruneError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as e:
        raise VtpruneError(f"{path} is no safetensors file, or not a whole one: {e}") from e
    text = meta.get("encoded")
    if text is None:
        raise VtpruneError(f"{path} holds no encoded prompts")
    if hashlib.sha256(text.encode()).hexdigest() != meta.get("digest"):
        raise VtpruneError(f"{path} was changed since it was written: its header does not match its digest")
    head = json.loads(text)
    if head.get("type") != FORMAT:
        raise VtpruneError(f"{path} holds no encoded prompts")
    if head.get("version") != VERSION:
        raise VtpruneError(f"{path} has version {head.get('version')}; this vtprune reads version {VERSION}")
    if _digest(tensors) != head.get("digest"):
        raise VtpruneError(f"{path} was changed since it was written: its tensors do not match their digest")
    return head, tensors


def _report(told: dict[str, Any]) -> Report:
    """The :class:`Report` that ``Report.to_dict`` wrote."""

    def rows(values: list[list[int]] | None) -> Any:
        return None if values is None else [torch.tensor(v, dtype=torch.long) for v in values]

    stages = tuple(
        StageReport(s["site"], s["method"], s["tokens_in"], s["tokens_out"], rows(s["kept"]), rows(s["assignment"]))
        for s in told["stages"]
    )
    return Report(
        told["visual_tokens"],
        stages,
        told["layer_tokens"],
        told["flops"],
        told["dense_flops"],
        told["kv_bytes"],
        told["dense_kv_bytes"],
        told["recipe"],
        [[(r, c) for r, c in sample] for sample in told["grids"]],
        # files that were written before layers could be left out, or rows be shelved, have none
        skipped=told.get("skipped", [[] for _ in told["visual_tokens"]]),
        skipped_online=told.get("skipped_online", [[] for _ in told["visual_tokens"]]),
        shelved_bytes=told.get("shelved_bytes", 0),
    )
