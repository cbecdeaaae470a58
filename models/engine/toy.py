"""A toy prompt for language models that nobody has tested here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...core.types import UnsupportedError, VtpruneError
from . import host
from .description import Decoder
from .layout import RasterSpan

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
TEXT, IMAGE = 5, 6  # tokens in front of the toy image, and of it

_passed: WeakKeyDictionary[Any, set[tuple[str, str]]] = WeakKeyDictionary()  # language model -> probes it has passed


class _Root(nn.Module):
    """The language model alone, called as a multimodal model calls it."""

    def __init__(self, lm: Any):
        super().__init__()
        self.__dict__["lm"] = lm  # not a submodule: nothing of it is registered here

    lm: Any

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.lm(inputs_embeds=self.lm.get_input_embeddings()(input_ids), use_cache=True, **kwargs)


@dataclass(frozen=True)
class Toy:
    """A prompt of two samples, the second padded, with six tokens that count as visual.

    Attributes:
        root: takes it as a multimodal model would.
        decoder: the description of the language model, with this root.
        ids: ``[2, T]``.
        mask: ``[2, T]`` what is no padding.
        marks: ``[2, T]`` the visual tokens.
        limit: the relative error that its dtype allows.
    """

    root: _Root
    decoder: Decoder
    ids: Tensor
    mask: Tensor
    marks: Tensor
    limit: float

    @property
    def name(self) -> str:
        return type(self.decoder.lm).__name__


@contextmanager
def toy_prompt(decoder: Decoder, what: str) -> Iterator[Toy | None]:
    """The toy for a probe in evaluation mode without gradients; ``None`` if the language model has passed it before."""
    lm, name = decoder.lm, type(decoder.lm).__name__
    lacks = [n for n in ("layers", "rotary_emb", "norm") if not hasattr(lm, n)]
    if lacks:
        raise UnsupportedError(
            f"{name} is not shaped like the decoders this library knows: it has no {', '.join(lacks)}"
        )
    weight = next(p for p in lm.parameters() if p.ndim == 2)
    if weight.is_meta:
        raise UnsupportedError(f"{name} is not known here and cannot be probed while its weights are offloaded")
    key = (what, host.backend(lm.config))
    if key in _passed.setdefault(lm, set()):
        yield None
        return
    toy = _build(decoder, weight)
    modes = {m: m.training for m in lm.modules()}
    lm.eval()
    try:
        with torch.no_grad():
            yield toy
    except VtpruneError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:  # what a model that is built otherwise may answer to a probe
        raise UnsupportedError(f"{name} cannot be probed, so it cannot be pruned: {type(e).__name__}: {e}") from e
    finally:
        for module, mode in modes.items():
            module.training = mode
    _passed[lm].add(key)


def _build(decoder: Decoder, weight: Tensor) -> Toy:
    """The toy on the device of ``weight``, in whose dtype results are compared."""
    lm = decoder.lm
    ids = torch.randint(
        1, lm.get_input_embeddings().num_embeddings, (2, TEXT + IMAGE + 4), generator=torch.Generator().manual_seed(0)
    ).to(weight.device)
    mask, marks = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[1, :3] = 0
    marks[:, TEXT : TEXT + IMAGE] = True
    parts = [
        [RasterSpan(torch.arange(TEXT, TEXT + IMAGE, device=ids.device), (1, IMAGE), 0, -1, (IMAGE,))] for _ in ids
    ]
    root = _Root(lm)
    described = replace(
        decoder,
        root=root,
        visual=lambda ids: marks if ids.shape == marks.shape else torch.zeros_like(ids, dtype=torch.bool),
        parts=lambda ids, inputs: parts,
        sources=lambda inputs, parts: [],
        mrope=False,
        core=None,
        encoded=lambda inputs: {},
        text=None,
    )
    return Toy(root, described, ids, mask, marks, TOLERANCE[weight.dtype])
