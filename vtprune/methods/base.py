"""What a method is: options as a frozen dataclass, a plan of cuts, and a decision per cut. It never sees a model, a
module, a cache or a global."""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from ..core import shown
from ..core.recipe import resolve
from ..core.registry import Registry
from ..core.types import Action, Cut, Geometry, Lender, Nesting, Selection, TokenView, UnsupportedError, VtpruneError

__all__ = [
    "METHODS",
    "OWN_BUDGETS",
    "Action",
    "Cut",
    "Method",
    "MethodInfo",
    "choice",
    "equal_shares",
    "layers",
    "left_by",
    "make",
    "option",
    "register",
]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """The registered facts of a method.

    Attributes:
        name: the paper's own short name, lower case.
        paper: arXiv id.
        idea: one line.
        kinds: of the sites it works at, its usual one first.
        needs: by kind of site, the sources it uses there.
        keep: its usual budget; ``None``: it takes none.
        cases: (mild, aggressive) keyword sets for the generated tests.
        exact: an integer ``keep`` is met exactly.
        merges: it merges tokens.
        routes: it puts tokens aside, for a side branch of its own or to give later layers keys and values.
        skips: it leaves out halves of decoder layers, and drops no token.
        fuses: it changes the prompt's text, which it reads once more beside the visual tokens.
        nests: it runs every token on a part of the tower's width, and drops none.
        learns: a module of its own, which can be trained, decides at its cuts (:attr:`TokenView.module`).
        fitted: it has no defaults: ``vtprune fit`` makes its recipe for a model.
        draws: it draws at random, so that the seed matters.
        budgeted: ``keep`` means anything to it.
        raster: it looks at the image plane, so that an image of several rasters is decided raster by raster.
        video: it compares the frames of a video: a budget is for all of them, images stay whole.
        whole: its first cut needs every token of the raster.
        even: it needs as many tokens in every image.
        carries: it remembers something of each token from cut to cut, which a merge in between would blur.
        elsewhere: options that make it work where its defaults are refused, or where it has none (``fitted``).
        dial: of a method whose number of tokens follows from the picture where ``keep`` is ``None``: the option that
            says how much stays, a setting that leaves few tokens and one that leaves many
            (:func:`vtprune.calibrate` turns it).
        mean: of a method whose own budget is what its layers have on average: the option that states it, as a share of
            the tokens (a budget of effective tokens is handed over there; of one that drops none, a budget of FLOPs).
        count: of a method without ``keep`` the option that is the number of tokens of an image behind it.
        positions: how it counts positions where a user does not say (``attach(positions=)``).
        score: what its tokens are ranked by, in words (higher stays; empty: it does not rank).
        cls: the method itself.
    """

    name: str
    paper: str
    idea: str
    kinds: tuple[str, ...]
    needs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    keep: int | float | None = 0.5
    cases: tuple[Mapping[str, Any], ...] = ()
    exact: bool = True
    merges: bool = False
    routes: bool = False
    skips: bool = False
    fuses: bool = False
    nests: bool = False
    learns: bool = False
    fitted: bool = False
    draws: bool = False
    budgeted: bool = True
    raster: bool = False
    video: bool = False
    whole: bool = False
    even: bool = False
    carries: bool = False
    elsewhere: Mapping[str, Any] = field(default_factory=dict)
    dial: tuple[str, float, float] | None = None
    mean: str | None = None
    count: str | None = None
    positions: str = "original"
    score: str = ""
    cls: type[Method] | None = None

    def __repr__(self) -> str:
        return shown.method(self)

    @property
    def options(self) -> dict[str, Any]:
        """Option names with their defaults."""
        assert self.cls is not None
        return {f.name: f.default for f in dataclasses.fields(self.cls)}

    @property
    def option_help(self) -> dict[str, str]:
        assert self.cls is not None
        return {f.name: f.metadata.get("help", "") for f in dataclasses.fields(self.cls)}

    @property
    def stages(self) -> tuple[str, ...]:
        return self.kinds

    @property
    def trained(self) -> bool:
        """Whether a part of it has to be trained first: a side branch, or what an option reads."""
        return self.routes or self.learns or "weights" in self.options

    @property
    def of_text(self) -> bool:
        """Whether it prunes prompts of text alone."""
        return any("prompt" in names for names in self.needs.values())

    @property
    def classifies(self) -> bool:
        """Whether it is for bare classifiers alone: what it does has no place in a prompt."""
        return "classifier" in self.needs.get("vision", ())

    @property
    def question_aware(self) -> bool:
        """Whether what it keeps depends on the prompt's text."""
        return any(names & {"query_attention", "text"} for names in self.needs.values())


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods; the dataclass fields of a subclass are its options."""

    info: ClassVar[MethodInfo]

    def plan(self, geometry: Geometry, keep: int | None) -> tuple[Cut, ...]:
        """The cuts, in execution order, for ``keep`` tokens per image after the last one. Raises :class:`VtpruneError`
        for an impossible schedule."""
        raise NotImplementedError

    def faithful(self) -> bool:
        """Whether, with these options, a full budget is the dense model: what is kept comes on as it was."""
        return True

    def select(self, view: TokenView, cut: Cut) -> Selection | None:
        """The decision at one cut (``None``: leave everything as it is)."""
        raise NotImplementedError

    def note(self, view: TokenView, cut: Cut) -> Tensor:
        """A number, or several, of each token ``[B, N, ...]`` at a cut that only notes; :meth:`TokenView.noted` finds
        them again."""
        raise NotImplementedError

    def nest(self, view: TokenView, cut: Cut) -> Nesting:
        """Nesting methods only: on which part of the width every token of the view runs."""
        raise NotImplementedError

    def restore(self, hidden: Tensor, run: Callable[..., Tensor], module: Any) -> Tensor:
        """Routing methods only: the tokens that come back, by default as they went. ``hidden`` ``[B, V, C]``, the
        visual rows as stashed; ``run(layer, hidden)`` runs a decoder layer over them, causally, at their own positions,
        ``module`` is what :meth:`build` made."""
        return hidden

    def fuse(self, hidden: Tensor, run: Callable[..., Tensor], module: Any) -> Tensor:
        """Methods with a cut that fuses only: what becomes of the rows ``hidden`` ``[L, S, C]``, of which those of the
        prompt's text, the last ones, then stand in its place. In each row of L, visual tokens come first: of a prompt's
        images all, of its videos one frame, and what the text becomes beside each frame is averaged; padding is behind
        the text. ``run(layer, hidden)`` runs a decoder layer over them, causally in this order; ``module`` is what
        :meth:`build` made."""
        raise NotImplementedError

    def insert(self, view: TokenView, cut: Cut) -> Tensor | None:
        """At a cut that inserts: the rows ``[B, M, C]`` that join the tokens of ``view`` in front of the block, behind
        them; ``None``: none."""
        raise NotImplementedError

    def answer(self, view: TokenView, cut: Cut) -> Tensor | None:
        """What the classifier of a bare tower answers, ``[B, classes]``; ``None``: its own."""
        raise NotImplementedError

    def exchange(self, rows: Tensor, images: Tensor, cut: Cut, module: Any) -> Tensor:
        """What is added to the tokens that were inserted, instead of what the block's attention does. ``rows`` ``[B, M,
        C]``, its output; ``images`` ``[B]``, the picture that each pass is a tile of, ascending; ``module`` is what
        :meth:`build` made."""
        raise NotImplementedError

    def skip(self, rows: Tensor, prompt: Tensor, cut: Cut, module: Any) -> Tensor:
        """Skipping methods only: for which samples the half of the layer at ``cut`` is left out, ``[B]`` bool, in a
        prompt and in all that follows it. ``rows`` ``[B, T, C]``, what that half is given (behind the layer's norm; an
        attention whose cut scales: what the layer is given); ``prompt`` ``[B, T]`` bool, those of the prompt: no
        padding, no answers; ``module`` is what :meth:`build` made."""
        raise NotImplementedError

    def gate(self, rows: Tensor, prompt: Tensor, cut: Cut, module: Any) -> Tensor | None:
        """Skipping methods only: while ``module`` is being trained, by what the half of the layer at ``cut`` is
        multiplied, ``[B]``: 0 where :meth:`skip` leaves it out, 1 elsewhere, with the gradient of what decides
        (straight through). ``None``: it is not trained. ``rows`` and ``prompt`` as in :meth:`skip`."""
        return None

    def learn(self, similarity: Tensor, ratio: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
        """Skipping methods only, at a cut that watches W tokens: for which samples the MLP is left out behind them,
        ``[B]`` bool, and what then passes by goes on times, ``[B]``. ``similarity`` and ``ratio`` ``[B, W]``: of each
        token, between what stands in front of the MLP and behind it, residual sum included, the cosine, and the norm
        behind over that in front."""
        raise NotImplementedError

    def work(self, tokens: Any, text: Any, cut: Cut, geometry: Geometry) -> Any:
        """FLOPs of the method's own module at ``cut`` for one unit of so many ``tokens`` beside so much ``text`` of its
        prompt (numbers, or tensors of them): what a budget of FLOPs is planned with (:attr:`Selection.work` is what is
        reported)."""
        return 0

    def lend(self, cut: Cut, module: Any) -> Lender | None:
        """Lending methods only: what takes the places of the norm and the projections of the layer at ``cut``, of
        ``module``, which :meth:`build` made; ``None``: the layer's own make its keys and values."""
        return None

    def build(self, branch: Callable[[int], Any], geometry: Geometry) -> Any:
        """Methods with a trained part only: that module; ``branch(i)`` copies decoder layer ``i``. One that decides
        (:attr:`MethodInfo.learns`) comes without gradients; what it is to learn from is a :attr:`Selection.gate`, the
        weights of a mix, or what it tells (:attr:`TokenView.tell`)."""
        return None


