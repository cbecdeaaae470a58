"""The engine for vision towers: shared by every ViT family. It hooks a stack of residual blocks and applies selections
behind a block or inside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import Action, Projections, Seed, Selection, UnsupportedError
from ..base import PlannedCut
from .arguments import Arguments
from .captured import catcher
from .composed import compose, sample
from .description import Tower
from .nesting import Nest
from .passes import COPY, Passes
from .rows import rows_of, with_rows
from .run import Run
from .tower_replays import BlockReplays, in_backward

HIDDEN = (
    "merging in the tower takes whole tiles: of this one a part is hidden (pixel_attention_mask), whose patches would "
    "be mixed into those that are seen"
)
UNSEEN = (
    "of a tile that is partly hidden (pixel_attention_mask) only hidden patches would be left, which the tower attends "
    "to nowhere"
)
ONE_SIZE = "images must have the size that the model's configuration names, and patch dropout must be off"


TRAINED = (
    "gradient checkpointing runs a block of the tower again, and what decides there is being trained: switch it off"
)


JOINED = (
    "gradient checkpointing runs a block of the tower again, and tokens of a method's own have joined: switch it off"
)


UNCALLED = "this tower's blocks call their attention as no module, so what it adds cannot be changed"


class TowerEngine:
    """Hooks one tower. ``done(run)`` is called at the end of each pass."""

    def __init__(
        self,
        tower: Tower,
        cuts: list[PlannedCut],
        ledger: UndoLedger,
        *,
        seed: int,
        done: Callable[[Run], None],
        tokens: int,
    ):
        self.tower, self.ledger, self.cuts = tower, ledger, cuts
        self.changes = any(c.cut.action not in (Action.NOTE, Action.NEST) for c in cuts)
        self.nesting = next((c for c in cuts if c.cut.action is Action.NEST), None)
        self.passes = Passes(tower, cuts, tokens=tokens, seed=seed, done=done)
        self.alone, self.reading = self.passes.alone, self.passes.reading
        self.replays = BlockReplays(len(tower.blocks))
        self.catch = catcher(tower.capture, ledger, lambda: self.run)
        self.decide = ledger.timed(self._decide)  # also called from within blocks, outside of any hook
        self.proportional = any(c.cut.proportional for c in cuts)
        names = list(inspect.signature(type(tower.blocks[0]).forward).parameters)[1:] if tower.blocks else []
        self.arguments = Arguments(names)
        own = (n for n in ("attn_mask", "attention_mask") if n in names)
        self.mask = tower.mask or next(own, "attention_mask")  # a composed block takes any name
        self.nest = None if self.nesting is None else Nest(tower, ledger, lambda: self.run)
        self.passes.hook(ledger, self._hook_blocks)

    @property
    def run(self) -> Run | None:
        """The pass that this thread is in."""
        return self.passes.run

    @property
    def seed(self) -> Seed:
        return self.passes.seed

    @seed.setter
    def seed(self, seed: Seed) -> None:
        self.passes.seed = seed

    def bias(self, x: Tensor) -> Tensor | None:
        """``[G, 1, 1, P + n * group]`` added to the logits: log sizes (proportional attention) and -inf on padding;
        ``None`` while it would be zero."""
        run = self.run
        assert run is not None
        sizes = self.proportional and run.merges
        if not sizes and run.whole and run.hidden is None:
            return None
        size = run.size.double() if x.dtype == torch.float64 else run.size
        bias = size.clamp_min(1).log() if sizes else torch.zeros_like(size)
        bias = bias.masked_fill(~run.valid, -torch.inf).to(x.dtype).repeat_interleave(run.group, 1)
        if run.hidden is not None:
            bias = bias.masked_fill(run.unseen(), -torch.inf)
        return F.pad(bias, (self.tower.prefix, 0))[:, None, None]

    def _hook_blocks(self) -> None:
        joining = (Action.INSERT, Action.EXCHANGE, Action.ANSWER)
        if any(c.cut.action in joining for c in self.cuts) and (self.tower.rope or self.passes.folded):
            raise UnsupportedError("tokens without a place in the image cannot join those of this tower")
        for i, block in enumerate(self.tower.blocks):
            here = [c for c in self.cuts if c.cut.site == f"vision.{i}" and c is not self.nesting]
            mine = [c for c in here if c.cut.action not in joining]
            inside = [c for c in mine if c.cut.inside]
            behind = [c for c in mine if not c.cut.inside]
            if inside or (self.tower.mask is None and self.changes):
                compose(block, i, self.ledger, self._composed(block, inside), *sample(self.tower, block))
            caught: list[nn.Module] = []
            if mine:
                self.catch(block, caught)
            inserts = [c for c in here if c.cut.action is Action.INSERT]
            self.ledger.before(block, self._enterer(i, block, caught if mine else None, inserts))
            for planned in here:
                if planned.cut.action is Action.EXCHANGE:
                    if self.tower.attention is None:
                        raise UnsupportedError(UNCALLED)
                    self.ledger.after(self.tower.attention(block), self._exchanger(planned))
            self.ledger.after(block, self._leaver(i, block, behind))
            for planned in here:
                if planned.cut.action is Action.ANSWER:
                    self.ledger.after(block, self._answerer(planned))

    # one block --------------------------------------------------------------------------------------------------------

    def _enterer(
        self, number: int, block: nn.Module, caught: list[nn.Module] | None, inserts: list[PlannedCut]
    ) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not self.cuts and self.run is None:
                return None
            if module is not block:
                raise UnsupportedError(COPY)
            x = self.arguments.first(args, kwargs)
            run = self._current(number, x)
            here, meant = x.shape[1] - self.tower.prefix, run.index.shape[1] * run.group
            if here != meant:
                raise UnsupportedError(f"a block got {here} patches where {meant} are left of {run.tokens}; {ONE_SIZE}")
            if inserts:
                x = self._insert(run, inserts, x)
                args, kwargs = self.arguments.put_first(args, kwargs, x)
            run.counts.append(run.index)
            if number == 0 and run.squares is not None:
                x = self._rest(x, run.gathered)
                args, kwargs = self.arguments.put_first(args, kwargs, x)
            run.captured["x"] = x
            if self.nest is not None and self.nesting is not None:
                self._no_replay(self.nesting, run, block)
                self.nest.check(number, block)
                if number == 0 and not run.again:
                    self._split(run, self.nest, self.nesting, x)
            if caught is not None:
                self.catch(block, caught)
            told = self.arguments.find(args, kwargs, self.mask)
            if told is not None and self.cuts and self.tower.masked:
                run.hide(told)
            elif self.cuts and (told is not None or kwargs.get("is_causal")):
                raise UnsupportedError(
                    "the tower was given an attention mask of its own; pruning and merging inside it need unmasked "
                    "images"
                )
            if self.tower.rope is not None:
                args, kwargs = self._rotate(run, args, kwargs)
            bias = self.bias(x)
            if bias is None and (told is None or not self.cuts):
                return args, kwargs
            return self.arguments.put(args, kwargs, self.mask, bias)

        return enter

    def _split(self, run: Run, nest: Nest, planned: PlannedCut, x: Tensor) -> None:
        """The method names the part of the width that each token of ``x`` ``[G, P + n, C]`` runs on."""
        view = self.passes.view(run, self._tokens(run, x), planned, prefix=self.tower.prefix, sources={})
        nesting = planned.nest(view)
        nest.begin(run, nesting, self.tower.prefix)
        shares = x.new_tensor([share for share, _ in nesting.widths], dtype=torch.float64)
        run.note(planned, run.index, shares[nesting.part])

    def _tokens(self, run: Run, x: Tensor) -> Tensor:
        """Of rows ``x`` ``[G, P + n * group, C]`` the tokens, each the mean of its patches."""
        patches = x[:, self.tower.prefix :]
        return patches if run.group == 1 else patches.unflatten(1, (-1, run.group)).mean(2)

    @staticmethod
    def _no_replay(planned: PlannedCut, run: Run, block: Any) -> None:
        if planned.trains() and (run.again or (block.training and getattr(block, "gradient_checkpointing", False))):
            raise UnsupportedError(TRAINED)

    def _insert(self, run: Run, inserts: list[PlannedCut], x: Tensor) -> Tensor:
        """The tokens ``x`` ``[G, P + n, C]`` with those that join them."""
        if run.again:
            raise UnsupportedError(JOINED)
        p = self.tower.prefix
        first = x[:, :p]
        for planned in inserts:
            view = self.passes.view(run, x[:, p:], planned, prefix=p, sources={"prefix": lambda: first})
            rows = planned.insert(view)
            if rows is not None:
                x = run.insert(x, rows)
        return x

    def _answerer(self, planned: PlannedCut) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            run, p = self.run, self.tower.prefix
            if run is None:
                return
            x = rows_of(output)
            view = self.passes.view(run, x[:, p:], planned, prefix=p, sources={"prefix": lambda: x[:, :p]})
            run.answer = planned.answer(view)

        return leave

    def _exchanger(self, planned: PlannedCut) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            run = self.run
            if run.again if run is not None else in_backward():
                raise UnsupportedError(JOINED)
            if run is None:
                return None
            x = rows_of(output)
            counts = self.tower.together(run.images)
            if sum(counts) != run.images:
                raise UnsupportedError(
                    f"the tower reads {run.images} tiles, and which belong to one picture is not known (there are "
                    f"pictures of {', '.join(map(str, counts))})"
                )
            images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(x.device)
            m = run.inserted
            run.exchanged.append((m, [m * n for n in counts for _ in range(n)]))
            joined = self.tower.prefix + (run.index[0] >= run.tokens).nonzero()[:, 0]
            return with_rows(output, x.index_copy(1, joined, planned.exchange(x[:, joined], images).to(x.dtype)))

        return leave

    def _rest(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` ``[G, P + n, C]`` with its patches changed."""
        p = self.tower.prefix
        return torch.cat([x[:, :p], change(x[:, p:])], dim=1) if p else change(x)

    def _rotate(self, run: Run, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The block's arguments with the rotary table of the tokens that are left."""
        assert self.tower.rope is not None
        table = self.arguments.find(args, kwargs, self.tower.rope)  # None: this model has no rotary positions
        if table is not None and run.slot is not run.raster:
            table = run.rows(table)
            args, kwargs = self.arguments.put(args, kwargs, self.tower.rope, table)
        run.captured["rope"] = table
        return args, kwargs

    def _current(self, number: int, x: Tensor) -> Run:
        """The pass that block ``number`` with the input ``x`` belongs to, which may be one that gradient checkpointing
        goes through again."""
        run = self.run
        if run is None or run.again:
            run = self.passes.run = self.replays.again(number, x)
        if run.decided is not None:
            self.replays.expect(number, x, run)
        return run

    def _decide(self, block: Any, cuts: list[PlannedCut], x: Tensor) -> Tensor:
        """What ``cuts`` leave of the tokens ``x`` ``[G, P + n, C]`` of the pass."""
        run = self.run
        if run is None:
            return x
        for planned in cuts:
            selection = self._decision(run, block, planned, x)
            if selection is not None:
                x = self._rest(x, partial(self._apply, run, selection, planned))
        return x

    @staticmethod
    def _apply(run: Run, selection: Selection, planned: PlannedCut, x: Tensor) -> Tensor:
        """What ``selection`` leaves of the patches ``x`` ``[G, n * group, C]``: those of a token share its fate, and
        are merged with those in the same places of others."""
        if run.group == 1:
            return run.apply(x, selection, planned)
        if run.hidden is not None and planned.merges:
            raise UnsupportedError(HIDDEN)
        tokens = x.unflatten(1, (-1, run.group)).flatten(2)
        left = run.apply(tokens, selection, planned).unflatten(2, (run.group, -1)).flatten(1, 2)
        if run.hidden is not None and bool(run.unseen().all(1).any()):
            raise UnsupportedError(UNSEEN)
        return left

    def _decision(self, run: Run, block: Any, planned: PlannedCut, x: Tensor) -> Selection | None:
        """The method's, or when a checkpoint runs the block again the one that it made the first time."""
        self._no_replay(planned, run, block)
        if run.again and run.decided is not None:
            return run.decided[id(planned)]
        p = self.tower.prefix

        def projections() -> Projections:
            q, k, v, scale = self.tower.project(block, run.captured)
            return Projections(q, k, v, scale, p, self.bias(x), run.group)

        sources: dict[str, Callable] = {"projections": projections, "prefix": lambda: x[:, :p]}
        sources |= run.noted_sources(planned.stage)
        view = self.passes.view(run, self._tokens(run, x), planned, prefix=p, sources=sources)
        selection = None
        if planned.cut.action is Action.NOTE:
            run.note_down(planned, planned.note(view))
        else:
            selection = planned.select(view)
        if run.decided is not None:
            run.decided[id(planned)] = selection
        return selection

    def _leaver(self, number: int, block: Any, cuts: list[PlannedCut]) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            run = self.run
            if run is None:
                return None
            x = rows_of(output)
            run.fed.append(run.index)
            changed = self.decide(block, cuts, x) if cuts else x
            if run.squares is not None and number == len(self.tower.blocks) - 1:
                changed = self._rest(changed, run.scattered)
            run.captured.clear()
            run.slots.append(run.slot)
            if run.again:
                self.replays.expect(number + 1, changed, run)
            if changed is x:
                return None
            return with_rows(output, changed)

        return leave

    def _composed(self, block: Any, cuts: list[PlannedCut]) -> Callable:
        """A forward of ``block`` made of its own children, with a decision between its halves."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = self.arguments.first(args, kwargs)
            rope = self.tower.rope
            rotary = {} if rope is None else {"rope": self.arguments.find(args, kwargs, rope)}
            run = self.run
            caught = rotary if run is None else run.captured
            x = self.tower.attend(block, x, self.arguments.find(args, kwargs, self.mask), caught)
            return self.tower.feed(block, self.decide(block, cuts, x))

        return forward
