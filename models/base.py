"""What an adapter is: for one model family, named sites, what each provides, where the visual tokens are, how a
selection is applied, and a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import vtprune.models as package
from torch import Tensor, nn

from ..core.ledger import UndoLedger
from ..core.registry import Registry
from ..core.types import Cut, Lender, Nesting, Seed, Selection, TokenView


def _never(what: str) -> Callable[..., Any]:
    """What stands where a method has nothing to say, and is never called."""

    def refuse(*args: Any) -> Any:
        raise NotImplementedError(f"this cut's method {what}")

    return refuse


def _nothing_gated(rows: Tensor, prompt: Tensor) -> None:
    return None


def _nothing_trained() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class PlannedCut:
    """A cut as the adapter sees it.

    Attributes:
        cut: where, and what happens there.
        stage: the number of its stage in the recipe; cuts of one stage share what the method remembers.
        select: answers with the method's decision.
        note: at a cut that only notes, the method's number of each token.
        nest: at a cut that nests, the method's part of the width for each token.
        merges: the method may merge tokens.
        bring_back: the method's :meth:`~vtprune.methods.base.Method.restore`, its module bound.
        fuse: its :meth:`~vtprune.methods.base.Method.fuse`, its module bound.
        skip: its :meth:`~vtprune.methods.base.Method.skip`, cut and module bound.
        gate: its :meth:`~vtprune.methods.base.Method.gate`, cut and module bound.
        learn: its :meth:`~vtprune.methods.base.Method.learn`, the cut bound.
        insert: its :meth:`~vtprune.methods.base.Method.insert`.
        answer: its :meth:`~vtprune.methods.base.Method.answer`.
        exchange: its :meth:`~vtprune.methods.base.Method.exchange`, cut and module bound.
        trains: whether the module that decides there wants gradients.
        lender: the method's :meth:`~vtprune.methods.base.Method.lend`.
    """

    cut: Cut
    stage: int
    select: Callable[[TokenView], Selection | None]
    note: Callable[[TokenView], Tensor] = _never("notes nothing")
    nest: Callable[[TokenView], Nesting] = _never("uses the whole width")
    merges: bool = False
    bring_back: Callable[..., Tensor] = _never("routes no tokens")
    fuse: Callable[..., Tensor] = _never("fuses no text")
    skip: Callable[[Tensor, Tensor], Tensor] = _never("leaves out no layer")
    gate: Callable[[Tensor, Tensor], Tensor | None] = _nothing_gated
    learn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _never("watches no answer")
    insert: Callable[[TokenView], Tensor | None] = _never("inserts nothing")
    answer: Callable[[TokenView], Tensor | None] = _never("answers nothing")
    exchange: Callable[[Tensor, Tensor], Tensor] = _never("exchanges nothing")
    trains: Callable[[], bool] = _nothing_trained
    lender: Lender | None = None


class Recorder(Protocol):
    """What an adapter tells the handle about one prefill."""

    def vision(self, run: Any) -> None: ...

    def arrived(self, request: Any) -> Any: ...

    def finished(self, run: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """The registered facts of an adapter.

    Attributes:
        name: of the model family, as registered.
        idea: which models these are, in one line.
        matches: whether the adapter takes a model; it answers for any module and raises for none.
        bind: the adapter of one model.
        tiny: random models built without network: variant name -> builder of ``(model, inputs)``.
        package: the module of an optional package that building them needs.
        priority: of several adapters that match a model the one with the highest gets it; equal ones are refused.
    """

    name: str
    idea: str
    matches: Callable[[nn.Module], bool]
    bind: Callable[..., Adapter]
    tiny: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]
    package: str | None = None
    priority: int = 0


class Adapter(Protocol):
    """One model, bound. ``geometry`` is what methods plan with, ``cost`` the shapes the cost model needs; with a
    language model also ``image_token``, the id that holds a visual token's place in ``input_ids``."""

    geometry: Any
    cost: Any

    def install(
        self, cuts: list[PlannedCut], ledger: UndoLedger, recorder: Recorder, *, positions: str, per: str, seed: int
    ) -> None: ...

    def reseed(self, seed: Seed) -> None: ...

    def branch(self, layer: int) -> nn.Module: ...


def named(module: object, *names: str) -> str | None:
    """The first class in ``type(module).__mro__`` whose name is among ``names``, ``None`` if there is none: subclasses,
    and classes that a wrapper derives from a model's own (FSDP2), are taken like their base."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in names), None)


def _load() -> None:
    from importlib import import_module
    from pkgutil import iter_modules

    for module in iter_modules(package.__path__):
        if module.name != "base" and not module.name.startswith("_"):
            import_module(f"vtprune.models.{module.name}")


ADAPTERS: Registry[AdapterInfo] = Registry("model family", _load, extensible=True)