OWN_BUDGETS = ("ratios", "ratio", "r", "counts")  # options that say how much stays instead of keep=


def _load() -> None:
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name != "base" and not module.name.startswith("_"):
            import_module(f"{__package__}.{module.name}")


METHODS: Registry[MethodInfo] = Registry("method", _load, extensible=True)
M = TypeVar("M", bound=type[Method])


def register(info: MethodInfo) -> Callable[[M], M]:
    """Class decorator. A method without at least two cases or without a paper id (or the word "baseline") is refused,
    and a name that a class of another name or module has; the same class again, as a notebook's cell makes it, replaces
    itself."""
    if len(info.cases) < 2:
        raise ValueError(f"method {info.name!r} needs at least two cases, a mild and an aggressive one")
    if not info.paper:
        raise ValueError(f"method {info.name!r} needs a paper id")

    def wrap(cls: M) -> M:
        record = dataclasses.replace(info, cls=cls)
        caller = sys._getframe(1).f_globals.get("__name__", "")  # the class may come from a module of no plug-in
        METHODS.register(info.name, record, owner=f"{cls.__module__}.{cls.__qualname__}", module=caller)
        cls.info = record
        return cls

    return wrap


def make(name: str, options: Mapping[str, Any]) -> Method:
    """The method ``name`` with ``options``; an unknown option raises and lists the known ones, so does a value of
    another type than annotated or outside of what :func:`option` declares."""
    info = METHODS.get(name)
    unknown = set(options) - set(info.options)
    if unknown:
        known = ", ".join(info.options) or "none"
        raise VtpruneError(f"{name} has no option {sorted(unknown)[0]!r}; its options: {known}")
    assert info.cls is not None
    hints = get_type_hints(info.cls)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}  # as files have them
    declared = {f.name: f.metadata for f in dataclasses.fields(info.cls)}
    for key, value in options.items():
        if not _fits(value, hints[key]):
            raise VtpruneError(f"{name}: {key}={value!r}: expected {_spoken(hints[key])}")
        _check(f"{name}: {key}", value, declared[key])
    return info.cls(**options)


