"""What the adapters of bare vision transformers share: one tower, no language model, and a head that may read every
token that is left."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import Action, Geometry, Seed, UnsupportedError
from ..base import PlannedCut
from ..engine.description import CLASSIFIER, INSERT, MATRICES, RESIZE, TOWER, Tower
from ..engine.run import Run
from ..engine.shapes import Shapes
from ..engine.tower import TowerEngine


class BareVit:
    """One bound vision transformer. A family describes its tower and, in :meth:`head`, says what reads the tokens
    behind the last block."""

    engine: TowerEngine
    model: Any

    def __init__(
        self,
        tower: Tower,
        *,
        family: str,
        arch: str,
        class_token: bool,
        cost: Shapes,
        class_readout: bool = True,
        classifier: nn.Module | None = None,
    ):
        """``class_readout``: the output depends on the last tokens through the class token only. ``classifier``: the
        linear layer that gives the classes."""
        self.classifier = classifier
        self.tower, self.cost, self.class_readout = tower, cost, class_readout
        self.tower_mask = tower.mask  # the blocks' own keyword, for the masked dense model
        self.geometry = Geometry(
            family=family,
            arch=arch,
            tokens=tower.grid[0] * tower.grid[1],
            grid=tower.grid,
            prefix=tower.prefix,
            vision_layers=len(tower.blocks),
            vision_depth=len(tower.blocks),
            llm_layers=0,
            notes=TOWER,
            seen_layers=len(tower.blocks),
            provides={
                "vision": TOWER,
                **({"pixels": RESIZE} if tower.resize else {}),
            },
            traits=frozenset(
                {
                    CLASSIFIER,
                    *(("class_token",) if class_token else ()),
                    *((MATRICES,) if tower.matrices is not None else ()),
                    *((INSERT,) if tower.rope is None else ()),
                }
            ),
            refuses={MATRICES: tower.unread} if tower.unread else {},
            variable=tower.variable,
            classes=getattr(classifier, "out_features", 0),
        )

    def tower_blocks(self) -> list[nn.Module]:
        return list(self.tower.blocks)

    def masked_modules(self) -> list[nn.Module]:
        return self.tower_blocks()

    def decoder_layers(self) -> list[nn.Module]:
        return []

    def all_layers(self) -> list[nn.Module]:
        return self.tower_blocks()

    def branch(self, layer: int) -> nn.Module:
        raise UnsupportedError("a bare vision tower has no language model")

    def reseed(self, seed: Seed) -> None:
        self.engine.seed = seed

    def install(
        self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Any, *, positions: str, per: str, seed: int
    ) -> None:
        self.engine = TowerEngine(
            self.tower, cuts, ledger, seed=seed, done=recorder.vision, tokens=self.geometry.tokens
        )
        if cuts:
            self.head(ledger)
        if any(c.cut.action is Action.ANSWER for c in cuts):
            self._answer(ledger)

    def _answer(self, ledger: UndoLedger) -> None:
        """In a call of the model its classifier answers what the method does."""
        model, classifier, local, passes = self.model, self.classifier, threading.local(), self.engine.passes
        assert classifier is not None  # methods that answer look for classes

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            local.within, passes.local.answer = True, None

        def end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            local.within, passes.local.answer = False, None

        def answer(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            if not getattr(local, "within", False):
                raise UnsupportedError(
                    "a method answers instead of this classifier, from what it has seen in a call of the model: call "
                    "the model, or remove()"
                )
            return passes.answer

        ledger.before(model, begin, first=True)
        ledger.after(model, end, first=False, always=True)
        ledger.after(classifier, answer)

    def head(self, ledger: UndoLedger) -> None:
        """Hooks what reads all tokens; a head that reads the class token needs nothing."""

    def weighed(self, run: Run, x: Tensor, *, whole: bool = False) -> Tensor:
        """Tokens ``x`` ``[G, P + n, C]`` scaled so that their plain mean over the patches (``whole``: over all of them)
        counts every original token that is still represented once: merged tokens count with their sizes, padding does
        not count. Raises :class:`UnsupportedError` for an image none of whose patches is left: that has no mean."""
        weight = run.weights()
        if weight is None:
            return x
        if not whole and not bool(weight.any(1).all()):
            raise UnsupportedError(
                "of an image no patch is left, and this model's head reads the mean of its patches: keep more of them"
            )
        p, weight = self.tower.prefix, weight.to(torch.promote_types(x.dtype, torch.float32))
        if whole:
            weight = F.pad(weight, (p, 0), value=1.0)
        weight = weight * (weight.shape[1] / weight.sum(1, keepdim=True))
        if not whole:
            weight = F.pad(weight, (p, 0), value=1.0)
        return x * weight[..., None].to(x.dtype)

    def highest(self, run: Run, x: Tensor) -> Tensor:
        """Tokens ``x`` whose maximum is taken: padding never is one."""
        return (
            x
            if run.whole
            else x.masked_fill(~F.pad(run.valid, (self.tower.prefix, 0), value=True)[..., None], -torch.inf)
        )

    def intermediates(self, ledger: UndoLedger, module: Any, name: str = "forward_intermediates") -> None:
        """A method of the root that gives what chosen blocks return: tokens (``NLC``) are those that are left behind
        each, feature maps (``NCHW``) have the token that stands for every cell, zeros where it was dropped."""
        original = getattr(module, name)
        signature = inspect.signature(original)

        def run_blocks(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            asked = bound.arguments
            reshape = asked["output_fmt"] == "NCHW"
            if reshape:
                asked["output_fmt"] = "NLC"
            depth = len(self.tower.blocks)

            def finish(run: Run, output: Any) -> Any:
                if not reshape:
                    return output
                blocks = taken(asked["indices"], depth)
                return _mapped(
                    output, lambda features: [_lifted(run, i, x) for i, x in zip(blocks, features, strict=True)]
                )

            call = self.engine.alone(original, early=asked["stop_early"], finish=finish)
            return call(*bound.args, **bound.kwargs)

        ledger.replace(module, name, run_blocks)

    def pooler(self, ledger: UndoLedger, module: nn.Module, *, heads: int | None = None, tokens: int = 0) -> None:
        """``module`` attends with learned queries to the tokens: it sees what a block sees, no padding and, with
        proportional attention, the log sizes. ``heads``: it is a ``nn.MultiheadAttention``, whose masks are ``[B *
        heads, queries, n]``; ``tokens`` which argument holds the tokens."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            run = self.engine.run
            x = args[tokens]
            bias = None if run is None else self.engine.bias(x)
            if bias is None:
                return None
            bias = bias[..., -x.shape[1] :]
            if heads is not None:
                bias = per_head(bias, heads, args[0].shape[1])
            return args, {**kwargs, "attn_mask": bias}

        ledger.before(module, enter)


