"""What a family's adapter tells the engines of its model: the language model and the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .encoder_call import EncoderCall
from .layout import Blend, RasterSpan
from .packing import Packing

# What methods may ask of a site in the tower, behind the projector, and in the language model: there also what needs
# the projections of its layers.
TOWER = frozenset({"projections", "prefix"})
WINDOWED = TOWER | {"windows"}  # where some blocks attend within windows
PROJECTOR = frozenset({"text", "origin"})
CLASSIFIER = "classifier"  # a trait: no language model reads what the tower makes
INSERT = "insert"  # a trait: tokens without a place in the image may join those of the tower
MATRICES = "matrices"  # a trait: rows of the tower's blocks can run on a part of their width
RESIZE = frozenset({"resize"})  # in front of a tower that takes images of any size
PIXEL_BLOCKS = frozenset({"pixel_blocks"})  # in front of one whose processor cuts images into blocks
PLAIN = frozenset({"queried", "text", "states", "origin"})
LLM = PLAIN | {"query_attention", "products", "keys"}


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A family's description of its language model.

    Attributes:
        root: takes ``input_ids`` / ``labels``.
        lm: the decoder stack that ``root`` calls.
        layers: those of the stack.
        visual: ``visual(input_ids)``: a bool mask of the placeholders ``[B, T]``.
        parts: ``parts(input_ids, inputs)``: what the placeholders stand for.
        pictures: the same of the images alone, where a prompt's text is pruned beside them.
        sources: ``sources(inputs, parts)``: which of the tower's tokens each was made of.
        blends: ``blends(sources, parts)``: per sample, of which of them each is a weighted mean; ``None``: each is one.
        kinds: each layer's attention type.
        window: of the sliding layers.
        rotary: ``rotary(x, ids, kind)``: the rotary table of other positions.
        mrope: positions have three axes.
        pairs: the rotary table turns each channel with its neighbour.
        first_position: of a prompt's first token.
        core: the model in ``root`` that takes ``input_ids`` as well; ``None``: there is none.
        encoded: ``encoded(inputs)``: what the encoders did for the forward, by modality.
        text: what is pruned is the prompt itself, but for so many tokens at its beginning and its end; these count as
            its text, the others as visual.
    """

    root: Any
    lm: Any
    layers: Any
    visual: Callable[[Tensor], Tensor]
    parts: Callable[[Tensor, dict[str, Any]], list[list[RasterSpan]]]
    sources: Callable[[dict[str, Any], list[list[RasterSpan]]], list[Tensor]]
    blends: Callable[[list[Tensor], list[list[RasterSpan]]], list[Blend | None]]
    kinds: tuple[str, ...]
    window: int | None
    rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    mrope: bool
    pairs: bool = False
    first_position: int = 0
    core: Any = None
    encoded: Callable[[dict[str, Any]], dict[str, EncoderCall]] = lambda inputs: {}
    text: tuple[int, int] | None = None
    pictures: Callable[[Tensor, dict[str, Any]], list[list[RasterSpan]]] = lambda ids, inputs: []

    def window_of(self, number: int) -> int | None:
        return self.window if self.kinds[number] == "sliding_attention" else None


