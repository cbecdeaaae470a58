"""What the adapters of multimodal models share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import Action, Geometry, Seed, UnsupportedError
from ..base import PlannedCut, named
from ..engine import host
from ..engine.count import count
from ..engine.decoder import DecoderEngine
from ..engine.description import LLM, PLAIN, PROJECTOR, Decoder
from ..engine.encoder_call import EncoderCall
from ..engine.layout import Blend, Raster, RasterSpan, parts
from ..engine.packed import PackedEngine
from ..engine.probe import probe, probe_queries
from ..engine.request import Request
from ..engine.shapes import Layer, Shapes, attention
from ..engine.tower import TowerEngine
from .copies import copied
from .encoders import Encoders
from .tiny import TEXT

TowerLike = TowerEngine | PackedEngine
BEHIND = {"projector": PROJECTOR, "llm": LLM}  # what a family without stages in its tower provides


class Mllm:
    """One bound model. A family says where its parts are and overrides what differs: :meth:`images` (rasters of each
    image), :meth:`videos`, :meth:`slice_` (one sample's inputs), :meth:`sources` (which of the tower's tokens become
    which placeholders)."""

    tested: ClassVar[Collection[str]] = TEXT  # language models that are not probed
    ranks = True  # a language model whose attention cannot be recomputed is refused
    tower_mask: str | None = None
    runs = False  # tiles that follow each other without a token between them are one image
    follows: ClassVar[dict[str, int]] = {}  # inputs with one entry per token, and what a generated token has there
    first_position = 0  # of a prompt's first token
    pairs = False  # rotary tables turn each channel with its neighbour

    def __init__(
        self,
        model: Any,
        *,
        geometry: Geometry,
        projector: Any,
        lm: Any,
        image_token: int,
        vision: dict[str, Any],
        video_token: int | None = None,
    ):
        text = lm.config
        self.model, self.projector, self.lm = model, projector, lm
        self.geometry = replace(geometry, width=text.hidden_size)
        self.image_token, self.video_token = image_token, video_token
        self.unspoken = tuple(t for t in (image_token, video_token) if t is not None)  # tokens that no answer holds
        self.encoding = Encoders(model.base_model, projector)
        self.notes = self.encoding.notes  # an encoder's output -> how it was made
        known = named(lm, *self.tested) is not None
        if not known:
            self.probe()
        try:
            layers, held = self.costs() if known else count(self.describe(), self._said())
            self.cost = Shapes(
                **vision,
                proj=sum(m.weight.numel() for m in projector.modules() if isinstance(m, nn.Linear)),
                d=text.hidden_size,
                vocab=text.vocab_size,
                layers=layers,
                held=held,
                bytes=next(lm.parameters()).element_size(),
            )
        except AttributeError as e:
            raise UnsupportedError(
                f"{type(lm).__name__} is not shaped like the decoders this library knows: its configuration has no "
                f"{e.name}"
            ) from e

    def probe(self) -> None:
        """A language model that nobody has tested here must show that it can be pruned. Where it need not rank,
        attention that cannot be recomputed takes away the methods that rank by it."""
        try:
            probe_queries(self.describe())
        except UnsupportedError as e:
            if self.ranks:
                raise
            without = {**self.geometry.provides, "llm": PLAIN}
            refuses = {**self.geometry.refuses, **dict.fromkeys(LLM - PLAIN, str(e))}
            self.geometry = replace(self.geometry, provides=without, refuses=refuses)
        probe(self.describe())

    def _said(self) -> tuple[Layer, ...] | None:
        """What the configuration says of the layers of an unknown language model, if it does."""
        try:
            return self.costs()[0]
        except (AttributeError, TypeError, RuntimeError):  # the last: values that differ from layer to layer (Gemma 4)
            return None

    def costs(self) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
        """What each decoder layer does with a token, and the tokens that its cache keeps at most (0: all), by the
        configuration."""
        text = self.lm.config
        d, heads = text.hidden_size, text.num_attention_heads
        hd, kv = getattr(text, "head_dim", None) or d // heads, getattr(text, "num_key_value_heads", None) or heads
        window = getattr(text, "sliding_window", None)
        held = tuple(window - 1 if window and kind == "sliding_attention" else 0 for kind in self.kinds())
        return tuple(attention(d, heads, hd, kv, self.mlp(layer)) for layer in self.lm.layers), held

    # ------------------------------------------------------------------------------------------------- what families
    # override

    def mlp(self, layer: Any) -> int:
        """Multiply-adds per token of a decoder layer's MLP; by default a gated one."""
        return 3 * self.lm.config.hidden_size * self.lm.config.intermediate_size

    def images(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        """The rasters of every image of the batch, in order; by default images of one size without end."""
        return repeat([Raster(self.geometry.grid)])

    def videos(self, inputs: dict[str, Any]) -> Iterator[list[Raster]]:
        """The frames of every video of the batch, in order."""
        return iter(())

    def sources(self, inputs: dict[str, Any], samples: list[list[RasterSpan]]) -> list[Tensor]:
        """Per sample, for each of its visual tokens ``[n]``, the tower's token it was made of, counted over the
        sample's passes (-1: none)."""
        return [torch.arange(sum(len(p.columns) for p in sample)) for sample in samples]

    def blends(self, sources: list[Tensor], samples: list[list[RasterSpan]]) -> list[Blend | None]:
        """Per sample, where its visual tokens are weighted means of the tower's: of which; ``None``: each is the one
        that its :meth:`sources` name."""
        return [None] * len(samples)

    def slice_(self, inputs: dict[str, Any], samples: list[list[RasterSpan]], b: int) -> dict[str, Any]:
        """The pixels of sample ``b`` as keywords; by default one row per pass of the tower."""
        passes = [sum(len(p.passes) for p in sample) for sample in samples]
        at = sum(passes[:b])
        return (
            {"pixel_values": inputs["pixel_values"][at : at + passes[b]]}
            if passes[b] and inputs.get("pixel_values") is not None
            else {}
        )

    def tower_engine(self, cuts: list[PlannedCut], ledger: UndoLedger, *, seed: int, done: Any) -> TowerLike | None:
        """Serves ``cuts`` inside the tower (and before it); ``None`` for a family that offers none there."""
        return None

    def together(self, passes: int) -> list[int]:
        """How many passes of the tower each picture of the encoder's call that this thread is in is made of."""
        if "tile" not in self.geometry.per:
            return [1] * passes
        known = self.encoding.now
        return [] if known is None else [sum(len(r.passes) for r in image) for image in self.images(known.inputs)]

    def tower_blocks(self) -> list[nn.Module]:
        """Those that stages can be placed behind."""
        return []

    def masked_modules(self) -> list[nn.Module]:
        """What takes :attr:`tower_mask`, block by block."""
        return self.tower_blocks()

    def rotary(self, x: Tensor, ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        return host.rotary(self.lm, x, ids, kind)

    def moving(self, inputs: dict[str, Any]) -> int | None:
        """The token that stands for videos in a prompt of these inputs, ``None``: there are none."""
        return self.video_token

    # -------------------------------------------------------------------------------------------------------- what is
    # shared

    def visual(self, ids: Tensor) -> Tensor:
        """Placeholders of images and videos, bool as ``ids``."""
        marks = ids == self.image_token
        return marks if self.video_token is None else marks | (ids == self.video_token)

    def prunable(self, inputs: dict[str, Any]) -> Tensor:
        """The tokens of a prompt that methods choose from, ``[B, T]`` bool."""
        return self.visual(inputs["input_ids"])

    def parts(self, ids: Tensor, inputs: dict[str, Any]) -> list[list[RasterSpan]]:
        """Per sample of ``ids`` ``[B, T]`` the rasters of visual tokens in it."""
        inputs = self.noted(inputs)
        images, videos, copies = self.images(inputs), self.videos(inputs), 1
        if not isinstance(images, repeat):
            images, videos = iter(known := list(images)), iter(moving := list(videos))
            have, want = sum(r.tokens for group in (*known, *moving) for r in group), int(self.visual(ids).sum())
            copies = want // have if have and want % have == 0 and len(ids) % (want // have) == 0 else 1
            marks = self.visual(ids)  # answers differ, prompts do not
            if not torch.equal(marks[::copies].repeat_interleave(copies, 0), marks):
                copies = 1
        # Beam search repeats every prompt, but not the sizes of its images.
        samples = parts(ids[::copies], self.visual(ids[::copies]), self.moving(inputs), images, videos, runs=self.runs)
        return [sample for sample in samples for _ in range(copies)]

    def noted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """``inputs`` with what the encoders' outputs among them were made from."""
        for known in self.encoded(inputs).values():
            inputs = {**known.inputs, **inputs}
        return inputs

    def encoded(self, inputs: dict[str, Any]) -> dict[str, EncoderCall]:
        """What the encoders did for a forward: those that ran before it and whose outputs it is given, then those that
        ran in it."""
        return self.encoding.known(inputs)

    def encoders(self) -> list[str]:
        """The methods of the model's core that turn pixels into rows of the prompt: tower, projector, and packing where
        there is some."""
        return self.encoding.names()

    def decoder_layers(self) -> list[nn.Module]:
        return list(self.lm.layers)

    def all_layers(self) -> list[nn.Module]:
        return self.decoder_layers()

    def kinds(self) -> tuple[str, ...]:
        """Each decoder layer's attention type."""
        config = self.lm.config
        everywhere = (
            "sliding_attention" if named(self.lm, "MistralModel") and config.sliding_window else "full_attention"
        )
        return tuple(getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers)

    def describe(self) -> Decoder:
        """What the decoder engine has to know."""
        return Decoder(
            root=self.model,
            lm=self.lm,
            layers=self.lm.layers,
            visual=self.visual,
            parts=self.parts,
            sources=self.sources,
            blends=self.blends,
            kinds=self.kinds(),
            window=getattr(self.lm.config, "sliding_window", None),
            rotary=self.rotary,
            mrope=self.geometry.mrope,
            pairs=self.pairs,
            first_position=self.first_position,
            core=None if self.model.base_model is self.model else self.model.base_model,
            encoded=self.encoded,
        )

    def branch(self, layer: int) -> nn.Module:
        """A copy of decoder layer ``layer`` that belongs to nobody (its hooks are not copied)."""
        return copied(self.lm.layers[layer], layer, self.lm.config)

    def reseed(self, seed: Seed) -> None:
        self.seed = seed
        for engine in self.engines:
            engine.seed = seed

    def install(
        self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, per: str, seed: int
    ) -> None:
        self.encoding.watch(ledger, lambda: self.decoder.call)
        tower = [c for c in cuts if c.cut.site == "pixels" or c.cut.site.startswith("vision.")]
        engine = self._install_tower(tower, ledger, recorder, seed) if tower else None

        def done(request: Request) -> None:
            decoder.finish_counts(request)
            recorder.finished(request)

        decoder = DecoderEngine(
            self.describe(),
            [c for c in cuts if c.cut.site.startswith("llm.")],
            ledger,
            positions=positions,
            per=per,
            tower=any(c.cut.action is not Action.NOTE for c in tower),
            noting=any(c.cut.action is Action.NOTE for c in tower),
            entry=[c for c in cuts if c.cut.site == "projector"],
            seed=seed,
            done=done,
            arrived=recorder.arrived,
        )
        self.seed, self.engines = seed, [e for e in (engine, decoder) if e is not None]
        self.decoder = decoder

    def _install_tower(self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, seed: int) -> TowerLike:
        engine = self.tower_engine(cuts, ledger, seed=seed, done=self.encoding.passed)
        assert engine is not None
        self.encoding.expand(ledger)
        return engine


NO_TOWER = dict.fromkeys(("vd", "vf", "vheads", "vdepth", "patch", "prefix"), 0)  # as keywords of Shapes


def untowered(family: str, model: nn.Module, lm: Any, **more: Any) -> Geometry:
    """The geometry of a model of which only its language model is known: what is pruned are rows of tokens of any
    length. ``more`` says what it provides."""
    return Geometry(
        family=family,
        arch=type(model).__name__,
        tokens=256,
        grid=(256, 1),
        prefix=0,
        vision_layers=0,
        vision_depth=0,
        llm_layers=len(lm.layers),
        variable=True,
        raster=False,
        **more,
    )


def tower_shapes(config: Any, **more: Any) -> dict[str, Any]:
    """Keywords of :class:`Shapes` for a tower with the usual names in its configuration; ``more`` adds to them."""
    return {
        "vd": config.hidden_size,
        "vf": config.intermediate_size,
        "vheads": config.num_attention_heads,
        "vdepth": config.num_hidden_layers,
        "patch": config.num_channels * config.patch_size**2 * config.hidden_size,
        "prefix": 0,
        **more,
    }


def known(blocks: list[nn.Module], *names: str) -> None:
    """Raises :class:`UnsupportedError` unless all ``blocks`` of a vision tower are of one of these classes."""
    other = next((block for block in blocks if named(block, *names) is None), None)
    if other is not None:
        raise UnsupportedError(
            f"a {type(other).__name__} is no block of a vision tower whose attention this adapter knows (it knows "
            f"{', '.join(names)}), so nothing can be noted behind it"
        )