def _check(what: str, value: Any, declared: Mapping[str, Any]) -> None:
    """Raises :class:`VtpruneError` unless ``value``, or each of a list that is not empty, is what :func:`option`
    allows."""
    if isinstance(value, tuple | list):
        if not value:
            raise VtpruneError(f"{what}: the list is empty")
        for v in value:
            _check(what, v, declared)
        return
    if (choices := declared.get("choices")) is not None:
        choice(what, value, choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    limits = [(word, declared[name], holds) for name, word, holds in _LIMITS if declared.get(name) is not None]
    # Whole numbers of more than 63 bits fit nowhere; NaN compares with nothing.
    finite = -(2**63) <= value < 2**63 if isinstance(value, int) else -math.inf < value < math.inf
    if not (finite and all(holds(value, limit) for _, limit, holds in limits)):
        raise VtpruneError(
            f"{what}={value!r} must be "
            f"{' and '.join(f'{word} {limit:g}' for word, limit, _ in limits) or 'a finite number'}"
        )


_LIMITS: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("least", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("most", "at most", operator.le),
    ("below", "below", operator.lt),
)


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type: unions, tuples of one kind (lists too), numbers, words; an integer is
    a float, a bool is no number."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _spoken(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spoken(h) for h in get_args(hint) if h is not type(None))
    if get_origin(hint) is tuple:
        return f"a list of {_spoken(get_args(hint)[0])}s"
    return {int: "integer", float: "number", str: "word", bool: "true or false"}.get(hint, str(hint))


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its help text and the values that it may have: one of ``choices``, or numbers from
    ``least`` to ``most``, ``above`` or ``below`` a limit. The same holds for each number of a list, which must not be
    empty."""
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "least": least, "most": most, "above": above, "below": below},
    )


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises :class:`VtpruneError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise VtpruneError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def layers(name: str, given: Any, geometry: Geometry, default: tuple[int, ...]) -> tuple[int, ...]:
    """Checks decoder layer numbers: ascending, in range, above 0 is not required."""
    if geometry.llm_layers == 0:
        raise UnsupportedError(f"{name} cuts inside a language model and this model ({geometry.family}) has none")
    numbers = default if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    if given is not None and not numbers:
        raise VtpruneError(f"{name}: the list of layers is empty")
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < geometry.llm_layers for i in numbers) or list(
        numbers
    ) != sorted(set(numbers)):
        raise VtpruneError(f"{name}: layers {list(numbers)} must ascend and lie in 0..{geometry.llm_layers - 1}")
    return numbers


def equal_shares(tokens: int, keep: int, cuts: int) -> list[int]:
    """What each of so many ``cuts`` leaves of ``tokens`` if all keep the same share of what they find, down to
    ``keep``."""
    return [math.floor(tokens * (keep / tokens) ** ((i + 1) / cuts) + 1e-9) for i in range(cuts)]


def left_by(counts: tuple[float, ...], geometry: Geometry) -> list[int]:
    """``counts`` of an option, numbers of tokens or fractions of the original number, as tokens. Where sizes vary, an
    image may have fewer than are to stay."""
    n = geometry.tokens
    most = n if geometry.variable else 2**63
    return [resolve(min(k, most) if isinstance(k, int) else k, n) for k in counts]