def unchanged(*args: Any) -> Tensor:
    """Halves of the blocks of a tower in which nothing is dropped or merged."""
    raise NotImplementedError("this tower only takes notes")


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The matrices of one block of a tower, each a module.

    Attributes:
        reads: those that are given the residual stream behind a norm.
        attention: the last of the attention, which writes into the residual stream.
        mlp: the last of the MLP, which does as well.
    """

    reads: Sequence[nn.Module]
    attention: nn.Module
    mlp: nn.Module

    @property
    def every(self) -> tuple[nn.Module, ...]:
        return (*self.reads, self.attention, self.mlp)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A family's description of its vision tower.

    ``caught`` is what one call of a block leaves for :attr:`project`: the block's input under ``"x"``, its rotary table
    under ``"rope"`` (None without), the captured outputs under their names; ``attend`` may add to it.

    Attributes:
        root: the module whose call is one pass.
        blocks: those whose output is used.
        prefix: tokens in front of the patches.
        grid: rows and columns of patches of a typical image.
        mask: the block's keyword for an additive mask; ``None``: it takes none of the shape ``[B, 1, 1, n]``, so that
            every block has to be composed of its halves.
        attend: ``attend(block, x, mask, caught)``: the first residual half, made of the block's own children.
        feed: ``feed(block, x)``: the second one.
        capture: ``capture(block)``: modules whose outputs :attr:`project` needs.
        project: ``project(block, caught)``: q, k, v (``[B, H, n, d]`` each, as the attention uses them, rotated if it
            rotates) and a scale.
        resize: ``resize(pixels, rows, columns)``: fewer pixels in, as call keywords; ``None``: images have one size.
        pixels: the root's keyword for them.
        width: of the residual stream; ``None``: that of the block's first norm.
        rope: the block's keyword for a rotary table with one row per patch (:func:`~.rotary.rotary_rows` says in which
            shapes); prefix tokens are not rotated. Behind a cut every block gets the rows of the tokens that are left,
            image by image; a merged token stands at the position of the token that absorbed the others.
        sample: ``sample(block, n)``: a table for ``n`` patches, so that rotary blocks can be probed.
        raster: ``raster(pixels)``: the rows and columns of patches that the root makes of them (``None``: always
            ``grid``); it raises for images that the root cannot take.
        variable: whether the root takes images of any size.
        fold: the side of the square of patches that become one visual token behind it.
        masked: whether the root may give its blocks a mask, which hides the same patches from all others.
        matrices: ``matrices(block)``: those that rows can use a part of; ``None``: not known, and ``unread`` says why.
        attention: ``attention(block)``: the module whose (first) output is added to the residual stream.
        together: ``together(passes)``: how many passes each picture of a call of the root with so many is made of.
    """

    root: nn.Module
    blocks: Sequence[nn.Module]
    prefix: int
    grid: tuple[int, int]
    mask: str | None
    attend: Callable[[nn.Module, Tensor, Tensor | None, dict[str, Any]], Tensor]
    feed: Callable[[nn.Module, Tensor], Tensor]
    capture: Callable[[nn.Module], dict[str, nn.Module]]
    project: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor, Tensor, float]]
    resize: Callable[[Tensor, int, int], tuple[Tensor, dict[str, Any]]] | None = None
    pixels: str = "pixel_values"
    width: int | None = None
    rope: str | None = None
    sample: Callable[[nn.Module, int], Any] | None = None
    raster: Callable[[Tensor], tuple[int, int]] | None = None
    variable: bool = False
    fold: int = 1
    masked: bool = False
    matrices: Callable[[nn.Module], Matrices] | None = None
    unread: str = ""
    attention: Callable[[Any], nn.Module] | None = None
    together: Callable[[int], Sequence[int]] = lambda passes: [1] * passes


@dataclass(frozen=True, kw_only=True)
class PackedTower:
    """A family's description of a vision tower whose blocks see rasters of several sizes one behind the other.

    ``caught`` is what one call of a block leaves for :attr:`project`: its rotary table under ``"rope"`` (None without)
    and the captured outputs under their names.

    Attributes:
        root: the module whose call is one pass.
        blocks: those whose output is used.
        pack: ``pack(inputs)``: what a call of the root with these arguments, by name, makes the blocks see; ``None``
            for one that the root itself will refuse.
        capture: as :attr:`Tower.capture`.
        project: ``project(block, caught)``: q, k, v (``[S, H, d]`` each, one row per patch, as the attention uses them)
            and a scale.
        fold: the side of the square of patches that become one visual token behind it.
        attend: ``attend(block, x, caught, mix)``: the first residual half on rows ``x`` ``[S, C]``, made of the block's
            own children; ``mix(q, k, v, scale)`` is the attention itself, ``[S, H, d]``.
        feed: ``feed(block, x)``: the second one.
        sample: ``sample(block)``: an input of a block, and its keywords, by which one made of its halves is compared.
        readers: modules that read the rows between blocks.
        pixels: ``pixels(inputs)``: of a call of the root the pixels of every patch at its step's first moment, as the
            processor normalised them, ``[S, channels, n]``; those of a visual token follow each other, in raster order.
    """

    root: nn.Module
    blocks: Sequence[nn.Module]
    pack: Callable[[dict[str, Any]], Packing | None]
    capture: Callable[[nn.Module], dict[str, nn.Module]]
    project: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor, Tensor, float]]
    fold: int
    attend: Callable[[nn.Module, Tensor, dict[str, Any], Callable], Tensor] = unchanged
    feed: Callable[[nn.Module, Tensor], Tensor] = unchanged
    sample: Callable[[nn.Module], tuple[Tensor, dict[str, Any]]] | None = None
    readers: Sequence[nn.Module] = ()
    pixels: Callable[[dict[str, Any]], Tensor] | None = None
