"""The data that travels between adapters, methods and handles. Shapes: B images, N candidate visual tokens, P prefix
tokens, K kept tokens, C channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import UnsupportedError as UnsupportedError
from .errors import VtpruneError as VtpruneError
from .sources import Products as Products
from .sources import Projections as Projections
from .sources import Text as Text

Seed = int | tuple[int, ...]  # for all samples of a batch, or one for each
NOTE = "note "  # the name of a source that gives the notes of a site


K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A table that forgets its oldest entries beyond ``most``."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self.most:
            self.pop(next(iter(self)), None)


@dataclass(frozen=True)
class Geometry:
    """What a plan needs to know of a model.

    Attributes:
        family: the adapter's name.
        arch: the tower's architecture.
        tokens: visual tokens per image (of a typical one where ``variable``), of several ``rasters`` all together.
        grid: rows and columns of those tokens.
        prefix: class, register and distillation tokens in front of the patches.
        vision_layers: blocks whose output is used: sites ``vision.0`` to ``vision.<vision_layers - 1>``.
        vision_depth: all blocks.
        llm_layers: decoder layers; 0 for a bare ViT.
        provides: by kind of site, the names that :meth:`TokenView.source` answers there.
        notes: the sources that a cut in the tower may use which only notes (:attr:`Action.NOTE`); empty: none can.
        seen_layers: blocks behind which notes can be taken, those whose output is used: as many as ``vision_layers``
            where stages can be placed there too.
        per: what a budget may apply to, the default first.
        overview: the raster of an image that shows all of it: 0 the first, -1 the last.
        variable: whether the number of tokens follows the image's size.
        raster: whether the image plane is known.
        mrope: whether rotary positions have three axes.
        refuses: what is not offered, and why.
        traits: what else methods may need: ``class_token`` in front of the patches, decoder ``layers`` that can be
            copied, a ``prompt`` of text alone, whose tokens are what is pruned.
        rasters: those that one unit of a budget is made of, if it has several.
        frames: those of one unit of a budget, if it is a video; ``grid`` is then that of each.
        fold: the side of the square of patches that become one visual token; stages in the tower see squares as tokens.
        width: of the language model's residual stream; 0 for a bare ViT.
        vision_width: of the vision tower's (:meth:`~vtprune.methods.base.Method.build` is told; 0: not known).
        classes: of the linear classifier behind a bare tower; 0: it has none.
        unmade: for each shape an image may have, the share of new-line tokens among its visual tokens and how many
            patches each of them stands behind. A stage in the tower cannot drop them: they leave with the last patch of
            their row.
    """

    family: str
    arch: str
    tokens: int
    grid: tuple[int, int]
    prefix: int
    vision_layers: int
    vision_depth: int
    llm_layers: int
    provides: Mapping[str, frozenset[str]]
    notes: frozenset[str] = frozenset()
    seen_layers: int = 0
    per: tuple[str, ...] = ("image", "sample")
    overview: int = 0
    variable: bool = False
    raster: bool = True
    mrope: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    traits: frozenset[str] = frozenset({"layers"})
    rasters: tuple[tuple[int, int], ...] = ()
    frames: int = 0
    fold: int = 1
    width: int = 0
    vision_width: int = 0
    classes: int = 0
    unmade: tuple[tuple[float, float], ...] = ()


class Action(Enum):
    """What happens to the visual tokens at a cut. Only routing methods need another one than ``SELECT``."""

    SELECT = "select"
    """The method decides: tokens are dropped or merged."""
    NOTE = "note"
    """The method notes a number of each token, which later cuts of its stage find again; nothing is dropped."""
    STASH = "stash"
    """The visual tokens are put aside for the method's side branch, then the method decides as at ``SELECT``."""
    RESTORE = "restore"
    """The tokens put aside come back into the sequence, changed by the side branch; nothing is dropped."""
    CONTEXT = "context"
    """The tokens put aside, changed by the side branch, give this layer keys and values and nothing else."""
    LEND = "lend"
    """What entered the stage's first such layer makes the keys and values of this one's rows; no token is dropped."""
    FUSE = "fuse"
    """The method changes the prompt's text, which it reads behind the visual tokens, then decides as at ``SELECT``; in
    front of layer 0."""
    INSERT = "insert"
    """Rows of the method's own join the tokens in front of that block of the tower: :meth:`Method.insert`. They have no
    place in the image until a selection gives them one (:attr:`Selection.places`)."""
    ANSWER = "answer"
    """Behind that block, the last, the method answers instead of the classifier of a bare tower: :meth:`Method.answer`;
    no token is dropped."""
    EXCHANGE = "exchange"
    """What the attention of that block of the tower adds to the tokens that were inserted goes through the method:
    :meth:`Method.exchange`; no token is dropped."""
    SKIP = "skip"
    """A half of the layer (:attr:`Cut.half`) is left out for the samples that the method names; no token is dropped."""
    NEST = "nest"
    """In front of the tower's first block: from there on every token runs on a part of the blocks' width; none is
    dropped."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One planned decision of a method.

    Attributes:
        site: where: ``"vision.3"``, ``"projector"``, ``"llm.8"``, ``"pixels"``.
        keep: tokens per image; ``None``: the method decides.
        action: what happens there.
        inside: the decision falls between attention and MLP of that block.
        proportional: the tower adds the log of the merged sizes to its attention logits from here on (ToMe, arXiv
            2210.09461, eq. 1).
        observe: decoder layers whose input the decision looks at.
        ahead: the decoder layer that the decision asks before its turn: those in front of it run once more for that.
        evict: once the prompt has been read, the caches of the layers in front of it, back to the stage's evicting cut
            before it, give up what they hold of the tokens that it dropped.
        adaptive: the method decides image by image, and ``keep`` is the least it leaves; as context: of what went so.
        most: the most that an adaptive cut leaves; ``None``: everything.
        mean: the most that its stage leaves in the mean over the layers, where its cuts may leave more one by one.
        joint: all rasters of a unit compete here, also those of a method of the image plane.
        half: of the layer that is skipped, ``"attention"`` or ``"mlp"``.
        scale: what that half's input, the residual stream, is multiplied by where it is skipped.
        passing: what it puts aside passes by the one layer behind it: it gets what the model adds between layers
            (DeepStack), and of the others the selection may weigh that layer's MLP (:attr:`Selection.mlp`).
        watch: the MLP runs for the prompt and so many tokens behind it; what these show decides for those that follow.
        recount: where text is fused, positions there are counted anew, the visual tokens first.
        widths: at a cut that nests, the parts of the width, as shares of it, ascending up to 1, each with how many
            tokens of an image run on it.
        data: what else the method wants to find again in :meth:`~vtprune.methods.base.Method.select`.
    """

    site: str
    keep: int | None = None
    action: Action = Action.SELECT
    inside: bool = False
    proportional: bool = False
    observe: tuple[int, ...] = ()
    ahead: int | None = None
    evict: bool = False
    adaptive: bool = False
    most: int | None = None
    mean: float | None = None
    joint: bool = False
    half: str = ""
    scale: float = 1.0
    passing: bool = False
    watch: int = 0
    recount: bool = False
    widths: tuple[tuple[float, int], ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bound(self) -> int | None:
        """The most tokens of an image that it leaves; ``None``: everything."""
        return self.most if self.adaptive else self.keep

    @property
    def kind(self) -> str:
        return self.site.partition(".")[0]

    @property
    def layer(self) -> int:
        return int(self.site.partition(".")[2] or 0)

    @property
    def returns(self) -> bool:
        """Whether tokens that were put aside have a part in it."""
        return self.action in (Action.RESTORE, Action.CONTEXT)

    @property
    def spared(self) -> float:
        """At a cut that nests, how many tokens' projections and MLPs an image is spared."""
        return sum((1 - share) * count for share, count in self.widths)


def _untold(name: str, values: Tensor) -> None:
    return None


@dataclass(frozen=True)
class TokenView:
    """What a method may look at: the visual tokens of B images (or whatever else one budget applies to) at one site.

    Attributes:
        features: ``[B, N, C]``.
        valid: ``[B, N]`` bool, False for padding rows.
        index: ``[B, N]``, each token's number within its image in the dense model; -1 for padding; of tokens that were
            inserted (:attr:`Action.INSERT`) numbers behind those of the image.
        size: ``[B, N]``, tokens that were merged into each.
        protected: ``[B, N]`` bool, must be kept.
        grid: rows and columns of the dense model's raster.
        prefix: class, register and distillation tokens in front, which are not part of N.
        seed: of the run, or one per image.
        memory: belongs to one method in one forward call (running averages).
        sources: lazily computed extras, by the names in :attr:`MethodInfo.needs`.
        rasters: per image, those it is made of (tiles, rows with new-line tokens, frames of a video) where they are not
            one ``grid``. A method is called once per kind of image.
        frames: per unit of a budget the tokens of each frame, if it is a video, in front of what belongs to no frame.
            Methods of videos (:attr:`MethodInfo.video`) are given videos alone, of as many tokens in every frame;
            ``grid`` is then that of a frame.
        known: a mask and the fewest and most tokens of an image in it, where that is known without asking the device
            (see :attr:`extent`).
        module: what the method's :meth:`~vtprune.methods.base.Method.build` made (:attr:`MethodInfo.learns`).
        tell: in training keeps values ``[B, ...]`` of the images by a name, for the losses (``handle.told()``).
    """

    features: Tensor
    valid: Tensor
    index: Tensor
    size: Tensor
    protected: Tensor
    grid: tuple[int, int]
    prefix: int = 0
    seed: Seed = 0
    memory: dict[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    rasters: tuple[tuple[tuple[int, int], ...], ...] = ()
    frames: tuple[tuple[int, ...], ...] = ()
    known: tuple[Tensor, int, int] | None = field(default=None, repr=False)
    module: Any = None
    tell: Callable[[str, Tensor], None] = _untold

    def noted(self, site: str) -> Tensor:
        """``[B, N, ...]``: what the stage's cut at ``site`` noted of each token
        (:meth:`~vtprune.methods.base.Method.note`); of a token that several were folded into, their mean; NaN for
        tokens that were not there."""
        return self.source(NOTE + site)

    def source(self, name: str, **kwargs: Any) -> Any:
        """An extra of the site, e.g. ``projections`` (:class:`Projections`) or ``query_attention`` (``[B, N]``). Raises
        :class:`UnsupportedError` if absent."""
        if name not in self.sources:
            raise UnsupportedError(f"this site provides {', '.join(sorted(self.sources)) or 'nothing'}, not {name!r}")
        return self.sources[name](**kwargs)

    @property
    def counts(self) -> Tensor:
        """Real tokens per image, ``[B]``."""
        return self.valid.sum(1)

    @property
    def extent(self) -> tuple[int, int]:
        """The fewest and the most real tokens of an image. The device is asked where nothing else tells."""
        if self.known is not None and self.known[0] is self.valid:
            return self.known[1:]
        return extent(self.valid)


def extent(mask: Tensor) -> tuple[int, int]:
    """The fewest and the most True in the rows of ``mask`` ``[B, N]``, read at once; ``(0, 0)`` without rows."""
    if not mask.shape[0]:
        return 0, 0
    least, most = torch.stack(mask.sum(1).aminmax()).tolist()
    return least, most


@dataclass(frozen=True)
class Lender:
    """Modules of a method's own that take the places of a layer's at :attr:`Action.LEND` and :attr:`Action.CONTEXT`.

    Attributes:
        norm: what lends keys and values passes through it, instead of the layer's input norm.
        beside: the decoder layer beside whose input norm it stands (its device and type).
        projections: by ``"q"``, ``"k"`` and ``"v"``: the queries of the layer's own rows, the keys and values of what
            is lent.
    """

    norm: Any
    beside: int
    projections: Mapping[str, Any]


@dataclass(frozen=True)
class Mix:
    """What the slots of a selection hold: ``slot = sum of weight * token`` over the entries that name it. A token may
    go into several slots; M entries of each image.

    Attributes:
        token: ``[B, M]``, positions in the view.
        slot: ``[B, M]``, columns of :attr:`Selection.kept`; -1: the entry is padding.
        weight: ``[B, M]``, free: those of a mean sum to one.
    """

    token: Tensor
    slot: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Selection:
    """A method's answer.

    Attributes:
        kept: ``[B, K]``, ascending positions in the view, padded with -1 at the end where an image keeps fewer.
        target: ``[B, N]``, of merging methods: for every token the column of ``kept`` that absorbs it; its own if it is
            kept, -1 if it is dropped.
        weight: ``[B, N]``, a token's weight in the mean of its slot; ``None``: the tokens' sizes.
        mix: what the slots hold where that is no mean over the tokens whose ``target`` they are.
        layout: ``[B, K]``, an order of the columns of ``kept`` in the running sequence.
        score: ``[B, N]``, what the tokens were ranked by, only to be told: higher stays, NaN: was not ranked.
        span: the fewest and the most tokens kept of an image, where they are known without asking the device.
        places: ``[B, K]``, the original numbers that the kept tokens go on with, where some were inserted
            (:attr:`Action.INSERT`) and have none; each once, -1 where ``kept`` is.
        gate: ``[B, N]``, in training, by what each token is multiplied that is kept, or merged: 1, with the gradient of
            what decided (straight through).
        retention: ``[B, N]`` from 0 to 1, in training alone: the layers from here on attend to each token as though
            there were so many of it, its log is added to their logits. What has 0 is as gone, what has 1 as it was.
        work: ``[B]``, FLOPs of the method's own module for each image, which count in a report.
        mlp: ``[B, N]``, at a cut with :attr:`Cut.passing`: by what the MLP's half of the layer behind is multiplied of
            each token that is kept, with its gradient; ``None``: by 1.
    """

    kept: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None
    layout: Tensor | None = None
    score: Tensor | None = None
    span: tuple[int, int] | None = None
    mix: Mix | None = None
    gate: Tensor | None = None
    retention: Tensor | None = None
    work: Tensor | None = None
    mlp: Tensor | None = None
    places: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        return (self.kept >= 0).sum(1)


@dataclass(frozen=True)
class Nesting:
    """A method's answer at a cut that nests.

    Attributes:
        part: ``[B, N]``, the number of each token's part among ``widths``.
        widths: as :attr:`Cut.widths`; every image has so many tokens of each part.
        gain: ``[layers, B, N]``, by what each block's MLP of each token is multiplied before it is added to the
            residual stream; ``None``: by 1.
    """

    part: Tensor
    widths: tuple[tuple[float, int], ...]
    gain: Tensor | None = None
