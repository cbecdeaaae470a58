"""Whether the stages of a recipe can follow each other: the tokens of an image are followed through all cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..methods.base import Method, MethodInfo
from .recipe import Stage
from .types import Action, Cut, Geometry, VtpruneError

Planned = tuple[Stage, Method, tuple[Cut, ...]]
DROPLESS = (Action.NOTE, Action.INSERT, Action.EXCHANGE, Action.ANSWER)  # no token goes there
ORDER = {"pixels": 0, "vision": 1, "projector": 2, "llm": 3}


def compose(geometry: Geometry, stages: Sequence[Planned]) -> list[str]:
    """Follows the tokens of an image through all cuts. Answers with a sentence for every stage that changes nothing;
    raises :class:`VtpruneError` for stages that cannot follow each other: one that finds no tokens, needs the whole
    raster, equal counts or the attention in front of its cut behind a stage that leaves none of these, remembers tokens
    that are merged meanwhile, cuts while others are put aside, skips layers beside any other, or nests widths beside
    others in the tower."""
    walk = _Walk(geometry, stages)
    for n in range(len(walk.order)):
        walk.check(n)
        walk.advance(n)
    return [
        _idle(geometry, stages, s)
        for s, count in walk.idle.items()
        if count == len(stages[s][2]) and _wants(geometry, stages[s])
    ]


@dataclass
class _Walk:
    """An image's tokens on their way through the cuts.

    Attributes:
        order: the cuts as (stage, number within it), as they fall.
        most, least: tokens of an image when the next cut decides.
        aside: tokens that a routing stage has put aside.
        reducer: the last method that dropped or merged some; ``reduced`` the number of its stage, -1: none.
        merger: the last cut that merged, -1: none.
        idle: cuts of a stage that left as many as there were.
        whole_budgets: a stage in the tower keeps a number of tokens, and one of its passes need not be what a budget
            behind it applies to.
    """

    geometry: Geometry
    stages: Sequence[Planned]
    order: list[tuple[int, int]] = field(init=False)
    most: int = field(init=False)
    least: int = field(init=False)
    aside: int = 0
    reducer: str = ""
    reduced: int = -1
    merger: int = -1
    idle: dict[int, int] = field(init=False)
    whole_budgets: bool = False

    def __post_init__(self) -> None:
        cuts = ((s, i) for s, (*_, own) in enumerate(self.stages) for i in range(len(own)))
        self.order = sorted(cuts, key=lambda at: _when(self.stages[at[0]][2][at[1]]))
        self.first = {s: n for n, (s, _) in reversed(list(enumerate(self.order)))}
        self.last = {s: n for n, (s, _) in enumerate(self.order)}
        self.most = self.least = self.geometry.tokens
        self.idle = dict.fromkeys(self.first, 0)

    def _at(self, n: int) -> tuple[int, Cut, MethodInfo]:
        """The stage, the cut and the method's facts at place ``n`` of the order."""
        s, i = self.order[n]
        _, method, cuts = self.stages[s]
        return s, cuts[i], method.info

    def check(self, n: int) -> None:
        """Raises :class:`VtpruneError` if cut ``n`` cannot fall here."""
        s, cut, info = self._at(n)
        if info.skips and len(self.stages) > 1:
            raise VtpruneError(
                f"{info.name} leaves out halves of layers, which is not composed with other stages yet: use it alone"
            )
        self._check_widths(s, cut, info)
        inserts = next(
            (m.info.name for _, m, cuts in self.stages if any(c.action is Action.INSERT for c in cuts)), None
        )
        if inserts is not None and inserts != info.name and cut.kind in ("pixels", "vision"):
            raise VtpruneError(
                f"{inserts} adds tokens of its own in the vision tower, which {info.name} cannot look at: only stages "
                "behind the tower can follow it"
            )
        if cut.action is Action.NOTE:
            return self._check_memory(n)
        routing = (t for t in self.first if t != s and self.stages[t][1].info.routes)
        busy = next((t for t in routing if self.first[t] < n <= self.last[t]), None)
        if busy is not None:
            name, where = self.stages[busy][1].info.name, "in front of all its sites or behind them"
            raise VtpruneError(
                f"{info.name} cuts at {cut.site}, where {name} has put the visual tokens aside: place it {where}"
            )
        if self._fresh(cut) == 0 and (n == self.first[s] or self.reducer != info.name):
            raise VtpruneError(f"{info.name} at {cut.site} finds no visual tokens: {self.reducer} has taken them all")
        if info.whole and self.reduced not in (-1, s):
            raise VtpruneError(
                f"{info.name} needs the whole raster; it cannot follow {self.reducer}, which drops or merges tokens"
            )
        if info.even and self.least < self._fresh(cut):
            raise VtpruneError(
                f"{info.name} needs the same number of tokens in every image; {self.reducer} keeps different numbers "
                f"in front of {cut.site}"
            )
        self._check_memory(n)

    def _check_widths(self, s: int, cut: Cut, info: MethodInfo) -> None:
        """Nothing else happens in a tower that runs tokens on parts of its width, or in front of it."""
        if not info.nests:
            return
        for t, (_, method, cuts) in enumerate(self.stages):
            other = next((c for c in cuts if t != s and c.kind in ("pixels", "vision")), None)
            if other is not None:
                raise VtpruneError(
                    f"{info.name} runs the tower's blocks on parts of their width, which is not composed with other "
                    f"stages there yet, as {method.info.name} at {other.site}: place those behind the tower"
                )

    def _check_memory(self, n: int) -> None:
        """What the method at cut ``n`` remembers or looks at is still there."""
        s, cut, info = self._at(n)
        if info.carries and self.first[s] < self.merger < n and self.order[self.merger][0] != s:
            raise VtpruneError(
                f"{info.name} averages each token's score over the blocks, which {self._at(self.merger)[2].name} in "
                "between would merge"
            )
        reads = cut.action is Action.NOTE or cut.action not in DROPLESS
        looks = cut.observe or (reads and "projections" in info.needs.get(cut.kind, ()))
        here = (self._at(m) for m in range(n))  # some may only note
        first = next((i.name for _, c, i in here if c.site == cut.site and c.action not in DROPLESS), None)
        if looks and first is not None:
            raise VtpruneError(
                f"{first} and {info.name} both cut at {cut.site}; the second cannot use attention from before the "
                "first: move one"
            )

    def _fresh(self, cut: Cut) -> int:
        """:attr:`most`, of which nothing is known behind a tower that keeps numbers of tokens."""
        unknown = cut.kind in ("projector", "llm") and self.whole_budgets and self.geometry.variable
        return self.geometry.tokens if unknown else self.most

    def advance(self, n: int) -> None:
        """Lets cut ``n`` fall."""
        s, cut, info = self._at(n)
        if cut.action in DROPLESS:
            return
        before = self._fresh(cut)
        if cut.kind in ("projector", "llm") and self.geometry.variable:
            self.whole_budgets = False
        self.most = before
        if cut.returns:
            self.most = self.least = self.aside
            return
        if cut.action is Action.STASH:
            self.aside = before
        if cut.keep is None:
            return
        self.least = min(self.least, cut.keep)
        self.most = before if cut.bound is None else min(before, cut.bound)
        self.idle[s] += cut.keep >= before
        stage = self.stages[s][0]
        wanted = info.keep if stage.keep is None else stage.keep
        self.whole_budgets |= cut.kind in ("pixels", "vision") and isinstance(wanted, int)
        everything = isinstance(wanted, float) and wanted == 1
        if not (everything if self.geometry.variable else cut.keep >= self.geometry.tokens):
            self.reducer, self.reduced = info.name, s
            self.merger = n if info.merges else self.merger