def mlp_shape(mlp: nn.Module, width: int) -> dict[str, Any]:
    """``vf`` and ``vmlp`` of :class:`Shapes`, told by the matrices, however they are stored; the last one leads back to
    ``width``."""
    shapes = list(_matrices(mlp))
    wide = shapes[-1][0]
    return {"vf": wide, "vmlp": sum(i * o for i, o in shapes) // (width * wide)}


def _matrices(module: Any) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of the linear layers in ``module``; what is inside of one (its base, an adapter's factors) is
    part of it."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        yield module.in_features, module.out_features
    else:
        for child in module.children():
            yield from _matrices(child)


def taken(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """The blocks that ``indices`` mean, ascending: all, the last so many, or those named (from the end if negative)."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        return list(range(depth - indices, depth))
    return sorted({i % depth for i in indices})


def _mapped(output: Any, lift: Callable[[list], list]) -> Any:
    """``output`` of timm or open_clip with its list of intermediates lifted."""
    if isinstance(output, dict):
        return {**output, "image_intermediates": lift(output["image_intermediates"])}
    return (output[0], lift(output[1])) if isinstance(output, tuple) else lift(output)


def _lifted(run: Run, block: int, features: Any) -> Any:
    """Patches, alone or with the prefix tokens beside them, as a feature map."""
    return (run.maps(block, features[0]), *features[1:]) if isinstance(features, tuple) else run.maps(block, features)


def per_head(mask: Tensor, heads: int, queries: int) -> Tensor:
    """``[B, 1, 1, n]`` as ``nn.MultiheadAttention`` wants it: ``[B * heads, queries, n]``."""
    return mask.expand(-1, heads, queries, -1).flatten(0, 1)