def _when(cut: Cut) -> tuple[int, int, int]:
    """Within a block what is in front of it comes first, then what is inside; within a decoder layer what gives it keys
    and values last."""
    if cut.action in (Action.INSERT, Action.EXCHANGE):
        return ORDER[cut.kind], cut.layer, -1
    last = cut.action in (Action.CONTEXT, Action.LEND)
    return ORDER[cut.kind], cut.layer, int(last or (cut.kind == "vision" and not cut.inside))


def _wants(geometry: Geometry, planned: Planned) -> bool:
    """Whether a stage's budget is less than everything."""
    stage, method, cuts = planned
    wanted = method.info.keep if stage.keep is None else stage.keep
    if geometry.variable:  # tokens of one image, of which there may be more or larger ones: only fractions compare
        return isinstance(wanted, float) and wanted < 1
    return any(c.keep is not None and c.keep < geometry.tokens for c in cuts)


def _idle(geometry: Geometry, stages: Sequence[Planned], s: int) -> str:
    stage, method, cuts = stages[s]
    keep = cuts[-1].keep
    return (
        f"{method.info.name} changes nothing: its budget is {keep} of an image's {geometry.tokens} visual tokens, and "
        "no more than that are left in front of it"
        " (a fraction keep= counts from the original tokens)"
    )
